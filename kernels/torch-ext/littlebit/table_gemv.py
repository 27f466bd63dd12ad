"""Rows of a packed table on a GPU: the head of one token, and the gather of an embedding.

    y[n] = bias[n] + sum_g scale[n, g] sum_(k in g) codes[n, k] x[k]

A warp reads rows from their beginning to their end, 16 bytes a thread at a time and several rows side by side, so that many
loads are on their way; what a thread has read it sums by itself, and the threads of a row meet once at the end. Codes become
fp32 exactly, products and sums are fp32. Nothing of x is reordered: see table.py for where the nibbles of a word belong.
"""

import triton
import triton.language as tl

__all__ = ["gather", "one4", "one8"]


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
    """The head of one token with 8 bits. EVEN: BLOCK_K divides the columns."""
    PART: tl.constexpr = 16  # columns that a thread has side by side
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    held = tl.minimum(row, rows - 1).to(tl.int64)  # a row past the end reads the last one
    k = tl.arange(0, BLOCK_K)
    part = tl.arange(0, BLOCK_K // PART) * PART
    codes += held[:, None] * columns + k[None, :]
    scales = scale + held[:, None] * groups
    sums = tl.zeros([BLOCK_N, BLOCK_K // PART], tl.float32)
    for start in tl.range(0, columns, BLOCK_K, num_stages=STAGES):
        if EVEN:
            values = tl.load(x + start + k).to(tl.float32)
            whole = tl.load(codes + start)
        else:
            values = tl.load(x + start + k, mask=start + k < columns, other=0.0).to(tl.float32)
            whole = tl.load(codes + start, mask=(start + k < columns)[None, :], other=0)
        products = whole.to(tl.float32) * values[None, :]
        found = tl.sum(tl.reshape(products, [BLOCK_N, BLOCK_K // PART, PART]), axis=2)
        if not PER_ROW:
            # Where there is nothing, a zero meets a scale that may belong to the next row.
            group = tl.minimum((start + part) // 64, groups - 1)
            found *= tl.load(scales + group[None, :]).to(tl.float32)
        sums += found
    _finish(sums, scale, bias, y, row, rows, PER_ROW)


@triton.jit
def nibble(words, q: tl.constexpr):
    """The values of nibble q of the words, code - 8, in fp32: the code becomes the end of the fraction of 2^23."""
    code = (words >> (4 * q)) & 15
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0


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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_ROW: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The head of one token with 4 bits; BLOCK_K is in columns, a multiple of 64."""
    PART: tl.constexpr = 4  # words that a thread has side by side
    WORDS: tl.constexpr = BLOCK_K // 8
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    held = tl.minimum(row, rows - 1).to(tl.int64)
    word = tl.arange(0, WORDS)
    k = word // 8 * 64 + word % 8
    group = tl.arange(0, WORDS // PART) * PART // 8
    width = groups * 8
    codes += held[:, None] * width + word[None, :]
    scales = scale + held[:, None] * groups
    sums = tl.zeros([BLOCK_N, WORDS // PART], tl.float32)
    for start in tl.range(0, columns, BLOCK_K, num_stages=STAGES):
        first = start // 8
        if EVEN:
            words = tl.load(codes + first)
        else:
            words = tl.load(codes + first, mask=(first + word < width)[None, :], other=0)
        products = tl.zeros([BLOCK_N, WORDS], tl.float32)
        for q in tl.static_range(8):
            if EVEN:
                values = tl.load(x + start + 8 * q + k).to(tl.float32)
            else:
                values = tl.load(x + start + 8 * q + k, mask=start + 8 * q + k < columns, other=0.0).to(tl.float32)
            products += nibble(words, q) * values[None, :]
        found = tl.sum(tl.reshape(products, [BLOCK_N, WORDS // PART, PART]), axis=2)
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
