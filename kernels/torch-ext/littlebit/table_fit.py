"""From a dense table to codes and scales: for every row or group, the scale whose rounding leaves the least squared error.

A scale is searched among fractions of the one that just reaches the largest magnitude, because clipping a rare large value
pays for a finer grid; then it and the codes are improved in turn: given the codes q, the best scale is <w, q> / <q, q>. The
scale is rounded to its dtype before the codes are chosen, so that its rounding costs next to nothing.

What counts of a head is not the error of its weights but that of its products, and the inputs x of a head are far from alike in
all directions. With their second moment M = mean x x^T, columns are rounded one after the other, and what rounding one of them
does to the products is taken back as well as can be by those that are still to be rounded: column j's error e_j, divided by
U_jj, is subtracted U_j times, where U^T U is the inverse of M (GPTQ, arXiv 2210.17323, equations 2 and 3 and section 3.3). The
columns of the largest inputs come first, while there are many others to take their errors back; scales are those of the weight.
"""

from typing import Optional, Tuple

import torch

from .table import GROUP, PackedTable, groups_of, pack_codes, table_shapes

__all__ = ["quantize_table"]

SLAB = 1 << 22  # weights at a time: the search holds a few copies of them in fp32
REFITS = 2
# Fractions of the scale without clipping. 127 steps gain little from clipping; 7 or 8 gain much.
_FRACTIONS = {8: (1.0, 0.97, 0.94, 0.9, 0.85, 0.8), 4: tuple(1.0 - 0.03 * step for step in range(16))}
_LIMITS = {8: (-127, 127), 4: (-8, 7)}
# Largest codes of some groups that were rounded with a moment to 4 bits: their values are found again as they are.
_COARSE = (1, 2, 3, 4, 5, 6)
# Of the mean square of an input, added to every one's: what an embedding that is tied to the head loses stays small by it.
DAMPING = 0.1


