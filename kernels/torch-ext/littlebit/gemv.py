"""Decode: the layer for one to four tokens, in two Triton launches that cover all paths.

    stage one    partial[t, s, j] = sum over split s of  g_p[k] x[t, k] V[k, j]          p: the path of column j
    stage two    y[t, n] = sum_p h_p[n] sum_j (l[j] sum_s partial[t, s, j]) U[j, n] + bias[n]

A bit flips the sign of an fp32 number by an exclusive or, so every product is exact and the sums are fp32: nothing is
unpacked to memory and no matrix unit is asked, because at so few tokens the launches and the wait for memory are what is
left. Stage one has few columns and a long sum, so it is cut into splits that write side by side and stage two adds in a
fixed order: no atomics, no clearing, the same result every time. Scales and bias are applied where a value is loaded or
stored. A token is an axis of the grid: the arithmetic is per token anyway, and the words come from the L2 cache.
"""

from typing import Any, Optional, Sequence

import torch
import triton
import triton.language as tl

from .tiles import in_units, locate, rank_sum, word_tile

__all__ = ["product"]


@triton.jit
def _signed_sum(values, words):
    """sum over b of values[b, i] with the sign of bit b of words[i, j]: [32, rows], [rows, columns] -> [rows, columns]."""
    # The bits come first, because the compiler spreads threads over the last axes: a thread then adds all bits of its words.
    bits = 31 - tl.arange(0, 32)
    flips = (words[None, :, :] << bits[:, None, None]) & -0x80000000
    signed = values.to(tl.int32, bitcast=True)[:, :, None] ^ flips
    return tl.sum(signed.to(tl.float32, bitcast=True), axis=0)


@triton.jit
def _inputs(x, scale_in, v, v_tail, row, columns, length, rank, total, BLOCK_W: tl.constexpr):
    """(scaled x [32, BLOCK_W], words [BLOCK_W, columns]) of stage one from word row `row` on."""
    rows = row + tl.arange(0, BLOCK_W)
    k = rows[None, :] * 32 + tl.arange(0, 32)[:, None]
    values = tl.load(x + k, mask=k < length, other=0.0).to(tl.float32)
    values *= tl.load(scale_in + k, mask=k < length, other=0.0).to(tl.float32)
    return values, word_tile(v, v_tail, rows, columns, length, rank, total)


