"""Very many tokens: the products of gemm.py as dense ones, with signs unpacked into a bounded scratch, slab after slab.

Unpacking costs time once, whatever the tokens, and a dense product of the vendor's is faster than one that makes signs as it
goes. A slab holds ±scale of some ranks or outputs in bf16, contiguous along the sum, so that scales cost nothing more.
One bf16 term only, bf16 in and out. As everywhere in this form the sums run in pair order (signs.py).
"""

from typing import Any, Iterator, Tuple

import torch
import triton
import triton.language as tl

from . import scaled
from .dense import DENSE
from .launch import Step
from .parts import PackedLayer, Place, operands, places
from .signs import across_words, along_words, padded, pair_of, sign_tile, tail_word

__all__ = ["SLAB", "launches"]

SLAB = 1 << 19  # signs of one MiB of scratch
_LEAST = 256  # outputs of a slab, or a multiple
_STEP = 64
_ROWS = 64  # of a program, and what paths' slots are a multiple of


@triton.jit(do_not_specialize=["first", "made"])
def _unpack(
    words,
    tail,
    scale,
    slab,
    first,
    made,
    length,
    stride,
    width,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """slab[m - first, k] = scale[m] times the sign of output m and summed place k; rows in pair order if ORDERED.

    Args:
        made, length: outputs (rows behind them become zeros), and places of the sum.
        stride: between the rows of words; `width`: between those of the slab.
    """
    start = tl.program_id(0) * BLOCK_K
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = first + rows
    held = tl.minimum(columns, made - 1)
    ones = pair_of(tl.load(scale + columns, mask=columns < made, other=0.0).to(tl.float32))
    if TRANSPOSED:
        at = (first + tl.program_id(1) * BLOCK) // 32 + tl.arange(0, BLOCK // 32)
        # Of less than a word of outputs there are no words to load.
        inside = tl.where(made < 32, 0, length)
        pointers = words + tl.maximum(0, tl.minimum(at, made // 32 - 1)) * stride
        left, right = across_words(pointers, start, inside, BLOCK_K)
        if tail is not None:
            # The row of the tail is the first of those behind the words, and of one program.
            pairs = tl.arange(0, BLOCK_K // 2)
            place = start + (pairs // 16) * 32 + pairs % 16
            last = (at == made // 32)[:, None]
            left = tl.where(last, tail_word(tail, place, length, made, stride)[None, :], left)
            right = tl.where(last, tail_word(tail, place + 16, length, made, stride)[None, :], right)
        signs = sign_tile(left, right, ones, BLOCK, BLOCK_K, True, False)
    else:
        tails = held
        if tail is not None:
            tails = tail_word(tail, held, made, length, stride)
        found = along_words(words, tails, tl.program_id(0), held, length // 32, stride, BLOCK_K // 32, tail is not None)
        signs = sign_tile(found, found, ones, BLOCK, BLOCK_K, False, False)
    if ORDERED:
        within = rows % 32
        rows += tl.where(within < 16, within, within - 31)
    slots = start + tl.arange(0, BLOCK_K)
    place = rows.to(tl.int64)[:, None] * width + slots[None, :]
    tl.store(slab + place, signs, mask=(slots < width)[None, :])


def _slabs(made: int, width: int, size: int) -> Iterator[Tuple[int, int]]:
    """(first, last + 1) of the outputs whose signs are unpacked together, into `size` MiB."""
    rows = max(_LEAST, size * SLAB // width // _LEAST * _LEAST)
    for first in range(0, made, rows):
        yield first, min(first + rows, made)


def _factors(layer: PackedLayer, path: Place) -> Tuple[Tuple[Any, Any], Tuple[Any, Any]]:
    """(words, tail) of the path's V and of its U^T; a path without a tail has None."""
    assert layer.v is not None
    v_tail = None if layer.v_tail is None else layer.v_tail[:, path.columns]
    u_tail = None if layer.u_tail is None or path.tail.start == path.tail.stop else layer.u_tail[path.tail]
    return (layer.v[:, path.columns], v_tail), (layer.u[path.words], u_tail)


def launches(
    x: torch.Tensor, layer: PackedLayer, y: torch.Tensor, config: Any, transposed: bool = False
) -> Iterator[Step]:
    """What `gemm.launches` yields, with steps of dense.py among it."""
    ranks, scale_rank, bias = layer.ranks, layer.scale_rank, layer.bias
    scale_first, scale_last = [operand.scale for operand in operands(layer, transposed)]
    (tokens, features), made, device = x.shape, y.shape[1], x.device
    width = -(-features // _STEP) * _STEP
    slots = padded(ranks, _STEP)
    terms = torch.empty(len(ranks), tokens, width, dtype=torch.bfloat16, device=device)
    rank_acts = torch.empty(tokens, sum(slots), dtype=torch.bfloat16, device=device)
    largest = max(
        [(last - first) * width for count in slots for first, last in _slabs(count, width, config.unpacked)]
        + [
            -(-(last - first) // _ROWS) * _ROWS * sum(slots)
            for first, last in _slabs(made, sum(slots), config.unpacked)
        ]
    )
    scratch = torch.empty(largest, dtype=torch.bfloat16, device=device)
    options = {"BLOCK": _ROWS, "BLOCK_K": _STEP, "TRANSPOSED": transposed, "num_warps": 4}
    yield (
        scaled.scale,
        (-(-tokens // 4), -(-width // 2048)),
        (x, scale_first, terms, tokens, features, x.stride(0), tokens, width),
        {"PATHS": len(ranks), "TERMS": 1, "ROWS": 4, "BLOCK": 2048, "EARLY": False, "num_warps": 4},
    )
    slot = 0
    sides = []
    for index, (path, count) in enumerate(zip(places(ranks), slots)):  # noqa: B905 Python 3.9
        rank = path.rank
        of_v, of_u = _factors(layer, path)
        one, two = (of_u, of_v) if transposed else (of_v, of_u)
        sides.append((two, scale_last[index], rank, slot))
        gain = scale_rank[path.columns]
        for first, last in _slabs(count, width, config.unpacked):
            slab = scratch[: (last - first) * width].view(last - first, width)
            yield (
                _unpack,
                (width // _STEP, (last - first) // _ROWS),
                (*one, gain, slab, first, rank, features, one[0].stride(0), width),
                {**options, "ORDERED": True},
            )
            yield DENSE, (), (terms[index], slab.T, rank_acts[:, slot + first : slot + last], None, 0), {}
        slot += count
    for first, last in _slabs(made, slot, config.unpacked):
        rows = -(-(last - first) // _ROWS)
        slab = scratch[: rows * _ROWS * slot].view(rows * _ROWS, slot)
        for (packed, tail), gain, rank, offset in sides:
            yield (
                _unpack,
                (-(-rank // _STEP), rows),
                (packed, tail, gain, slab[:, offset:], first, made, rank, packed.stride(0), slot),
                {**options, "ORDERED": False},
            )
        signs = slab[: last - first].T
        yield DENSE, (), (rank_acts, signs, y[:, first:last], bias, first), {}
