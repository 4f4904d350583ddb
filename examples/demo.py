"""GRM against plain Bradley-Terry in a small synthetic world: base, training, table, picture, checkpoint.

    python examples/demo.py --output_dir outputs/demo        two CPU cores, a few minutes, 1 GB, no network

The world is small_world.py's. `Protocol` was chosen on validation pairs in distribution, by the rule that
benchmarks/small_world_selection.py states, with other seeds and another base; a full run is in docs/results.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from small_world import HIDDEN_SIZE, make_tokenizer, plain_text_loss, preferences, train_base
from transformers import LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from grm_hf import (
    GRMForRewardModeling,
    PreferenceCollator,
    RewardMetricsCallback,
    RewardScorer,
    compute_preference_metrics,
    tokenize_preferences,
)


METHODS = {"GRM": "sft", "Bradley-Terry": "none"}
SPLITS = {"in": "in distribution", "out": "out: unseen things, no phrase", "reversed": "out: phrase reversed"}


@dataclass(frozen=True)
class Protocol:
    """What is fixed before the comparison; both methods share all of it but the regularization."""

    seeds: tuple[int, ...] = (10, 11, 12)
    base_seed: int = 1
    base_steps: int = 2000
    num_pairs: int = 2000
    num_epochs: int = 10
    learning_rate: float = 3e-4
    regularization_weight: float = 0.1
    # The paper's 0.1 is for answers of hundreds of tokens; these have some fifteen.
    beta: float = 1.0
    num_eval_pairs: int = 1000


TINY = Protocol(seeds=(0, 1), base_steps=20, num_pairs=64, num_epochs=1, num_eval_pairs=40)

# A process that has the checkpoint and its libraries, but no grm_hf.
CLEAN_PROCESS = """
import json, sys
sys.modules["grm_hf"] = None  # every import of it fails
import torch
from transformers import AutoModel, AutoTokenizer, pipeline

folder, rows = sys.argv[1], json.load(sys.stdin)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
chats = [row["prompt"] + row[name] for row in rows for name in ("chosen", "rejected")]
inputs = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt", return_dict=True)
with torch.no_grad():
    rewards = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.view(-1, 2).tolist()