def quantize_table(
    weight: torch.Tensor,
    bits: int,
    grouped: Optional[bool] = None,
    scale_dtype: torch.dtype = torch.bfloat16,
    moment: Optional[torch.Tensor] = None,
) -> PackedTable:
    """The table of 8 or 4 bits nearest to `weight` [rows, columns] of floats, on its device.

    Args:
        grouped: a scale for every 64 columns rather than for a row; by default with 4 bits only.
        scale_dtype: bf16, fp16 or fp32.
        moment: the second moment [columns, columns] of the inputs that the table is multiplied with, if products with them are
            to be near rather than the weights themselves.

    Raises:
        ValueError: as `table_shapes`; weight has not two dimensions, or holds what is not finite, or what scale_dtype cannot
            hold; moment is none of such inputs.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight is {list(weight.shape)}, but must be [rows, columns]")
    rows, columns = weight.shape
    shapes = table_shapes(rows, columns, bits, grouped, scale_dtype)
    (shape, dtype), (scale_shape, _) = shapes["codes"], shapes["scale"]
    codes = torch.empty(shape, dtype=dtype, device=weight.device)
    scale = torch.empty(scale_shape, dtype=scale_dtype, device=weight.device)
    width = columns if scale_shape[1] == 1 else GROUP
    factor = None if moment is None else _carry_factor(moment.to(weight.device), columns)
    # With a moment some operations a column: the fewer slabs the better where their launches are what takes time.
    slab = max(1, SLAB * (16 if factor is not None and weight.is_cuda else 1) // columns)
    for first in range(0, rows, slab):
        last = first + slab
        values = weight[first:last].float()
        if not values.isfinite().all():
            raise ValueError(f"rows {first} to {min(last, rows) - 1} of the weight hold values that are not finite")
        if width == GROUP:
            values = torch.nn.functional.pad(values, (0, GROUP * groups_of(columns) - columns))
        if factor is None:
            grouped_values = values.view(-1, scale_shape[1], width)
            found = _search(grouped_values, bits, scale_dtype)
            whole = _round(grouped_values, found.float(), *_LIMITS[bits]).flatten(1)
        else:
            found, whole = _carry(values, *factor, width, bits, scale_dtype)
        if not found.isfinite().all():
            raise ValueError(f"the weight needs scales that {scale_dtype} cannot hold; pass scale_dtype=torch.float32")
        scale[first:last] = found[..., 0]
        codes[first:last] = pack_codes(whole[:, :columns], bits)
    return PackedTable(codes, scale, columns)


def _carry_factor(moment: torch.Tensor, columns: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """(U / diag(U), order): upper triangular [columns, columns] of fp32, with U^T U the inverse of the damped `moment`, whose
    columns are in `order` [columns], the largest first.

    Raises:
        ValueError: the moment has another shape, or is that of no inputs.
    """
    if tuple(moment.shape) != (columns, columns):
        raise ValueError(f"moment is {list(moment.shape)}, but must be {[columns, columns]} for {columns} columns")
    order = moment.diagonal().argsort(descending=True, stable=True)
    moment = moment.double()[order][:, order]
    size = moment.diagonal().mean()
    if not moment.isfinite().all() or not size > 0:
        raise ValueError(
            "moment holds what is not finite, or nothing but zeros; leave it out, or give that of some inputs"
        )
    damped = moment / size + DAMPING * torch.eye(columns, dtype=moment.dtype, device=moment.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise ValueError("moment is that of no inputs, since some direction has less than nothing; give mean x x^T")
    factor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    return (factor / factor.diagonal()[:, None]).float(), order


def _carry(
    values: torch.Tensor, factor: torch.Tensor, order: torch.Tensor, width: int, bits: int, dtype: torch.dtype
) -> Tuple[torch.Tensor, torch.Tensor]:
    """(scales [rows, groups, 1] of dtype, whole numbers [rows, columns]) of `values` [rows, columns], errors carried on.

    Args:
        factor, order: of `_carry_factor`. width: columns with one scale.
    """
    columns = len(order)
    grouped = values.view(values.shape[0], -1, width)
    found = _search(grouped, bits, dtype)
    scales = found.float().expand_as(grouped).flatten(1)[:, order]
    left, whole = values[:, order], torch.zeros_like(values)
    least, most = _LIMITS[bits]
    for first in range(0, columns, GROUP):
        last = min(first + GROUP, columns)
        # A column at a time is contiguous.
        block, scale = (each[:, first:last].T.contiguous() for each in (left, scales))
        divisor = torch.where(scale == 0, torch.inf, scale)
        rounded = torch.empty_like(block)
        for j in range(last - first):
            rounded[j] = (block[j] / divisor[j]).round_().clamp_(least, most)
            block[j] -= rounded[j] * scale[j]  # from here on its error
            block[j + 1 :].addr_(factor[first + j, first + j + 1 : last], block[j], alpha=-1)
        whole[:, order[first:last]] = rounded.T
        left[:, last:] -= block.T @ factor[first:last, last:]
    return found, whole


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
    # Only a group on a grid already has no value between 0 and its peak / 6.
    if bits == 4 and _smallest(values).gt(0.99 * peak.abs() / len(_COARSE)).any():
        for largest in _COARSE:
            scale = (peak / largest).to(dtype)
            exact = _error(values, scale.float(), unit, least, most) == 0
            best, error = torch.where(exact, scale, best), torch.where(exact, 0.0, error)
    for _ in range(REFITS):
        whole = _round(values, best.float(), least, most)
        fitted = (values / unit * whole).sum(-1, keepdim=True) / whole.square().sum(-1, keepdim=True).clamp_min_(1.0)
        attempt(fitted * unit)
    return best


def _smallest(values: torch.Tensor) -> torch.Tensor:
    """The smallest magnitude [..., 1] but 0 of values [..., group]."""
    return torch.where(values == 0, torch.inf, values.abs()).amin(-1, keepdim=True)


def _round(values: torch.Tensor, scale: torch.Tensor, least: int, most: int) -> torch.Tensor:
    """values / scale as whole numbers within the limits, in fp32; 0 where the scale is 0."""
    return (values / torch.where(scale == 0, torch.inf, scale)).round_().clamp_(least, most)


def _error(values: torch.Tensor, scale: torch.Tensor, unit: torch.Tensor, least: int, most: int) -> torch.Tensor:
    """The squared error [..., 1] of rounding to multiples of scale, in squares of unit."""
    rounded = _round(values, scale, least, most)
    return rounded.mul_(scale).sub_(values).div_(unit).square_().sum(-1, keepdim=True)
