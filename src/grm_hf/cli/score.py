"""`grm-hf score`: rewards of the rows of a JSON Lines file."""

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from ..scoring import RewardScorer
from .options import parse


@dataclass
class ScoreOptions:
    """What to score, and with which model."""

    model: str = field(default="", metadata={"help": "Hub repository or folder of a GRM."})
    input: str = field(
        default="-",
        metadata={"help": "JSON Lines, each line an input of the pipeline reward-modeling; - for stdin."},
    )
    output: str = field(default="-", metadata={"help": "JSON Lines, one per input, in order; - for stdout."})
    batch_size: int = field(default=16, metadata={"help": "Sequences per forward pass."})
    max_length: int | None = field(default=None, metadata={"help": "Most tokens of an input."})
    overlong: str = field(default="error", metadata={"help": "error, or truncate_prompt (never the response)."})
    dtype: str = field(default="auto", metadata={"help": "dtype of the backbone: auto, bfloat16, float32."})
    device: str | None = field(default=None, metadata={"help": "cuda, cpu, ...; the GPU if there is one."})
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code in the model's repository."})


def main(argv: list[str]) -> None:
    """Parse `argv`, score, and write one line of JSON per input."""
    (options,) = parse("score", [ScoreOptions], argv, {})
    if not options.model:
        raise ValueError("`model` is missing; pass --model")
    inputs = list(_read(options.input))
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    scorer = RewardScorer.from_pretrained(
        options.model,
        dtype=options.dtype,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    scorer.model.to(device)
    results = scorer(inputs, options.batch_size, options.max_length, options.overlong, progress=True)
    with nullcontext(sys.stdout) if options.output == "-" else open(options.output, "w", encoding="utf-8") as file:
        for result in results:
            file.write(json.dumps(result) + "\n")


def _read(path: str) -> Iterator[Any]:
    with nullcontext(sys.stdin) if path == "-" else open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
