"""Rewards of many inputs at once, with the pipeline's inputs, outputs and encoding."""

from collections.abc import Iterable
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

from .collator import pad_sequences
from .modeling import GRMConfig
from .modeling.encoding_grm import encode
from .modeling.pipeline_grm import as_result, fit, max_tokens, parse_inputs


class RewardScorer:
    """
    Scores whatever the pipeline "reward-modeling" takes, in batches of like lengths.

    Args:
        model ([`GRMForRewardModeling`]): The reward model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.

    Example:

    ```python
    scorer = RewardScorer.from_pretrained("user/grm", dtype="bfloat16", device_map="cuda")
    scorer([{"prompt": "Is 7 prime?", "responses": ["Yes.", "No."]}])
    # [{"scores": [1.3, -0.2], "margin": 1.5, "preferred": 0}]
    ```
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, name_or_path: str, **kwargs: Any) -> "RewardScorer":
        """
        Load model and tokenizer; `kwargs` go to `AutoModel.from_pretrained`.

        Raises:
            ValueError: If it is another kind of model.
        """
        hub = {name: kwargs[name] for name in ("revision", "token", "trust_remote_code") if name in kwargs}
        model = AutoModel.from_pretrained(name_or_path, **kwargs)
        if model.config.model_type != GRMConfig.model_type:
            raise ValueError(
                f"{name_or_path} is a {type(model).__name__}, not a GRM; grm-hf train makes one from a language model."
            )
        return cls(model, AutoTokenizer.from_pretrained(name_or_path, **hub))

    @torch.no_grad()
    def __call__(
        self,
        inputs: Iterable[Any],
        batch_size: int = 16,
        max_length: int | None = None,
        overlong: str = "error",
        progress: bool = False,
    ) -> list[dict[str, Any]]:
        """
        Score `inputs`.

        Args:
            inputs (`Iterable`): Inputs of [`GRMPipeline`].
            batch_size (`int`, defaults to 16): Sequences per forward pass.
            max_length (`int`, *optional*): As in [`GRMPipeline`].
            overlong (`str`, defaults to `"error"`): As in [`GRMPipeline`].
            progress (`bool`, defaults to `False`): Show a progress bar, in sequences.

        Returns:
            `list[dict]`: Outputs of [`GRMPipeline`], in the order of `inputs`.

        Raises:
            ValueError: If an input can't be scored; the message names its index.
        """
        if overlong not in ("error", "truncate_prompt"):
            raise ValueError(f"`overlong` must be 'error' or 'truncate_prompt', got {overlong!r}.")
        limit = max_tokens(self.model, self.tokenizer) if max_length is None else max_length
        sequences: list[list[int]] = []
        parts: list[tuple[int, bool]] = []
        for index, item in enumerate(inputs):
            try:
                prompt, responses, is_set = parse_inputs(item)
                encoded = encode(self.tokenizer, [(prompt, response) for response in responses])
                fitting = [fit(entry, limit, overlong, self.tokenizer.bos_token_id) for entry in encoded]
            except ValueError as error:
                raise ValueError(f"Input {index}: {error}") from error
            sequences.extend(entry.input_ids for entry in fitting)
            parts.append((len(fitting), is_set))
        rewards = iter(self._rewards(sequences, batch_size, progress))
        return [as_result([next(rewards) for _ in range(count)], is_set) for count, is_set in parts]

    def _rewards(self, sequences: list[list[int]], batch_size: int, progress: bool) -> list[float]:
        order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
        rewards = [0.0] * len(sequences)
        with tqdm(total=len(order), desc="Scoring", unit="seq", disable=not progress) as bar:
            for start in range(0, len(order), batch_size):
                indices = order[start : start + batch_size]
                input_ids, mask = pad_sequences([sequences[index] for index in indices], 0)
                device = self.model.device
                logits = self.model(input_ids=input_ids.to(device), attention_mask=mask.to(device)).logits
                for index, reward in zip(indices, logits[:, 0].tolist()):
                    rewards[index] = reward
                bar.update(len(indices))
        return rewards
