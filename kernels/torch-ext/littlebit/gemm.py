"""Many tokens: the layer and its gradient with respect to x, as matrix products with tiles of signs.

    expand       partial[s, t, j] = sum over split s of  i_p[k] x[t, k] F[k, j]      into the latent space of all ranks
    combine      z[t, j] = l[j] sum_s partial[s, t, j]                               skipped where there is one split
    contract     y[t, n] = sum_p o_p[n] sum_j z[t, j] G_p[j, n] + bias[n]            back out of it

    forward      F = V, i = scale_in,  G = U,   o = scale_out
    gradient     F = U^T, i = scale_out,  G = V^T,  o = scale_in:  the same words, read across (TRANSPOSED)

Tiles of ±1 are made from words in registers and go to the matrix units as bf16, which holds ±1 exactly. The other side is
fp32 (x times its scale, or the latent), and is cut into TERMS bf16 numbers that add up to it, each with its own product in
the same fp32 accumulator: three terms hold all 24 bits of fp32, two hold 16 (all of a bf16 x times a bf16 scale), one
rounds as a dense bf16 layer does. TERMS = 0 multiplies in fp32 without matrix units, for devices that have none for bf16.
"""

from typing import Any, Optional, Sequence

import torch
import triton
import triton.language as tl

from .tiles import INTERPRETED, in_units, locate, rank_sum, sign_tile

__all__ = ["product"]

# The interpreter keeps bf16 numbers as integers and would multiply those; the values are the same in fp32.
_OPERAND = tl.constexpr(tl.float32 if INTERPRETED else tl.bfloat16)


@triton.jit
def _multiply(values, signs, result, TERMS: tl.constexpr):
    """result + values @ signs: fp32 [M, K], ±1 [K, N], fp32 [M, N]."""
    if TERMS == 0:
        result = tl.dot(values, signs, result, input_precision="ieee")
    else:
        half = signs.to(_OPERAND)
        for _ in tl.static_range(TERMS):
            term = values.to(tl.bfloat16)
            result = tl.dot(term.to(_OPERAND), half, result, input_precision="ieee")
            values -= term.to(tl.float32)
    return result


