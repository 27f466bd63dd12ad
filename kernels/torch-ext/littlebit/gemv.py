"""One to four tokens without matrix units: layers that read the same tokens, in two Triton launches that cover all paths.

    stage one    partial[t, s, j] = sum over split s of  scale_in[p, k] x[t, k] V[k, j]          p: the path of column j
    stage two    y[t, n] = sum_p scale_out[p, n] sum_j (scale_rank[j] sum_s partial[t, s, j]) U[j, n] + bias[n]

For devices whose matrix units take no bf16; decode.py is faster where they do. A bit flips the sign of an fp32 number by an
exclusive or, so every product is exact and the sums are fp32. Stage one has few columns and a long sum, so it is cut into
splits that write side by side and stage two adds in a fixed order: no atomics, no clearing, the same result every time.
Scales and bias are applied where a value is loaded or stored. A token is an axis of the grid: the arithmetic is per token
anyway, and the words come from the L2 cache.

Layers lie side by side in `partial` and along the grid's first axis. Each has a branch of its own, in which the compiler
knows the alignment of its pointers; it computes there what it computes alone, in the same order.
"""

import functools
from typing import Any, Iterator, NamedTuple, Sequence, Tuple

import torch
import triton
import triton.language as tl

from .launch import Step
from .parts import PackedLayer, few_tokens
from .tiles import block_count, in_units, locate, rank_sum, word_tile

__all__ = ["launches"]


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


@triton.jit
def _layer_sums(ranks, UNITS: tl.constexpr, LAYER: tl.constexpr):
    """(ranks of the layers before LAYER, ranks of all layers)."""
    before = 0
    total = 0
    for index in tl.static_range(len(ranks)):
        if index == LAYER:
            before = total
        total += rank_sum(ranks[index], UNITS[index])
    return before, total


