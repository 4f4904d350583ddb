"""Pipeline "reward-modeling": rewards of texts, chats and responses to a prompt."""

from collections.abc import Iterator
from typing import Any, Optional

import torch
from transformers.pipelines.base import ChunkPipeline

from .encoding_grm import Encoded, Text, as_response, encode, truncate_prompt


_FORMS = (
    'a string, a list of messages, {"prompt", "response"}, {"prompt", "responses"} or {"prompt", "chosen", "rejected"}'
)


class GRMPipeline(ChunkPipeline):
    """
    Scores texts, chats and responses with a [`GRMForRewardModeling`].

    | input | output |
    |---|---|
    | a string | `{"score"}` |
    | a chat: a list of messages | `{"score"}` |
    | `{"prompt", "response"}` | `{"score"}` |
    | `{"prompt", "responses": [...]}` | `{"scores", "margin", "preferred"}` |
    | `{"prompt", "chosen", "rejected"}` | `{"scores", "margin", "preferred"}` |

    and lists of them. Prompts and responses are strings or lists of messages; under a prompt of messages a response
    may also be a string. `margin` is the reward of the first response less the best of the others,
    `preferred` the index of the best response.

    Args:
        max_length (`int`, *optional*):
            Most tokens of prompt and response. Defaults to the smaller of the tokenizer's and the backbone's limit.
        overlong (`str`, defaults to `"error"`):
            What to do with a longer input: `"error"`, or `"truncate_prompt"`, which leaves out the prompt's oldest
            tokens and never a token of the response.

    Example:

    ```python
    scorer = pipeline("reward-modeling", model="user/grm")
    scorer({"prompt": "Is 7 prime?", "chosen": "Yes.", "rejected": "No."})
    # {"scores": [1.3, -0.2], "margin": 1.5, "preferred": 0}
    ```
    """

    def _sanitize_parameters(
        self, max_length: Optional[int] = None, overlong: Optional[str] = None, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if kwargs:
            raise TypeError(f"Unknown options {sorted(kwargs)}; the pipeline takes `max_length` and `overlong`.")
        if overlong not in (None, "error", "truncate_prompt"):
            raise ValueError(f"`overlong` must be 'error' or 'truncate_prompt', got {overlong!r}.")
        options = {"max_length": max_length, "overlong": overlong}
        return {name: value for name, value in options.items() if value is not None}, {}, {}

    def preprocess(
        self, inputs: Any, max_length: Optional[int] = None, overlong: str = "error"
    ) -> Iterator[dict[str, Any]]:
        prompt, responses, is_set = parse_inputs(inputs)
        tokenizer: Any = self.tokenizer
        if tokenizer is None:
            raise ValueError("The pipeline has no tokenizer. Pass `tokenizer=AutoTokenizer.from_pretrained(...)`.")
        try:
            encoded = encode(tokenizer, [(prompt, response) for response in responses])
        except ValueError as error:
            raise ValueError(f"Can't score {str(inputs)[:200]!r}: {error}.") from error
        limit = max_tokens(self.model, tokenizer) if max_length is None else max_length
        for index, item in enumerate(encoded):
            fitting = fit(item, limit, overlong, tokenizer.bos_token_id)
            input_ids = torch.tensor([fitting.input_ids])
            yield {
                "input_ids": input_ids,
                "attention_mask": torch.ones_like(input_ids),
                "is_set": is_set,
                "is_last": index == len(encoded) - 1,
            }

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        is_set, is_last = model_inputs.pop("is_set"), model_inputs.pop("is_last")
        return {"logits": self.model(**model_inputs).logits, "is_set": is_set, "is_last": is_last}

    def postprocess(self, model_outputs: list[dict[str, Any]]) -> dict[str, Any]:
        scores = [output["logits"].item() for output in model_outputs]
        # Batches turn the flag into a list or a tensor of one.
        return as_result(scores, bool(torch.as_tensor(model_outputs[0]["is_set"]).all()))


def as_result(scores: list[float], is_set: bool) -> dict[str, Any]:
    """The pipeline's output for the rewards of one input's responses."""
    if not is_set:
        return {"score": scores[0]}
    margin = scores[0] - max(scores[1:]) if len(scores) > 1 else None
    return {"scores": scores, "margin": margin, "preferred": max(range(len(scores)), key=scores.__getitem__)}


def max_tokens(model: Any, tokenizer: Any) -> int:
    """The longest input, in tokens, that both the tokenizer and the backbone's positions allow."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(tokenizer.model_max_length, positions or tokenizer.model_max_length)


def fit(encoded: Encoded, max_length: int, overlong: str, bos_token_id: Optional[int]) -> Encoded:
    """
    `encoded` within `max_length` tokens.

    Raises:
        ValueError: If it is longer and `overlong` is `"error"`, or the response alone is too long.
    """
    if len(encoded.input_ids) <= max_length:
        return encoded
    shorter = truncate_prompt(encoded, max_length, bos_token_id)
    if overlong == "truncate_prompt" and shorter is not None:
        return shorter
    advice = "the response alone is too long" if shorter is None else "pass overlong='truncate_prompt'"
    raise ValueError(f"The input has {len(encoded.input_ids)} tokens, more than max_length={max_length}: {advice}.")


def parse_inputs(inputs: Any) -> tuple[Text, list[Text], bool]:
    """Prompt, responses, and whether the input asks for a set of responses rather than for one score."""
    # Newer transformers hand chats over in a wrapper.
    inputs = getattr(inputs, "messages", inputs)
    if isinstance(inputs, str):
        return inputs, [""], False
    if isinstance(inputs, (list, tuple)) and inputs and isinstance(inputs[0], dict):
        return list(inputs[:-1]), [list(inputs[-1:])], False
    if not isinstance(inputs, dict) or "prompt" not in inputs:
        raise ValueError(f"The pipeline takes {_FORMS}, got {str(inputs)[:200]!r}.")
    prompt, keys = inputs["prompt"], set(inputs) - {"prompt"}
    if keys == {"response"}:
        return prompt, [as_response(prompt, inputs["response"])], False
    if keys == {"responses"}:
        responses = list(inputs["responses"])
    elif keys == {"chosen", "rejected"}:
        responses = [inputs["chosen"], inputs["rejected"]]
    else:
        raise ValueError(f"The pipeline takes {_FORMS}, got a dictionary with {sorted(inputs)}.")
    if not responses:
        raise ValueError("`responses` is empty.")
    return prompt, [as_response(prompt, response) for response in responses], True