@triton.jit(do_not_specialize=["tokens", "span"])
def _expand(
    x,
    words,
    tail,
    scale_in,
    scale_rank,
    result,
    tokens,
    features,
    stride_x,
    span,
    ranks,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TERMS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    split = tl.program_id(2)
    path, rank, before, words_before, tails_before, inside = locate(tl.program_id(1), ranks, UNIT, BLOCK_N)
    total = rank_sum(ranks, UNIT)
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    if TRANSPOSED:
        words += words_before * features
        if tail is not None:
            tail += tails_before * features
    else:
        words += before
        if tail is not None:
            tail += before
    scale_in += path * features
    total_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(split * span, min((split + 1) * span, tl.cdiv(features, BLOCK_K))):
        start = block * BLOCK_K
        k = start + tl.arange(0, BLOCK_K)
        live = (rows < tokens)[:, None] & (k < features)[None, :]
        values = tl.load(x + rows[:, None] * stride_x + k[None, :], mask=live, other=0.0).to(tl.float32)
        values *= tl.load(scale_in + k, mask=k < features, other=0.0).to(tl.float32)[None, :]
        if TRANSPOSED:
            signs = sign_tile(words, tail, start, inside, rank, features, features, BLOCK_K, BLOCK_N, True)
        else:
            signs = sign_tile(words, tail, start, inside, features, rank, total, BLOCK_K, BLOCK_N, False)
        total_sum = _multiply(values, signs, total_sum, TERMS)
    columns = inside + tl.arange(0, BLOCK_N)
    kept = (rows < tokens)[:, None] & (columns < rank)[None, :]
    if SPLIT:
        result += split.to(tl.int64) * tokens * total
    else:
        total_sum *= tl.load(scale_rank + before + columns, mask=columns < rank, other=0.0).to(tl.float32)[None, :]
    place = rows[:, None] * total + (before + columns)[None, :]
    tl.store(result + place, total_sum.to(result.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["tokens", "splits"])
def _combine(partial, scale_rank, latent, tokens, total, splits, BLOCK: tl.constexpr):
    size = tokens.to(tl.int64) * total
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    result = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        result += tl.load(partial + split * size + places, mask=inside, other=0.0)
    result *= tl.load(scale_rank + places % total, mask=inside, other=0.0).to(tl.float32)
    tl.store(latent + places, result.to(latent.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _contract(
    latent,
    words,
    tail,
    scale_out,
    bias,
    y,
    tokens,
    features,
    ranks,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TERMS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    total = rank_sum(ranks, UNIT)
    made = tl.program_id(1) * BLOCK_N
    columns = made + tl.arange(0, BLOCK_N)
    inside = columns < features
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if bias is not None:
        result += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    latent += rows[:, None] * total
    for path in tl.static_range(len(ranks)):
        rank = ranks[path] * UNIT
        path_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, rank, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            live = (rows < tokens)[:, None] & (j < rank)[None, :]
            values = tl.load(latent + j[None, :], mask=live, other=0.0).to(tl.float32)
            if TRANSPOSED:
                signs = sign_tile(words, tail, start, made, features, rank, total, BLOCK_K, BLOCK_N, True)
            else:
                signs = sign_tile(words, tail, start, made, rank, features, features, BLOCK_K, BLOCK_N, False)
            path_sum = _multiply(values, signs, path_sum, TERMS)
        scale = tl.load(scale_out + path * features + columns, mask=inside, other=0.0).to(tl.float32)
        result += path_sum * scale[None, :]
        latent += rank
        if TRANSPOSED:
            words += rank
            if tail is not None:
                tail += rank
        else:
            words += (rank // 32) * features
            if tail is not None:
                tail += tl.cdiv(rank % 32, 8) * features
    kept = (rows < tokens)[:, None] & inside[None, :]
    tl.store(y + rows[:, None] * features + columns[None, :], result.to(y.dtype.element_ty), mask=kept)


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
    transposed: bool = False,
) -> None:
    """y [tokens, out_features] of x [tokens, in_features], whose rows are contiguous; parts checked and contiguous.

    Args:
        transposed: the gradient; x is [tokens, out_features] and y [tokens, in_features].
        config: a tuning.Tiles: tile sizes, warps, stages, the number of splits and of terms.
    """
    if transposed:
        first, first_tail, scale_first, second, second_tail, scale_last = u, u_tail, scale_out, v, v_tail, scale_in
    else:
        first, first_tail, scale_first, second, second_tail, scale_last = v, v_tail, scale_in, u, u_tail, scale_out
    (tokens, features), total = x.shape, scale_rank.shape[0]
    units, unit = in_units(ranks)
    steps = -(-features // config.block_k)
    span = -(-steps // config.splits)
    splits = -(-steps // span)
    # One term is all that the second product reads of the latent.
    latent_dtype = torch.bfloat16 if config.terms == 1 else torch.float32
    latent = torch.empty(tokens, total, dtype=latent_dtype, device=x.device)
    partial = latent
    if splits > 1:
        partial = torch.empty(splits, tokens, total, dtype=torch.float32, device=x.device)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    blocks = -(-tokens // config.block_m)
    _expand[(blocks, sum(-(-rank // config.block_r) for rank in ranks), splits)](
        x,
        first,
        first_tail,
        scale_first,
        scale_rank,
        partial,
        tokens,
        features,
        x.stride(0),
        span,
        units,
        UNIT=unit,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_r,
        BLOCK_K=config.block_k,
        TERMS=config.terms,
        TRANSPOSED=transposed,
        SPLIT=splits > 1,
        **options,
    )
    if splits > 1:
        _combine[(-(-tokens * total // 512),)](partial, scale_rank, latent, tokens, total, splits, BLOCK=512)
    _contract[(blocks, -(-y.shape[1] // config.block_n))](
        latent,
        second,
        second_tail,
        scale_last,
        bias,
        y,
        tokens,
        y.shape[1],
        units,
        UNIT=unit,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        TERMS=config.terms,
        TRANSPOSED=transposed,
        **options,
    )
