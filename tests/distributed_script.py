"""Run in each process by test_distributed.py: does the jobs of a JSON file, the first process writes the results."""

import json
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import load_from_disk
from torch.distributed.fsdp import FSDPModule
from training import build_trainer, training_logs
from transformers import AutoTokenizer

from grm_hf import GRMForRewardModeling, RewardMetricsCallback, add_reference_logps
from grm_hf.cli import main as run_cli


def let_accelerate_shard_on_cpu():
    """accelerate knows FSDP on accelerators alone; on the CPU it ignores the plugin and silently runs DDP."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            # What it does for the processes of an accelerator.
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def train(
    folder,
    model,
    dataset,
    options,
    arguments,
    lora=None,
    reference_batch_size=None,
    has_evaluation=True,
    has_float32_outputs=False,
):
    """Train with the stock Trainer, evaluate, predict and save; returns what the tests compare."""
    rows = load_from_disk(dataset)
    grm = GRMForRewardModeling.from_pretrained(model, **options)
    results = {}
    if reference_batch_size is not None:
        rows = add_reference_logps(rows, grm, reference_batch_size)
        results["ref_logps"] = rows["ref_logps"][:]
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        grm = get_peft_model(grm, LoraConfig(task_type="SEQ_CLS", **lora))
    trainer = build_trainer(AutoTokenizer.from_pretrained(model), folder / "run", grm, rows, rows, **arguments)
    if has_float32_outputs:
        plugin = trainer.accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
    RewardMetricsCallback.attach(trainer)
    trainer.train()
    results["logs"] = training_logs(trainer)
    if has_evaluation:
        results["evaluation"] = trainer.evaluate()
        results["rewards"] = trainer.predict(rows).predictions.tolist()
    results["units"] = [name for name, module in grm.named_modules() if isinstance(module, FSDPModule)]
    trainer.save_model(folder / "saved")
    return results


def main():
    torch.set_num_threads(1)
    let_accelerate_shard_on_cpu()
    folder = Path(sys.argv[1])
    for name, job in json.loads((folder / "jobs.json").read_text()).items():
        try:
            results = {"code": run_cli(job["cli"])} if "cli" in job else train(folder / name, **job)
        except Exception:
            results = {"error": traceback.format_exc()}
        if os.environ["RANK"] == "0":
            (folder / name).mkdir(exist_ok=True)
            (folder / name / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
