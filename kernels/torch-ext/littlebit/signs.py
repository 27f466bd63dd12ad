"""Device functions of the products of many tokens: packed words become ±1 in bf16, the left operand, in registers.

Pair order: inside every 32 places the sum takes them as 0, 16, 1, 17, ..., 15, 31. One shift and one logic instruction then
make two signs of a word, as they lie in a register of the matrix units:

    (word << (15 - i)) & 0x80008000 | 0x3F803F80       the bf16 pair of bit i and bit i + 16

Where the bits run along the outputs instead (the gradient), the two words of places i and i + 16 are first put together,
half by half, and the same two instructions follow. The other operand is written in this order by whoever writes it
(scaled.py), with zeros up to a multiple of the step: what the signs are there does not matter.
"""

from typing import Sequence, Tuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .tiles import INTERPRETED

__all__ = [
    "across_words",
    "add_across",
    "add_along",
    "along_words",
    "in_pair_order",
    "place",
    "segment",
    "segments",
    "sign_tile",
    "tail_word",
    "wait",
]

# The interpreter keeps bf16 numbers as integers and would multiply those; the values are the same in fp32.
OPERAND = tl.constexpr(tl.float32 if INTERPRETED else tl.bfloat16)
_SIGNS = tl.constexpr(-0x7FFF8000)  # 0x80008000
_ONES = tl.constexpr(0x3F803F80)


