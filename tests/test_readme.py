"""Every code block of the README runs, on a tiny model and a few rows in place of what it would download."""

import re
import shlex
from pathlib import Path

import pytest

from grm_hf.cli import main


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, base_folder):
    folder = tmp_path_factory.mktemp("readme")
    rows = [
        f'{{"chosen": [{{"role": "user", "content": "Is {i} prime?"}}, {{"role": "assistant", "content": "Yes {i}"}}],'
        f' "rejected": [{{"role": "user", "content": "Is {i} prime?"}}, {{"role": "assistant", "content": "No"}}],'
        ' "score_chosen": 2.0, "score_rejected": 1.0}'
        for i in range(4)
    ]
    (folder / "data.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "rows.jsonl").write_text('{"prompt": "Is 7 prime?", "response": "Yes"}\n"text"\n', encoding="utf-8")
    return folder


def test_python_blocks_run_in_order(workplace, base_folder, monkeypatch):
    monkeypatch.chdir(workplace)
    replacements = {
        '"Qwen/Qwen3-0.6B"': repr(str(base_folder)),
        '"trl-lib/ultrafeedback_binarized"': repr(str(workplace / "data.jsonl")),
        # Mixed precision is for a GPU.
        "bf16=True": "use_cpu=True, report_to='none'",
    }
    names = {}
    for language, code in BLOCKS:
        if language == "python":
            for old, new in replacements.items():
                code = code.replace(old, new)
            exec(compile(code, "README.md", "exec"), names)
    assert names["reward"].shape == ()
    assert set(names["scorer"]("text")) == {"score"}


def test_command_blocks_run(workplace, base_folder, monkeypatch):
    monkeypatch.chdir(workplace)
    commands = [line for kind, code in BLOCKS if kind == "bash" for line in code.splitlines()]
    tiny = [
        f"--model_name_or_path={base_folder}",
        f"--dataset={workplace / 'data.jsonl'}",
        "--dataset_subsample=",
        "--output_dir=my-grm",
        "--max_steps=1",
        "--use_cpu",
        "--bf16=false",
        "--report_to=none",
        "--eval_strategy=no",
        "--save_strategy=no",
    ]
    ran = []
    for command in commands:
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
            continue
        assert words[0] == "grm-hf"
        arguments = [str(ROOT / word) if word.startswith("examples/") else word for word in words[1:]]
        if arguments[0] == "train":
            config = workplace / "recipe.yaml"
            text = Path(arguments[-1]).read_text()
            config.write_text(re.sub(r"(?m)^(dataset_subsample|eval_datasets|  unified_feedback):.*\n", "", text))
            arguments = ["train", "--config", str(config), *[flag for flag in tiny if "subsample" not in flag]]
        assert main(arguments) == 0, arguments
        ran.append(arguments[0])
    assert ran == ["train", "score"]
    assert (workplace / "rewards.jsonl").read_text().count("\n") == 2


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
