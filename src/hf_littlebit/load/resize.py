"""`resize_token_embeddings` of a model whose embedding or head is a packed table: rows are cut off or added, the others stay.

Rows of a table are stored one by one, so those that stay keep their bits. New ones are the mean of the old ones, as
transformers makes them up to a tiny noise, in as many bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..kernels import quantize_table, unpack_table
from ..layers.table import TABLE_PARTS, PackedTableModule
from .tables import table_modules

__all__ = ["resize_tables"]

REMEDY = "resize the dense model, and quantize that; or model.dequantize() first"
SLAB = 1 << 22  # weights unpacked at a time


def resize_tables(
    model: PreTrainedModel,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> nn.Module:
    """What `model.resize_token_embeddings` does, for a `model` with packed tables; returns the embedding.

    Args:
        new_num_tokens: rows of the embedding and the head; None for as many as there are.
        pad_to_multiple_of: round that up to a multiple.
        mean_resizing: new rows are the mean of the old ones (True), or random (False) as the model's class would draw them.

    Raises:
        ValueError: for sizes that are no positive integers, and for classes that resize more than the two.
    """
    if type(model).resize_token_embeddings is not PreTrainedModel.resize_token_embeddings:
        raise ValueError(
            f"{type(model).__name__} resizes more than its embedding and head, which packed tables cannot follow; {REMEDY}"
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    count = _count(embedding, new_num_tokens, pad_to_multiple_of)
    if new_num_tokens is None and pad_to_multiple_of is None:
        return embedding
    std = None if mean_resizing else float(getattr(model.config.get_text_config(), "initializer_range", None) or 0.02)
    with torch.no_grad():
        resized: set[int] = set()
        for module in (embedding, head):
            if module is not None:
                _resize(module, count, std, resized)
        for reader in table_modules(model).values():
            if id(reader.holder()) in resized:
                _note(reader, count)
    model.config.get_text_config().vocab_size = count
    model.vocab_size = count  # type: ignore[assignment]  # as transformers leaves it
    return embedding


def _count(embedding: nn.Module, count: int | None, multiple: int | None) -> int:
    for name, value in (("new_num_tokens", count), ("pad_to_multiple_of", multiple)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is {value!r}; it must be a positive integer, or None")
    rows: int = embedding.num_embeddings if count is None else count  # type: ignore[assignment]
    return rows if multiple is None else -(-rows // multiple) * multiple


def _resize(module: nn.Module, count: int, std: float | None, resized: set[int]) -> None:
    """Give an embedding or a head, dense or packed, `count` rows; what it shares with others is resized once."""
    if isinstance(module, PackedTableModule):
        _resize_table(module.holder(), count, std, resized)
    else:
        weight: Any = module.weight
        if id(weight) not in resized:
            weight.data = _rows(weight.data, count, std, lambda: weight.data.float().mean(0))
            resized.add(id(weight))
        _note(module, count)
    bias = getattr(module, "bias", None)
    if bias is not None:  # in place, because others may hold it too
        bias.data = _rows(bias.data[:, None], count, 0.0 if std else None, lambda: bias.data.float().mean()[None])[:, 0]


def _resize_table(table: PackedTableModule, count: int, std: float | None, resized: set[int]) -> None:
    if id(table) in resized:
        return
    resized.add(id(table))
    codes, scale = table.table()
    new = None
    if count > table.rows:
        size = (count - table.rows, table.columns)
        row = _mean(table) if std is None else None
        values = torch.randn(size, device=codes.device).mul_(std or 0.0) if row is None else row.expand(size)
        new = quantize_table(values, table.table_bits, scale_dtype=scale.dtype)
    for part, value in zip(TABLE_PARTS, (codes, scale), strict=True):
        kept = value[:count]
        setattr(table, part, kept.clone() if new is None else torch.cat([kept, getattr(new, part)]))


def _mean(table: PackedTableModule) -> Tensor:
    codes, scale = table.table()
    step = max(1, SLAB // table.columns)
    total = torch.zeros(table.columns, dtype=torch.float32, device=codes.device)
    for first in range(0, table.rows, step):
        total += unpack_table(codes[first : first + step], scale[first : first + step], table.columns).sum(0)
    return total / table.rows


def _rows(value: Tensor, count: int, std: float | None, mean: Callable[[], Tensor]) -> Tensor:
    """`value` [rows, columns] with `count` rows: cut, or followed by copies of the mean, or by random ones."""
    if count <= len(value):
        return value[:count].clone()
    size = (count - len(value), value.shape[1])
    new = mean().expand(size) if std is None else torch.randn(size, device=value.device) * std
    return torch.cat([value, new.to(value.dtype)])


def _note(module: Any, count: int) -> None:
    """Write the number of rows where modules of its kind have it."""
    for name in ("rows", "num_embeddings", "out_features"):
        if hasattr(module, name):
            setattr(module, name, count)
    padding = getattr(module, "padding_idx", None)
    if padding is not None and padding >= count:
        module.padding_idx = None
