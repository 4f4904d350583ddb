"""Every supported architecture: weights, tied embeddings, log-probabilities and padding, against the untouched backbone."""

import copy

import pytest
import torch
from independent_grm import IndependentGRM, assert_gradients_close
from tiny import BACKBONES, FALLBACKS, make_base, make_config, make_rows, pad_rows
from transformers import AutoModelForCausalLM

from grm_hf import GRMForRewardModeling
from grm_hf.modeling.modeling_grm import _DIRECT_HEADS


ALL = [*BACKBONES, *FALLBACKS]
# float32 on our side, float64 on the other; rewards are around 1, summed log-probabilities around -40 nats.
REWARD = {"atol": 1e-5, "rtol": 1e-5}
LOGPS = {"atol": 1e-4, "rtol": 1e-5}


@pytest.fixture(scope="module", params=ALL)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def base(name):
    """A causal language model with random biases and norms too."""
    model = make_base(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    base.save_pretrained(folder)
    return folder


@pytest.fixture
def grm(folder):
    torch.manual_seed(0)
    return GRMForRewardModeling.from_base_pretrained(folder, head_hidden_size=16)


def rewards_and_logps(model, batch):
    with torch.no_grad():
        output = model(**batch)
    return output.logits, output.logps


def is_tied(model):
    return model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()


def assert_equal_weights(state_dict, other):
    assert state_dict.keys() == other.keys()
    for key, value in state_dict.items():
        assert value.dtype == other[key].dtype, key
        assert value.equal(other[key]), key


def test_every_direct_head_is_tested_here():
    assert {make_config(name).model_type for name in BACKBONES} == _DIRECT_HEADS
    assert not {make_config(name).model_type for name in FALLBACKS} & _DIRECT_HEADS


def test_base_weights_load_bit_equal_and_only_the_head_is_new(base, folder):
    model, info = GRMForRewardModeling.from_base_pretrained(folder, head_hidden_size=16, output_loading_info=True)
    assert set(info["missing_keys"]) == {f"score.layers.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")}
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert_equal_weights(model.backbone.state_dict(), base.state_dict())


def test_head_is_as_wide_as_the_language_model_heads_input(grm, base):
    assert grm.score.layers[0].weight.shape[1] == base.get_output_embeddings().weight.shape[1]


@pytest.mark.parametrize("shard_size", ["5GB", "10KB"])
def test_saved_model_loads_bit_equal(shard_size, grm, tmp_path):
    grm.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "10KB")
    loaded, info = GRMForRewardModeling.from_pretrained(tmp_path, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], kind
    assert_equal_weights(loaded.state_dict(), grm.state_dict())
    batch = pad_rows(make_rows())
    assert loaded(**batch).loss.equal(grm(**batch).loss)


def test_backbone_saves_as_the_language_model_it_was(grm, base, tmp_path):
    grm.backbone.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(base)
    assert not info["missing_keys"]
    assert_equal_weights(loaded.state_dict(), base.state_dict())


def test_embeddings_stay_tied_or_untied(grm, base, tmp_path):
    tied = base.config.tie_word_embeddings
    assert is_tied(grm) is tied
    grm.save_pretrained(tmp_path)
    loaded = GRMForRewardModeling.from_pretrained(tmp_path)
    assert is_tied(loaded) is tied
    loaded.resize_token_embeddings(330)
    assert is_tied(loaded) is tied
    loaded.save_pretrained(tmp_path / "resized")
    assert is_tied(GRMForRewardModeling.from_pretrained(tmp_path / "resized")) is tied
    loaded.tie_weights()
    assert is_tied(loaded) is tied


def test_resized_vocabulary_keeps_the_rewards_of_old_tokens(grm, tmp_path):
    batch = pad_rows(make_rows())
    rewards, _ = rewards_and_logps(grm, batch)
    grm.resize_token_embeddings(330)
    assert (grm.config.vocab_size, grm.config.text_config.vocab_size) == (330, 330)
    assert grm.get_input_embeddings().weight.shape[0] == grm.get_output_embeddings().weight.shape[0] == 330
    torch.testing.assert_close(grm(**batch).logits, rewards, atol=1e-6, rtol=1e-6)
    # A response of new tokens.
    batch["input_ids"][batch["completion_mask"] == 1] = 329
    output = grm(**batch)
    assert output.loss.isfinite()
    grm.save_pretrained(tmp_path)
    assert GRMForRewardModeling.from_pretrained(tmp_path)(**batch).loss.equal(output.loss)


