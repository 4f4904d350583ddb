"""GRM: a causal language model that keeps its head and learns a scalar reward head behind the same hidden states."""

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_grm import GRMConfig
from .losses_grm import dpo_loss, nll_loss, preference_loss, response_logps, sft_loss


if TYPE_CHECKING:
    # A checkpoint carries the files that this one imports relatively, and older transformers load none but those.
    from .encoding_grm import Encoded  # noqa: F401
    from .pipeline_grm import GRMPipeline  # noqa: F401

# Backbones whose logits are `lm_head(hidden_states)`, apart from what `_language_model_logits` applies. Their head can
# run on the response's tokens alone. Any other backbone goes through its own forward, on all tokens.
_DIRECT_HEADS = {
    "cohere",
    "gemma",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
}


# Where multimodal checkpoints keep their language model.
_MULTIMODAL_KEYS = {r"^model\.language_model\.": "model.", r"^language_model\.": ""}


@dataclass
class GRMOutput(ModelOutput):
    """
    Output of [`GRMForRewardModeling`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned with `labels`):
            `(1 - regularization_weight) * reward_loss + regularization_weight * regularization_loss`, mean over rows.
        logits (`torch.FloatTensor` of shape `(batch, num_responses)` or `(batch, 1)`):
            Rewards, float32.
        reward_loss (`torch.FloatTensor` of shape `()`, *optional*, returned with `labels`):
            Preference loss, mean over rows, detached.
        regularization_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Text-generation loss, mean over rows, detached. `None` where the configuration has none.
        logps (`torch.FloatTensor` of shape `(batch, num_responses)`, *optional*):
            Log-probability of each response, summed over its tokens, in nats, detached. While training with a
            regularizer that needs the preferred response alone, the others are NaN. `None` without a regularizer.
    """

    loss: Optional[torch.Tensor] = None
    logits: Optional[torch.Tensor] = None
    reward_loss: Optional[torch.Tensor] = None
    regularization_loss: Optional[torch.Tensor] = None
    logps: Optional[torch.Tensor] = None


