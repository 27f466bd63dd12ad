"""From a dense table to codes and scales: for every row or group, the scale whose rounding leaves the least squared error.

A scale is searched among fractions of the one that just reaches the largest magnitude, because clipping a rare large value
pays for a finer grid; then it and the codes are improved in turn: given the codes q, the best scale is <w, q> / <q, q>. The
scale is rounded to its dtype before the codes are chosen, so that its rounding costs next to nothing.
"""

from typing import Optional

import torch

from .table import GROUP, PackedTable, groups_of, pack_codes, table_shapes

__all__ = ["quantize_table"]

SLAB = 1 << 22  # weights at a time: the search holds a few copies of them in fp32
REFITS = 2
# Fractions of the scale without clipping. 127 steps gain little from clipping; 7 or 8 gain much.
_FRACTIONS = {8: (1.0, 0.97, 0.94, 0.9, 0.85, 0.8), 4: tuple(1.0 - 0.03 * step for step in range(16))}
_LIMITS = {8: (-127, 127), 4: (-8, 7)}


def quantize_table(
    weight: torch.Tensor,
    bits: int,
    grouped: Optional[bool] = None,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> PackedTable:
    """The table of 8 or 4 bits nearest to `weight` [rows, columns] of floats, on its device.

    Args:
        grouped: a scale for every 64 columns rather than for a row; by default with 4 bits only.
        scale_dtype: bf16, fp16 or fp32.

    Raises:
        ValueError: as `table_shapes`; weight has not two dimensions, or holds what is not finite, or what scale_dtype cannot hold.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight is {list(weight.shape)}, but must be [rows, columns]")
    rows, columns = weight.shape
    shapes = table_shapes(rows, columns, bits, grouped, scale_dtype)
    (shape, dtype), (scale_shape, _) = shapes["codes"], shapes["scale"]
    codes = torch.empty(shape, dtype=dtype, device=weight.device)
    scale = torch.empty(scale_shape, dtype=scale_dtype, device=weight.device)
    width = columns if scale_shape[1] == 1 else GROUP
    for first in range(0, rows, max(1, SLAB // columns)):
        last = first + max(1, SLAB // columns)
        values = weight[first:last].float()
        if not values.isfinite().all():
            raise ValueError(f"rows {first} to {min(last, rows) - 1} of the weight hold values that are not finite")
        if width == GROUP:
            values = torch.nn.functional.pad(values, (0, GROUP * groups_of(columns) - columns))
        grouped_values = values.view(-1, scale_shape[1], width)
        found = _search(grouped_values, bits, scale_dtype)
        if not found.isfinite().all():
            raise ValueError(f"the weight needs scales that {scale_dtype} cannot hold; pass scale_dtype=torch.float32")
        scale[first:last] = found[..., 0]
        whole = _round(grouped_values, found.float(), *_LIMITS[bits])
        codes[first:last] = pack_codes(whole.flatten(1)[:, :columns], bits)
    return PackedTable(codes, scale, columns)


def _search(values: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The best scales [..., 1] of dtype, found for values [..., group]."""
    least, most = _LIMITS[bits]
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    peak = torch.where(-low > high, low, high)
    unit = torch.where(peak == 0, 1.0, peak)  # of errors, whose squares would vanish or overflow otherwise
    # The value of the largest magnitude goes to the end with more steps, or to the other end.
    starts = (least,) if most == -least else (least, most)
    best = (peak / least).to(dtype)
    error = _error(values, best.float(), unit, least, most)

    def attempt(scale: torch.Tensor) -> None:
        nonlocal best, error
        scale = scale.to(dtype)
        found = _error(values, scale.float(), unit, least, most)
        less = found < error
        best, error = torch.where(less, scale, best), torch.where(less, found, error)

    for start in starts:
        for fraction in _FRACTIONS[bits]:
            attempt((fraction / start) * peak)
    for _ in range(REFITS):
        whole = _round(values, best.float(), least, most)
        fitted = (values / unit * whole).sum(-1, keepdim=True) / whole.square().sum(-1, keepdim=True).clamp_min_(1.0)
        attempt(fitted * unit)
    return best


def _round(values: torch.Tensor, scale: torch.Tensor, least: int, most: int) -> torch.Tensor:
    """values / scale as whole numbers within the limits, in fp32; 0 where the scale is 0."""
    return (values / torch.where(scale == 0, torch.inf, scale)).round_().clamp_(least, most)


def _error(values: torch.Tensor, scale: torch.Tensor, unit: torch.Tensor, least: int, most: int) -> torch.Tensor:
    """The squared error [..., 1] of rounding to multiples of scale, in squares of unit."""
    rounded = _round(values, scale, least, most)
    return rounded.mul_(scale).sub_(values).div_(unit).square_().sum(-1, keepdim=True)
