"""The sum in the products of many tokens: tiles of ±1, made from words step by step, times bf16 terms.

A step is BLOCK_K places of the sum: the words of those places are loaded, become the left operand in registers (signs.py)
and are multiplied by every term of the right one (scaled.py). Where two paths end in the same outputs their sums are one
loop, whose signs are multiplied by the paths' scales. Matrix units cut off what they add to an fp32 sum, so that a sum of
three terms, which are to hold fp32, is carried over to another sum every CARRY steps.
"""

import triton
import triton.language as tl

from .signs import across_words, along_words, sign_tile
from .tiles import OPERAND

__all__ = ["add_signs"]


@triton.jit
def _add_terms(result, signs, values, plane, TERMS: tl.constexpr):
    """result + signs @ the sum of the terms, which lie `plane` apart behind the pointers `values`."""
    for term in tl.static_range(TERMS):
        result = tl.dot(signs.to(OPERAND), tl.load(values + term * plane).to(OPERAND), result)
    return result


@triton.jit
def _settled(result):
    """`result`, seen by an instruction of no machine code: whoever computes it is waited for before the next step.

    Matrix instructions of Hopper read the signs from registers while the program goes on. Left to run into the next step,
    they were found to read registers that already held that step's signs.
    """
    return tl.inline_asm_elementwise("", "=f,0", [result], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _sum_steps(
    result,
    words,
    tails,
    more_tails,
    columns,
    whole,
    stride,
    values,
    plane,
    first,
    last,
    ones,
    more_ones,
    turn,
    more_whole,
    more_words,
    more_values,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TERMS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TAIL: tl.constexpr,
    TWO: tl.constexpr,
    PTX: tl.constexpr,
):
    """result + the signs of the steps first .. last - 1, of which there is one at the least; arguments as `add_signs`."""
    # Without this the loop could be passed by, and ptxas then lets every matrix instruction wait for the one before it.
    tl.assume(first < last)
    for step in range(first, last):
        # Two paths are one loop: with two, ptxas does the same.
        here = step
        begin = 0
        end = whole
        offset = 0
        pair = ones
        extra = tails
        if TWO:
            second = step >= turn
            here = tl.where(second, step - turn, step)
            begin = tl.where(second, more_words, 0)
            end = tl.where(second, more_whole, whole)
            offset = tl.where(second, more_values, 0)
            pair = tl.where(second, more_ones, ones)
            if TAIL:
                extra = tl.where(second, more_tails, tails)
        if TRANSPOSED:
            left, right = across_words(words + begin, here * BLOCK_K, end, BLOCK_K)
        else:
            left = along_words(words + begin * stride, extra, here, columns, end, stride, BLOCK_K // 32, TAIL)
            right = left
        signs = sign_tile(left, right, pair, BLOCK, BLOCK_K, TRANSPOSED, PTX)
        result = _add_terms(result, signs, values + (offset + here * BLOCK_K), plane, TERMS)
        if PTX:
            result = _settled(result)
    return result


@triton.jit
def add_signs(
    words,
    tails,
    more_tails,
    columns,
    whole,
    stride,
    values,
    plane,
    first,
    last,
    ones,
    more_ones,
    turn,
    more_whole,
    more_words,
    more_values,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TERMS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TAIL: tl.constexpr,
    TWO: tl.constexpr,
    CARRY: tl.constexpr,
    PTX: tl.constexpr,
):
    """fp32 [BLOCK, BLOCK_T]: signs @ values over the steps first .. last - 1, carried over every CARRY steps if that is not 0.

    Args:
        words, columns: the factor's words and the columns of the tile, which lie inside it. TRANSPOSED: pointers to the rows
            of words of the tile (`row_pointers`), and anything.
        tails: what `tail_word` gave, if TAIL; never if TRANSPOSED.
        whole, stride: whole words along the sum, and between their rows. TRANSPOSED: places of the sum, and anything.
        values: pointers [BLOCK_K, BLOCK_T] to the first term at the sum's first step; terms lie `plane` apart.
        ones: as in `sign_tile`.
        more_...: if TWO, the same of the path that begins at step `turn`: its rows of words (TRANSPOSED: columns) lie
            `more_words` behind the first path's, its values `more_values`.
    """
    result = tl.zeros([BLOCK, BLOCK_T], tl.float32)
    if CARRY:
        for start in range(first, last, CARRY):
            result += _sum_steps(
                tl.zeros([BLOCK, BLOCK_T], tl.float32),
                words,
                tails,
                more_tails,
                columns,
                whole,
                stride,
                values,
                plane,
                start,
                min(start + CARRY, last),
                ones,
                more_ones,
                turn,
                more_whole,
                more_words,
                more_values,
                BLOCK,
                BLOCK_K,
                TERMS,
                TRANSPOSED,
                TAIL,
                TWO,
                PTX,
            )
    else:
        result = _sum_steps(
            result,
            words,
            tails,
            more_tails,
            columns,
            whole,
            stride,
            values,
            plane,
            first,
            last,
            ones,
            more_ones,
            turn,
            more_whole,
            more_words,
            more_values,
            BLOCK,
            BLOCK_K,
            TERMS,
            TRANSPOSED,
            TAIL,
            TWO,
            PTX,
        )
    return result
