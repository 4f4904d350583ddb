"""Batches of tokenized preference rows, in the multiple-choice layout (batch, num_responses, seq_len)."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


@dataclass
class PreferenceCollator:
    """
    Pads rows of [`tokenize_preferences`] to batches for [`GRMForRewardModeling`].

    A tokenizer without a pad token is fine: the attention mask alone says what is padding.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Gives the pad token and the padding side; `Trainer` saves it.
        pad_to_multiple_of (`int`, *optional*): Pad sequences to a multiple of this many tokens.

    Returns, when called with a list of rows:
        `input_ids`, `attention_mask`, `completion_mask` `(batch, num_responses, seq_len)`, `labels` `(batch,)`, all 0
        as the chosen response comes first, and where the rows have them `margin` `(batch,)` and `ref_logps`
        `(batch, num_responses)`.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pad_token_id = self.tokenizer.pad_token_id
        if pad_token_id is None:
            pad_token_id = self.tokenizer.eos_token_id or 0
        return pad_rows(rows, pad_token_id, self.tokenizer.padding_side, self.pad_to_multiple_of)


def pad_rows(
    rows: list[dict[str, Any]],
    pad_token_id: int,
    padding_side: str = "right",
    pad_to_multiple_of: int | None = None,
) -> dict[str, torch.Tensor]:
    """The batch of [`PreferenceCollator`], from what it needs to know of a tokenizer."""
    if "input_ids" not in rows[0] or "completion_mask" not in rows[0]:
        raise ValueError(
            f"The rows have {sorted(rows[0])}, but need `input_ids` and `completion_mask`. "
            "Run grm_hf.tokenize_preferences(dataset, tokenizer) first."
        )
    counts = {len(row["input_ids"]) for row in rows}
    if len(counts) > 1:
        raise ValueError(f"The rows of a batch must have equally many responses, got {sorted(counts)}.")
    num_responses = counts.pop()

    def pad(name: str, value: int) -> tuple[torch.Tensor, torch.Tensor]:
        sequences = [sequence for row in rows for sequence in row[name]]
        padded, mask = pad_sequences(sequences, value, padding_side, pad_to_multiple_of)
        return padded.unflatten(0, (-1, num_responses)), mask.unflatten(0, (-1, num_responses))

    input_ids, attention_mask = pad("input_ids", pad_token_id)
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "completion_mask": pad("completion_mask", 0)[0],
        "labels": torch.zeros(len(rows), dtype=torch.long),
    }
    for name in ("margin", "ref_logps"):
        if name in rows[0]:
            batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
    return batch


def pad_sequences(
    sequences: list[list[int]], value: int, padding_side: str = "right", pad_to_multiple_of: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sequences` padded with `value`, and the mask of what is no padding: both `(len(sequences), longest)`."""
    length = max(map(len, sequences))
    if pad_to_multiple_of:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    padded = torch.full((len(sequences), length), value)
    mask = torch.zeros_like(padded)
    for index, sequence in enumerate(sequences):
        start = 0 if padding_side == "right" else length - len(sequence)
        padded[index, start : start + len(sequence)] = torch.as_tensor(sequence)
        mask[index, start : start + len(sequence)] = 1
    return padded, mask
