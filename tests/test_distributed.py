"""Two processes on the CPU: data parallelism (DDP) and sharding (FSDP2) train what one process trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import make_base
from training import distance, losses, training_logs, weights_of
from transformers import AutoModel

from grm_hf import GRMForRewardModeling, RewardMetricsCallback, add_reference_logps


pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("distributed_script.py")
RECIPE = Path(__file__).parents[1] / "examples/configs/tiny.yaml"
NONE = {"regularization": "none"}
DPO = {"regularization": "dpo"}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
FOUR_STEPS = {"num_train_epochs": 2}

DDP_JOBS = {
    "sft": {"arguments": FOUR_STEPS},
    "accumulation": {"arguments": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}},
    "checkpointing": {"arguments": {"gradient_checkpointing": True, **FOUR_STEPS}},
    "none": {"model": "untied", "options": NONE, "arguments": {"gradient_checkpointing": True, **FOUR_STEPS}},
    "weight 0": {
        "model": "untied",
        "options": {"regularization_weight": 0.0},
        "arguments": {"gradient_checkpointing": True, **FOUR_STEPS},
    },
    "dpo": {"options": DPO, "reference_batch_size": 3},
    # One batch for two processes.
    "dpo at once": {"options": DPO, "reference_batch_size": 8},
    "filled tail": {"num_rows": 7},
    # Trainer can't evaluate unevenly.
    "uneven tail": {
        "num_rows": 7,
        "arguments": {"accelerator_config": {"even_batches": False}},
        "has_evaluation": False,
    },
    "lora": {"model": "untied", "lora": LORA, "arguments": {"gradient_checkpointing": True, **FOUR_STEPS}},
    "cli": {"cli": ["--bf16", "false"]},
    "cli lora": {"cli": ["--use_peft", "true", "--regularization", "dpo"]},
}
FSDP = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
FSDP_JOBS = {
    "tied": {"arguments": FOUR_STEPS},
    "untied": {"model": "untied"},
    "none": {"model": "untied", "options": NONE},
    "weight 0": {"options": {"regularization_weight": 0.0}},
    "dpo": {"options": DPO, "reference_batch_size": 3},
    "accumulation": {"arguments": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}},
    "checkpointing": {"arguments": {"gradient_checkpointing": True}},
    "fsdp checkpointing": {
        "arguments": {"fsdp_config": {**FSDP["fsdp_config"], "activation_checkpointing": True}},
    },
    "bfloat16": {"model": "untied", "options": {"dtype": "bfloat16"}},
    "bfloat16 tied": {"options": {"dtype": "bfloat16"}},
    "mixed": {"arguments": {"bf16": True}},
    "mixed, float32 outputs": {"arguments": {"bf16": True}, "has_float32_outputs": True},
    "lora": {"model": "untied", "lora": LORA},
    "lora bfloat16": {"model": "untied", "lora": LORA, "options": {"dtype": "bfloat16"}},
    "cli": {"cli": ["--bf16", "true"]},
    "cli lora": {"cli": ["--use_peft", "true"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, preferences, tokenized):
    """Where each process finds the GRMs, the base model and the rows."""
    folder = tmp_path_factory.mktemp("distributed")
    for name, base in (("tied", "llama"), ("untied", "llama-untied")):
        make_base(base).save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        torch.manual_seed(0)
        model = GRMForRewardModeling.from_base_pretrained(folder / "base", head_hidden_size=16, head_dropout=0.0)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for num_rows in (7, 8):
        tokenized.select(range(num_rows)).save_to_disk(folder / str(num_rows))
    preferences.to_json(folder / "rows.jsonl")
    return folder


def launch(folder, kind, jobs, **arguments):
    """Do all `jobs` in one launch, as starting two processes takes longer than training in them; results by name."""
    described = {}
    for name, job in jobs.items():
        if "cli" in job:
            flags = {
                "config": RECIPE,
                "model_name_or_path": folder / "base",
                "dataset": folder / "rows.jsonl",
                "eval_datasets": f"own={folder / 'rows.jsonl'}",
                "output_dir": folder / kind / name / "saved",
                "use_cpu": "true",
            }
            flags = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
            if "fsdp" in arguments:
                flags += ["--fsdp", arguments["fsdp"], "--fsdp_config", json.dumps(arguments["fsdp_config"])]
            described[name] = {"cli": ["train", *flags, *job["cli"]]}
            continue
        job = {"model": "tied", "num_rows": 8, "options": {}, "arguments": {}, **job}
        described[name] = {
            **job,
            "model": str(folder / job["model"]),
            "dataset": str(folder / str(job.pop("num_rows"))),
            "arguments": {"per_device_train_batch_size": 2, **arguments, **job["arguments"]},
        }
        described[name].pop("num_rows")
    (folder / kind).mkdir()
    (folder / kind / "jobs.json").write_text(json.dumps(described))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.run(
        [*command, str(SCRIPT), str(folder / kind)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=600,
        check=False,
    )
    (folder / kind / "stderr.txt").write_text(process.stderr)
    results = {}
    for name in jobs:
        path = folder / kind / name / "results.json"
        results[name] = json.loads(path.read_text()) if path.exists() else {"error": process.stderr[-3000:]}
    return results


@pytest.fixture(scope="module")
def ddp(folder):
    return launch(folder, "ddp", DDP_JOBS)


@pytest.fixture(scope="module")
def fsdp(folder):
    return launch(folder, "fsdp", FSDP_JOBS, **FSDP)


def results_of(results, name):
    assert "error" not in results[name], results[name]["error"]
    return results[name]


@pytest.fixture
def train_alone(folder, tokenized, make_trainer):
    """`train_alone(job, rows)`: the trainer after one process trained the job on the global batches."""

    def train(job, rows=range(8)):
        grm = GRMForRewardModeling.from_pretrained(folder / job.get("model", "tied"), **job.get("options", {}))
        rows = tokenized.select(rows)
        if grm.config.regularization == "dpo":
            rows = add_reference_logps(rows, grm)
        names = ("bf16", "num_train_epochs")
        arguments = {name: value for name, value in job.get("arguments", {}).items() if name in names}
        trainer = make_trainer(grm, rows, rows, **arguments)
        RewardMetricsCallback.attach(trainer)
        trainer.train()
        return trainer

    return train


def metrics_of(entry):
    """The entry's metrics, without times."""
    is_time = ("runtime", "_per_second", "_time")
    return {name: value for name, value in entry.items() if not name.endswith(is_time)}


