"""A packed table in plain torch: the oracle of every kernel test and the fall-back on any device.

    head         y[..., n] = sum_k x[..., k] W[n, k] + bias[n]           the gradient: grad W
    embedding    rows of W

W [rows, columns] is unpacked a slab of rows at a time, at most `SLAB` weights, so the extra memory does not grow with the table.
Sums are fp32; the result has x's dtype. Every call unpacks anew: correct everywhere, fast nowhere.
"""

from typing import Iterator, Optional, Tuple

import torch

from .table import checked, checked_grad, checked_indices, unpack_table

__all__ = ["SLAB", "embedding", "head", "head_grad"]

SLAB = 1 << 22  # weights unpacked at a time: 16 MiB of fp32


def head(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """x [..., columns] of fp32, bf16 or fp16 -> [..., rows] of x's dtype. Parts as in table.py.

    Raises:
        RuntimeError: a part has another shape, dtype or device than the others and x ask for.
    """
    codes, scale, bias = checked(x, codes, scale, bias)
    values = x.reshape(x.shape[:-1].numel(), x.shape[-1]).float()
    result = x.new_empty(*x.shape[:-1], codes.shape[0])
    out = result.view(values.shape[0], codes.shape[0])
    for first, rows in _slabs(codes, scale, x.shape[-1]):
        last = first + rows.shape[0]
        y = values @ rows.T
        out[:, first:last] = y if bias is None else y.add_(bias[first:last].float())
    return result


def head_grad(grad: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, columns: int) -> torch.Tensor:
    """The gradient of `head` with respect to x: grad [..., rows] -> [..., columns] of grad's dtype. Errors as `head`."""
    codes, scale = checked_grad(grad, codes, scale, columns)
    values = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1]).float()
    out = values.new_zeros(values.shape[0], columns)
    for first, rows in _slabs(codes, scale, columns):
        out.addmm_(values[:, first : first + rows.shape[0]], rows)
    result = grad.new_empty(*grad.shape[:-1], columns)
    result.view(out.shape).copy_(out)
    return result


def embedding(
    indices: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """The rows of the table at indices [...] of int64 or int32: [..., columns] of dtype (fp32, bf16 or fp16).

    Raises:
        RuntimeError: as `head`. An index outside of the table is torch's own error for the device.
    """
    codes, scale = checked_indices(indices, codes, scale, columns, dtype)
    flat = indices.reshape(-1)
    # embedding, not index_select: an index that is wrong stops a GPU too, and negative ones are wrong.
    found = torch.nn.functional.embedding(flat, codes), torch.nn.functional.embedding(flat, scale)
    result = scale.new_empty(*indices.shape, columns, dtype=dtype)
    result.view(flat.shape[0], columns).copy_(unpack_table(*found, columns))
    return result


def _slabs(codes: torch.Tensor, scale: torch.Tensor, columns: int) -> Iterator[Tuple[int, torch.Tensor]]:
    """(first row, rows of W in fp32), at most about SLAB weights at a time."""
    step = max(1, SLAB // columns)
    for first in range(0, codes.shape[0], step):
        yield first, unpack_table(codes[first : first + step], scale[first : first + step], columns)