def test_logps_of_single_tokens_equal_the_untouched_backbones(grm, base):
    ids = make_rows(1, 1)[0][0][0]
    input_ids = torch.tensor([ids])
    # One row for each token that has a prediction.
    masks = torch.eye(len(ids), dtype=torch.long)[1:].unsqueeze(1)
    repeated = input_ids.expand(len(masks), 1, -1)
    with torch.no_grad():
        logps = grm.response_logps(repeated, torch.ones_like(repeated), masks)[:, 0]
        logits = copy.deepcopy(base).double()(input_ids).logits[0].double()
    expected = logits[:-1].log_softmax(-1).gather(1, input_ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(logps.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("side", "extra"), [("right", 0), ("right", 5), ("left", 0), ("left", 5), ("mixed", 3)])
def test_rewards_and_logps_under_any_padding_are_those_of_sequences_alone(side, extra, grm, base):
    rows = make_rows()
    # A row without a prompt: its first token has no prediction, whatever stands to its left.
    rows[1] = [(ids, 0) for ids, _ in rows[1]]
    rewards, logps = rewards_and_logps(grm, pad_rows(rows, side, extra))
    expected_rewards, expected_logps = IndependentGRM(grm, base).rewards_and_logps(rows)
    torch.testing.assert_close(rewards.double(), expected_rewards, **REWARD)
    torch.testing.assert_close(logps.double(), expected_logps, **LOGPS)


def test_batch_of_rows_equals_its_singles(grm):
    rows = make_rows()
    rewards, logps = rewards_and_logps(grm, pad_rows(rows, "left"))
    singles = [rewards_and_logps(grm, pad_rows([row])) for row in rows]
    torch.testing.assert_close(rewards, torch.cat([reward for reward, _ in singles]), **REWARD)
    torch.testing.assert_close(logps, torch.cat([logp for _, logp in singles]), **LOGPS)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pad_token_equal_to_eos_changes_nothing(side, grm):
    # An EOS inside and at the end of each response.
    rows = [[([*ids[:-1], 2, ids[-1], 2], length) for ids, length in row] for row in make_rows()]
    expected_rewards, expected_logps = rewards_and_logps(grm, pad_rows(rows, side, 2, pad_token_id=3))
    grm.config.pad_token_id = 2
    rewards, logps = rewards_and_logps(grm, pad_rows(rows, side, 2, pad_token_id=2))
    torch.testing.assert_close(rewards, expected_rewards, **REWARD)
    torch.testing.assert_close(logps, expected_logps, **LOGPS)


def test_scoring_gives_the_rewards_of_training(grm):
    batch = pad_rows(make_rows(), "left")
    rewards, _ = rewards_and_logps(grm, batch)
    scores = grm(batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)).logits
    assert scores.shape == (6, 1)
    torch.testing.assert_close(scores.view(3, 2), rewards, **REWARD)


def test_loss_and_gradients_equal_those_from_the_untouched_backbones_full_logits(grm, base):
    rows = make_rows()
    grm.config.regularization, grm.config.regularization_weight = "dpo_reference_free", 0.5
    output = grm(**pad_rows(rows, "left"))
    output.loss.backward()
    expected = IndependentGRM(grm, base).loss_and_gradients(
        rows, [0, 0, 0], regularization="dpo_reference_free", weight=0.5
    )
    assert output.loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert_gradients_close(grm, expected["gradients"])


def test_forward_leaves_no_hook_behind(grm):
    batch = pad_rows(make_rows())
    grm(**batch)
    # A token outside the vocabulary.
    batch["input_ids"][0, 0, 0] = 10**6
    with pytest.raises(IndexError):
        grm(**batch)
    assert not grm.backbone.base_model._forward_hooks