def check_equal(results, saved, trainer):
    """Logs, evaluation, rewards and saved weights are those of one process."""
    for entry, expected in zip(results["logs"], training_logs(trainer), strict=True):
        assert metrics_of(entry) == pytest.approx(metrics_of(expected), abs=1e-5, rel=1e-4)
    expected = metrics_of(trainer.evaluate())
    assert metrics_of(results["evaluation"]) == pytest.approx(expected, abs=1e-5, rel=1e-4)
    rewards = torch.from_numpy(trainer.predict(trainer.eval_dataset).predictions)
    assert torch.tensor(results["rewards"]).allclose(rewards, atol=1e-5)
    assert distance(weights_of(AutoModel.from_pretrained(saved)), weights_of(trainer.model)) < 1e-5


def predict(model, rows, make_trainer, **arguments):
    model.config.regularization = "none"
    return torch.from_numpy(make_trainer(model, None, **arguments).predict(rows).predictions)


@pytest.mark.parametrize("name", ["sft", "accumulation", "checkpointing", "none", "weight 0", "dpo", "dpo at once"])
def test_ddp_trains_and_reports_what_one_process_does(name, ddp, folder, train_alone):
    alone = train_alone(DDP_JOBS[name])
    check_equal(results_of(ddp, name), folder / "ddp" / name / "saved", alone)


@pytest.mark.parametrize(("name", "rows"), [("uneven tail", range(7)), ("filled tail", [*range(7), 0])])
def test_ddp_trains_a_tail_as_it_is_or_filled_with_the_first_rows(name, rows, ddp, folder, train_alone):
    results = results_of(ddp, name)
    alone = train_alone(DDP_JOBS[name], rows)
    assert [entry["loss"] for entry in results["logs"]] == pytest.approx(losses(alone), abs=1e-5)
    reloaded = AutoModel.from_pretrained(folder / "ddp" / name / "saved")
    assert distance(weights_of(reloaded), weights_of(alone.model)) < 1e-5


def test_ddp_evaluation_counts_each_row_once(ddp, folder, tokenized, make_trainer):
    results = results_of(ddp, "filled tail")
    reloaded = AutoModel.from_pretrained(folder / "ddp" / "filled tail" / "saved")
    expected = make_trainer(reloaded, None, tokenized.select(range(7))).evaluate()
    for name in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
        assert results["evaluation"][f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], abs=1e-5)
    assert len(results["rewards"]) == 7