@triton.jit
def _layer_one(
    block,
    x,
    layers,
    partial,
    in_features,
    stride_x,
    span,
    ranks,
    UNITS: tl.constexpr,
    LAYER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Stage one of a block of a layer's columns."""
    v, v_tail, scale_in = layers[LAYER]
    split, token = tl.program_id(1), tl.program_id(2)
    path, rank, before, _, _, inside = locate(block, ranks[LAYER], UNITS[LAYER], BLOCK_N)
    total = rank_sum(ranks[LAYER], UNITS[LAYER])
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
    first, width = _layer_sums(ranks, UNITS, LAYER)
    place = (token * tl.num_programs(1) + split).to(tl.int64) * width + first + before
    tl.store(partial + place + columns, tl.sum(total_sum, axis=0), mask=columns < rank)


@triton.jit(do_not_specialize=["span"])
def _stage_one(
    x,
    layers,
    partial,
    in_features,
    stride_x,
    span,
    ranks,
    UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    block = tl.program_id(0)
    for layer in tl.static_range(len(ranks)):
        # Alone, nothing is asked. The ranks are counted, because before triton 3.7 a tuple that holds a None has no len.
        blocks = block_count(ranks[layer], UNITS[layer], BLOCK_N)
        if len(ranks) == 1 or (block >= 0) & (block < blocks):
            _layer_one(block, x, layers, partial, in_features, stride_x, span, ranks, UNITS, layer, BLOCK_N, BLOCK_W)
        block -= blocks


@triton.jit
def _rank_acts(partial, scale_rank, row, before, rank, width, SPLITS: tl.constexpr, BLOCK_W: tl.constexpr):
    """Scaled sums of the splits, [32, BLOCK_W], from word row `row` of a path on."""
    j = (row + tl.arange(0, BLOCK_W))[None, :] * 32 + tl.arange(0, 32)[:, None]
    values = tl.zeros([32, BLOCK_W], tl.float32)
    for split in tl.static_range(SPLITS):
        values += tl.load(partial + split * width + before + j, mask=j < rank, other=0.0)
    return values * tl.load(scale_rank + before + j, mask=j < rank, other=0.0).to(tl.float32)


@triton.jit
def _layer_two(
    block,
    partial,
    layers,
    ranks,
    UNITS: tl.constexpr,
    LAYER: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Stage two of a block of a layer's outputs."""
    u, u_tail, scale_out, scale_rank, bias, y, out_features = layers[LAYER]
    token = tl.program_id(1)
    first, width = _layer_sums(ranks, UNITS, LAYER)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < out_features
    partial += token.to(tl.int64) * SPLITS * width + first
    result = tl.zeros([BLOCK_N], tl.float32)
    if bias is not None:
        result += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    before = 0
    for path in tl.static_range(len(ranks[LAYER])):
        rank = ranks[LAYER][path] * UNITS[LAYER]
        path_sum = tl.zeros([BLOCK_W, BLOCK_N], tl.float32)
        words = word_tile(u, u_tail, tl.arange(0, BLOCK_W), columns, rank, out_features, out_features)
        for row in range(0, tl.cdiv(rank, 32), BLOCK_W):
            rows = row + BLOCK_W + tl.arange(0, BLOCK_W)
            next_words = word_tile(u, u_tail, rows, columns, rank, out_features, out_features)
            values = _rank_acts(partial, scale_rank, row, before, rank, width, SPLITS, BLOCK_W)
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


@triton.jit
def _stage_two(
    partial,
    layers,
    ranks,
    UNITS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    block = tl.program_id(0)
    for layer in tl.static_range(len(ranks)):
        blocks = tl.cdiv(layers[layer][6], BLOCK_N)
        if len(ranks) == 1 or (block >= 0) & (block < blocks):
            _layer_two(block, partial, layers, ranks, UNITS, layer, SPLITS, BLOCK_N, BLOCK_W)
        block -= blocks


class _Plan(NamedTuple):
    """What both launches take from the layers' sizes."""

    ranks: Tuple[Tuple[int, ...], ...]  # of each layer, in its unit
    units: Tuple[int, ...]
    width: int  # of `partial`: the ranks of all layers
    splits: int
    span: int  # words of a split
    blocks_one: int
    blocks_two: int


@functools.lru_cache(maxsize=4096)
def _plan(in_features: int, outs: Tuple[int, ...], ranks: Tuple[Tuple[int, ...], ...], config: Any) -> _Plan:
    scaled, units = zip(*map(in_units, ranks))  # noqa: B905 Python 3.9
    every = [rank for each in ranks for rank in each]
    rows = -(-in_features // 32)
    span = -(-rows // (config.splits * config.words_one)) * config.words_one
    blocks_one = sum(-(-rank // config.columns_one) for rank in every)
    blocks_two = sum(-(-out // config.columns_two) for out in outs)
    return _Plan(scaled, units, sum(every), -(-rows // span), span, blocks_one, blocks_two)


def launches(
    x: torch.Tensor, layers: Sequence[PackedLayer], results: Sequence[torch.Tensor], config: Any
) -> Iterator[Step]:
    """(kernel, grid, arguments, options) of both launches of results[i] [tokens, out_features] of layers[i] and x.

    Args:
        x: [tokens, in_features], whose rows are contiguous.
        layers: checked and contiguous.
        config: a tuning.Decode: tile sizes, warps and the number of splits, of all layers.
    """
    tokens, in_features = x.shape
    outs = tuple([y.shape[1] for y in results])
    plan = _plan(in_features, outs, tuple([tuple(layer.ranks) for layer in layers]), config)
    partial = torch.empty(tokens, plan.splits, plan.width, dtype=torch.float32, device=x.device)
    ones, twos = few_tokens(layers, results)
    yield (
        _stage_one,
        (plan.blocks_one, plan.splits, tokens),
        (x, ones, partial, in_features, x.stride(0), plan.span, plan.ranks),
        {
            "UNITS": plan.units,
            "BLOCK_N": config.columns_one,
            "BLOCK_W": config.words_one,
            "num_warps": config.warps_one,
        },
    )
    yield (
        _stage_two,
        (plan.blocks_two, tokens),
        (partial, twos, plan.ranks),
        {
            "UNITS": plan.units,
            "SPLITS": plan.splits,
            "BLOCK_N": config.columns_two,
            "BLOCK_W": config.words_two,
            "num_warps": config.warps_two,
        },
    )
