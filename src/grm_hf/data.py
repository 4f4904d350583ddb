"""Preference rows to tokens, in the multiple-choice layout: one list of responses per row, the preferred one first."""

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

from datasets import Dataset, Features, IterableDataset, Value
from datasets import Sequence as SequenceFeature
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .modeling.encoding_grm import Encoded, Text, as_response, encode, truncate_prompt


logger = logging.get_logger(__name__)

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)

_TOO_LONG = "longer than max_length"
_IDENTICAL = "with a rejected response equal to the chosen one"
_EMPTY = "with an empty response"


def tokenize_preferences(
    dataset: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    overlong: str = "drop",
    num_proc: int | None = None,
) -> AnyDataset:
    r"""
    Tokenize preference rows for [`GRMForRewardModeling`].

    Rows are in TRL's preference formats: `chosen` and `rejected`, with the prompt in `prompt` or as what the two have
    in common; text, or lists of messages with `role` and `content`. `rejected` may be a list of several responses. An
    optional `margin` (by how much the chosen response is better) is kept; rows without one get 0.

    Rows that can't be compared are dropped and counted in a warning: an empty response, a rejected response equal to
    the chosen one, and with `overlong="drop"` a row with a sequence longer than `max_length`.

    Args:
        dataset (`Dataset` or `IterableDataset`): Preference rows.
        tokenizer (`PreTrainedTokenizerBase`): With a chat template where rows hold messages.
        max_length (`int`, *optional*): Most tokens of a prompt with one response. `None` for no limit.
        overlong (`str`, defaults to `"drop"`):
            `"drop"`, or `"truncate_prompt"`, which leaves out the prompt's oldest tokens, for each response on its
            own; a row whose response alone is too long is dropped even so. A response is never cut.
        num_proc (`int`, *optional*): Number of processes, for a `Dataset`.

    Returns:
        A dataset of the same kind with the columns `input_ids` and `completion_mask` (per row one list per response,
        the chosen one first), `length` (tokens of the longest response with its prompt) and, if given, `margin`.

    Raises:
        ValueError: If a column is missing, or a row is unusable; the message names the row.
    """
    if overlong not in ("drop", "truncate_prompt"):
        raise ValueError(f"`overlong` must be 'drop' or 'truncate_prompt', got {overlong!r}.")
    columns = dataset.column_names or list(next(iter(dataset), {}))
    missing = {"chosen", "rejected"} - set(columns)
    if missing:
        raise ValueError(
            f"The dataset lacks {sorted(missing)}; it has {sorted(columns)}. Rename its columns to prompt, chosen and "
            "rejected, or use grm_hf.to_preferences for a dataset that it knows."
        )
    if unused := {"tools", "chat_template_kwargs"} & set(columns):
        raise ValueError(
            f"The columns {sorted(unused)} would change the text, but are not supported. Render the chat template "
            "with them yourself, or remove them with dataset.remove_columns."
        )
    features = Features(
        {
            "input_ids": SequenceFeature(SequenceFeature(Value("int32"))),
            "completion_mask": SequenceFeature(SequenceFeature(Value("int8"))),
            "length": Value("int32"),
            "dropped": Value("string"),
        }
    )
    if "margin" in columns:
        features["margin"] = Value("float32")
    tokenized = dataset.map(
        partial(_tokenize_batch, tokenizer=tokenizer, max_length=max_length, overlong=overlong),
        batched=True,
        with_indices=True,
        remove_columns=columns,
        features=features,
        **({"num_proc": num_proc, "desc": "Tokenizing"} if isinstance(dataset, Dataset) else {}),
    )
    if isinstance(tokenized, IterableDataset):
        return tokenized.filter(_is_kept, input_columns="dropped").remove_columns("dropped")
    return _without_dropped(tokenized, max_length)


def _without_dropped(tokenized: Dataset, max_length: int | None) -> Dataset:
    reasons = list(tokenized["dropped"])
    counts = Counter(reason for reason in reasons if reason)
    if counts:
        details = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        limit = f" (max_length={max_length})" if _TOO_LONG in counts else ""
        message = f"Dropped {counts.total()} of {len(reasons)} rows: {details}{limit}."
        if counts.total() == len(reasons):
            raise ValueError(f"{message} No row is left.")
        logger.warning(message)
    tokenized = tokenized.select([index for index, reason in enumerate(reasons) if not reason])
    return tokenized.remove_columns("dropped")


def _is_kept(dropped: str) -> bool:
    if dropped:
        # A stream has no end at which to count.
        logger.warning_once(f"Dropping rows {dropped}.")
    return not dropped


