"""Device functions of the Triton kernels: from packed words to tiles of signs, and from a program's number to its path.

A factor is a matrix of bits, `length` along the bit axis (32 to a word, then up to three or four tail bytes, packing.py),
by columns that lie side by side with `stride` of them in a row. Both axes serve as the one that is summed over: the forward
product of V sums along its bits, the gradient sums along its columns.

Places outside the factor read as 0, which is the sign +1: whoever multiplies must have zeros there on the other side.
"""

from typing import Sequence, Tuple

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "OPERAND", "block_count", "in_units", "locate", "rank_sum", "sign_tile", "word_tile"]


@triton.jit
def locate(block, ranks, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Where a block lies when every path's ranks (ranks[p] * UNIT) are cut into blocks of their own.

    Returns (path, its rank, ranks before it, its word rows before it, its tail rows before it, first rank inside the path).
    """
    path = 0
    rank = ranks[0] * UNIT
    before = 0
    words = 0
    tails = 0
    inside = block * BLOCK
    blocks = 0
    ranks_seen = 0
    words_seen = 0
    tails_seen = 0
    for index in tl.static_range(1, len(ranks)):
        last = ranks[index - 1] * UNIT
        blocks += tl.cdiv(last, BLOCK)
        ranks_seen += last
        words_seen += last // 32
        tails_seen += tl.cdiv(last % 32, 8)
        here = block >= blocks
        path = tl.where(here, index, path)
        rank = tl.where(here, ranks[index] * UNIT, rank)
        before = tl.where(here, ranks_seen, before)
        words = tl.where(here, words_seen, words)
        tails = tl.where(here, tails_seen, tails)
        inside = tl.where(here, (block - blocks) * BLOCK, inside)
    return path, rank, before, words, tails, inside


@triton.jit
def block_count(ranks, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """The blocks of all paths together, as `locate` cuts them."""
    blocks = 0
    for index in tl.static_range(len(ranks)):
        blocks += tl.cdiv(ranks[index] * UNIT, BLOCK)
    return blocks


@triton.jit
def rank_sum(ranks, UNIT: tl.constexpr):
    """The ranks of all paths together."""
    total = 0
    for index in tl.static_range(len(ranks)):
        total += ranks[index] * UNIT
    return total


@triton.jit
def word_tile(words, tail, rows, columns, length, width, stride):
    """int32 [rows, columns] of a factor of `length` bits by `width` columns; `tail` is None where it has no tail."""
    inside = columns < width
    whole = length // 32
    places = rows[:, None] * stride + columns[None, :]
    tile = tl.load(words + places, mask=(rows < whole)[:, None] & inside[None, :], other=0)
    if tail is not None:
        left = tl.cdiv(length % 32, 8)
        for index in tl.static_range(4):
            # The row after the last word, or no row; written so that the mask is a comparison of blocks.
            last = rows == tl.where(index < left, whole, -1)
            places = tl.zeros_like(rows)[:, None] + (index * stride + columns)[None, :]
            part = tl.load(tail + places, mask=last[:, None] & inside[None, :], other=0)
            tile |= part.to(tl.int32) << (8 * index)
    return tile


@triton.jit
def sign_tile(
    words,
    tail,
    summed,
    made,
    length,
    width,
    stride,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """±1 as fp32 [BLOCK_K, BLOCK_N], from `summed` on along the axis that is summed, from `made` on along the outputs'."""
    bits = 31 - tl.arange(0, 32)
    if TRANSPOSED:
        rows = made // 32 + tl.arange(0, BLOCK_N // 32)
        tile = word_tile(words, tail, rows, summed + tl.arange(0, BLOCK_K), length, width, stride)
    else:
        rows = summed // 32 + tl.arange(0, BLOCK_K // 32)
        tile = word_tile(words, tail, rows, made + tl.arange(0, BLOCK_N), length, width, stride)
    # The bit becomes the sign of 1.0: no comparison, no conversion of an integer.
    spread = ((tile[:, None, :] << bits[None, :, None]) & -0x80000000) | 0x3F800000
    signs = spread.to(tl.float32, bitcast=True)
    if TRANSPOSED:
        return tl.trans(tl.reshape(signs, [BLOCK_N, BLOCK_K]))
    return tl.reshape(signs, [BLOCK_K, BLOCK_N])


# TRITON_INTERPRET=1 was set when triton first saw the kernels: they run as numpy on CPU tensors, for tests.
INTERPRETED = not isinstance(locate, triton.runtime.JITFunction)
# The interpreter keeps bf16 numbers as integers and would multiply those; the values are the same in fp32.
OPERAND = tl.constexpr(tl.float32 if INTERPRETED else tl.bfloat16)


def in_units(ranks: Sequence[int]) -> Tuple[Tuple[int, ...], int]:
    """(ranks / UNIT, UNIT): a factor of 8 that the compiler can see lets it load 16 bytes at a time."""
    unit = 1 if any(rank % 8 for rank in ranks) else 8
    return tuple(rank // unit for rank in ranks), unit
