"""The head of several tokens on a GPU, and its gradient: tiles of codes times 16-bit terms, on matrix units.

    many       y[t, n] = bias[n] + sum_g scale[n, g] sum_(k in g) codes[n, k] x[t, k]
    gradient   y[t, k] = sum_n (scale[n, g] grad[t, n]) codes[n, k]                            g: the group of column k

Codes are whole numbers below 2^8 and so exact in bf16 and fp16; scales meet sums, or the gradient, in fp32. A 16-bit x is a
factor as it is. An fp32 x, and a scaled gradient, are sums of bf16 terms (TERMS: 3 hold 24 bits, 2 hold 16), each with a product
of its own; without matrix units for bf16 (TERMS 0) everything is fp32. Sums are fp32.
"""

import triton
import triton.language as tl

from .tiles import OPERAND

__all__ = ["gradient", "many"]


@triton.jit
def _codes8(codes, row, k, columns, EVEN: tl.constexpr):
    """Codes of 8 bits of the rows at columns k, int8 [rows, columns]."""
    place = codes + row.to(tl.int64)[:, None] * columns + k[None, :]
    if EVEN:
        return tl.load(place)
    return tl.load(place, mask=(k < columns)[None, :], other=0)


@triton.jit
def _codes4(codes, row, group, groups):
    """Codes of 4 bits of one group of the rows, fp32 [rows, 64]."""
    place = codes + row.to(tl.int64)[:, None] * (groups * 8) + (group * 8 + tl.arange(0, 8))[None, :]
    nibbles = (tl.load(place)[:, None, :] >> (4 * tl.arange(0, 8))[None, :, None]) & 15
    values = (nibbles | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    return tl.reshape(values, [row.shape[0], 64])


@triton.jit
def _multiply(total, left, right, TERMS: tl.constexpr, LEFT: tl.constexpr):
    """total + left @ right, where one side (LEFT: the left one) is codes and the other fp32 or, with TERMS 1, of 16 bits."""
    if TERMS == 0:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    if TERMS == 1:
        given: tl.constexpr = right.dtype if LEFT else left.dtype
        kind: tl.constexpr = OPERAND if given == tl.bfloat16 else given
        return tl.dot(left.to(kind), right.to(kind), total)
    if LEFT:
        rest = right
        whole = left.to(OPERAND)
    else:
        rest = left
        whole = right.to(OPERAND)
    for _ in tl.static_range(TERMS):
        term = rest.to(tl.bfloat16)
        rest -= term.to(tl.float32)
        total = tl.dot(whole, term.to(OPERAND), total) if LEFT else tl.dot(term.to(OPERAND), whole, total)
    return total


@triton.jit(do_not_specialize=["tokens"])
def many(
    x,
    codes,
    scale,
    bias,
    y,
    tokens,
    rows,
    columns,
    groups,
    stride_x,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BITS: tl.constexpr,
    PER_ROW: tl.constexpr,
    EVEN: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Tiles [BLOCK_N rows, BLOCK_T tokens]. Without PER_ROW, BLOCK_K is 64, a group."""
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    held = tl.minimum(row, rows - 1)
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    x += tl.minimum(token, tokens - 1)[None, :] * stride_x
    scales = scale + held.to(tl.int64) * groups
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        values = tl.load(x + k[:, None]) if EVEN else tl.load(x + k[:, None], mask=(k < columns)[:, None], other=0.0)
        if TERMS != 1:
            values = values.to(tl.float32)
        whole = _codes8(codes, held, k, columns, EVEN) if BITS == 8 else _codes4(codes, held, start // 64, groups)
        if PER_ROW:
            total = _multiply(total, whole, values, TERMS, True)
        else:
            part = _multiply(tl.zeros([BLOCK_N, BLOCK_T], tl.float32), whole, values, TERMS, True)
            total += part * tl.load(scales + start // 64).to(tl.float32)[:, None]
    if PER_ROW:
        total *= tl.load(scales).to(tl.float32)[:, None]
    if bias is not None:
        total += tl.load(bias + held).to(tl.float32)[:, None]
    kept = (row < rows)[:, None] & (token < tokens)[None, :]
    tl.store(y + token[None, :] * rows + row[:, None], total.to(y.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["tokens", "span"])
def gradient(
    grad,
    codes,
    scale,
    y,
    tokens,
    rows,
    columns,
    groups,
    stride_grad,
    span,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BITS: tl.constexpr,
    PER_ROW: tl.constexpr,
    EVEN: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Tiles [BLOCK_T tokens, 64 columns], summed over `span` blocks of rows; y [splits, tokens, columns] or [tokens, columns]."""
    split = tl.program_id(2)
    start = tl.program_id(1) * 64
    k = start + tl.arange(0, 64)
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    grad += tl.minimum(token, tokens - 1)[:, None] * stride_grad
    scale += start // 64 if not PER_ROW else 0
    total = tl.zeros([BLOCK_T, 64], tl.float32)
    for block in range(split * span, min((split + 1) * span, tl.cdiv(rows, BLOCK_N))):
        row = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = row < rows
        held = tl.minimum(row, rows - 1)
        values = tl.load(grad + row[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        values *= tl.load(scale + held.to(tl.int64) * groups).to(tl.float32)[None, :]
        whole = _codes8(codes, held, k, columns, EVEN) if BITS == 8 else _codes4(codes, held, start // 64, groups)
        total = _multiply(total, values, whole, TERMS, False)
    kept = (token < tokens)[:, None] & (k < columns)[None, :]
    place = (split.to(tl.int64) * tokens + token)[:, None] * columns + k[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=kept)