@pytest.mark.parametrize("name", ["dpo", "dpo at once"])
def test_reference_logps_of_two_processes_are_those_of_one(name, ddp, folder, tokenized):
    model = GRMForRewardModeling.from_pretrained(folder / "tied", regularization="dpo")
    expected = torch.tensor(add_reference_logps(tokenized, model)["ref_logps"][:])
    assert torch.tensor(results_of(ddp, name)["ref_logps"]).allclose(expected, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["tied", "untied", "none", "weight 0", "dpo", "accumulation", "checkpointing", "fsdp checkpointing"]
)
def test_fsdp2_trains_and_reports_what_one_process_does(name, fsdp, folder, train_alone):
    results = results_of(fsdp, name)
    alone = train_alone(FSDP_JOBS[name])
    check_equal(results, folder / "fsdp" / name / "saved", alone)


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16 tied", "mixed, float32 outputs"])
def test_fsdp2_in_bf16_has_float32_rewards(name, fsdp, train_alone):
    results = results_of(fsdp, name)
    alone = train_alone(FSDP_JOBS[name])
    assert [entry["loss"] for entry in results["logs"]] == pytest.approx(losses(alone), abs=0.02)
    rewards = torch.tensor(results["rewards"])
    assert not rewards.equal(rewards.bfloat16().float())


def test_mixed_precision_policy_of_accelerate_rounds_the_rewards(fsdp):
    rewards = torch.tensor(results_of(fsdp, "mixed")["rewards"])
    assert rewards.equal(rewards.bfloat16().float())


@pytest.mark.parametrize("name", ["tied", "bfloat16", "mixed"])
def test_fsdp2_shards_layers_and_the_reward_head_apart(name, fsdp):
    units = results_of(fsdp, name)["units"]
    assert {"", "score", "backbone.model.layers.0", "backbone.model.layers.1"} <= set(units)


@pytest.mark.parametrize("name", [name for name in FSDP_JOBS if "lora" not in name and "cli" not in name])
def test_fsdp2_checkpoint_loads_with_equal_rewards(name, fsdp, folder, make_trainer, tokenized):
    results = results_of(fsdp, name)
    saved = folder / "fsdp" / name / "saved"
    reloaded, report = GRMForRewardModeling.from_pretrained(saved, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert {parameter.dtype for parameter in reloaded.score.parameters()} == {torch.float32}
    is_mixed = "mixed" in name
    rewards = predict(reloaded, tokenized, make_trainer, bf16=is_mixed)
    # Mixed precision under FSDP2 rounds the head's weights.
    assert torch.tensor(results["rewards"]).allclose(rewards, atol=0.02 if is_mixed else 1e-5)


@pytest.mark.parametrize(("kind", "name"), [("ddp", "lora"), ("fsdp", "lora"), ("fsdp", "lora bfloat16")])
def test_adapter_of_two_processes_loads_with_equal_rewards(kind, name, request, folder, make_trainer, tokenized):
    results = results_of(request.getfixturevalue(kind), name)
    assert results["logs"][-1]["loss"] < results["logs"][0]["loss"]
    job = {**DDP_JOBS, **FSDP_JOBS}[name]
    base = GRMForRewardModeling.from_pretrained(folder / "untied", **job.get("options", {}))
    model = PeftModel.from_pretrained(base, folder / kind / name / "saved")
    before = GRMForRewardModeling.from_pretrained(folder / "untied", **job.get("options", {}))
    rewards = torch.tensor(results["rewards"])
    assert rewards.allclose(predict(model, tokenized, make_trainer), atol=1e-5)
    assert not rewards.allclose(predict(before, tokenized, make_trainer), atol=1e-3)


@pytest.mark.parametrize("name", ["cli", "cli lora"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_command_line_trains_in_two_processes(kind, name, request, folder, make_trainer, tokenized):
    assert results_of(request.getfixturevalue(kind), name) == {"code": 0}
    saved = folder / kind / name / "saved"
    rewards = torch.tensor(json.loads((saved / "rewards.json").read_text())["own"]["rewards"])
    assert rewards.shape == (8, 2)
    assert not rewards.equal(rewards.bfloat16().float())
    reloaded = GRMForRewardModeling.from_pretrained(saved)
    # The command evaluates rows by length.
    assert rewards.allclose(predict(reloaded, tokenized.sort("length"), make_trainer), atol=0.02)
