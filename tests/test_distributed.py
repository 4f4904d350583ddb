"""Two processes on the CPU: data parallelism (DDP) and sharding (FSDP2) train what one process trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_base
from training import DEFAULTS, distance, losses, training_logs, weights_of
from transformers import AutoModel

from grm_hf import GRMForRewardModeling, RewardMetricsCallback, add_reference_logps


pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("distributed_script.py")
NONE = {"regularization": "none"}
CHECKPOINTED = {"gradient_checkpointing": True, "num_train_epochs": 2}
# Name: model, rows, options of the model, arguments of the training, and what else the script takes.
DDP_JOBS = {
    "sft": ("tied", 8, {}, {"num_train_epochs": 2}, {}),
    "accumulation": ("tied", 8, {}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}, {}),
    "filled tail": ("tied", 7, {}, {}, {}),
    "uneven tail": ("tied", 7, {}, {"accelerator_config": {"even_batches": False}}, {"evaluate": False}),
    "checkpointing": ("tied", 8, {}, CHECKPOINTED, {}),
    "untied none": ("untied", 8, NONE, CHECKPOINTED, {}),
    "untied weight 0": ("untied", 8, {"regularization_weight": 0.0}, CHECKPOINTED, {}),
    "dpo": ("tied", 8, {"regularization": "dpo"}, {}, {"reference_batch_size": 3}),
    "dpo in one batch": ("tied", 8, {"regularization": "dpo"}, {}, {"reference_batch_size": 8}),
    "lora none": ("untied", 8, NONE, CHECKPOINTED, {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}),
}
FSDP_JOBS = {
    "float32": ("untied", 8, {}, {}, {}),
    "float32 tied": ("tied", 8, {}, {}, {}),
    "bfloat16": ("untied", 8, {"dtype": "bfloat16"}, {}, {}),
    "bfloat16 tied": ("tied", 8, {"dtype": "bfloat16"}, {}, {}),
    "mixed": ("tied", 8, {}, {"bf16": True}, {}),
    "none": ("untied", 8, NONE, {}, {}),
    "weight 0": ("tied", 8, {"regularization_weight": 0.0}, {}, {}),
    "dpo": ("tied", 8, {"regularization": "dpo"}, {}, {"reference_batch_size": 3}),
    "checkpointing": ("tied", 8, {}, {"gradient_checkpointing": True}, {}),
    "fsdp checkpointing": ("tied", 8, {}, {"activation_checkpointing": True}, {}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer, tokenized):
    """Where the GRMs and rows are saved that each process loads."""
    folder = tmp_path_factory.mktemp("distributed")
    for name, base in (("tied", "llama"), ("untied", "llama-untied")):
        make_base(base).save_pretrained(folder / "base")
        torch.manual_seed(0)
        model = GRMForRewardModeling.from_base_pretrained(folder / "base", head_hidden_size=16, head_dropout=0.0)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for num_rows in (7, 8):
        tokenized.select(range(num_rows)).save_to_disk(folder / str(num_rows))
    return folder


def launch(folder, jobs, **arguments):
    """Run `jobs` in two processes; results by name."""
    described = {}
    for name, (model, num_rows, options, job_arguments, others) in jobs.items():
        described[name] = {
            "model": str(folder.parent / model),
            "dataset": str(folder.parent / str(num_rows)),
            "options": options,
            "arguments": {"per_device_train_batch_size": 2, **arguments, **job_arguments},
            **others,
        }
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps(described))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [*command, str(SCRIPT), str(folder)], capture_output=True, text=True, env=environment, timeout=600, check=False
    )
    results = {}
    for name in jobs:
        path = folder / name / "results.json"
        results[name] = json.loads(path.read_text()) if path.exists() else {"error": process.stderr[-3000:]}
    return results


@pytest.fixture(scope="module")
def ddp(folders):
    """Results of DDP_JOBS, all in one launch: starting two processes takes longer than training in them."""
    return launch(folders / "ddp", DDP_JOBS)


@pytest.fixture(scope="module")
def fsdp(folders):
    fsdp_config = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True}
    jobs = {}
    for name, (model, num_rows, options, arguments, others) in FSDP_JOBS.items():
        config = {**fsdp_config, "activation_checkpointing": arguments.pop("activation_checkpointing", False)}
        jobs[name] = (model, num_rows, options, {**arguments, "fsdp": True, "fsdp_config": config}, others)
    return launch(folders / "fsdp", jobs)


@pytest.fixture
def train_alone(folders, tokenized, make_trainer):
    """`train_alone(model, rows, options, arguments)`: the trainer after one process trained on the global batches."""

    def train(model, rows, options, arguments):
        grm = GRMForRewardModeling.from_pretrained(folders / model, **options)
        rows = tokenized.select(rows)
        if grm.config.regularization == "dpo":
            rows = add_reference_logps(rows, grm)
        trainer = make_trainer(grm, rows, rows, **{**arguments, "per_device_train_batch_size": 4})
        RewardMetricsCallback.attach(trainer)
        trainer.train()
        return trainer

    return train


def results_of(results, name):
    assert "error" not in results[name], results[name]["error"]
    return results[name]


def numbers(entry):
    """The entry's metrics, without times."""
    return {name: value for name, value in entry.items() if "runtime" not in name and "_per_second" not in name}


