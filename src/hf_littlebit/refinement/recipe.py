"""How much work a refinement is, and on which rows of the text it is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..train.data import is_listed
from .distillation import SEEN, Schedule
from .tuning import Rates

__all__ = ["Recipe", "as_tokens", "block_rows", "check_vocabulary", "distilled_rows", "spread_rows"]


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Recipe:
    """How much work a refinement is, and at what rates; the defaults are what won in an hour on two CPU cores (docs/refinement.md).

    Attributes:
        block_tokens: of the text, that blocks are tuned on. length: tokens of a row of them at most; longer rows are cut.
        epochs: passes over these rows for every block. batch: rows per step of a block.
        rates: of a block's tuning.
        importance_rows: rows that a block's importances are measured on.
        allocation_rows: rows that the costs of blocks are measured on, to share the bits out by; 0 gives all the same.
        distillation: of the whole model at the end; None leaves it out.

    Raises:
        ValueError: for a number that is too small.
    """

    block_tokens: int = 65_536
    length: int = 256
    epochs: float = 2.0
    batch: int = 1
    rates: Rates = field(default_factory=lambda: Rates(latents=1e-3, scales=2e-3, rest=1e-3))
    importance_rows: int = 16
    allocation_rows: int = 8
    distillation: Schedule | None = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        least = {"block_tokens": 1, "length": 2, "batch": 1, "importance_rows": 1, "allocation_rows": 0}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {limit} or more")
        if not 0 < self.epochs < float("inf"):
            raise ValueError(f"epochs is {self.epochs}; it must be above 0")


def as_tokens(data: Any) -> Tensor:
    """Text as tokens, int32 [rows, length], from what `refine` takes.

    Raises:
        ValueError: for anything else, rows of different lengths, or too few of them.
    """
    if isinstance(data, str | bytes):
        raise ValueError(
            f"data is {data!r:.60}; give tokens, as text_blocks(texts, tokenizer, length) makes them of text"
        )
    if isinstance(data, Mapping) and torch.is_tensor(data.get("input_ids")):
        data = _row(data)  # as a tokenizer makes them
    if not torch.is_tensor(data):
        if not is_listed(data) or isinstance(data, Mapping):
            raise ValueError(
                f"data is a {type(data).__name__}; give tokens [rows, length], or a list or dataset of rows with input_ids"
            )
        rows = [_row(data[index]) for index in range(len(data))]
        shapes = sorted({tuple(row.shape) for row in rows})
        if len(shapes) > 1:
            raise ValueError(f"data has rows of {len(shapes)} shapes; cut them to one length, e.g. by text_blocks")
        data = torch.stack(rows) if rows else torch.zeros(0, 2, dtype=torch.int32)
    if data.ndim != 2 or data.dtype not in INTEGERS or data.shape[1] < 2:
        raise ValueError(
            f"data is {list(data.shape)} of {data.dtype}; it must be tokens [rows, length], at least 2 a row"
        )
    if data.numel() and not 0 <= int(data.min()) <= int(data.max()) < 2**31:
        raise ValueError(f"data has tokens from {int(data.min())} to {int(data.max())}, which no vocabulary has")
    if len(data) < 2:
        raise ValueError(
            f"data has {len(data)} row of {data.shape[1]} tokens; give at least 2, one of them to measure on"
        )
    return data.to("cpu", torch.int32)


def _row(row: Any) -> Tensor:
    """The tokens of what a dataset gives for one row, or a tokenizer for all."""
    if isinstance(row, Mapping):
        if "input_ids" not in row:
            raise ValueError(f"a row of data has {', '.join(map(str, row))} and no input_ids; make them by text_blocks")
        _refuse_padding(row.get("attention_mask"))
        row = row["input_ids"]
    try:
        return torch.as_tensor(row)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"a row of data is {row!r:.60}, and no list of tokens ({error}); make them by text_blocks"
        ) from None


def _refuse_padding(mask: Any) -> None:
    """Refuse an attention mask with zeros: what it hides would be learnt like text."""
    if mask is not None and not bool(torch.as_tensor(mask).bool().all()):
        raise ValueError(
            "data has padding (zeros in attention_mask); pack the texts into full rows instead, e.g. by text_blocks"
        )


def check_vocabulary(tokens: Tensor, size: int) -> None:
    """Refuse `tokens` that a model with `size` embeddings does not have.

    Raises:
        ValueError: with the smallest and the largest token.
    """
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
        raise ValueError(
            f"data has tokens from {int(tokens.min())} to {int(tokens.max())}, but the model has {size}; use the "
            "model's own tokenizer"
        )


def spread_rows(rows: Tensor, count: int) -> Tensor:
    """`count` of `rows` [rows, ...], at equal distances, or all where there are no more."""
    count = min(count, len(rows))
    return rows[torch.arange(count) * len(rows) // count]


def distilled_rows(tokens: Tensor, schedule: Schedule) -> Tensor:
    """The rows of `tokens` [rows, length] that the whole model is distilled on: all, or by default at most SEEN tokens."""
    return tokens if schedule.epochs is not None else spread_rows(tokens, max(1, SEEN // tokens.shape[1]))


def block_rows(tokens: Tensor, recipe: Recipe) -> Tensor:
    """The rows that blocks are tuned on: some from all over `tokens` [rows, length], cut into equal pieces where they are long.

    Of a length that does not divide, the last few tokens are left out. A step of one short row costs half of one twice as long, and
    attention within it a quarter; and steps are what tuning needs.
    """
    length = tokens.shape[1]
    rows = spread_rows(tokens, max(2, recipe.block_tokens // length))
    pieces = math.ceil(length / recipe.length)
    size = length // pieces
    return rows[:, : pieces * size].reshape(len(rows) * pieces, size)
