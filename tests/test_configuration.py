"""GRMConfig: the paper's defaults, refusals that name what is allowed, and what a saved configuration holds."""

import copy
import json
import math
import pickle

import pytest
from tiny import BACKBONES, make_config
from transformers import AutoConfig, GPT2Config, LlamaConfig

from grm_hf import GRMConfig, GRMForRewardModeling


PAPER = {
    "head_type": "mlp",
    "head_hidden_size": 1024,
    "head_num_layers": 1,
    "head_dropout": 0.1,
    "regularization": "sft",
    "regularization_weight": 0.01,
    "beta": 0.1,
    "logps_reduction": "sum",
    "label_smoothing": 0.0,
    "center_rewards_coefficient": None,
}
CHANGED = {
    "head_type": "linear",
    "head_hidden_size": 7,
    "head_num_layers": 3,
    "head_dropout": 0.0,
    "regularization": "dpo",
    "regularization_weight": 0.5,
    "beta": 2.0,
    "logps_reduction": "mean",
    "label_smoothing": 0.25,
    "center_rewards_coefficient": 0.01,
}
MODEL = "modeling_grm.GRMForRewardModeling"
REFUSED = {
    "head_type": (["MLP", "cnn", None], "must be one of 'mlp', 'linear', got "),
    "regularization": (
        ["SFT", "ppo", None, ""],
        "must be one of 'sft', 'nll', 'dpo', 'dpo_reference_free', 'none', got ",
    ),
    "logps_reduction": (["avg", None, 1], "must be one of 'sum', 'mean', got "),
    "head_hidden_size": ([0, -1, 2.0, "64", None, True], "must be an integer of at least 1, got "),
    "head_num_layers": ([0, -1, 1.5, "1", None, True], "must be an integer of at least 1, got "),
    "head_dropout": ([-0.1, 1, 1.0, math.nan, "0.1", None, False], r"must be a number in \[0, 1\), got "),
    "regularization_weight": ([-0.01, 1.01, math.nan, "0.1", None, True], r"must be a number in \[0, 1\], got "),
    "beta": ([0, -1, math.inf, math.nan, "0.1", None, True], "must be a finite number above 0, got "),
    "label_smoothing": ([-0.1, 0.5, 1, math.nan, "0", None, False], r"must be a number in \[0, 0.5\), got "),
    "center_rewards_coefficient": (
        [-0.1, math.inf, math.nan, "0.01", True],
        "must be None or a finite number of at least 0, got ",
    ),
}
REFUSED_VALUES = [(name, value, message) for name, (values, message) in REFUSED.items() for value in values]


