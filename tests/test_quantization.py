"""QLoRA: a backbone in 4 bits under LoRA adapters and a float32 reward head."""

import json

import pytest
import torch
from tiny import make_config
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, pipeline

from grm_hf import GRMForRewardModeling, PreferenceCollator
from grm_hf.cli import main


bnb = pytest.importorskip("bitsandbytes", exc_type=ImportError)

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture
def base_folder(tokenizer, tmp_path):
    """A base whose layers have as many rows and columns as 4-bit kernels ask for."""
    config = make_config("llama")
    config.update(
        {
            "hidden_size": 128,
            "intermediate_size": 128,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "initializer_range": 0.02,
        }
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def quantized(base_folder):
    return GRMForRewardModeling.from_base_pretrained(base_folder, head_hidden_size=16, quantization_config=NF4)


def four_bit_layers(model):
    return {name.rsplit(".")[-1] for name, layer in model.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}


def test_backbone_is_quantized_and_both_heads_are_not(quantized):
    assert four_bit_layers(quantized) == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert {parameter.dtype for parameter in quantized.score.parameters()} == {torch.float32}


def test_quantized_rewards_and_log_probabilities_are_near_the_others(quantized, base_folder, tokenized, tokenizer):
    batch = PreferenceCollator(tokenizer)(list(tokenized))
    full = GRMForRewardModeling.from_base_pretrained(base_folder, head_hidden_size=16)
    full.score.load_state_dict(quantized.score.state_dict())
    with torch.no_grad():
        output, expected = quantized.eval()(**batch), full(**batch)
    for name in ("logits", "logps"):
        pair = torch.stack([output[name].flatten(), expected[name].flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.8, name
        assert not pair[0].equal(pair[1]), name


@pytest.mark.parametrize("regularization", ["sft", "dpo"])
def test_command_line_trains_with_qlora_and_leaves_a_merged_model(
    regularization, base_folder, preferences, tmp_path, capsys
):
    preferences.to_json(tmp_path / "rows.jsonl")
    options = {
        "model_name_or_path": base_folder,
        "dataset": tmp_path / "rows.jsonl",
        "eval_datasets": f"own={tmp_path / 'rows.jsonl'}",
        "output_dir": tmp_path / "out",
        "regularization": regularization,
        "head_hidden_size": 16,
        "load_in_4bit": True,
        "use_peft": True,
        "gradient_checkpointing": True,
        "learning_rate": 0.01,
        "num_train_epochs": 4,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert main(["train", *flags]) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert history[3]["reward_loss"] < history[0]["reward_loss"]
    saved = GRMForRewardModeling.from_pretrained(tmp_path / "out")
    assert not four_bit_layers(saved)
    row = preferences[0]
    output = pipeline("reward-modeling", model=str(tmp_path / "out"))(
        {name: row[name] for name in ("prompt", "chosen", "rejected")}
    )
    assert output["preferred"] == 0
