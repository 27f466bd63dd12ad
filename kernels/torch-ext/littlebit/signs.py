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

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a triton without NVIDIA's part, where nothing starts early

    @triton.jit
    def gdc_launch_dependents():
        pass

    @triton.jit
    def gdc_wait():
        pass


__all__ = [
    "across_words",
    "along_words",
    "in_pair_order",
    "padded",
    "pair_of",
    "path_of",
    "place",
    "row_pointers",
    "segment",
    "segments",
    "sign_pairs",
    "sign_tile",
    "tail_word",
    "wait",
]

_SIGNS = tl.constexpr(-0x7FFF8000)  # 0x80008000


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

    Returns (path, its rank, ranks before it, its word rows before it, slots before it, first rank inside the path).
    """
    path = 0
    rank = ranks[0] * UNIT
    before = 0
    words = 0
    slots = 0
    ranks_seen = 0
    words_seen = 0
    slots_seen = 0
    for index in tl.static_range(1, len(ranks)):
        last = ranks[index - 1] * UNIT
        ranks_seen += last
        words_seen += last // 32
        slots_seen += tl.cdiv(last, PAD) * PAD
        here = block * BLOCK >= slots_seen
        path = tl.where(here, index, path)
        rank = tl.where(here, ranks[index] * UNIT, rank)
        before = tl.where(here, ranks_seen, before)
        words = tl.where(here, words_seen, words)
        slots = tl.where(here, slots_seen, slots)
    return path, rank, before, words, slots, block * BLOCK - slots


@triton.jit
def segments(ranks, UNIT: tl.constexpr, PAD: tl.constexpr):
    """The slots of all paths together."""
    slots = 0
    for index in tl.static_range(len(ranks)):
        slots += tl.cdiv(ranks[index] * UNIT, PAD) * PAD
    return slots


@triton.jit
def path_of(ranks, UNIT: tl.constexpr, PAD: tl.constexpr, path):
    """Of every path of the tensor `path`: (its rank, ranks, word rows, tail rows and slots before it)."""
    if len(ranks) == 1:
        return path * 0 + ranks[0] * UNIT, path * 0, path * 0, path * 0, path * 0
    rank = path * 0
    before = path * 0
    words = path * 0
    tails = path * 0
    slots = path * 0
    ranks_seen = 0
    words_seen = 0
    tails_seen = 0
    slots_seen = 0
    for index in tl.static_range(len(ranks)):
        here = path == index
        own = ranks[index] * UNIT
        rank = tl.where(here, own, rank)
        before = tl.where(here, ranks_seen, before)
        words = tl.where(here, words_seen, words)
        tails = tl.where(here, tails_seen, tails)
        slots = tl.where(here, slots_seen, slots)
        ranks_seen += own
        words_seen += own // 32
        tails_seen += tl.cdiv(own % 32, 8)
        slots_seen += tl.cdiv(own, PAD) * PAD
    return rank, before, words, tails, slots


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
def sign_pairs(words, shifts, ones, PTX: tl.constexpr):
    """Bits 15 - shift and 31 - shift of each word as the signs of a pair of `ones`."""
    if PTX:
        # A multiplication shifts as well, and runs beside the logic instruction instead of in turns with it. Left to
        # itself the compiler makes two logic instructions, each with a constant of its own.
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; mul.lo.u32 t, $1, $2; lop3.b32 $0, t, 0x80008000, $3, 0x6A; }",
            "=r,r,r,r",
            [words, 1 << shifts, ones],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return ((words << shifts) & _SIGNS) ^ ones


@triton.jit
def pair_of(scale):
    """fp32 numbers, rounded to bf16, twice in an int32 each."""
    bits = scale.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (bits << 16)


@triton.jit
def sign_tile(
    first, second, ones, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr, PTX: tl.constexpr
):
    """±1 in bf16 [ROWS, BLOCK_K], in pair order, of what `along_words` or (TRANSPOSED) `across_words` gave.

    Args:
        ones: int32 [ROWS], `pair_of` what takes the place of 1 in a row.
    """
    shifts = 15 - tl.arange(0, 16)
    if TRANSPOSED:
        half = tl.arange(0, 2)[None, :, None]
        if PTX:
            both = tl.inline_asm_elementwise(
                "prmt.b32 $0, $1, $2, $3;",
                "=r,r,r,r",
                [first[:, None, :], second[:, None, :], 0x5410 + 0x2222 * half],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
        else:
            low = (first[:, None, :] >> (16 * half)) & 0xFFFF
            both = low | ((second[:, None, :] >> (16 * half)) << 16)
        pairs = sign_pairs(
            both[:, :, None, :], shifts[None, None, :, None], tl.reshape(ones, [ROWS // 32, 2, 16, 1]), PTX
        )
    else:
        pairs = sign_pairs(first[:, :, None], shifts[None, None, :], ones[:, None, None], PTX)
    return _halves(tl.reshape(pairs, [ROWS, BLOCK_K // 2]), ROWS, BLOCK_K)


@triton.jit
def row_pointers(words, tails, first, path, whole, stride, ROWS: tl.constexpr, TAIL: tl.constexpr):
    """The first word of ROWS rows from `first` on, of a factor that has `whole` rows.

    The row after the last is the path's in `tails` (scaled.tail_rows), or one of no meaning.
    """
    rows = first + tl.arange(0, ROWS)
    if TAIL:
        return tl.where(rows < whole, words + rows * stride, tails + path * stride + rows * 0)
    return words + tl.minimum(rows, whole - 1) * stride


def padded(ranks: Sequence[int], pad: int) -> Tuple[int, ...]:
    """The slots of every path."""
    return tuple(-(-rank // pad) * pad for rank in ranks)