@triton.jit(do_not_specialize=["span"])
def _stage_one(
    x,
    v,
    v_tail,
    scale_in,
    partial,
    in_features,
    stride_x,
    span,
    ranks,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    split, token = tl.program_id(1), tl.program_id(2)
    path, rank, before, _, _, inside = locate(tl.program_id(0), ranks, UNIT, BLOCK_N)
    total = rank_sum(ranks, UNIT)
    columns = inside + tl.arange(0, BLOCK_N)
    x += token.to(tl.int64) * stride_x
    scale_in += path * in_features
    total_sum = tl.zeros([BLOCK_W, BLOCK_N], tl.float32)
    v += before
    if v_tail is not None:
        v_tail += before
    # The split's end takes the place of the factor's, so that nothing past it is fetched.
    length = min(in_features, (split + 1) * span * 32)
    values, words = _inputs(x, scale_in, v, v_tail, split * span, columns, length, rank, total, BLOCK_W)
    for row in range(split * span, tl.cdiv(length, 32), BLOCK_W):
        # The next words travel while these are added. Left to the compiler's own stages, some versions of triton scale the
        # same values again in every thread that reads them.
        next_values, next_words = _inputs(x, scale_in, v, v_tail, row + BLOCK_W, columns, length, rank, total, BLOCK_W)
        total_sum += _signed_sum(values, words)
        values, words = next_values, next_words
    place = (token * tl.num_programs(1) + split).to(tl.int64) * total + before
    tl.store(partial + place + columns, tl.sum(total_sum, axis=0), mask=columns < rank)


@triton.jit
def _latent(partial, scale_rank, row, before, rank, total, SPLITS: tl.constexpr, BLOCK_W: tl.constexpr):
    """Scaled sums of the splits, [32, BLOCK_W], from word row `row` of a path on."""
    j = (row + tl.arange(0, BLOCK_W))[None, :] * 32 + tl.arange(0, 32)[:, None]
    values = tl.zeros([32, BLOCK_W], tl.float32)
    for split in tl.static_range(SPLITS):
        values += tl.load(partial + split * total + before + j, mask=j < rank, other=0.0)
    return values * tl.load(scale_rank + before + j, mask=j < rank, other=0.0).to(tl.float32)


@triton.jit
def _stage_two(
    partial,
    u,
    u_tail,
    scale_out,
    scale_rank,
    bias,
    y,
    out_features,
    ranks,
    UNIT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    token = tl.program_id(1)
    total = rank_sum(ranks, UNIT)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < out_features
    partial += token.to(tl.int64) * SPLITS * total
    result = tl.zeros([BLOCK_N], tl.float32)
    if bias is not None:
        result += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    before = 0
    for path in tl.static_range(len(ranks)):
        rank = ranks[path] * UNIT
        path_sum = tl.zeros([BLOCK_W, BLOCK_N], tl.float32)
        words = word_tile(u, u_tail, tl.arange(0, BLOCK_W), columns, rank, out_features, out_features)
        for row in range(0, tl.cdiv(rank, 32), BLOCK_W):
            rows = row + BLOCK_W + tl.arange(0, BLOCK_W)
            next_words = word_tile(u, u_tail, rows, columns, rank, out_features, out_features)
            values = _latent(partial, scale_rank, row, before, rank, total, SPLITS, BLOCK_W)
            path_sum += _signed_sum(values, words)
            words = next_words
        scale = tl.load(scale_out + path * out_features + columns, mask=inside, other=0.0).to(tl.float32)
        result += tl.sum(path_sum, axis=0) * scale
        before += rank
        u += (rank // 32) * out_features
        if u_tail is not None:
            u_tail += tl.cdiv(rank % 32, 8) * out_features
    y += token.to(tl.int64) * out_features
    tl.store(y + columns, result.to(y.dtype.element_ty), mask=inside)


def product(
    x: torch.Tensor,
    u: torch.Tensor,
    u_tail: Optional[torch.Tensor],
    v: torch.Tensor,
    v_tail: Optional[torch.Tensor],
    scale_out: torch.Tensor,
    scale_rank: torch.Tensor,
    scale_in: torch.Tensor,
    bias: Optional[torch.Tensor],
    ranks: Sequence[int],
    y: torch.Tensor,
    config: Any,
) -> None:
    """y [tokens, out_features] of x [tokens, in_features], whose rows are contiguous; parts checked and contiguous.

    Args:
        config: a tuning.Decode: tile sizes, warps and the number of splits.
    """
    tokens, in_features = x.shape
    out_features, total = y.shape[1], scale_rank.shape[0]
    units, unit = in_units(ranks)
    rows = -(-in_features // 32)
    span = -(-rows // (config.splits * config.words_one)) * config.words_one
    splits = -(-rows // span)
    partial = torch.empty(tokens, splits, total, dtype=torch.float32, device=x.device)
    blocks = sum(-(-rank // config.columns_one) for rank in ranks)
    _stage_one[(blocks, splits, tokens)](
        x,
        v,
        v_tail,
        scale_in,
        partial,
        in_features,
        x.stride(0),
        span,
        units,
        UNIT=unit,
        BLOCK_N=config.columns_one,
        BLOCK_W=config.words_one,
        num_warps=config.warps_one,
    )
    _stage_two[(-(-out_features // config.columns_two), tokens)](
        partial,
        u,
        u_tail,
        scale_out,
        scale_rank,
        bias,
        y,
        out_features,
        units,
        UNIT=unit,
        SPLITS=splits,
        BLOCK_N=config.columns_two,
        BLOCK_W=config.words_two,
        num_warps=config.warps_two,
    )
