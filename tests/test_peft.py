"""PEFT LoRA with the stock Trainer: what is trained and saved, and that every way back gives the same rewards."""

import json

import pytest
import torch
import transformers
from clean_process import run_clean
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_base
from training import losses, training_logs, weights_of
from transformers import AutoModel

from grm_hf import GRMForRewardModeling, PreferenceCollator, RewardMetricsCallback, add_reference_logps


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture
def batch(tokenized, tokenizer):
    return PreferenceCollator(tokenizer)(list(tokenized))


@pytest.fixture
def make_untied_grm(tmp_path):
    """`make_untied_grm(**options)`: a GRM whose lm_head is not the input embedding."""
    make_base("llama-untied").save_pretrained(tmp_path / "untied")

    def make(**options):
        torch.manual_seed(0)
        options = {"head_hidden_size": 16, **options}
        return GRMForRewardModeling.from_base_pretrained(tmp_path / "untied", **options)

    return make


def with_lora(model, target_modules=ATTENTION, **options):
    torch.manual_seed(0)
    config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=target_modules, **options)
    return get_peft_model(model, config)


def targets_of(model):
    """Last parts of the names of the layers that have LoRA weights."""
    return {name.split(".lora_A")[0].rsplit(".")[-1] for name in model.state_dict() if ".lora_A." in name}


def rewards_of(model, batch):
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def perturb(model):
    """Give freshly added adapters, which change nothing yet, and heads random weights."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def trained(make_grm, make_trainer, tokenized):
    """A PEFT model trained for two epochs, and its trainer."""
    trainer = make_trainer(with_lora(make_grm()), tokenized, tokenized, num_train_epochs=2)
    trainer.train()
    return trainer.model, trainer


def test_adapters_and_head_are_trained_and_nothing_else(make_grm, make_trainer, tokenized):
    model = with_lora(make_grm())
    before = weights_of(model)
    make_trainer(model, tokenized, num_train_epochs=2).train()
    changed = {name for name, weight in weights_of(model).items() if not weight.equal(before[name])}
    trainable = {name for name in before if "lora_" in name or "score.modules_to_save" in name}
    # The last bias is common to all rewards, so that rounding alone moves it.
    bias = {name for name in trainable if name.endswith("layers.1.bias")}
    assert changed | bias == trainable
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable


def test_log_has_the_parts_of_the_loss(make_grm, make_trainer, tokenized):
    trainer = make_trainer(with_lora(make_grm()), tokenized, tokenized)
    RewardMetricsCallback.attach(trainer)
    trainer.train()
    names = {"reward_loss", "regularization_loss", "accuracy", "margin", "mean_reward", "logps/chosen"}
    assert all(names <= entry.keys() for entry in training_logs(trainer))
    assert {f"eval_{name}" for name in names} <= trainer.evaluate().keys()


def test_accumulation_gives_the_losses_of_one_large_batch(make_grm, make_trainer, tokenized):
    runs = []
    for batch_size, steps in ((4, 1), (1, 4)):
        trainer = make_trainer(
            with_lora(make_grm(head_dropout=0.0)),
            tokenized,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
        )
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)


def test_saved_adapter_loads_onto_a_fresh_grm_with_equal_rewards(trained, make_grm, batch, tmp_path):
    model, trainer = trained
    trainer.save_model(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    torch.manual_seed(5)
    fresh = make_grm()
    with torch.no_grad():
        # A head drawn anew, as in another process.
        fresh.score.layers[0].weight.normal_()
    reloaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert rewards_of(reloaded, batch).equal(rewards_of(model, batch))
    assert not rewards_of(model, batch).allclose(rewards_of(make_grm(), batch), atol=1e-3)


def test_saved_adapter_holds_lora_weights_and_the_head_alone(trained, tmp_path):
    model, _ = trained
    model.save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    parts = ("layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias")
    assert {name for name in names if "lora_" not in name} == {f"base_model.model.score.{part}" for part in parts}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def test_merged_model_is_a_grm_with_equal_rewards(trained, batch, tmp_path):
    model, _ = trained
    expected = rewards_of(model, batch)
    merged = model.merge_and_unload()
    assert isinstance(merged, GRMForRewardModeling)
    assert type(merged.score).__name__ == "RewardHead"
    assert rewards_of(merged, batch).allclose(expected, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    reloaded, report = GRMForRewardModeling.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert rewards_of(reloaded, batch).equal(rewards_of(merged, batch))


def test_merged_checkpoint_loads_without_grm_hf_and_peft(trained, batch, tmp_path):
    merged = trained[0].merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    inputs = {name: batch[name].tolist() for name in ("input_ids", "attention_mask")}
    code = f"""
