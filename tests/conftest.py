"""Fixtures: tiny random models and an in-memory tokenizer; nothing is downloaded."""

import os
from functools import partial


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from tiny import make_base, make_tokenizer
from training import build_trainer
from transformers.utils import logging

from grm_hf import GRMForRewardModeling, tokenize_preferences


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


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def tokenized(preferences, tokenizer):
    return tokenize_preferences(preferences, tokenizer)


@pytest.fixture
def make_trainer(tokenizer, tmp_path):
    """`make_trainer(model, dataset, eval_dataset, **arguments)`: the stock Trainer, one epoch in order."""
    return partial(build_trainer, tokenizer, tmp_path / "run")