class Float32Linear(nn.Module):
    """
    A linear layer that computes in float32 whatever the dtype of its input, its weights or an autocast region.

    It is not an `nn.Linear`, because quantizers and PEFT's "all-linear" replace every `nn.Linear` that they find.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=torch.float32))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(inputs.device.type, enabled=False):
            return F.linear(inputs.float(), self.weight.float(), self.bias.float())


class RewardHead(nn.Module):
    """
    Maps hidden states `(..., hidden_size)` to rewards `(...,)` in float32, as bf16 would leave few distinct rewards.

    Args:
        input_size (`int`): Width of the hidden states.
        config ([`GRMConfig`]): Gives `head_type`, `head_hidden_size`, `head_num_layers` and `head_dropout`.
    """

    def __init__(self, input_size: int, config: GRMConfig) -> None:
        super().__init__()
        hidden_sizes = [config.head_hidden_size] * config.head_num_layers if config.head_type == "mlp" else []
        sizes = [input_size, *hidden_sizes, 1]
        self.dropout = nn.Dropout(config.head_dropout)
        self.layers = nn.ModuleList(Float32Linear(i, o) for i, o in zip(sizes, sizes[1:]))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # (..., hidden_size) -> (...,)
        hidden_states = self.layers[0](self.dropout(hidden_states))
        for layer in self.layers[1:]:
            hidden_states = layer(F.relu(hidden_states))
        return hidden_states.squeeze(-1)


class GRMForRewardModeling(PreTrainedModel):
    """
    Causal language model with its own head, a reward head ([`RewardHead`], `score`) and the regularized loss.

    `model.backbone` is the language model: `model.backbone.generate(...)`, `model.backbone.save_pretrained(...)` work.

    Args:
        config ([`GRMConfig`]): Configuration.
    """

    config_class = GRMConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    # The loss divides by `num_items_in_batch`, so gradient accumulation equals one large batch.
    accepts_loss_kwargs = True
    _keep_in_fp32_modules_strict = ["score"]
    _no_split_modules = ["RewardHead"]
    # What a backbone does not support, the backbone itself refuses.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: GRMConfig) -> None:
        super().__init__(config)
        self.backbone = AutoModelForCausalLM.from_config(
            config.text_config, trust_remote_code=_is_remote(config.text_config)
        )
        lm_head = self.backbone.get_output_embeddings()
        if lm_head is None:
            raise ValueError(
                f"{type(self.backbone).__name__} has no output embeddings; a GRM needs a causal language model."
            )
        if self.backbone.base_model is self.backbone:
            raise ValueError(f"{type(self.backbone).__name__} has no separate body below its language-model head.")
        self.score = RewardHead(lm_head.weight.shape[-1], config)
        self._takes_position_ids = "position_ids" in inspect.signature(self.backbone.base_model.forward).parameters
        self.post_init()
        self._freeze_unused_head()

    def _freeze_unused_head(self) -> None:
        # A trainable head without gradients stops DDP at its second step.
        if not self.config.uses_language_model and not self.config.text_config.tie_word_embeddings:
            self.get_output_embeddings().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in [`~transformers.PreTrainedModel.from_pretrained`]."""
        loaded = super().from_pretrained(*args, **kwargs)
        # Loading makes every weight trainable.
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze_unused_head()
        return loaded

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """
        As in [`~transformers.integrations.PeftAdapterMixin.load_adapter`], which `from_pretrained` calls too.

        Raises:
            RuntimeError: if the adapter has a reward head of its own and its weights were not found.
        """
        loading_info = super().load_adapter(*args, **kwargs)
        missing = sorted(name for name in getattr(loading_info, "missing_keys", ()) if name.startswith("score."))
        if missing:
            raise RuntimeError(
                f"The adapter's reward head did not load, {', '.join(missing)} would be random. transformers before "
                "5.18 does not find it here; peft.PeftModel.from_pretrained(model, adapter) does."
            )
        return loading_info

    @classmethod
    def from_base_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "GRMForRewardModeling":
        r"""
        A GRM on top of a pretrained causal language model: the base's weights, and a new reward head.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                Hub repository or folder of a causal language model; of a multimodal one, its language model is taken.
            kwargs:
                Fields of [`GRMConfig`], and options of `from_pretrained`: `dtype`, `device_map`,
                `quantization_config`, `attn_implementation`, `revision`, `token`, `trust_remote_code`, ...

        Returns:
            [`GRMForRewardModeling`], in evaluation mode as every `from_pretrained` leaves it.

        Raises:
            ValueError: If it is a GRM already, or lacks weights of the language model.

        Example:

        ```python
        model = GRMForRewardModeling.from_base_pretrained("Qwen/Qwen3-0.6B", regularization="sft", dtype="bfloat16")
        ```
        """
        fields = set(inspect.signature(GRMConfig.__init__).parameters) - {"self", "text_config", "kwargs"}
        grm_options = {name: kwargs.pop(name) for name in fields & kwargs.keys()}
        # These reach both the configuration's files and the weights' files.
        hub_options = {
            name: kwargs[name]
            for name in ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
            if name in kwargs
        }
        remote = {name: kwargs.pop(name) for name in ("trust_remote_code", "code_revision") if name in kwargs}
        text_config = kwargs.pop("text_config", None)
        if text_config is None:
            text_config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **hub_options, **remote)
        if text_config.model_type == GRMConfig.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} is a GRM already. Load it with "
                "GRMForRewardModeling.from_pretrained, which takes other values for its loss as options too."
            )
        if text_config.get_text_config() is not text_config:
            is_tied = text_config.tie_word_embeddings
            text_config = text_config.get_text_config()
            text_config.tie_word_embeddings = is_tied
            kwargs.setdefault("key_mapping", _MULTIMODAL_KEYS)
        config = GRMConfig(text_config=text_config, **grm_options)
        dtype = getattr(text_config, "dtype", None)
        if dtype is not None:
            config.dtype = dtype
        if getattr(text_config, "quantization_config", None) is not None:
            config.quantization_config = text_config.quantization_config
        with_info = kwargs.pop("output_loading_info", False)
        model, info = cls.from_pretrained(
            pretrained_model_name_or_path, config=config, output_loading_info=True, **kwargs
        )
        # Saving would turn the base's names around, `key_mapping` included.
        model.__dict__.pop("_weight_conversions", None)
        missing = sorted(name for name in info["missing_keys"] if not name.startswith("score."))
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} weights of {type(model.backbone).__name__}, "
                f"which would be random: {', '.join(missing[:3])}, ... A GRM needs a causal language "
                "model with its head; if this is one, a newer transformers may find them."
            )
        return (model, info) if with_info else model  # type: ignore[return-value]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Float32Linear):
            # The initialisation of torch.nn.Linear, which the paper's head has.
            bound = 1 / math.sqrt(module.weight.shape[-1])
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.uniform_(module.bias, -bound, bound)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.backbone.set_output_embeddings(new_embeddings)

    def forward(
        self,
        input_ids: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        completion_mask: Optional[torch.Tensor] = None,
        labels: Optional[torch.Tensor] = None,
        margin: Optional[torch.Tensor] = None,
        ref_logps: Optional[torch.Tensor] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        token_type_ids: Optional[torch.Tensor] = None,
        num_items_in_batch: Optional[torch.Tensor] = None,
        return_dict: Optional[bool] = None,
        **kwargs: Any,
    ) -> Union[GRMOutput, tuple[torch.Tensor, ...]]:
        r"""
        Rewards, and with `labels` the regularized loss.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, num_responses, seq_len)` or `(batch, seq_len)`):
                Prompt and response, one sequence per response; two-dimensional for scoring.
            attention_mask (`torch.Tensor` of the same shape, *optional*):
                1 on tokens, 0 on padding, on either side. Without it every position is a token.
            completion_mask (`torch.Tensor` of the same shape, *optional*):
                1 on the tokens of the response. Needed by every regularizer.
            labels (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Index of the preferred response.
            margin (`torch.FloatTensor` of shape `(batch,)`, *optional*):
                Reward by which the preferred response has to lead.
            ref_logps (`torch.FloatTensor` of shape `(batch, num_responses)`, *optional*):
                Log-probabilities under the reference, summed over the response's tokens, nats. Needed by `"dpo"`.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, seq_len, hidden_size)`, *optional*):
                Embeddings instead of `input_ids`, for scoring alone.
            token_type_ids (`torch.LongTensor`, *optional*):
                Ignored; some tokenizers return it.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Number of rows over all accumulated micro-batches, as `Trainer` passes it.
            return_dict (`bool`, *optional*):
                `False` for a tuple.
            kwargs:
                Passed to the backbone.

        Returns:
            [`GRMOutput`]

        Raises:
            ValueError: If the batch lacks what the loss needs, or has a shape that it can't use.
        """
        inputs = inputs_embeds if input_ids is None else input_ids
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("Give either `input_ids` or `inputs_embeds`.")
        # (batch, num_responses) or (batch,)
        shape = inputs.shape[:2] if input_ids is not None and inputs.dim() == 3 else inputs.shape[:1]
        if labels is not None:
            self._check_batch(shape, completion_mask, ref_logps, inputs_embeds)
        elif self.training and completion_mask is not None:
            raise ValueError(
                "A training batch without `labels` has no loss of a GRM. Trainer takes them away for its own "
                "label_smoothing_factor: use GRMConfig(label_smoothing=...) instead."
            )
        if attention_mask is None:
            if input_ids is not None:
                self.backbone.warn_if_padding_and_no_attention_mask(input_ids, None)
            attention_mask = inputs.new_ones(inputs.shape[: len(shape) + 1], dtype=torch.long)
        # One row per response from here on.
        attention_mask = attention_mask.flatten(0, len(shape) - 1)
        if input_ids is not None:
            input_ids = input_ids.flatten(0, len(shape) - 1)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"].flatten(0, len(shape) - 1)

        needs_logps = labels is not None and self.config.uses_language_model
        hidden_states, logits = self._run_backbone(input_ids, inputs_embeds, attention_mask, needs_logps, kwargs)
        positions = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
        # The rightmost token: neither the pad token's id nor the padding side matters.
        last = (positions * (attention_mask != 0)).argmax(-1).to(hidden_states.device)
        rows = torch.arange(last.shape[0], device=last.device)
        rewards = self.score(hidden_states[rows, last]).to(hidden_states.device).unflatten(0, shape)
        if len(shape) == 1:
            rewards = rewards.unsqueeze(-1)
        if labels is None:
            output = GRMOutput(logits=rewards)
            return output if return_dict is not False else output.to_tuple()

        # A model over several devices ends on another one than its inputs are on.
        labels = labels.to(rewards.device)
        margin = None if margin is None else margin.to(rewards.device)
        ref_logps = None if ref_logps is None else ref_logps.to(rewards.device)
        reward_loss = preference_loss(
            rewards, labels, margin, self.config.label_smoothing, self.config.center_rewards_coefficient
        ).mean()
        loss, regularization_loss, logps = reward_loss, None, None
        if needs_logps and input_ids is not None and completion_mask is not None:
            completion_mask = _predicted(completion_mask.flatten(0, 1), attention_mask).to(hidden_states.device)
            input_ids = input_ids.to(hidden_states.device)
            logps = self._batch_logps(hidden_states, logits, input_ids, completion_mask, labels)
            lengths = completion_mask.sum(-1).view_as(logps)
            regularization_loss = self._regularization_loss(logps, lengths, labels, ref_logps).mean()
            weight = self.config.regularization_weight
            loss = (1 - weight) * reward_loss + weight * regularization_loss
            regularization_loss, logps = regularization_loss.detach(), logps.detach()
        # A tensor of its own: Trainer multiplies the loss in place.
        scale = 1.0 if num_items_in_batch is None else labels.numel() / num_items_in_batch
        output = GRMOutput(
            loss=loss * scale,
            logits=rewards,
            reward_loss=reward_loss.detach(),
            regularization_loss=regularization_loss,
            logps=logps,
        )
        return output if return_dict is not False else output.to_tuple()

    def _check_batch(
        self,
        shape: torch.Size,
        completion_mask: Optional[torch.Tensor],
        ref_logps: Optional[torch.Tensor],
        inputs_embeds: Optional[torch.Tensor],
    ) -> None:
        kind = self.config.regularization
        if len(shape) != 2 or shape[1] < 2 or inputs_embeds is not None:
            raise ValueError(
                "With `labels`, `input_ids` must have shape (batch, num_responses, seq_len) with 2 or more responses, "
                f"got leading dimensions {tuple(shape)}. grm_hf.PreferenceCollator builds such batches."
            )
        if not self.config.uses_language_model:
            return
        if kind in ("dpo", "dpo_reference_free") and shape[1] != 2:
            raise ValueError(
                f"regularization={kind!r} compares exactly two responses, got {shape[1]}. "
                "Use 'sft', 'nll' or 'none' for more."
            )
        if completion_mask is None:
            raise ValueError(
                f"regularization={kind!r} needs `completion_mask` (the response's tokens), but the batch has none. "
                "grm_hf.tokenize_preferences adds it."
            )
        if kind == "dpo" and ref_logps is None:
            raise ValueError(
                "regularization='dpo' needs `ref_logps`, but the batch has none. "
                "Run grm_hf.add_reference_logps(dataset, model) first, or use 'dpo_reference_free'."
            )

    def _run_backbone(
        self,
        input_ids: Optional[torch.Tensor],
        inputs_embeds: Optional[torch.Tensor],
        attention_mask: torch.Tensor,
        with_logits: bool,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Final hidden states `(rows, seq_len, hidden_size)`; logits only for a backbone that must make its own."""
        body = self.backbone.base_model
        # Padding on the left must not shift the tokens' positions.
        if self._takes_position_ids and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask, **kwargs}
        inputs["use_cache"] = False
        inputs["return_dict"] = True
        if not with_logits or self.config.text_config.model_type in _DIRECT_HEADS:
            return body(**inputs).last_hidden_state, None
        outputs = []
        hook = body.register_forward_hook(lambda module, args, output: outputs.append(output.last_hidden_state))
        try:
            logits = self.backbone(**inputs).logits
        finally:
            hook.remove()
        return outputs[0], logits

    def _language_model_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `(tokens, vocab_size)`, float32, of hidden states `(tokens, hidden_size)`, as the backbone's."""
        config = self.config.text_config
        logits = self.backbone.get_output_embeddings()(hidden_states).float()
        if config.model_type == "cohere":
            logits = logits * config.logit_scale
        elif config.model_type == "granite":
            logits = logits / config.logits_scaling
        elif config.model_type == "gemma2" and config.final_logit_softcapping is not None:
            logits = config.final_logit_softcapping * torch.tanh(logits / config.final_logit_softcapping)
        return logits

    def _sequence_logps(
        self,
        hidden_states: torch.Tensor,
        logits: Optional[torch.Tensor],
        input_ids: torch.Tensor,
        completion_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Summed log-probabilities `(rows,)`, from the backbone's own logits where it made them."""
        if logits is not None:
            return response_logps(logits, input_ids, completion_mask, nn.Identity())
        return response_logps(hidden_states, input_ids, completion_mask, self._language_model_logits)

    def _batch_logps(
        self,
        hidden_states: torch.Tensor,
        logits: Optional[torch.Tensor],
        input_ids: torch.Tensor,
        completion_mask: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """Summed log-probabilities `(batch, num_responses)`; in training NaN for responses the loss does not use."""
        num_responses = input_ids.shape[0] // labels.shape[0]
        if not self.training or self.config.regularization not in ("sft", "nll"):
            return self._sequence_logps(hidden_states, logits, input_ids, completion_mask).view(-1, num_responses)
        rows = torch.arange(labels.shape[0], device=labels.device) * num_responses + labels
        logits = None if logits is None else logits[rows]
        preferred = self._sequence_logps(hidden_states[rows], logits, input_ids[rows], completion_mask[rows])
        logps = preferred.new_full((input_ids.shape[0],), math.nan)
        return logps.index_put((rows,), preferred).view(-1, num_responses)

    def _regularization_loss(
        self,
        logps: torch.Tensor,
        lengths: torch.Tensor,
        labels: torch.Tensor,
        ref_logps: Optional[torch.Tensor],
    ) -> torch.Tensor:
        """Text-generation loss `(batch,)` from summed log-probabilities and response lengths in tokens."""
        config = self.config
        if config.logps_reduction == "mean":
            lengths = lengths.clamp(min=1)
            logps = logps / lengths
            ref_logps = None if ref_logps is None else ref_logps / lengths
        if config.regularization == "sft":
            return sft_loss(logps, labels, config.beta)
        if config.regularization == "nll":
            return nll_loss(logps, labels)
        return dpo_loss(logps, labels, config.beta, ref_logps if config.regularization == "dpo" else None)

    @torch.no_grad()
    def response_logps(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_mask: torch.Tensor
    ) -> torch.Tensor:
        r"""
        Log-probability of each response under the language model, summed over its tokens, without gradient.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, num_responses, seq_len)`): Tokens.
            attention_mask (`torch.Tensor` of the same shape): 1 on tokens, 0 on padding.
            completion_mask (`torch.Tensor` of the same shape): 1 on the response's tokens.

        Returns:
            `torch.FloatTensor` of shape `(batch, num_responses)`: nats.
        """
        shape = input_ids.shape[:2]
        input_ids, attention_mask, completion_mask = (
            tensor.flatten(0, 1) for tensor in (input_ids, attention_mask, completion_mask)
        )
        completion_mask = _predicted(completion_mask, attention_mask)
        hidden_states, logits = self._run_backbone(input_ids, None, attention_mask, True, {})
        return self._sequence_logps(hidden_states, logits, input_ids, completion_mask).view(shape)


def _predicted(completion_mask: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """`completion_mask` `(rows, seq_len)` without a sequence's first token, which nothing but padding comes before."""
    return completion_mask * F.pad(attention_mask[:, :-1] != 0, (1, 0))


def _is_remote(config: PretrainedConfig) -> bool:
    # A configuration class from a repository exists only after the user trusted that repository's code.
    return type(config).__module__.startswith("transformers_modules.")
