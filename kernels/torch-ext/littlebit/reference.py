"""The layer in plain torch: the oracle of every kernel test and the fall-back on any device.

    y = sum_p h_p * (U_p (l_p * (V_p^T (g_p * x)))) + bias

Accumulates in fp32 and returns x's dtype. Signs are unpacked a slab of rows at a time, at most `SLAB` of them, so the
extra memory does not grow with the layer. Every call unpacks anew: correct everywhere, fast nowhere.
Source: LittleBit, arXiv 2506.13771, eq. 5 (the forward in factored form).
"""

from typing import Any, Iterator, List, Optional, Sequence, Tuple

import torch

from .packing import factor_shape, unpack_signs

__all__ = ["SLAB", "littlebit_linear", "littlebit_linear_grad", "littlebit_linears"]

SLAB = 1 << 22  # signs unpacked at a time: 16 MiB of fp32


def littlebit_linear(
    x: torch.Tensor,
    u: torch.Tensor,
    u_tail: Optional[torch.Tensor],
    v: Optional[torch.Tensor],
    v_tail: Optional[torch.Tensor],
    scale_out: torch.Tensor,
    scale_rank: torch.Tensor,
    scale_in: torch.Tensor,
    bias: Optional[torch.Tensor],
    ranks: Sequence[int],
) -> torch.Tensor:
    """x [..., in_features] of fp32, bf16 or fp16 -> [..., out_features] of the same dtype; parts as in packing.py."""
    rows = x.reshape(-1, x.shape[-1]).float()
    bounds = _bounds(ranks)
    inner = rows.new_zeros(rows.shape[0], bounds[-1])
    scaled = [rows * gain.float() for gain in scale_in]
    for start, signs in _slabs(v, v_tail, x.shape[-1]):
        stop = start + signs.shape[0]
        for path, values in enumerate(scaled):
            columns = slice(bounds[path], bounds[path + 1])
            inner[:, columns] += values[:, start:stop] @ signs[:, columns]
    inner *= scale_rank.float()
    # A result may be changed in place, so it is allocated in its final shape: autograd refuses that for views.
    result = x.new_empty(*x.shape[:-1], u.shape[-1])
    out = rows.new_zeros(rows.shape[0], u.shape[-1])
    for path, (words, tail) in enumerate(_paths(u, u_tail, ranks)):
        part = torch.zeros_like(out)
        for start, signs in _slabs(words, tail, ranks[path]):
            offset = bounds[path] + start
            part += inner[:, offset : offset + signs.shape[0]] @ signs
        out.addcmul_(part, scale_out[path].float())
    if bias is not None:
        out += bias.float()
    result.view(out.shape).copy_(out)
    return result


def littlebit_linears(x: torch.Tensor, layers: Sequence[Sequence[Any]]) -> List[torch.Tensor]:
    """The products of several layers with the same x; each layer is the arguments of `littlebit_linear` after x."""
    return [littlebit_linear(x, *layer) for layer in layers]


def littlebit_linear_grad(
    grad: torch.Tensor,
    u: torch.Tensor,
    u_tail: Optional[torch.Tensor],
    v: Optional[torch.Tensor],
    v_tail: Optional[torch.Tensor],
    scale_out: torch.Tensor,
    scale_rank: torch.Tensor,
    scale_in: torch.Tensor,
    ranks: Sequence[int],
) -> torch.Tensor:
    """The gradient with respect to x: grad [..., out_features] -> [..., in_features], through the same packed parts."""
    rows = grad.reshape(-1, grad.shape[-1]).float()
    bounds = _bounds(ranks)
    inner = rows.new_empty(rows.shape[0], bounds[-1])
    for path, (words, tail) in enumerate(_paths(u, u_tail, ranks)):
        scaled = rows * scale_out[path].float()
        for start, signs in _slabs(words, tail, ranks[path]):
            offset = bounds[path] + start
            inner[:, offset : offset + signs.shape[0]] = scaled @ signs.T
    inner *= scale_rank.float()
    in_features = scale_in.shape[-1]
    result = grad.new_empty(*grad.shape[:-1], in_features)
    out = rows.new_empty(rows.shape[0], in_features)
    for start, signs in _slabs(v, v_tail, in_features):
        stop = start + signs.shape[0]
        total = torch.zeros_like(out[:, start:stop])
        for path, gain in enumerate(scale_in):
            columns = slice(bounds[path], bounds[path + 1])
            total.addcmul_(inner[:, columns] @ signs[:, columns].T, gain[start:stop].float())
        out[:, start:stop] = total
    result.view(out.shape).copy_(out)
    return result


def _bounds(ranks: Sequence[int]) -> "list[int]":
    """Where each path's ranks begin and, last, their sum."""
    bounds = [0]
    for rank in ranks:
        bounds.append(bounds[-1] + rank)
    return bounds


def _paths(
    u: torch.Tensor, u_tail: Optional[torch.Tensor], ranks: Sequence[int]
) -> Iterator[Tuple[torch.Tensor, Optional[torch.Tensor]]]:
    """The row ranges of u and u_tail that belong to each path."""
    word, byte = 0, 0
    for rank in ranks:
        words, tail = factor_shape(rank)
        yield u[word : word + words], None if u_tail is None else u_tail[byte : byte + tail]
        word, byte = word + words, byte + tail


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
