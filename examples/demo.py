"""GRM against plain Bradley-Terry in a small synthetic world: base, training, table, picture, checkpoint.

    python examples/demo.py --output_dir outputs/demo        two CPU cores, two minutes, 1 GB, no network

The world is small_world.py's; what both methods share is `Protocol`, set once, by guess, before they were compared. An
answer of some fifteen words has a small log-probability, so beta is 1 instead of the paper's 0.1; the weight is the
paper's. docs/results holds the table of a full run, and what it does not show.
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
from small_world import FACTS, make_tokenizer, plain_text, preferences
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
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
SPLITS = ("in", "out", "reversed")


@dataclass(frozen=True)
class Protocol:
    """What is fixed before the comparison; both methods share all of it but the regularization."""

    seeds: tuple[int, ...] = (0, 1, 2)
    hidden_size: int = 64
    num_layers: int = 2
    num_documents: int = 20_000
    base_steps: int = 2000
    base_learning_rate: float = 4e-3
    num_pairs: int = 2000
    num_epochs: int = 3
    learning_rate: float = 1e-3
    regularization_weight: float = 0.01
    beta: float = 1.0
    num_eval_pairs: int = 1000
    num_eval_documents: int = 400


TINY = Protocol(
    seeds=(0, 1),
    num_documents=500,
    base_steps=20,
    num_pairs=64,
    num_epochs=1,
    num_eval_pairs=40,
    num_eval_documents=20,
)

# A process that has the checkpoint and its libraries, but no grm_hf.
CLEAN_PROCESS = """
import json, sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "grm_hf":
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModel, AutoTokenizer, pipeline

folder = sys.argv[1]
rows = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
scores = []
for row in rows:
    inputs = [
        tokenizer.apply_chat_template(row["prompt"] + row[name], return_tensors="pt", return_dict=True)
        for name in ("chosen", "rejected")
    ]
    with torch.no_grad():
        scores.append([model(**each).logits.item() for each in inputs])
