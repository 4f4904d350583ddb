"""Published preference datasets, under the column names they come with, as rows in TRL's preference format.

What a dataset is follows from its columns alone: a copy, a subset or a local file of the same layout works like the
original, whatever its name. Every adapter is for `Dataset` and `IterableDataset` alike.
"""

import math
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers.utils import logging

from .data import AnyDataset, split_row
from .modeling.encoding_grm import Messages


logger = logging.get_logger(__name__)

_UNIFIED = ["conv_A", "conv_B", "conv_A_rating", "conv_B_rating"]
_SCORES = [("chosen_score", "rejected_score"), ("score_chosen", "score_rejected")]
_KNOWN = (
    f"{', '.join(_UNIFIED)} (Unified-Feedback); chosen, rejected (TRL, Skywork-Reward-Preference, and as text "
    "of Human: and Assistant: turns hh-rlhf); the same with chosen_score, rejected_score (preference_700K) or with "
    "score_chosen, score_rejected (UltraFeedback binarized)"
)
# The paper's subsets of Unified-Feedback, as steps through the rows that are left without ties.
_SUBSAMPLE_STEPS = {"40K": 20, "400K": 2}
_SUMMARY_INSTRUCTION = "Generate one-sentence summary for the following post: "
_DEFAULT_CONFIGS = {"llm-blender/Unified-Feedback": "all"}
_FILE = re.compile(r"\.(?:(?P<json>jsonl?)(?:\.(?:gz|zst|xz|bz2))?|(?P<parquet>parquet))$")
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")

_TIED = "with equal or missing ratings"
_MALFORMED = "that don't alternate from Human: to Assistant: turns, up to an answer"
_MESSAGES = [{"role": Value("string"), "content": Value("string")}]


def load_preferences(
    path: str | Path,
    name: str | None = None,
    split: str = "train",
    streaming: bool = False,
    subsample: str | None = None,
    **load_dataset_kwargs: Any,
) -> Dataset | IterableDataset:
    """
    Load one split of a preference dataset from the Hub or from disk, in TRL's preference format.

    Args:
        path (`str` or `Path`):
            A dataset on the Hub, a folder, or the path or URL of `.json`, `.jsonl`, `.jsonl.gz` or `.parquet` files.
        name (`str`, *optional*): Configuration. llm-blender/Unified-Feedback defaults to `"all"`.
        split (`str`, defaults to `"train"`):
            A split, or a slice such as `"train[:1000]"`. A file is all `"train"`; Unified-Feedback also has `"val"`,
            HuggingFaceH4/ultrafeedback_binarized has `"train_prefs"` and `"test_prefs"`.
        streaming (`bool`, defaults to `False`): Read rows as they are needed, and give an `IterableDataset`.
        subsample (`str`, *optional*): As in [`to_preferences`].
        load_dataset_kwargs: Passed to `datasets.load_dataset`, such as `data_dir` or `revision`.

    Returns:
        `Dataset`, or `IterableDataset` with `streaming=True`, as given by [`to_preferences`].

    Raises:
        FileNotFoundError: If there is no such dataset or file.
        ValueError: If there is no such split, a file is malformed, or [`to_preferences`] can't read the dataset.
    """
    location = os.path.expanduser(path)
    name = name or _DEFAULT_CONFIGS.get(location)
    file = _FILE.search(location)
    if file:
        load_dataset_kwargs["data_files"] = location
        location = str(file.lastgroup)
    try:
        dataset = load_dataset(location, name, split=split, streaming=streaming, **load_dataset_kwargs)
    except DatasetGenerationError as error:
        raise ValueError(f"Can't read {path}: {error.__cause__}") from error
    return to_preferences(cast(Dataset, dataset), subsample=subsample)


