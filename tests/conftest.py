"""Fixtures: tiny random models and an in-memory tokenizer; nothing is downloaded."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from tiny import make_base, make_tokenizer
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from grm_hf import GRMForRewardModeling, PreferenceCollator, compute_preference_metrics, tokenize_preferences


# Test processes share the cores.
torch.set_num_threads(1)
disable_progress_bars()
logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE with a ChatML template, BOS, EOS and a pad token of its own."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory, tokenizer):
    """A saved tiny Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    make_base("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_grm(base_folder):
    """`make_grm(**options)`: a GRM on the tiny Llama with a small head whose weights depend on nothing else."""

    def make(**options):
        torch.manual_seed(0)
        return GRMForRewardModeling.from_base_pretrained(base_folder, **{"head_hidden_size": 16, **options})

    return make


@pytest.fixture
def preferences():
    """Eight conversational rows of different lengths, in TRL's format."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"Name number {i}." + " Please." * (i % 3)}],
                "chosen": [{"role": "assistant", "content": "It is " + "very " * (i % 4) + f"clearly {i}."}],
                "rejected": [{"role": "assistant", "content": f"No idea {i * 7}" + "!" * (i % 5)}],
            }
            for i in range(8)
        ]
    )


@pytest.fixture
def tokenized(preferences, tokenizer):
    return tokenize_preferences(preferences, tokenizer)


@pytest.fixture
def make_trainer(tokenizer, tmp_path):
    """`make_trainer(model, dataset, eval_dataset, callbacks, **arguments)`: the stock Trainer, one epoch in order."""

    def make(model, dataset, eval_dataset=None, callbacks=None, compute_metrics=compute_preference_metrics, **arguments):
        defaults = {
            "num_train_epochs": 1,
            "per_device_train_batch_size": 4,
            # With Adam, equal steps may part by rounding where a gradient is all but zero.
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        is_function = callable(model) and not isinstance(model, torch.nn.Module)
        return Trainer(
            **{"model_init" if is_function else "model": model},
            args=TrainingArguments(str(tmp_path / "run"), **{**defaults, **arguments}),
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            data_collator=PreferenceCollator(tokenizer),
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
        )

    return make