@triton.jit
def wait(EARLY: tl.constexpr):
    """Programmatic dependent launch: let the next kernel start, and wait for the results of the one before."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def place(slots):
    """The place of a slot: a position in pair order."""
    within = slots % 32
    return slots - within + within // 2 + 16 * (within % 2)


@triton.jit
def in_pair_order(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """values [ROWS, COLUMNS] with the rows of every 32 in pair order."""
    split = tl.reshape(values, [ROWS // 32, 2, 16, COLUMNS])
    return tl.reshape(tl.permute(split, (0, 2, 1, 3)), [ROWS, COLUMNS])


@triton.jit
def segment(block, ranks, UNIT: tl.constexpr, BLOCK: tl.constexpr, PAD: tl.constexpr):
    """Where a block of ranks lies: every path's ranks (ranks[p] * UNIT) take a multiple of PAD, and so of BLOCK, slots.

    Returns (path, its rank, ranks before it, its word rows before it, its tail rows before it, slots before it, first rank
    inside the path).
    """
    path = 0
    rank = ranks[0] * UNIT
    before = 0
    words = 0
    tails = 0
    slots = 0
    ranks_seen = 0
    words_seen = 0
    tails_seen = 0
    slots_seen = 0
    for index in tl.static_range(1, len(ranks)):
        last = ranks[index - 1] * UNIT
        ranks_seen += last
        words_seen += last // 32
        tails_seen += tl.cdiv(last % 32, 8)
        slots_seen += tl.cdiv(last, PAD) * PAD
        here = block * BLOCK >= slots_seen
        path = tl.where(here, index, path)
        rank = tl.where(here, ranks[index] * UNIT, rank)
        before = tl.where(here, ranks_seen, before)
        words = tl.where(here, words_seen, words)
        tails = tl.where(here, tails_seen, tails)
        slots = tl.where(here, slots_seen, slots)
    return path, rank, before, words, tails, slots, block * BLOCK - slots


@triton.jit
def segments(ranks, UNIT: tl.constexpr, PAD: tl.constexpr):
    """The slots of all paths together."""
    slots = 0
    for index in tl.static_range(len(ranks)):
        slots += tl.cdiv(ranks[index] * UNIT, PAD) * PAD
    return slots


@triton.jit
def tail_word(tail, columns, width, length, stride):
    """The tail bytes of `columns` as one word each, of a factor of `length` bits by `width` columns.

    `tail` is not None, but may have no bytes for this length; `stride` is between its rows.
    """
    left = tl.cdiv(length % 32, 8)
    word = columns * 0
    for index in tl.static_range(4):
        # No columns in the rows that are not there; written so that the mask is a comparison of blocks.
        live = columns < tl.where(index < left, width, 0)
        word |= tl.load(tail + index * stride + columns, mask=live, other=0).to(tl.int32) << (8 * index)
    return word


@triton.jit
def along_words(words, tails, step, columns, whole, stride, WORDS: tl.constexpr, TAIL: tl.constexpr):
    """int32 [columns, WORDS] of a step: bits run along the sum. `columns` lie inside; `tails` is what `tail_word` gave."""
    rows = step * WORDS + tl.arange(0, WORDS)
    found = tl.load(words + rows[None, :] * stride + columns[:, None], mask=(rows < whole)[None, :], other=0)
    if TAIL:
        found = tl.where((rows == whole)[None, :], tails[:, None], found)
    return found


@triton.jit
def across_words(rows, start, length, BLOCK_K: tl.constexpr):
    """The two int32 [rows, BLOCK_K / 2] whose bits, along the outputs, are the left and the right of every pair.

    Args:
        rows: pointers to the first word of every row of words.
        start, length: the places summed from here on, and all of them.
    """
    pairs = tl.arange(0, BLOCK_K // 2)
    left = start + (pairs // 16) * 32 + pairs % 16
    first = tl.load(rows[:, None] + left[None, :], mask=(left < length)[None, :], other=0)
    second = tl.load(rows[:, None] + (left + 16)[None, :], mask=(left + 16 < length)[None, :], other=0)
    return first, second


@triton.jit
def _halves(pairs, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """int32 [ROWS, COLUMNS / 2] -> its bf16 halves side by side, [ROWS, COLUMNS]."""
    halves = tl.interleave(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    return tl.reshape(halves, [ROWS, COLUMNS]).to(tl.bfloat16, bitcast=True)


@triton.jit
def sign_tile(first, second, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr):
    """±1 in bf16 [ROWS, BLOCK_K], in pair order, of what `along_words` or (TRANSPOSED) `across_words` gave."""
    bits = tl.arange(0, 16)
    if TRANSPOSED:
        half = 16 * tl.arange(0, 2)
        low = (first[:, None, :] >> half[None, :, None]) & 0xFFFF
        both = low | ((second[:, None, :] >> half[None, :, None]) << 16)
        pairs = ((both[:, :, None, :] << (15 - bits)[None, None, :, None]) & _SIGNS) | _ONES
    else:
        # A multiplication shifts too, and runs beside the logic instructions, not in turns with them.
        pairs = ((first[:, :, None] * (1 << (15 - bits))[None, None, :]) & _SIGNS) | _ONES
    return _halves(tl.reshape(pairs, [ROWS, BLOCK_K // 2]), ROWS, BLOCK_K)


@triton.jit
def _add_terms(result, signs, values, plane, TERMS: tl.constexpr):
    """result + signs @ the sum of the terms, which lie `plane` apart behind the pointers `values`."""
    for term in tl.static_range(TERMS):
        result = tl.dot(signs.to(OPERAND), tl.load(values + term * plane).to(OPERAND), result)
    return result


@triton.jit
def add_along(
    result,
    words,
    tails,
    columns,
    whole,
    stride,
    values,
    plane,
    first,
    last,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TERMS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """result [BLOCK, tokens] + signs @ values over the steps first .. last - 1; `values` points to the first step's."""
    for step in range(first, last):
        found = along_words(words, tails, step, columns, whole, stride, BLOCK_K // 32, TAIL)
        result = _add_terms(result, sign_tile(found, found, BLOCK, BLOCK_K, False), values, plane, TERMS)
        values += BLOCK_K
    return result


@triton.jit
def add_across(
    result,
    rows,
    length,
    values,
    plane,
    first,
    last,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TERMS: tl.constexpr,
):
    """The same where the words' bits run along the outputs; `rows` as in `across_words`."""
    for step in range(first, last):
        left, right = across_words(rows, step * BLOCK_K, length, BLOCK_K)
        result = _add_terms(result, sign_tile(left, right, BLOCK, BLOCK_K, True), values, plane, TERMS)
        values += BLOCK_K
    return result


def padded(ranks: Sequence[int], pad: int) -> Tuple[int, ...]:
    """The slots of every path."""
    return tuple(-(-rank // pad) * pad for rank in ranks)
