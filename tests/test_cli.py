"""`grm-hf`: what it trains and writes, how flags and files combine, and its exit codes."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import AutoModel, TrainingArguments, pipeline

from grm_hf.cli import main
from grm_hf.cli.options import GRMOptions, parse
from grm_hf.cli.train import DEFAULTS, DataOptions, ModelOptions


ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "examples/configs").glob("*.yaml"))
CLASSES = [GRMOptions, ModelOptions, DataOptions, TrainingArguments]


@pytest.fixture
def rows_file(preferences, tmp_path):
    path = tmp_path / "rows.jsonl"
    preferences.to_json(path)
    return path


@pytest.fixture
def flags(base_folder, rows_file, tmp_path):
    options = {
        "config": ROOT / "examples/configs/tiny.yaml",
        "model_name_or_path": base_folder,
        "dataset": rows_file,
        "eval_datasets": f"own={rows_file}",
        "output_dir": tmp_path / "out",
        "use_cpu": True,
    }
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


@pytest.mark.parametrize("options", [[], ["--regularization", "dpo"], ["--use_peft", "true"], ["--freeze_backbone"]])
def test_train_leaves_a_checkpoint_with_its_records(options, flags, tmp_path, capsys):
    assert main(["train", *flags, *options]) == 0
    (line,) = [json.loads(text) for text in capsys.readouterr().out.splitlines() if text.startswith('{"set"')]
    assert line["set"] == "own"
    assert line["rows"] == 8
    assert 0 <= line["accuracy"] <= 1
    assert 0 <= line["longest_response"] <= 1
    folder = tmp_path / "out"
    record = json.loads((folder / "results.json").read_text())
    assert record["evaluation"][0]["accuracy"] == line["accuracy"]
    assert len(json.loads((folder / "rewards.json").read_text())["own"]["rewards"]) == 8
    assert (folder / "training_curves.png").stat().st_size > 1000
    assert not list(folder.glob("*.bin.index*"))
    output = pipeline("reward-modeling", model=str(folder))({"prompt": "a", "responses": ["b", "c"]})
    assert len(output["scores"]) == 2
    if "--use_peft" in options:
        assert (folder / "adapter" / "adapter_model.safetensors").exists()


def test_merged_model_has_the_rewards_of_the_trained_one(flags, tmp_path, preferences):
    assert main(["train", *flags, "--use_peft", "true", "--learning_rate", "0.05"]) == 0
    folder = tmp_path / "out"
    rewards = json.loads((folder / "rewards.json").read_text())["own"]["rewards"]
    scorer = pipeline("reward-modeling", model=str(folder))
    expected = [scorer(row)["scores"] for row in preferences]
    # The rows are evaluated by length.
    assert np.sort(rewards, axis=0) == pytest.approx(np.sort(expected, axis=0), abs=1e-4)


def test_record_of_a_merged_run_holds_the_options_it_was_given(flags, tmp_path):
    assert main(["train", *flags, "--use_peft", "true", "--attn_implementation", "eager"]) == 0
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["model"]["attn_implementation"] == "eager"


def test_same_seed_gives_the_same_model(flags, tmp_path):
    for name in ("one", "two"):
        assert main(["train", *flags, "--output_dir", str(tmp_path / name)]) == 0
    one, two = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(one[name].equal(two[name]) for name in one)


def test_trained_model_trains_further(flags, tmp_path):
    assert main(["train", *flags]) == 0
    further = [*flags, "--model_name_or_path", str(tmp_path / "out"), "--output_dir", str(tmp_path / "further")]
    assert main(["train", *further, "--regularization_weight", "0.5"]) == 0
    config = AutoModel.from_pretrained(tmp_path / "further").config
    assert (config.regularization_weight, config.head_hidden_size) == (0.5, 32)


def test_trained_model_takes_options_that_equal_the_defaults(flags, tmp_path):
    assert main(["train", *flags, "--regularization", "none", "--beta", "0.5"]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["grm"]["beta"] == 0.5
    further = [*flags, "--model_name_or_path", str(tmp_path / "out"), "--output_dir", str(tmp_path / "further")]
    assert main(["train", *further, "--regularization", "sft"]) == 0
    config = AutoModel.from_pretrained(tmp_path / "further").config
    assert (config.regularization, config.beta) == ("sft", 0.5)
    record = json.loads((tmp_path / "further" / "results.json").read_text())
    assert (record["grm"]["regularization"], record["grm"]["beta"]) == ("sft", 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--freeze_backbone", "true", "--use_peft", "true"], "exclude each other"),
        (["--label_smoothing_factor", "0.1"], "a GRM takes `label_smoothing`"),
    ],
)
def test_contradicting_options_exit_with_1(options, message, flags, capsys):
    assert main(["train", *flags, *options]) == 1
    assert message in capsys.readouterr().err


def test_score_writes_one_line_per_input_in_order(flags, tmp_path, capsys):
    main(["train", *flags])
    inputs = [{"prompt": "a", "chosen": "b " * 9, "rejected": "c"}, "text", [{"role": "user", "content": "hi"}]]
    path = tmp_path / "inputs.jsonl"
    path.write_text("\n".join(map(json.dumps, inputs)) + "\n\n")
    capsys.readouterr()
    assert main(["score", "--model", str(tmp_path / "out"), "--input", str(path), "--batch_size", "2"]) == 0
    outputs = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scorer = pipeline("reward-modeling", model=str(tmp_path / "out"))
    assert outputs[0]["scores"] == pytest.approx(scorer(inputs[0])["scores"], abs=1e-5)
    assert [set(output) for output in outputs[1:]] == [{"score"}, {"score"}]
    assert (
        main(["score", "--model", str(tmp_path / "out"), "--input", str(path), "--output", str(tmp_path / "o")]) == 0
    )
    assert (tmp_path / "o").read_text().count("\n") == 3


def test_bad_input_exits_with_1_and_names_it(flags, tmp_path, capsys):
    main(["train", *flags])
    path = tmp_path / "inputs.jsonl"
    path.write_text('"text"\nnot json\n')
    assert main(["score", "--model", str(tmp_path / "out"), "--input", str(path)]) == 1
    assert "line 2, is not JSON" in capsys.readouterr().err
    path.write_text('"text"\n{"prompt": "a"}\n')
    assert main(["score", "--model", str(tmp_path / "out"), "--input", str(path)]) == 1
    assert "Input 1: " in capsys.readouterr().err


def test_what_cannot_be_loaded_exits_with_1_and_is_named(flags, base_folder, tmp_path, capsys):
    malformed = tmp_path / "malformed.jsonl"
    malformed.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{oops\n')
    assert main(["train", *flags, "--dataset", str(malformed)]) == 1
    assert f"Can't read {malformed}: " in capsys.readouterr().err
    assert main(["train", *flags, "--model_name_or_path", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
    path = tmp_path / "inputs.jsonl"
    path.write_text('"text"\n')
    assert main(["score", "--model", str(base_folder), "--input", str(path)]) == 1
    assert "is a LlamaModel, not a GRM" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "message"), [(["train"], "`model_name_or_path` is missing"), (["score"], "`model`")])
def test_missing_argument_exits_with_1(argv, message, capsys):
    assert main(argv) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["nonsense"], []])
def test_wrong_command_exits_with_2(argv, capsys):
    assert main(argv) == 2


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    assert "train" in capsys.readouterr().out


def parse_train(argv):
    return parse("train", CLASSES, argv, DEFAULTS)


@pytest.mark.parametrize("argv", [["--regularisation", "sft"], ["--learning_rate", "fast"], ["--config"]])
def test_unknown_flag_or_value_exits_with_2(argv):
    with pytest.raises(SystemExit, match="2"):
        parse_train(argv)


@pytest.mark.parametrize("content", ["regularisation: sft", "- sft", "a: [", ""])
def test_unknown_key_of_the_file_exits_with_2(content, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    if not content:
        parse_train(["--config", str(path), "--use_cpu"])
        return
    with pytest.raises(SystemExit, match="2"):
        parse_train(["--config", str(path)])
    assert str(path) in capsys.readouterr().err


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("beta: 0.5\nlearning_rate: 1e-5\nregularization: nll\neval_datasets:\n  a: x.jsonl\n")
    grm, _, data, args = parse_train([f"--config={path}", "--regularization", "dpo", "--use_cpu"])
    assert (grm.beta, grm.regularization, grm.regularization_weight) == (0.5, "dpo", None)
    assert args.learning_rate == 1e-5
    assert data.eval_datasets == ["a=x.jsonl"]
    assert args.remove_unused_columns is False


def test_mapping_of_the_file_stays_one_where_the_option_takes_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("gradient_checkpointing_kwargs:\n  use_reentrant: false\n")
    *_, args = parse_train(["--config", str(path), "--use_cpu"])
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_has_known_options_alone(recipe):
    options = yaml.safe_load(recipe.read_text())
    # Float strings, GPU-only precision and optimizers are for the machines that the recipe names.
    grm, model, data, args = parse_train(
        ["--config", str(recipe), "--use_cpu", "--bf16", "false", "--report_to", "none"]
    )
    for name, value in options.items():
        if name in ("bf16", "report_to", "eval_datasets"):
            continue
        holder = next(holder for holder in (grm, model, data, args) if hasattr(holder, name))
        assert str(getattr(holder, name)).split(".")[-1].lower() == str(value).split(".")[-1].lower(), name


def test_recipes_cover_the_papers_models_and_ways_to_shard():
    assert {path.stem for path in RECIPES} >= {
        "gemma_2b_lora",
        "gemma_2b_full",
        "mistral_7b_lora",
        "mistral_7b_full",
        "llama_8b_fsdp2",
        "llama_8b_qlora",
        "llama_8b_zero3",
        "tiny",
        "tiny_real",
    }