scorer = pipeline(model=folder, trust_remote_code=True)
print(json.dumps({"AutoModel": rewards, "pipeline": [result["scores"] for result in scorer(rows)]}))
"""


def train_reward_model(base: Path, regularization: str, seed: int, protocol: Protocol, output_dir: Path) -> Trainer:
    """A trainer that has trained a reward model on the pairs of `seed`."""
    set_seed(seed)
    tokenizer = make_tokenizer()
    model = GRMForRewardModeling.from_base_pretrained(
        base,
        regularization=regularization,
        regularization_weight=protocol.regularization_weight,
        beta=protocol.beta,
        head_hidden_size=HIDDEN_SIZE,
    )
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir,
            seed=seed,
            num_train_epochs=protocol.num_epochs,
            learning_rate=protocol.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            max_grad_norm=5.0,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=100,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=tokenize_preferences(
            Dataset.from_list(preferences(protocol.num_pairs, seed, "train")), tokenizer
        ),
        data_collator=PreferenceCollator(tokenizer),
        compute_metrics=compute_preference_metrics,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    RewardMetricsCallback.attach(trainer)
    trainer.train()
    return trainer


def accuracy(trainer: Trainer, split: str, seed: int, protocol: Protocol) -> float:
    rows = Dataset.from_list(preferences(protocol.num_eval_pairs, seed, split))
    return trainer.evaluate(tokenize_preferences(rows, trainer.processing_class))["eval_accuracy"]


def as_table(results: dict[str, list[dict[str, float]]], base_loss: float) -> str:
    columns = {**SPLITS, "plain_text_loss": "plain text, nats/token"}
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---" * (1 + len(columns)) + "|"]
    for method, runs in results.items():
        cells = [f"{mean(run[name] for run in runs):.3f} ± {stdev(run[name] for run in runs):.3f}" for name in columns]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines.append("| base" + " | " * len(columns) + f"{base_loss:.3f} |")
    return "\n".join(lines)


def plot(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("No picture: install matplotlib, or grm_hf[plots].")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for shift, (method, runs) in zip((-0.2, 0.2), results.items()):
        places = [index + shift for index in range(len(SPLITS))]
        heights = [mean(run[split] for run in runs) for split in SPLITS]
        spreads = [stdev(run[split] for run in runs) for split in SPLITS]
        axes.bar(places, heights, width=0.38, yerr=spreads, capsize=4, label=method)
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(SPLITS)), list(SPLITS.values()))
    axes.set_ylabel(f"accuracy, mean ± std of {len(runs)} seeds")
    axes.legend()
    figure.savefig(path, dpi=120)


def check_in_clean_process(trainer: Trainer, rows: list[dict[str, Any]], folder: Path) -> None:
    """Save the checkpoint, and compare its scores here with those in a process that can't import grm_hf."""
    trainer.save_model(str(folder))
    expected = [result["scores"] for result in RewardScorer(trainer.model, trainer.processing_class)(rows)]
    with tempfile.TemporaryDirectory() as home:
        process = subprocess.run(
            [sys.executable, "-c", CLEAN_PROCESS, str(folder.resolve())],
            input=json.dumps(rows),
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HOME": home, "HF_HUB_OFFLINE": "1"},
        )
    if process.returncode:
        sys.exit(f"The clean process failed:\n{process.stderr}")
    for name, scores in json.loads(process.stdout.splitlines()[-1]).items():
        difference = max(abs(a - b) for one, two in zip(expected, scores) for a, b in zip(one, two))
        print(f"{name} in a process without grm_hf: largest difference of a reward {difference:.1e}")
        if difference > 1e-5:
            sys.exit(f"{name} gives {scores}, expected {expected}")
    print(f"for example {rows[0]['prompt'][0]['content']!r}")
    for name, score in zip(("chosen", "rejected"), expected[0]):
        print(f"  {score:+.3f}  {rows[0][name][0]['content']}")


def quiet() -> None:
    disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--tiny", action="store_true", help="a few steps, to see that all parts run")
    args = parser.parse_args()
    protocol = TINY if args.tiny else Protocol()
    quiet()
    start = time.time()

    print("Training the base language model on the world's plain text", flush=True)
    base = args.output_dir / "base"
    train_base(base, protocol.base_seed, protocol.base_steps)
    results: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    trainers = {}
    for seed in protocol.seeds:
        for method, regularization in METHODS.items():
            print(f"Training {method}, seed {seed}", flush=True)
            trainer = train_reward_model(base, regularization, seed, protocol, args.output_dir / "run")
            result = {split: accuracy(trainer, split, seed, protocol) for split in SPLITS}
            results[method].append({**result, "plain_text_loss": plain_text_loss(trainer.model.eval().backbone)})
            trainers[method] = trainer

    base_loss = plain_text_loss(LlamaForCausalLM.from_pretrained(base))
    table = as_table(results, base_loss)
    print(f"\nAccuracy in and out of distribution, and what is left of the language model\n\n{table}\n")
    record = {
        "protocol": asdict(protocol),
        "base_plain_text_loss": base_loss,
        "results": results,
        "versions": {name: version(name) for name in ("grm_hf", "torch", "transformers")},
        "cpu_threads": torch.get_num_threads(),
        "minutes": (time.time() - start) / 60,
    }
    (args.output_dir / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (args.output_dir / "table.md").write_text(table + "\n", encoding="utf-8")
    plot(results, args.output_dir / "results.png")
    check_in_clean_process(trainers["GRM"], preferences(3, 0, "out"), args.output_dir / "grm")
    print(f"\n{(time.time() - start) / 60:.1f} minutes; everything is in {args.output_dir}")


if __name__ == "__main__":
    main()
