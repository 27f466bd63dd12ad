"""Rows of a packed table on a GPU: the head of one token, and the gather of an embedding.

    y[n] = bias[n] + sum_g scale[n, g] sum_(k in g) codes[n, k] x[k]

The threads of a program lie along a row, which they read from its beginning to its end, for many rows at once, so that many
loads are on their way. What a thread has read it sums by itself, and the threads meet once at the end. It has as many values of
x side by side as it has codes: both are then loaded in the layout in which they are multiplied, and nothing passes through
shared memory. Codes become fp32 exactly, products and sums are fp32.
"""

import triton
import triton.language as tl

__all__ = ["MAGIC", "PART4", "PART8", "gather", "one4", "one8"]

MAGIC = 0x4B000000
PART8 = tl.constexpr(8)  # codes of 8 bits that a thread has side by side: as many bf16 as 16 bytes hold
PART4 = tl.constexpr(4)  # words of eight 4-bit codes that a thread has side by side: 16 bytes


@triton.jit
def _finish(sums, scale, bias, y, row, rows, PER_ROW: tl.constexpr):
    """Add what the threads of a row have, and store it."""
    total = tl.sum(sums, axis=1)
    inside = row < rows
    if PER_ROW:
        total *= tl.load(scale + row, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def one8(
    x,
    codes,
    scale,
    bias,
    y,
    rows,
    columns,
    groups,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_ROW: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The head of one token with 8 bits. BLOCK_K: PART8 for every thread of the program. EVEN: it divides the columns."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    held = tl.minimum(row, rows - 1).to(tl.int64)  # a row past the end reads the last one
    k = tl.max_contiguous(tl.arange(0, BLOCK_K), PART8)
    part = tl.arange(0, BLOCK_K // PART8) * PART8
    codes += held[:, None] * columns
    scales = scale + held[:, None] * groups
    sums = tl.zeros([BLOCK_N, BLOCK_K // PART8], tl.float32)
    for start in tl.range(0, columns, BLOCK_K, num_stages=STAGES):
        place = codes + tl.max_contiguous(start + k, PART8)[None, :]
        if EVEN:
            values = tl.load(x + start + k).to(tl.float32)
            whole = tl.load(place)
        else:
            values = tl.load(x + start + k, mask=start + k < columns, other=0.0).to(tl.float32)
            whole = tl.load(place, mask=(start + k < columns)[None, :], other=0)
        products = whole.to(tl.float32) * values[None, :]
        found = tl.sum(tl.reshape(products, [BLOCK_N, BLOCK_K // PART8, PART8]), axis=2)
        if not PER_ROW:
            # Where there is nothing, a zero meets a scale that may belong to the next row.
            group = tl.minimum((start + part) // 64, groups - 1)
            found *= tl.load(scales + group[None, :]).to(tl.float32)
        sums += found
    _finish(sums, scale, bias, y, row, rows, PER_ROW)


@triton.jit
def _nibble(words, high, magic, q: tl.constexpr):
    """(code - 8) 16^p of nibble q of the words in fp32, p = q below 5 and q - 3 from there on; high: the words >> 12.

    The nibble stays where it is, in the fraction of a number of which 2^23 is then taken away: exact, and no shift. `magic`
    holds the bits of 2^23, MAGIC: were it a constant, the assembler would load the mask beside it anew for every code.
    """
    P: tl.constexpr = q if q < 5 else q - 3
    code = (words if q < 5 else high) & (15 << (4 * P))
    return (code | magic).to(tl.float32, bitcast=True) - (8388608.0 + (8 << (4 * P)))


@triton.jit
def one4(
    x,
    codes,
    scale,
    bias,
    y,
    rows,
    columns,
    groups,
    magic,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_ROW: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The head of one token with 4 bits. BLOCK_K: 8 PART4 for every thread of the program."""
    WORDS: tl.constexpr = BLOCK_K // 8
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    held = tl.minimum(row, rows - 1).to(tl.int64)
    word = tl.max_contiguous(tl.arange(0, WORDS), PART4)
    k = word // 8 * 64 + word % 8
    group = tl.arange(0, WORDS // PART4) * PART4 // 8
    width = groups * 8
    codes += held[:, None] * width + word[None, :]
    scales = scale + held[:, None] * groups
    sums = tl.zeros([BLOCK_N, WORDS // PART4], tl.float32)
    for start in tl.range(0, columns, BLOCK_K, num_stages=STAGES):
        first = start // 8
        words = (
            tl.load(codes + first) if EVEN else tl.load(codes + first, mask=(first + word < width)[None, :], other=0)
        )
        high = words >> 12
        products = tl.zeros([BLOCK_N, WORDS], tl.float32)
        for q in tl.static_range(8):
            place = tl.max_contiguous(tl.multiple_of(start + 8 * q + k, PART4), PART4)
            if EVEN:
                values = tl.load(x + place).to(tl.float32)
            else:
                values = tl.load(x + place, mask=place < columns, other=0.0).to(tl.float32)
            values *= 1.0 / (1 << (4 * (q if q < 5 else q - 3)))
            products += _nibble(words, high, magic, q) * values[None, :]
        found = tl.sum(tl.reshape(products, [BLOCK_N, WORDS // PART4, PART4]), axis=2)
        near = start // 64 + group
        if not EVEN:
            near = tl.minimum(near, groups - 1)
        sums += found * tl.load(scales + near[None, :]).to(tl.float32)
    _finish(sums, scale, bias, y, row, rows, False)


@triton.jit
def gather(
    indices, codes, scale, y, rows, columns, groups, BLOCK: tl.constexpr, BITS: tl.constexpr, PER_ROW: tl.constexpr
):
    """Columns of one row of an embedding; NaN where the index is none of the table's."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(indices + token).to(tl.int64)
    known = (row >= 0) & (row < rows)
    row = tl.where(known, row, 0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < columns
    group = k // 64
    if BITS == 8:
        values = tl.load(codes + row * columns + k, mask=inside, other=0).to(tl.float32)
    else:
        words = tl.load(codes + row * groups * 8 + group * 8 + k % 8, mask=inside, other=0)
        values = ((words >> (k % 64 // 8 * 4)) & 15).to(tl.float32) - 8.0
    if PER_ROW:
        values *= tl.load(scale + row).to(tl.float32)
    else:
        values *= tl.load(scale + row * groups + group, mask=inside, other=0.0).to(tl.float32)
    values = tl.where(known, values, float("nan"))
    tl.store(y + token * columns + k, values.to(y.dtype.element_ty), mask=inside)
