"""Many tokens without matrix units for bf16: the two products of gemm.py in fp32, for older GPUs.

    expand       partial[s, t, j] = sum over split s of  scale_first[p, k] x[t, k] F[k, j]      into rank space, of all paths
    combine      rank_acts[t, j] = scale_rank[j] sum_s partial[s, t, j]                         skipped where there is one split
    contract     y[t, n] = sum_p scale_last[p, n] sum_j rank_acts[t, j] G_p[j, n] + bias[n]     back out of it

F, G, scale_first and scale_last as in gemm.py. Tiles of ±1 are made from words in registers; x is scaled where it is loaded.
"""

from typing import Any, Iterator

import torch
import triton
import triton.language as tl

from .launch import Step
from .parts import PackedLayer, operands
from .tiles import in_units, locate, rank_sum, sign_tile

__all__ = ["launches"]


@triton.jit(do_not_specialize=["tokens", "span"])
def _expand(
    x,
    words,
    tail,
    scale_first,
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
    scale_first += path * features
    total_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(split * span, min((split + 1) * span, tl.cdiv(features, BLOCK_K))):
        start = block * BLOCK_K
        k = start + tl.arange(0, BLOCK_K)
        live = (rows < tokens)[:, None] & (k < features)[None, :]
        values = tl.load(x + rows[:, None] * stride_x + k[None, :], mask=live, other=0.0).to(tl.float32)
        values *= tl.load(scale_first + k, mask=k < features, other=0.0).to(tl.float32)[None, :]
        if TRANSPOSED:
            signs = sign_tile(words, tail, start, inside, rank, features, features, BLOCK_K, BLOCK_N, True)
        else:
            signs = sign_tile(words, tail, start, inside, features, rank, total, BLOCK_K, BLOCK_N, False)
        total_sum = tl.dot(values, signs, total_sum, input_precision="ieee")
    columns = inside + tl.arange(0, BLOCK_N)
    kept = (rows < tokens)[:, None] & (columns < rank)[None, :]
    if SPLIT:
        result += split.to(tl.int64) * tokens * total
    else:
        total_sum *= tl.load(scale_rank + before + columns, mask=columns < rank, other=0.0).to(tl.float32)[None, :]
    place = rows[:, None] * total + (before + columns)[None, :]
    tl.store(result + place, total_sum.to(result.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["tokens", "splits"])
def _combine(partial, scale_rank, rank_acts, tokens, total, splits, BLOCK: tl.constexpr):
    size = tokens.to(tl.int64) * total
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    result = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        result += tl.load(partial + split * size + places, mask=inside, other=0.0)
    result *= tl.load(scale_rank + places % total, mask=inside, other=0.0).to(tl.float32)
    tl.store(rank_acts + places, result.to(rank_acts.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _contract(
    rank_acts,
    words,
    tail,
    scale_last,
    bias,
    y,
    tokens,
    features,
    ranks,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
    rank_acts += rows[:, None] * total
    for path in tl.static_range(len(ranks)):
        rank = ranks[path] * UNIT
        path_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, rank, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            live = (rows < tokens)[:, None] & (j < rank)[None, :]
            values = tl.load(rank_acts + j[None, :], mask=live, other=0.0).to(tl.float32)
            if TRANSPOSED:
                signs = sign_tile(words, tail, start, made, features, rank, total, BLOCK_K, BLOCK_N, True)
            else:
                signs = sign_tile(words, tail, start, made, rank, features, features, BLOCK_K, BLOCK_N, False)
            path_sum = tl.dot(values, signs, path_sum, input_precision="ieee")
        scale = tl.load(scale_last + path * features + columns, mask=inside, other=0.0).to(tl.float32)
        result += path_sum * scale[None, :]
        rank_acts += rank
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


def launches(
    x: torch.Tensor, layer: PackedLayer, y: torch.Tensor, config: Any, transposed: bool = False
) -> Iterator[Step]:
    """What `gemm.launches` yields, for tiles without bf16 terms."""
    ranks, scale_rank, bias = layer.ranks, layer.scale_rank, layer.bias
    (first, first_tail, scale_first), (last, last_tail, scale_last) = operands(layer, transposed)
    (tokens, features), total, made = x.shape, scale_rank.shape[0], y.shape[1]
    units, unit = in_units(ranks)
    block_k = 32 * config.words
    steps = -(-features // block_k)
    span = -(-steps // config.splits_one)
    splits = -(-steps // span)
    rank_acts = torch.empty(tokens, total, dtype=torch.float32, device=x.device)
    partial = rank_acts
    if splits > 1:
        partial = torch.empty(splits, tokens, total, dtype=torch.float32, device=x.device)
    shared = {"UNIT": unit, "BLOCK_K": block_k, "TRANSPOSED": transposed}
    yield (
        _expand,
        (-(-tokens // config.tokens_one), sum(-(-rank // config.ranks) for rank in ranks), splits),
        (x, first, first_tail, scale_first, scale_rank, partial, tokens, features, x.stride(0), span, units),
        {
            **shared,
            "BLOCK_M": config.tokens_one,
            "BLOCK_N": config.ranks,
            "SPLIT": splits > 1,
            "num_warps": config.warps_one,
            "num_stages": config.stages_one,
        },
    )
    if splits > 1:
        yield (
            _combine,
            (-(-tokens * total // 512),),
            (partial, scale_rank, rank_acts, tokens, total, splits),
            {"BLOCK": 512},
        )
    yield (
        _contract,
        (-(-tokens // config.tokens_two), -(-made // config.outputs)),
        (rank_acts, last, last_tail, scale_last, bias, y, tokens, made, units),
        {
            **shared,
            "BLOCK_M": config.tokens_two,
            "BLOCK_N": config.outputs,
            "num_warps": config.warps_two,
            "num_stages": config.stages_two,
        },
    )