def fields(config):
    """What the configuration says, apart from the folder that it came from."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def test_defaults_are_those_of_the_paper():
    config = GRMConfig()
    assert {name: getattr(config, name) for name in PAPER} == PAPER
    assert isinstance(config.text_config, LlamaConfig)


@pytest.mark.parametrize(("name", "value", "message"), REFUSED_VALUES)
def test_bad_value_is_refused_with_what_is_allowed(name, value, message):
    with pytest.raises(ValueError, match=f"`{name}` {message}{value!r}"):
        GRMConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"), [(name, values[0], message) for name, (values, message) in REFUSED.items()]
)
def test_bad_value_given_to_from_pretrained_is_refused(name, value, message, tmp_path):
    GRMConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`{name}` {message}{value!r}"):
        GRMConfig.from_pretrained(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("head_hidden_size", 1),
        ("head_dropout", 0),
        ("regularization_weight", 0),
        ("regularization_weight", 1),
        ("label_smoothing", 0),
        ("center_rewards_coefficient", 0),
        ("center_rewards_coefficient", None),
    ],
)
def test_ends_of_a_range_are_allowed(name, value):
    assert getattr(GRMConfig(**{name: value}), name) == value


@pytest.mark.parametrize("options", [{"num_labels": 2}, {"num_labels": 0}, {"id2label": {0: "bad", 1: "good"}}])
def test_more_or_less_than_one_label_is_refused(options):
    with pytest.raises(ValueError, match=r"A GRM has one reward: num_labels must be 1, got (2|0|.*'good')"):
        GRMConfig(**options)


def test_more_than_one_label_given_to_from_pretrained_is_refused(tmp_path):
    GRMConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="A GRM has one reward: num_labels must be 1, got 2"):
        AutoConfig.from_pretrained(tmp_path, num_labels=2)


def test_one_label_is_accepted_wherever_it_is_given(tmp_path):
    GRMConfig(num_labels=1, id2label={0: "reward"}).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, num_labels=1)
    assert config.num_labels == 1


def test_problem_is_a_regression_with_one_label():
    config = GRMConfig(problem_type="multi_label_classification")
    assert config.problem_type == "regression"
    assert config.num_labels == 1


def test_text_config_may_be_a_dictionary_or_a_configuration():
    given = make_config("gpt2")
    assert GRMConfig(text_config=given).text_config is given
    from_dictionary = GRMConfig(text_config=given.to_dict()).text_config
    assert type(from_dictionary) is GPT2Config
    assert from_dictionary.to_dict() == given.to_dict()


@pytest.mark.parametrize("text_config", [{"model_type": "nonsense"}, {"hidden_size": 8}])
def test_text_config_of_unknown_type_is_refused(text_config):
    model_type = text_config.get("model_type")
    with pytest.raises(ValueError, match=f"model_type={model_type!r}, which this version .* Upgrade transformers"):
        GRMConfig(text_config=text_config)


@pytest.mark.parametrize("name", BACKBONES)
def test_json_round_trip_keeps_every_field(name, tmp_path):
    config = GRMConfig(text_config=make_config(name), **CHANGED)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is GRMConfig
    assert type(loaded.text_config) is type(config.text_config)
    assert {field: getattr(loaded, field) for field in CHANGED} == CHANGED
    assert loaded.text_config.to_dict() == config.text_config.to_dict()
    assert fields(loaded) == fields(config)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_are_equal_and_independent(duplicate):
    config = GRMConfig(text_config=make_config("qwen2"), beta=0.7)
    other = duplicate(config)
    assert other.to_dict() == config.to_dict()
    other.pad_token_id = 77
    assert config.pad_token_id == 3


@pytest.mark.parametrize("name", BACKBONES)
def test_properties_are_those_of_the_backbone(name):
    text_config = make_config(name)
    config = GRMConfig(text_config=text_config)
    assert config.hidden_size == text_config.hidden_size == 32
    assert config.vocab_size == text_config.vocab_size == 320
    assert config.pad_token_id == text_config.pad_token_id == 3
    assert config.tie_word_embeddings == text_config.tie_word_embeddings
    assert config.get_text_config() is text_config


def test_setters_reach_the_backbone_and_survive_saving(tmp_path):
    config = GRMConfig(text_config=make_config("llama"))
    config.pad_token_id = 9
    config.vocab_size = 400
    assert (config.text_config.pad_token_id, config.text_config.vocab_size) == (9, 400)
    config.save_pretrained(tmp_path)
    loaded = GRMConfig.from_pretrained(tmp_path)
    assert (loaded.pad_token_id, loaded.vocab_size) == (9, 400)
    assert (loaded.text_config.pad_token_id, loaded.text_config.vocab_size) == (9, 400)


def test_pad_token_id_given_to_the_config_is_the_backbones():
    assert GRMConfig(text_config=make_config("llama"), pad_token_id=5).text_config.pad_token_id == 5


@pytest.mark.parametrize(
    ("options", "uses"),
    [
        ({}, True),
        ({"regularization": "none"}, False),
        ({"regularization_weight": 0}, False),
        ({"regularization": "dpo", "regularization_weight": 1}, True),
    ],
)
def test_loss_uses_the_language_model_unless_it_has_no_share(options, uses):
    assert GRMConfig(**options).uses_language_model is uses


def test_saved_config_names_its_code(tmp_path):
    GRMConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "grm"
    assert saved["auto_map"] == {
        "AutoConfig": "configuration_grm.GRMConfig",
        "AutoModel": MODEL,
        "AutoModelForSequenceClassification": MODEL,
    }
    entry = saved["custom_pipelines"]["reward-modeling"]
    assert (entry["impl"], entry["pt"]) == ("pipeline_grm.GRMPipeline", ["AutoModel"])


def test_evaluation_gathers_the_rewards_and_nothing_else():
    ignored = GRMConfig().keys_to_ignore_at_inference
    assert set(ignored) == {"reward_loss", "regularization_loss", "logps"}


def test_config_of_a_base_model_becomes_the_text_config(base_folder):
    config = GRMConfig.from_pretrained(base_folder)
    assert config.model_type == "grm"
    assert fields(config.text_config) == fields(AutoConfig.from_pretrained(base_folder))


def test_grm_is_refused_as_a_base(make_grm, tmp_path):
    make_grm().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a GRM already\. Load it with GRMForRewardModeling.from_pretrained"):
        GRMForRewardModeling.from_base_pretrained(tmp_path)