def _tokenize_batch(
    batch: dict[str, list[Any]],
    indices: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    overlong: str,
) -> dict[str, list[Any]]:
    rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
    split = []
    for row, index in zip(rows, indices):
        try:
            split.append(split_row(row))
        except ValueError as error:
            raise ValueError(f"Row {index}: {error}.") from error
        if len(split[-1][1]) != len(split[0][1]):
            raise ValueError(
                f"Row {index} has {len(split[-1][1])} responses, the rows before it {len(split[0][1])}. A batch needs "
                "equally many: keep as many rejected responses in each row."
            )
    pairs = [(prompt, response) for prompt, responses in split for response in responses]
    try:
        encoded = iter(encode(tokenizer, pairs))
    except ValueError:
        # Once more, row by row, to name the row.
        for (prompt, responses), index in zip(split, indices):
            try:
                encode(tokenizer, [(prompt, response) for response in responses])
            except ValueError as error:
                raise ValueError(f"Row {index}: {error}.") from error
        raise
    output: dict[str, list[Any]] = {"input_ids": [], "completion_mask": [], "length": [], "dropped": []}
    for (_, responses), index in zip(split, indices):
        items = [next(encoded) for _ in responses]
        dropped = _reason_to_drop(responses, items)
        if not dropped:
            if not all(1 in item.completion_mask for item in items):
                raise ValueError(f"Row {index}: a response has no message of the assistant.")
            fitting = _fit(items, max_length, overlong, tokenizer.bos_token_id)
            items, dropped = (fitting, "") if fitting else (items, _TOO_LONG)
        output["input_ids"].append([item.input_ids for item in items])
        output["completion_mask"].append([item.completion_mask for item in items])
        output["length"].append(max(len(item.input_ids) for item in items))
        output["dropped"].append(dropped)
    if "margin" in batch:
        output["margin"] = [0.0 if margin is None else margin for margin in batch["margin"]]
        for margin, index in zip(output["margin"], indices):
            if not math.isfinite(margin):
                raise ValueError(f"Row {index}: `margin` is {margin}.")
    return output


def _reason_to_drop(responses: list[Text], items: list[Encoded]) -> str:
    texts = [
        response if isinstance(response, str) else "".join(str(message["content"]) for message in response)
        for response in responses
    ]
    if not all(text.strip() for text in texts):
        return _EMPTY
    # Tokens rather than text: a template may trim what sets two responses apart.
    return _IDENTICAL if items[0].input_ids in [item.input_ids for item in items[1:]] else ""


def _fit(
    items: list[Encoded], max_length: int | None, overlong: str, bos_token_id: int | None
) -> list[Encoded] | None:
    if max_length is None or all(len(item.input_ids) <= max_length for item in items):
        return items
    if overlong == "drop":
        return None
    fitting = [truncate_prompt(item, max_length, bos_token_id) for item in items]
    return None if None in fitting else [item for item in fitting if item is not None]


def split_row(row: dict[str, Any]) -> tuple[Text, list[Text]]:
    """
    Prompt and responses, the chosen one first, of a row in one of TRL's preference formats.

    Raises:
        ValueError: If a column is `None`, empty or of the wrong type.
    """
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise ValueError(f"`{name}` is None")
        if not isinstance(row[name], (str, list)):
            raise ValueError(f"`{name}` must be text or a list of messages, got {type(row[name]).__name__}")
    chosen, rejected = row["chosen"], row["rejected"]
    # Several rejected responses: a list of texts, or a list of lists of messages.
    several = isinstance(rejected, list) and len(rejected) > 0 and isinstance(rejected[0], (str, list))
    responses = [_clean(response) for response in [chosen, *(rejected if several else [rejected])]]
    if "prompt" in row:
        if row["prompt"] is None:
            raise ValueError("`prompt` is None")
        prompt = _clean(row["prompt"])
        return prompt, [as_response(prompt, response) for response in responses]
    if len({type(response) for response in responses}) != 1:
        raise ValueError("`chosen` and `rejected` must both be text or both be lists of messages")
    length = _common_prompt(responses)
    return responses[0][:length], [response[length:] for response in responses]


def _clean(text: Any) -> Text:
    """Messages without the keys that Arrow fills with None where another message has them."""
    if isinstance(text, str):
        return text
    if not isinstance(text, list) or not all(isinstance(message, dict) for message in text):
        raise ValueError(f"expected text or a list of messages, got {str(text)[:80]!r}")
    return [
        {key: value for key, value in message.items() if value is not None or key == "content"} for message in text
    ]


def _common_prompt(responses: list[Any]) -> int:
    """Length, in characters or messages, of the implicit prompt: what all responses begin with."""
    shortest = min(len(response) for response in responses)
    length = next((i for i in range(shortest) if any(r[i] != responses[0][i] for r in responses[1:])), shortest)
    if isinstance(responses[0], str):
        # As in TRL, a space before the first difference belongs to the responses.
        return length - 1 if length > 0 and responses[0][length - 1] == " " else length
    # Equal responses, or one that continues another: keep a final turn to compare.
    return length - 1 if length == shortest and length else length
