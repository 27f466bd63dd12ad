"""The layer in plain torch: the oracle of every kernel test and the fall-back on any device.

    y = sum_p scale_out_p * (U_p (scale_rank_p * (V_p^T (scale_in_p * x)))) + bias

Accumulates in fp32 and returns x's dtype. Signs are unpacked a slab of rows at a time, at most `SLAB` of them, so the
extra memory does not grow with the layer. Every call unpacks anew: correct everywhere, fast nowhere.
Source: LittleBit, arXiv 2506.13771, eq. 5 (the forward in factored form).
"""

from typing import Iterator, List, Optional, Sequence, Tuple

import torch

from .bound import check_once
from .packing import factor_shape, unpack_signs
from .parts import PackedLayer, Place, places

__all__ = ["SLAB", "products"]

SLAB = 1 << 22  # signs unpacked at a time: 16 MiB of fp32


def products(x: torch.Tensor, layers: Sequence[PackedLayer], transposed: bool = False) -> List[torch.Tensor]:
    """The product of x with each of several layers that read it, or the gradient with respect to their input.

    Args:
        x: [..., in_features] of fp32, bf16 or fp16; the gradient (transposed) takes [..., out_features].

    Returns:
        [..., out_features] of x's dtype for each layer, in their order; the gradient is [..., in_features].

    Raises:
        RuntimeError: a part is missing, or has another shape, dtype or device than the ranks and x ask for.
    """
    check_once(x, layers, transposed)
    return [_gradient(x, layer) if transposed else _product(x, layer) for layer in layers]


def _product(x: torch.Tensor, layer: PackedLayer) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1]).float()
    paths = places(layer.ranks)
    rank_acts = rows.new_zeros(rows.shape[0], paths[-1].columns.stop)
    scaled = [rows * scale.float() for scale in layer.scale_in]
    for start, signs in _slabs(layer.v, layer.v_tail, x.shape[-1]):
        stop = start + signs.shape[0]
        for path, values in zip(paths, scaled):  # noqa: B905 Python 3.9
            rank_acts[:, path.columns] += values[:, start:stop] @ signs[:, path.columns]
    rank_acts *= layer.scale_rank.float()
    # A result may be changed in place, so it is allocated in its final shape: autograd refuses that for views.
    result = x.new_empty(*x.shape[:-1], layer.u.shape[-1])
    out = rows.new_zeros(rows.shape[0], layer.u.shape[-1])
    for path, scale in zip(paths, layer.scale_out):  # noqa: B905 Python 3.9
        part = torch.zeros_like(out)
        for start, signs in _path_slabs(layer, path):
            offset = path.columns.start + start
            part += rank_acts[:, offset : offset + signs.shape[0]] @ signs
        out.addcmul_(part, scale.float())
    if layer.bias is not None:
        out += layer.bias.float()
    result.view(out.shape).copy_(out)
    return result


def _gradient(grad: torch.Tensor, layer: PackedLayer) -> torch.Tensor:
    rows = grad.reshape(-1, grad.shape[-1]).float()
    paths = places(layer.ranks)
    rank_acts = rows.new_empty(rows.shape[0], paths[-1].columns.stop)
    for path, scale in zip(paths, layer.scale_out):  # noqa: B905 Python 3.9
        scaled = rows * scale.float()
        for start, signs in _path_slabs(layer, path):
            offset = path.columns.start + start
            rank_acts[:, offset : offset + signs.shape[0]] = scaled @ signs.T
    rank_acts *= layer.scale_rank.float()
    in_features = layer.scale_in.shape[-1]
    result = grad.new_empty(*grad.shape[:-1], in_features)
    out = rows.new_empty(rows.shape[0], in_features)
    for start, signs in _slabs(layer.v, layer.v_tail, in_features):
        stop = start + signs.shape[0]
        total = torch.zeros_like(out[:, start:stop])
        for path, scale in zip(paths, layer.scale_in):  # noqa: B905 Python 3.9
            total.addcmul_(rank_acts[:, path.columns] @ signs[:, path.columns].T, scale[start:stop].float())
        out[:, start:stop] = total
    result.view(out.shape).copy_(out)
    return result


def _path_slabs(layer: PackedLayer, path: Place) -> Iterator[Tuple[int, torch.Tensor]]:
    """The slabs of a path's U^T."""
    tail = None if layer.u_tail is None else layer.u_tail[path.tail]
    return _slabs(layer.u[path.words], tail, path.rank)


def _slabs(
    words: Optional[torch.Tensor], tail: Optional[torch.Tensor], length: int
) -> Iterator[Tuple[int, torch.Tensor]]:
    """(first row, ±1 signs [rows, N] in fp32) over a factor of `length` rows, at most about SLAB signs at a time."""
    whole, _ = factor_shape(length)
    if words is not None and whole:
        step = max(1, SLAB // (32 * max(1, words.shape[-1])))
        for first in range(0, whole, step):
            last = min(first + step, whole)
            yield 32 * first, unpack_signs(words[first:last], None, 32 * (last - first))
    if tail is not None and tail.shape[0]:
        yield 32 * whole, unpack_signs(None, tail, length - 32 * whole)
