"""GRM against plain Bradley-Terry in a small synthetic world, start to finish: base, training, table, picture, checkpoint.

python examples/demo.py --output_dir outputs/demo        two CPU cores, 3 minutes, 1 GB, no network
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
