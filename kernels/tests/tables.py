"""Packed tables for tests: random ones with the matrix that they stand for, and how far a product is from it."""

from typing import Optional, Tuple

import torch
from hf_littlebit.kernels import table

KINDS = [(8, False), (8, True), (4, None)]  # bits, grouped
RAGGED = [(1, 1), (5, 33), (37, 64), (70, 130), (131, 200), (16, 576)]  # rows, columns


def made(
    rows: int,
    columns: int,
    bits: int,
    grouped: Optional[bool],
    scale_dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Tuple[table.PackedTable, torch.Tensor]:
    """A table of random codes and scales of either sign, and its fp64 matrix; padded codes are what a file holds."""
    draw = torch.Generator().manual_seed(seed)
    least, most = (-127, 127) if bits == 8 else (-8, 7)
    values = torch.randint(least, most + 1, (rows, columns), generator=draw)
    shape, _ = table.table_shapes(rows, columns, bits, grouped, scale_dtype)["scale"]
    scale = (torch.randn(shape, generator=draw) / most).to(scale_dtype)
    wide = scale.double().repeat_interleave(64 if shape[1] > 1 else columns, dim=1)[:, :columns]
    return table.PackedTable(table.pack_codes(values, bits), scale, columns), values.double() * wide


def dense(weight: torch.Tensor, bits: int, grouped: Optional[bool]) -> torch.Tensor:
    """The weight rounded to as many steps as its largest magnitude asks for, with no search and no rounding of the scale."""
    (_, groups), _ = table.table_shapes(*weight.shape, bits, grouped)["scale"]
    most = 127 if bits == 8 else 7
    found = torch.empty_like(weight)
    width = 64 if groups > 1 else weight.shape[1]
    for first in range(0, weight.shape[1], width):
        part = weight[:, first : first + width]
        step = part.abs().amax(1, keepdim=True).div(most).clamp_min(1e-38)
        found[:, first : first + width] = (part / step).round() * step
    return found


def worst_row(
    result: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor, bias: Optional[torch.Tensor] = None
) -> float:
    """The largest error relative to the sum of magnitudes, as a dot product's error is."""
    exact, size = x.double() @ matrix, x.double().abs() @ matrix.abs()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    return ((result.double() - exact).abs() / size.clamp_min(1e-30)).max().item() if result.numel() else 0.0