def to_preferences(dataset: AnyDataset, subsample: str | None = None) -> AnyDataset:
    """
    Rows of a published preference dataset in TRL's preference format.

    - `conv_A`, `conv_B`, `conv_A_rating`, `conv_B_rating` (llm-blender/Unified-Feedback): the higher rated is
      `chosen`. As in the paper, ties are dropped, and counted in a warning, and where `source` contains "summarize" an
      instruction to do so is put in front of the post.
    - `chosen`, `rejected` as text that begins with "Human:" (Anthropic/hh-rlhf): becomes messages. Rows that don't
      alternate from Human: to Assistant: turns, up to an answer, are dropped, and counted in a warning.
    - `chosen`, `rejected` with `chosen_score`, `rejected_score` (hendrydong/preference_700K) or with `score_chosen`,
      `score_rejected` (UltraFeedback binarized): gets a `margin`.
    - `chosen`, `rejected` otherwise (TRL, Skywork/Skywork-Reward-Preference-80K): unchanged.

    A text `prompt` beside messages that begin with it is left out: the messages hold the prompt.

    `margin` is the difference of the two ratings or scores, 0 where one is missing. Its unit may differ by row:
    Unified-Feedback mixes votes (0 or 1), ranks and marks out of ten, preference_700K marks and counts of Reddit
    votes. The loss asks the chosen response for that lead; to train without it, as the paper does with GRM, use
    `dataset.remove_columns("margin")`.

    Args:
        dataset (`Dataset` or `IterableDataset`): One split.
        subsample (`str`, *optional*):
            A training set of the paper, for Unified-Feedback only: `"40K"` is every 20th and `"400K"` every 2nd of the
            rows that are no ties.

    Returns:
        A dataset of the same kind with `chosen`, `rejected` and, where there are any, `prompt` and `margin`.

    Raises:
        ValueError: If the columns fit no layout, there is no row, or a row is unusable; the message names the row.
    """
    if isinstance(dataset, dict):
        raise ValueError(f"Expected one split, got {sorted(dataset)}. Pass for example dataset[{min(dataset)!r}].")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("The dataset has no rows.")
    columns = dataset.column_names or list(first)
    is_unified = set(_UNIFIED) <= set(columns)
    if subsample is not None and (subsample not in _SUBSAMPLE_STEPS or not is_unified):
        raise ValueError(
            f"`subsample` must be None, or one of {sorted(_SUBSAMPLE_STEPS)} for a dataset with {_UNIFIED}, got "
            f"{subsample!r} for one with {sorted(columns)}. Use `split='train[:1000]'` for other subsets."
        )
    if is_unified:
        return _from_ratings(dataset, columns, subsample)
    if not {"chosen", "rejected"} <= set(columns):
        raise ValueError(
            f"No known layout fits the columns {sorted(columns)}. Known are: {_KNOWN}. "
            "Rename the columns to prompt, chosen and rejected."
        )
    if "prompt" not in columns and str(first["chosen"]).lstrip().startswith("Human:"):
        return _from_dialogues(dataset, columns)
    if isinstance(first.get("prompt"), str) and isinstance(first["chosen"], list):
        dataset = dataset.map(_check_prompt, with_indices=True, input_columns=["prompt", "chosen"])
        dataset = cast(AnyDataset, dataset.remove_columns("prompt"))
        columns = [column for column in columns if column != "prompt"]
    scores = next((pair for pair in _SCORES if set(pair) <= set(columns)), None)
    if scores is None or "margin" in columns:
        return dataset
    return _from_scores(dataset, columns, scores)


def _check_prompt(prompt: str, chosen: Messages, index: int) -> dict[str, Any]:
    asked = [str(message["content"]).strip() for message in chosen if message["role"] != "assistant"]
    if prompt.strip() not in asked:
        raise ValueError(
            f"Row {index}: `prompt` is text, but `chosen` is a list of messages without it. Make it a list of "
            'messages too: [{"role": "user", "content": prompt}].'
        )
    return {}


def _from_ratings(dataset: AnyDataset, columns: list[str], subsample: str | None) -> AnyDataset:
    is_stream = isinstance(dataset, IterableDataset)
    untied = dataset.filter(partial(_is_untied, is_stream=is_stream), input_columns=_UNIFIED[2:])
    _warn_of_dropped(dataset, untied, _TIED)
    step = _SUBSAMPLE_STEPS[subsample] if subsample else 1
    if isinstance(untied, Dataset):
        untied = untied.select(range(0, len(untied), step))
    elif step > 1:
        untied = untied.filter(partial(_is_step, step=step), with_indices=True, input_columns=[])
    _warn_of_margin("the higher rating", "the lower")
    features = Features({"prompt": _MESSAGES, "chosen": _MESSAGES, "rejected": _MESSAGES, "margin": Value("float32")})
    return untied.map(_rated_row, with_indices=True, remove_columns=columns, features=features)