def check_equal(folder, results, trainer, tolerance=1e-5):
    """Losses, logged metrics, evaluation, rewards and saved weights are those of one process."""
    assert len(results["logs"]) == len(training_logs(trainer))
    for entry, expected in zip(results["logs"], training_logs(trainer)):
        assert numbers(entry) == pytest.approx(numbers(expected), abs=tolerance, rel=tolerance)
    evaluation = trainer.evaluate()
    for name in numbers(evaluation):
        if "preparation_time" not in name:
            assert results["evaluation"][name] == pytest.approx(evaluation[name], abs=tolerance, rel=tolerance), name
    expected = torch.from_numpy(trainer.predict(trainer.eval_dataset).predictions)
    assert torch.tensor(results["rewards"]).allclose(expected, atol=tolerance)
    reloaded = AutoModel.from_pretrained(folder / "saved")
    assert distance(weights_of(reloaded), weights_of(trainer.model)) < tolerance


SINGLE = {
    "sft": {},
    "accumulation": {},
    "checkpointing": {},
    "untied none": {},
    "untied weight 0": {},
    "dpo": {},
    "dpo in one batch": {},
}


@pytest.mark.parametrize(
    "name",
    ["sft", "accumulation", "checkpointing", "untied none", "untied weight 0", "dpo", "dpo in one batch"],
)
def test_ddp_trains_and_reports_what_one_process_does(name, ddp, folders, train_alone):
    model, num_rows, options, arguments, _ = DDP_JOBS[name]
    alone = train_alone(model, range(num_rows), options, {**arguments, "gradient_accumulation_steps": 1})
    assert distance(weights_of(alone.model), weights_of(AutoModel.from_pretrained(folders / model))) > 1e-2
    check_equal(folders / "ddp" / name, results_of(ddp, name), alone)


def test_ddp_trains_an_uneven_tail_as_one_process_does(ddp, folders, train_alone):
    results = results_of(ddp, "uneven tail")
    alone = train_alone("tied", range(7), {}, {})
    assert [entry["loss"] for entry in results["logs"]] == pytest.approx(losses(alone), abs=1e-5)
    reloaded = AutoModel.from_pretrained(folders / "ddp" / "uneven tail" / "saved")
    assert distance(weights_of(reloaded), weights_of(alone.model)) < 1e-5


def test_ddp_fills_a_tail_with_the_first_rows_by_default(ddp, folders, train_alone):
    results = results_of(ddp, "filled tail")
    alone = train_alone("tied", [*range(7), 0], {}, {})
    assert [entry["loss"] for entry in results["logs"]] == pytest.approx(losses(alone), abs=1e-5)
    reloaded = AutoModel.from_pretrained(folders / "ddp" / "filled tail" / "saved")
    assert distance(weights_of(reloaded), weights_of(alone.model)) < 1e-5


def test_ddp_evaluation_counts_each_row_once(ddp, folders, tokenized, make_trainer):
    results = results_of(ddp, "filled tail")
    reloaded = AutoModel.from_pretrained(folders / "ddp" / "filled tail" / "saved")
    expected = make_trainer(reloaded, None, tokenized.select(range(7))).evaluate()
    for name in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
        assert results["evaluation"][f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], abs=1e-5)
    assert len(results["rewards"]) == 7


@pytest.mark.parametrize("name", ["dpo", "dpo in one batch"])
def test_reference_logps_of_two_processes_are_those_of_one(name, ddp, folders, tokenized):
    model = GRMForRewardModeling.from_pretrained(folders / "tied", regularization="dpo")
    expected = torch.tensor(add_reference_logps(tokenized, model)["ref_logps"][:])
    assert torch.tensor(results_of(ddp, name)["ref_logps"]).allclose(expected, atol=1e-4)


def test_lora_trains_under_ddp_with_gradient_checkpointing(ddp):
    results = results_of(ddp, "lora none")
    assert len(results["logs"]) == 4
    assert results["logs"][-1]["loss"] < results["logs"][0]["loss"]


@pytest.mark.parametrize(
    "name", ["float32", "float32 tied", "none", "weight 0", "checkpointing", "fsdp checkpointing", "dpo"]
)
def test_fsdp2_trains_and_reports_what_one_process_does(name, fsdp, folders, train_alone):
    model, num_rows, options, arguments, _ = FSDP_JOBS[name]
    alone = train_alone(model, range(num_rows), options, arguments)
    check_equal(folders / "fsdp" / name, results_of(fsdp, name), alone)


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16 tied", "mixed"])
def test_fsdp2_in_bf16_keeps_a_float32_head(name, fsdp, folders, train_alone, make_trainer, tokenized):
    results = results_of(fsdp, name)
    model, num_rows, options, arguments, _ = FSDP_JOBS[name]
    alone = train_alone(model, range(num_rows), options, arguments)
    assert [entry["loss"] for entry in results["logs"]] == pytest.approx(losses(alone), abs=0.02)
    assert "score" in results["units"]
    assert results["rewards_dtype"] == "float32"
    rewards = torch.tensor(results["rewards"])
    assert not rewards.equal(rewards.bfloat16().float())


@pytest.mark.parametrize("name", FSDP_JOBS)
def test_fsdp2_checkpoint_loads_with_equal_rewards(name, fsdp, folders, make_trainer, tokenized):
    results = results_of(fsdp, name)
    folder = folders / "fsdp" / name / "saved"
    reloaded, report = GRMForRewardModeling.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert {parameter.dtype for parameter in reloaded.score.parameters()} == {torch.float32}
    trainer = make_trainer(reloaded, None, bf16=FSDP_JOBS[name][3].get("bf16", False))
    expected = torch.from_numpy(trainer.predict(tokenized).predictions)
    assert torch.tensor(results["rewards"]).allclose(expected, atol=1e-5)