import torch
sys.modules["peft"] = None
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "merged")!r}, trust_remote_code=True)
inputs = {{name: torch.tensor(values) for name, values in {inputs!r}.items()}}
result = model(**inputs).logits.tolist()
"""
    assert torch.tensor(run_clean(code, tmp_path)).allclose(rewards_of(merged, batch), atol=1e-5)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (ATTENTION, set(ATTENTION)),
        # Neither the lm_head nor the reward head.
        ("all-linear", {*ATTENTION, "gate_proj", "up_proj", "down_proj"}),
        (["q_proj", "lm_head"], {"q_proj", "lm_head"}),
    ],
)
def test_lora_targets(target_modules, expected, is_tied, make_grm, make_untied_grm):
    model = with_lora((make_grm if is_tied else make_untied_grm)(), target_modules)
    assert targets_of(model) == expected
    assert type(model.base_model.model.score).__name__ == "ModulesToSaveWrapper"


def logps_of(backbone, batch):
    """Log-probabilities `(batch, num_responses)` from the logits of the backbone's own forward."""
    ids = batch["input_ids"].flatten(0, 1)
    with torch.no_grad():
        logits = backbone(ids, attention_mask=batch["attention_mask"].flatten(0, 1)).logits
    token_logps = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (token_logps * batch["completion_mask"].flatten(0, 1)[:, 1:]).sum(-1).unflatten(0, (-1, 2))


@pytest.mark.parametrize("target_modules", [ATTENTION, "all-linear", ["q_proj", "lm_head"]])
@pytest.mark.parametrize("is_tied", [True, False])
def test_logps_are_those_of_the_adapted_backbone(is_tied, target_modules, make_grm, make_untied_grm, batch):
    make = make_grm if is_tied else make_untied_grm
    model = perturb(with_lora(make(regularization="dpo_reference_free"), target_modules)).eval()
    with torch.no_grad():
        logps = model(**batch).logps
    assert logps.allclose(logps_of(model.get_base_model().backbone, batch), rtol=1e-4, atol=1e-3)
    assert not logps.allclose(logps_of(make().backbone, batch), atol=0.1)


# An adapter on a tied lm_head can't be merged: PEFT would change the input embedding with it.
@pytest.mark.parametrize("target_modules", [ATTENTION, "all-linear", ["q_proj", "lm_head"]])
def test_merging_changes_neither_logps_nor_rewards(target_modules, make_untied_grm, batch):
    model = perturb(with_lora(make_untied_grm(regularization="dpo_reference_free"), target_modules)).eval()
    with torch.no_grad():
        before = model(**batch)
        merged = model.merge_and_unload()
        after = merged(**batch)
    assert after.logits.allclose(before.logits, atol=1e-4)
    assert after.logps.allclose(before.logps, rtol=1e-4, atol=1e-3)
    assert after.logps.allclose(logps_of(merged.backbone, batch), rtol=1e-4, atol=1e-3)


def test_lora_on_lm_head_gets_a_gradient(make_untied_grm, make_trainer, tokenized):
    model = with_lora(make_untied_grm(), ["q_proj", "lm_head"])
    before = weights_of(model)
    make_trainer(model, tokenized, num_train_epochs=2).train()
    changed = {name for name, weight in weights_of(model).items() if not weight.equal(before[name])}
    assert {name for name in before if "lm_head.lora_" in name} <= changed