def _is_untied(rating_a: Any, rating_b: Any, is_stream: bool) -> bool:
    is_untied = _difference(rating_a, rating_b) != 0
    if is_stream and not is_untied:
        # A stream has no end at which to count.
        logger.warning_once(f"Dropping rows {_TIED}.")
    return is_untied


def _is_step(index: int, step: int) -> bool:
    return index % step == 0


def _rated_row(row: dict[str, Any], index: int) -> dict[str, Any]:
    margin = _difference(row["conv_A_rating"], row["conv_B_rating"])
    chosen, rejected = ("conv_A", "conv_B") if margin > 0 else ("conv_B", "conv_A")
    try:
        prompt, responses = split_row({"chosen": row[chosen], "rejected": row[rejected]})
    except ValueError as error:
        raise ValueError(f"Row {index} of those used, id {row.get('id')!r}: {error}.") from error
    messages = cast(Messages, prompt)
    if messages and "summarize" in (row.get("source") or ""):
        post = str(messages[0]["content"]).strip()
        messages = [{**messages[0], "content": _SUMMARY_INSTRUCTION + post}, *messages[1:]]
    return {"prompt": messages, "chosen": responses[0], "rejected": responses[1], "margin": abs(margin)}


def _from_dialogues(dataset: AnyDataset, columns: list[str]) -> AnyDataset:
    parsed = dataset.map(
        partial(_parse_batch, is_stream=isinstance(dataset, IterableDataset)),
        batched=True,
        input_columns=["chosen", "rejected"],
        remove_columns=columns,
        features=Features({"prompt": _MESSAGES, "chosen": _MESSAGES, "rejected": _MESSAGES}),
    )
    _warn_of_dropped(dataset, parsed, _MALFORMED)
    return parsed


def _parse_batch(chosen: Sequence[Any], rejected: Sequence[Any], is_stream: bool) -> dict[str, list[Any]]:
    output: dict[str, list[Any]] = {"prompt": [], "chosen": [], "rejected": []}
    for texts in zip(chosen, rejected):
        dialogues = [_parse_dialogue(text) for text in texts]
        if None in dialogues:
            if is_stream:
                logger.warning_once(f"Dropping rows {_MALFORMED}.")
            continue
        prompt, responses = split_row({"chosen": dialogues[0], "rejected": dialogues[1]})
        for name, messages in zip(output, [prompt, *responses]):
            output[name].append(messages)
    return output


def _parse_dialogue(text: Any) -> Messages | None:
    """Messages of an hh-rlhf dialogue; `None` where it is malformed. Only a blank line and a name begin a turn."""
    before, *turns = _TURN.split(text) if isinstance(text, str) else [""]
    names = turns[::2]
    if before.strip() or not names or names != ["Human", "Assistant"] * (len(names) // 2):
        return None
    return [
        {"role": "user" if name == "Human" else "assistant", "content": content.strip()}
        for name, content in zip(names, turns[1::2])
    ]


def _from_scores(dataset: AnyDataset, columns: list[str], scores: tuple[str, str]) -> AnyDataset:
    kept = [column for column in ("prompt", "chosen", "rejected") if column in columns]
    features = None
    if dataset.features is not None:
        features = Features({**{column: dataset.features[column] for column in kept}, "margin": Value("float32")})
    _warn_of_margin(*scores)
    return dataset.map(
        _add_margin,
        input_columns=list(scores),
        remove_columns=[column for column in columns if column not in kept],
        features=features,
    )


def _add_margin(chosen_score: Any, rejected_score: Any) -> dict[str, float]:
    return {"margin": _difference(chosen_score, rejected_score)}


def _difference(score: Any, other: Any) -> float:
    """`score` less `other`, and 0 where one of them is missing."""
    difference = math.nan if score is None or other is None else float(score) - float(other)
    return 0.0 if math.isnan(difference) else difference


def _warn_of_margin(score: str, other: str) -> None:
    logger.warning(
        f"`margin` is {score} less {other}, in the source's units; training asks the chosen response for that lead. "
        'Use dataset.remove_columns("margin") to train without it, as the paper does with GRM.'
    )


def _warn_of_dropped(before: Any, after: Any, reason: str) -> None:
    if isinstance(before, IterableDataset) or len(before) == len(after):
        return
    message = f"Dropped {len(before) - len(after)} of {len(before)} rows {reason}."
    if not len(after):
        raise ValueError(f"{message} No row is left.")
    logger.warning(message)