scorer = pipeline(model=folder, trust_remote_code=True)
piped = [scorer(row)["scores"] for row in rows]
print(json.dumps({"AutoModel": scores, "pipeline": piped, "model_module": type(model).__module__}))
"""


def arguments(output_dir: Path, seed: int, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir,
        seed=seed,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=100,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **options,
    )


def train_base(tokenizer: PreTrainedTokenizerFast, protocol: Protocol, folder: Path) -> LlamaForCausalLM:
    """A language model of the world's plain text, saved to `folder`."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=protocol.hidden_size,
        intermediate_size=2 * protocol.hidden_size,
        num_hidden_layers=protocol.num_layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        # With the usual 0.02, a model this narrow may never learn to mark statements.
        initializer_range=0.1,
    )
    documents = plain_text(protocol.num_documents, seed=0)
    trainer = Trainer(
        LlamaForCausalLM(config),
        arguments(folder, 0, max_steps=protocol.base_steps, learning_rate=protocol.base_learning_rate),
        train_dataset=Dataset.from_dict({"input_ids": tokenizer(documents)["input_ids"]}),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    return trainer.model.eval()


@torch.no_grad()
def language_ability(
    language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, num_documents: int
) -> dict[str, float]:
    """Loss on held-out plain text (nats per token), and share of the world's facts that the model states right."""
    batch = tokenizer(plain_text(num_documents, seed=1), padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = language_model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    prompts = tokenizer([f"<s> the {thing} {relation}" for thing, relation in FACTS], return_tensors="pt")
    predicted = language_model(prompts["input_ids"]).logits[:, -1].argmax(-1).tolist()
    values = tokenizer.convert_tokens_to_ids(list(FACTS.values()))
    return {"nats_per_token": loss.item(), "facts": mean(a == b for a, b in zip(predicted, values))}


def train_reward_model(
    base: Path,
    tokenizer: PreTrainedTokenizerFast,
    regularization: str,
    seed: int,
    protocol: Protocol,
    output_dir: Path,
) -> Trainer:
    """A trainer that has trained a reward model on the pairs of `seed`."""
    set_seed(seed)
    model = GRMForRewardModeling.from_base_pretrained(
        base,
        regularization=regularization,
        regularization_weight=protocol.regularization_weight,
        beta=protocol.beta,
        head_hidden_size=protocol.hidden_size,
    )
    rows = Dataset.from_list(preferences(protocol.num_pairs, seed, "train"))
    trainer = Trainer(
        model,
        arguments(
            output_dir,
            seed,
            num_train_epochs=protocol.num_epochs,
            learning_rate=protocol.learning_rate,
            max_grad_norm=5.0,
        ),
        train_dataset=tokenize_preferences(rows, tokenizer),
        data_collator=PreferenceCollator(tokenizer),
        compute_metrics=compute_preference_metrics,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    RewardMetricsCallback.attach(trainer)
    trainer.train()
    return trainer


def evaluate(trainer: Trainer, tokenizer: PreTrainedTokenizerFast, seed: int, protocol: Protocol) -> dict[str, float]:
    """Accuracy on each split, and the ability of the language model behind the reward head."""
    result = {}
    for split in SPLITS:
        rows = Dataset.from_list(preferences(protocol.num_eval_pairs, seed, split))
        metrics = trainer.evaluate(tokenize_preferences(rows, tokenizer), metric_key_prefix=split)
        result[split] = metrics[f"{split}_accuracy"]
    backbone = trainer.model.eval().backbone
    return {**result, **language_ability(backbone, tokenizer, protocol.num_eval_documents)}


def as_table(base: dict[str, float], results: dict[str, list[dict[str, float]]]) -> str:
    columns = [*SPLITS, "nats_per_token", "facts"]
    lines = [f"{'':16}" + "".join(f"{name:>18}" for name in columns)]
    for method, runs in results.items():
        cells = [f"{mean(run[name] for run in runs):.3f} ± {stdev(run[name] for run in runs):.3f}" for name in columns]
        lines.append(f"{method:16}" + "".join(f"{cell:>18}" for cell in cells))
    cells = ["" for _ in SPLITS] + [f"{base[name]:.3f}" for name in ("nats_per_token", "facts")]
    lines.append(f"{'base':16}" + "".join(f"{cell:>18}" for cell in cells))
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
    axes.set_xticks(range(len(SPLITS)), ["in distribution", "out: unseen things, no cue", "out: cue reversed"])
    axes.set_ylabel(f"accuracy, mean ± std of {len(runs)} seeds")
    axes.legend()
    figure.savefig(path, dpi=120)


def check_in_clean_process(trainer: Trainer, rows: list[dict[str, Any]], folder: Path) -> None:
    """Save the checkpoint, and compare its scores here with those in a process that can't import grm_hf."""
    trainer.save_model(str(folder))
    scorer = RewardScorer(trainer.model, trainer.processing_class)
    expected = [result["scores"] for result in scorer(rows, batch_size=1)]
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "HF_HOME": home, "HF_HUB_OFFLINE": "1"}
        process = subprocess.run(
            [sys.executable, "-c", CLEAN_PROCESS, str(folder.resolve())],
            input=json.dumps(rows),
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
    if process.returncode:
        sys.exit(f"The clean process failed:\n{process.stderr}")
    output = json.loads(process.stdout.splitlines()[-1])
    for name in ("AutoModel", "pipeline"):
        difference = max(abs(a - b) for one, two in zip(expected, output[name]) for a, b in zip(one, two))
        print(f"{name:9} in a process without grm_hf ({output['model_module']}): largest difference {difference:.1e}")
        if difference > 1e-5:
            sys.exit(f"{name} scores {output[name]}, expected {expected}")
    row, scores = rows[0], expected[0]
    print(f"for example {row['prompt'][0]['content']!r}")
    for name, score in zip(("chosen", "rejected"), scores):
        print(f"  {score:+.3f}  {row[name][0]['content']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--tiny", action="store_true", help="a few steps, to see that all parts run")
    args = parser.parse_args()
    protocol = TINY if args.tiny else Protocol()
    disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    start = time.time()

    tokenizer = make_tokenizer()
    print("Training the base language model on the world's plain text")
    base = train_base(tokenizer, protocol, args.output_dir / "base")
    base_ability = language_ability(base, tokenizer, protocol.num_eval_documents)
    results: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    trainers = {}
    for seed in protocol.seeds:
        for method, regularization in METHODS.items():
            print(f"Training {method}, seed {seed}", flush=True)
            trainers[method] = train_reward_model(
                args.output_dir / "base", tokenizer, regularization, seed, protocol, args.output_dir / "run"
            )
            results[method].append(evaluate(trainers[method], tokenizer, seed, protocol))

    table = as_table(base_ability, results)
    print(f"\nAccuracy in and out of distribution, and what is left of the language model\n{table}\n")
    record = {
        "protocol": asdict(protocol),
        "base": base_ability,
        "results": results,
        "versions": {name: version(name) for name in ("grm_hf", "torch", "transformers")},
        "cpu_threads": torch.get_num_threads(),
        "minutes": (time.time() - start) / 60,
    }
    (args.output_dir / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (args.output_dir / "table.txt").write_text(table + "\n", encoding="utf-8")
    plot(results, args.output_dir / "results.png")
    check_in_clean_process(trainers["GRM"], preferences(3, 0, "out"), args.output_dir / "grm")
    print(f"\n{(time.time() - start) / 60:.1f} minutes; everything is in {args.output_dir}")


if __name__ == "__main__":
    main()