@pytest.mark.parametrize("options", [{}, {"regularization": "dpo_reference_free"}, {"regularization": "none"}])
def test_gradient_checkpointing_gives_the_same_weights(options, make_grm, make_trainer, tokenized):
    runs = []
    for gradient_checkpointing in (False, True):
        model = with_lora(make_grm(head_dropout=0.0, **options))
        before = weights_of(model)
        make_trainer(model, tokenized, gradient_checkpointing=gradient_checkpointing).train()
        runs.append(weights_of(model))
    for name, weight in runs[0].items():
        assert weight.allclose(runs[1][name], atol=1e-6), name
    assert any("lora_B" in name and not weight.equal(before[name]) for name, weight in runs[1].items())


def test_bf16_backbone_keeps_a_float32_head(make_grm, make_trainer, tokenized, batch, tmp_path):
    model = with_lora(make_grm(dtype=torch.bfloat16))
    trainer = make_trainer(model, tokenized)
    trainer.train()
    assert {parameter.dtype for parameter in model.base_model.model.score.parameters()} == {torch.float32}
    expected = rewards_of(model, batch)
    assert expected.dtype == torch.float32
    trainer.save_model(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(make_grm(dtype=torch.bfloat16), tmp_path / "adapter")
    assert rewards_of(reloaded, batch).equal(expected)


def test_reference_is_the_base_without_its_adapter(make_grm, tokenized, batch):
    expected = add_reference_logps(tokenized, make_grm())["ref_logps"][:]
    model = perturb(with_lora(make_grm())).train()
    rewards = rewards_of(model, batch)
    model.train()
    assert add_reference_logps(tokenized, model)["ref_logps"][:] == expected
    assert model.training
    assert rewards_of(model, batch).equal(rewards)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name or "score.modules_to_save" in name
    }


def test_dpo_starts_at_ln_2(make_grm, make_trainer, tokenized):
    model = with_lora(make_grm(regularization="dpo"))
    trainer = make_trainer(model, add_reference_logps(tokenized, model))
    RewardMetricsCallback.attach(trainer)
    trainer.train()
    assert training_logs(trainer)[0]["regularization_loss"] == pytest.approx(0.693147, abs=1e-5)


def test_two_adapters_have_rewards_and_reference_of_their_own(make_grm, tokenized, batch):
    expected = add_reference_logps(tokenized, make_grm())["ref_logps"][:]
    model = perturb(with_lora(make_grm()))
    first = rewards_of(model, batch)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["v_proj"])
    model.add_adapter("second", config)
    model.set_adapter("second")
    second = rewards_of(perturb(model), batch)
    assert not second.allclose(first, atol=1e-3)
    assert add_reference_logps(tokenized, model)["ref_logps"][:] == expected
    assert rewards_of(model, batch).equal(second)
    model.set_adapter("default")
    assert rewards_of(model, batch).equal(first)


def test_adapter_resumes_from_a_checkpoint(make_grm, make_trainer, tokenized, tmp_path):
    arguments = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    whole = make_trainer(with_lora(make_grm()), tokenized, **arguments)
    whole.train()
    resumed = make_trainer(with_lora(make_grm()), tokenized, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    expected = weights_of(whole.model)
    assert all(weight.equal(expected[name]) for name, weight in weights_of(resumed.model).items())


@pytest.fixture
def adapter_of_grm(trained, tmp_path):
    """A LoRA model on a saved GRM, and the folder of its adapter."""
    model, _ = trained
    model.merge_and_unload().save_pretrained(tmp_path / "grm")
    further = perturb(with_lora(GRMForRewardModeling.from_pretrained(tmp_path / "grm")))
    further.save_pretrained(tmp_path / "adapter")
    return further, tmp_path / "adapter"


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="transformers loses modules_to_save before 5.18"
)
def test_auto_model_loads_the_adapter_of_a_saved_grm(adapter_of_grm, batch):
    further, adapter = adapter_of_grm
    reloaded = AutoModel.from_pretrained(adapter)
    assert rewards_of(reloaded, batch).allclose(rewards_of(further, batch), atol=1e-5)


def test_auto_model_refuses_an_adapter_without_its_reward_head(adapter_of_grm):
    _, adapter = adapter_of_grm
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: weight for name, weight in weights.items() if ".score." not in name},
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(RuntimeError, match=r"reward head did not load, score\..* would be random"):
        AutoModel.from_pretrained(adapter)
