"""Bases that are more than a causal language model's own checkpoint, or less: multimodal models, and incomplete ones."""

import pytest
import torch
from tiny import make_base
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

from grm_hf import GRMForRewardModeling


TEXT = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "layer_types": ["full_attention"] * 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
    "depth": 1,
    "num_heads": 4,
    "out_hidden_size": 32,
}


@pytest.mark.parametrize(
    ("model_type", "tied"),
    [
        ("gemma3", True),
        ("mistral3", False),
        ("mistral3", True),
        ("llava", False),
        ("qwen3_5", False),
        ("qwen3_5", True),
    ],
)
def test_language_model_of_a_multimodal_base_keeps_its_weights(model_type, tied, tmp_path):
    default = AutoConfig.for_model(model_type)
    config = AutoConfig.for_model(
        model_type,
        text_config={**TEXT, "model_type": default.text_config.model_type},
        vision_config={**VISION, "model_type": default.vision_config.model_type},
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    base = AutoModelForImageTextToText.from_config(config)
    base.save_pretrained(tmp_path / "base")
    model = GRMForRewardModeling.from_base_pretrained(tmp_path / "base", head_hidden_size=16)
    body = base.model.language_model.state_dict()
    assert body.keys() == model.backbone.model.state_dict().keys()
    assert all(weight.equal(body[name]) for name, weight in model.backbone.model.state_dict().items())
    head = model.get_output_embeddings().weight
    assert head.equal(base.get_output_embeddings().weight)
    assert (head is model.get_input_embeddings().weight) is tied
    model.save_pretrained(tmp_path / "grm")
    loaded, info = GRMForRewardModeling.from_pretrained(tmp_path / "grm", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(weight.equal(loaded.state_dict()[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("auto_class", "missing"),
    [
        (AutoModel, "backbone.lm_head.weight"),
        (AutoModelForSequenceClassification, "lacks 1 weights of LlamaForCausalLM"),
    ],
)
def test_base_without_its_language_model_head_is_refused(auto_class, missing, tmp_path):
    auto_class.from_config(make_base("llama-untied").config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=missing):
        GRMForRewardModeling.from_base_pretrained(tmp_path)


def test_base_of_experts_keeps_its_weights(tmp_path):
    config = AutoConfig.for_model("mixtral", **TEXT, num_local_experts=4)
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(tmp_path / "base")
    model = GRMForRewardModeling.from_base_pretrained(tmp_path / "base", head_hidden_size=16)
    model.save_pretrained(tmp_path / "grm")
    loaded = GRMForRewardModeling.from_pretrained(tmp_path / "grm").backbone.state_dict()
    assert all(weight.equal(loaded[name]) for name, weight in base.state_dict().items())
