"""Configuration of a GRM: the base language model's configuration plus the reward head and the regularized loss."""

import math
from typing import Any, Optional, Union

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig


_CHOICES: dict[str, tuple[str, ...]] = {
    "head_type": ("mlp", "linear"),
    "regularization": ("sft", "nll", "dpo", "dpo_reference_free", "none"),
    "logps_reduction": ("sum", "mean"),
}
_RANGES: dict[str, tuple[Any, str, Any]] = {
    "head_hidden_size": (int, "an integer of at least 1", lambda value: value >= 1),
    "head_num_layers": (int, "an integer of at least 1", lambda value: value >= 1),
    "head_dropout": ((int, float), "a number in [0, 1)", lambda value: 0 <= value < 1),
    "regularization_weight": ((int, float), "a number in [0, 1]", lambda value: 0 <= value <= 1),
    "beta": ((int, float), "a finite number above 0", lambda value: 0 < value < math.inf),
    "label_smoothing": ((int, float), "a number in [0, 0.5)", lambda value: 0 <= value < 0.5),
    "center_rewards_coefficient": (
        (int, float),
        "None or a finite number of at least 0",
        lambda value: 0 <= value < math.inf,
    ),
}


class GRMConfig(PretrainedConfig):
    r"""
    Configuration of [`GRMForRewardModeling`] (arXiv 2406.10216).

    The loss is `(1 - regularization_weight) * reward_loss + regularization_weight * regularization_loss`.

    | paper | here | flag of the authors' code |
    |---|---|---|
    | \\(\alpha\\) | `regularization_weight` | `weight_ratio` |
    | \\(\beta\\) | `beta` | `beta` |
    | SFT regularization | `regularization="sft"` | `sft_only=True` |
    | — | `regularization="nll"` | `no_logsigmoid_sft=True` |
    | DPO regularization | `regularization="dpo"` | `sft_only=False, reference_free=False` |
    | DPO without a reference | `regularization="dpo_reference_free"` | `sft_only=False, reference_free=True` |
    | reward head | `head_type` | `layer_type` |
    | neurons of the head | `head_hidden_size` | `num_neurons` |
    | hidden layers of the head | `head_num_layers` | `num_layers` |

    Args:
        text_config (`PretrainedConfig` or `dict`, *optional*):
            Configuration of the base causal language model. Defaults to a `LlamaConfig`.
        head_type (`str`, defaults to `"mlp"`):
            `"mlp"`: `head_num_layers` hidden layers with ReLU, then one output; `"linear"`: one output.
        head_hidden_size (`int`, defaults to 1024):
            Width of the hidden layers of an `"mlp"` head.
        head_num_layers (`int`, defaults to 1):
            Number of hidden layers of an `"mlp"` head.
        head_dropout (`float`, defaults to 0.1):
            Dropout probability on the head's input.
        regularization (`str`, defaults to `"sft"`):
            Text-generation loss on the retained language-model head: `"sft"`, `"nll"`, `"dpo"`,
            `"dpo_reference_free"`, or `"none"` for plain Bradley-Terry.
        regularization_weight (`float`, defaults to 0.01):
            Share of the text-generation loss in the total loss, in [0, 1].
        beta (`float`, defaults to 0.1):
            Scale of the log-probabilities (nats) inside the log-sigmoid of `"sft"`, `"dpo"`, `"dpo_reference_free"`.
        logps_reduction (`str`, defaults to `"sum"`):
            Whether the regularizer sees a response's log-probability summed over its tokens (the paper) or their mean.
        label_smoothing (`float`, defaults to 0.0):
            Assumed probability, in [0, 0.5), that the annotated preference is wrong.
        center_rewards_coefficient (`float`, *optional*):
            Weight of the squared sum of a row's rewards, to keep them around zero (arXiv 2312.09244; as in TRL).

    Raises:
        ValueError: If a value is not allowed; the message names what is.
    """

    model_type = "grm"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["reward_loss", "regularization_loss", "logps"]

    def __init__(
        self,
        text_config: Optional[Union[PretrainedConfig, dict[str, Any]]] = None,
        head_type: str = "mlp",
        head_hidden_size: int = 1024,
        head_num_layers: int = 1,
        head_dropout: float = 0.1,
        regularization: str = "sft",
        regularization_weight: float = 0.01,
        beta: float = 0.1,
        logps_reduction: str = "sum",
        label_smoothing: float = 0.0,
        center_rewards_coefficient: Optional[float] = None,
        **kwargs: Any,
    ) -> None:
        self.text_config = _as_config(text_config)
        self.head_type = head_type
        self.head_hidden_size = head_hidden_size
        self.head_num_layers = head_num_layers
        self.head_dropout = head_dropout
        self.regularization = regularization
        self.regularization_weight = regularization_weight
        self.beta = beta
        self.logps_reduction = logps_reduction
        self.label_smoothing = label_smoothing
        self.center_rewards_coefficient = center_rewards_coefficient

        kwargs.setdefault("num_labels", 1)
        # "regression" makes the stock text-classification pipeline return the reward itself, without a sigmoid.
        kwargs["problem_type"] = "regression"
        # Older transformers assign these in the parent's __init__; without them they would overwrite the backbone's.
        kwargs.setdefault("pad_token_id", self.text_config.pad_token_id)
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # `from_pretrained(..., beta=...)` and later changes assign fields too: checked here, no bad value gets in.
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, _CHOICES[name]))}, got {value!r}.")
        if name in _RANGES and not (value is None and name == "center_rewards_coefficient"):
            kinds, allowed, holds = _RANGES[name]
            if not isinstance(value, kinds) or isinstance(value, bool) or not holds(value):
                raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")
        if (name == "num_labels" and value != 1) or (name == "id2label" and value is not None and len(value) != 1):
            raise ValueError(f"A GRM has one reward: num_labels must be 1, got {value!r}.")
        super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From its own dictionary, or from a base model's, which is what PEFT reads when it saves an adapter."""
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            config_dict = {"text_config": config_dict}
        return super().from_dict(config_dict, **kwargs)

    @property
    def uses_language_model(self) -> bool:
        """Whether the loss depends on the language-model head."""
        return self.regularization != "none" and self.regularization_weight > 0

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.text_config.vocab_size = value

    @property
    def pad_token_id(self) -> Optional[int]:
        return self.text_config.pad_token_id

    @pad_token_id.setter
    def pad_token_id(self, value: Optional[int]) -> None:
        self.text_config.pad_token_id = value

    @property
    def custom_pipelines(self) -> dict[str, Any]:
        """The entry by which `pipeline` finds [`GRMPipeline`]."""
        entry = {"impl": "pipeline_grm.GRMPipeline", "pt": ["AutoModel"], "tf": [], "type": "text"}
        is_remote = type(self).__module__.startswith("transformers_modules.")
        return (dict if is_remote else _RegisteredPipelines)({"reward-modeling": entry})

    @custom_pipelines.setter
    def custom_pipelines(self, value: Any) -> None:
        """Loading a configuration and saving a pipeline assign what is known already."""

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is saved, with the entries by which auto classes and pipelines find the code."""
        # Written anew each time: a checkpoint loaded from a repository carries "repository--module.Class" entries,
        # which would tie its fine-tuned copies to that repository's code.
        output = super().to_dict()
        model = "modeling_grm.GRMForRewardModeling"
        output["auto_map"] = {
            "AutoConfig": "configuration_grm.GRMConfig",
            "AutoModel": model,
            "AutoModelForSequenceClassification": model,
        }
        output["custom_pipelines"] = dict(self.custom_pipelines)
        return output


class _RegisteredPipelines(dict):
    """
    `pipeline` infers a missing task from the keys, then asks with `in` whether the task's code is remote. Installed
    code is not: without this, it would need `trust_remote_code=True`, and not work on a model object at all.
    """

    def __contains__(self, task: object) -> bool:
        return False


def _as_config(text_config: Optional[Union[PretrainedConfig, dict[str, Any]]]) -> PretrainedConfig:
    if text_config is None:
        return CONFIG_MAPPING["llama"]()
    if not isinstance(text_config, dict):
        return text_config
    model_type = text_config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"text_config has model_type={model_type!r}, which this version of transformers does not know. "
            "Upgrade transformers, or load the backbone's own configuration and pass it as `text_config`."
        )
    return CONFIG_MAPPING[model_type](**text_config)
