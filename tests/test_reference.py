"""Reference log-probabilities: their values, their column, and the state they leave behind."""

import pytest
import torch

from grm_hf import PreferenceCollator, add_reference_logps


@pytest.fixture
def model(make_grm):
    return make_grm(regularization="dpo")


def test_column_holds_the_logps_of_the_language_model(model, tokenized, tokenizer):
    batch = PreferenceCollator(tokenizer)(list(tokenized))
    with torch.no_grad():
        logits = model.backbone(batch["input_ids"][:, 0], attention_mask=batch["attention_mask"][:, 0]).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 0, 1:, None]).squeeze(-1)
    expected = (logps * batch["completion_mask"][:, 0, 1:]).sum(-1)
    column = torch.tensor(add_reference_logps(tokenized, model)["ref_logps"][:])
    assert column.shape == (8, 2)
    assert column[:, 0].allclose(expected, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_changes_nothing(batch_size, model, tokenized):
    column, expected = (
        torch.tensor(add_reference_logps(tokenized, model, size)["ref_logps"][:]) for size in (batch_size, 8)
    )
    assert column.allclose(expected, atol=1e-4)


@pytest.mark.parametrize("is_training", [True, False])
def test_training_mode_is_restored_and_dropout_is_off(is_training, model, tokenized):
    # A dropout inside the backbone.
    model.backbone.model.layers[0].self_attn.attention_dropout = 0.9
    expected = add_reference_logps(tokenized, model.eval())["ref_logps"][:]
    model.train(is_training)
    assert add_reference_logps(tokenized, model)["ref_logps"][:] == expected
    assert model.training == is_training
    assert model.backbone.training == is_training


def test_other_columns_stay_and_an_old_column_is_replaced(model, tokenized):
    rows = add_reference_logps(tokenized, model)
    assert rows.column_names == [*tokenized.column_names, "ref_logps"]
    assert rows.remove_columns("ref_logps")[:] == tokenized[:]
    with torch.no_grad():
        model.backbone.get_input_embeddings().weight.mul_(0.5)
    again = add_reference_logps(rows, model)
    assert again.column_names == rows.column_names
    assert again["ref_logps"][:] != rows["ref_logps"][:]


def test_gradients_are_left_alone(model, tokenized):
    rows = add_reference_logps(tokenized, model)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert rows.features["ref_logps"].feature.dtype == "float32"


def test_stream_is_refused(model, tokenized):
    with pytest.raises(ValueError, match="dpo_reference_free"):
        add_reference_logps(tokenized.to_iterable_dataset(), model)


def test_untokenized_rows_are_refused(model, preferences):
    with pytest.raises(ValueError, match="tokenize_preferences"):
        add_reference_logps(preferences, model)
