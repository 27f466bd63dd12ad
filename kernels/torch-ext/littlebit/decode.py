"""One to four tokens by matrix units: layers that read the same tokens, in two Triton launches that cover all layers and paths.

    stage one    partial[s, t, j] = sum over split s of  g_p[k] x[t, k] V[k, j]          p: the path of column j
    stage two    y[t, n] = sum_p h_p[n] sum_j (l[j] sum_s partial[s, t, j]) U[j, n] + bias[n]

So few tokens are a matter of latency: a layer's words fit into the registers of the whole device. Every program asks for all
its words first, waits for what the kernel before it writes (programmatic dependent launch, where the device has it), and
then computes in one go. A warp is one matrix of a batch: it sums its own words of a column, and the warps' sums are added at
the end, so that a long sum needs few splits and stage two reads little.

The signs are the left operand of a matrix product and are made in registers (signs.py). The right one has eight columns or
sixteen: the bf16 terms of every token's value, two for 16-bit tokens and three (of four) for fp32, repeated where there are
fewer. A product of a sign and a bf16 term is exact, and every warp's sum starts anew, so that fp32 holds what fp32 promises.
The terms of a token cost nothing, and four tokens cost little more than one.

gemv.py computes the same without matrix units, for devices that have none for bf16.
"""

import functools
from typing import Any, Iterator, List, NamedTuple, Sequence, Tuple

import torch
import triton
import triton.language as tl

from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .tiles import INTERPRETED, block_count, in_units, locate, rank_sum

__all__ = ["launches"]

# The interpreter keeps bf16 numbers as integers and would multiply those; the values are the same in fp32.
OPERAND = tl.constexpr(tl.float32 if INTERPRETED else tl.bfloat16)
ONES = 0x3F803F80  # a pair of bf16 ones; an argument, because as a constant it takes the compiler another instruction a pair


@triton.jit
def _wait(EARLY: tl.constexpr):
    """Programmatic dependent launch: let the next kernel start, and wait for the results of the one before."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _pair_signs(words, ones):
    """int32 [batch, columns, words] -> ±1 in bf16 [batch, columns, places in pair order]."""
    BATCH: tl.constexpr = words.shape[0]
    COLUMNS: tl.constexpr = words.shape[1]
    PLACES: tl.constexpr = words.shape[2] * 32
    bits = 15 - tl.arange(0, 16)
    pairs = ((words[:, :, :, None] << bits[None, None, None, :]) & -0x7FFF8000) | ones
    halves = tl.interleave(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    return tl.reshape(halves, [BATCH, COLUMNS, PLACES]).to(tl.bfloat16, bitcast=True)


@triton.jit
def _tail_words(tail, columns, width, left, stride):
    """The tail bytes of `columns` as one word each; `left` signs are in it."""
    word = columns * 0 + left * 0
    for index in tl.static_range(4):
        # No columns in the rows that are not there; written so that the mask is a comparison of blocks.
        live = columns < tl.where(8 * index < left, width, 0)
        word |= tl.load(tail + index * stride + columns, mask=live, other=0).to(tl.int32) << (8 * index)
    return word


@triton.jit
def _columns(values, TOKENS: tl.constexpr, PLANES: tl.constexpr, COLUMNS: tl.constexpr):
    """fp32 [batch, places, TOKENS] -> bf16 [batch, places in pair order, COLUMNS]: the terms of every token, repeated."""
    BATCH: tl.constexpr = values.shape[0]
    PLACES: tl.constexpr = values.shape[1]
    first = values.to(tl.bfloat16)
    rest = values - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    if PLANES == 4:
        third = (rest - second.to(tl.float32)).to(tl.bfloat16)
        # Pairs of pairs: a term of zeros is the fourth.
        terms = tl.join(tl.join(first, third), tl.join(second, tl.zeros_like(third)))
        terms = tl.reshape(terms, [BATCH, PLACES, TOKENS, 4])
    else:
        terms = tl.join(first, second)
    REPEATS: tl.constexpr = COLUMNS // (TOKENS * PLANES)
    terms = tl.reshape(terms, [BATCH, PLACES // 32, 2, 16, 1, TOKENS * PLANES])
    terms = tl.permute(terms, (0, 1, 3, 2, 4, 5))
    terms = tl.broadcast_to(terms, [BATCH, PLACES // 32, 16, 2, REPEATS, TOKENS * PLANES])
    return tl.reshape(terms, [BATCH, PLACES, COLUMNS])


@triton.jit
def _tokens(result, TOKENS: tl.constexpr, PLANES: tl.constexpr):
    """The sums of the terms: [batch, outputs, COLUMNS] -> [batch, outputs, TOKENS]."""
    BATCH: tl.constexpr = result.shape[0]
    OUTPUTS: tl.constexpr = result.shape[1]
    REPEATS: tl.constexpr = result.shape[2] // (TOKENS * PLANES)
    terms = tl.reshape(result, [BATCH, OUTPUTS, REPEATS, TOKENS, PLANES])
    return tl.sum(tl.sum(terms, axis=4), axis=2) * (1.0 / REPEATS)


@triton.jit
def _words(words, tail, rows, whole, columns, width, stride, TAIL: tl.constexpr):
    """int32 [batch, columns, words] of a factor whose bits run along the rows.

    Args:
        rows: [batch, words], the word rows; `whole` [batch, 1] of them hold 32 signs, and where there is a tail the next holds
            those of `tail`, [1 or batch, columns], as `tail_words` gives them.
        columns: [columns], below `width` where they mean something; `stride` lies between two word rows.
    """
    inside = (columns < width)[None, :, None]
    places = rows[:, None, :] * stride + columns[None, :, None]
    found = tl.load(words + places, mask=(rows < whole)[:, None, :] & inside, other=0)
    if TAIL:
        found = tl.where((rows == whole)[:, None, :], tail[:, :, None], found)
    return found


@triton.jit
def _layer_one(
    block,
    x,
    layers,
    partial,
    in_features,
    stride_x,
    tokens,
    ones,
    ranks,
    before,
    width,
    UNITS: tl.constexpr,
    LAYER: tl.constexpr,
    TOKENS: tl.constexpr,
    PLANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
    WORDS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Stage one of a block of a layer's columns."""
    v, v_tail, scale_in = layers[LAYER]
    split = tl.program_id(1)
    path, rank, ranks_before, _, _, inside = locate(block, ranks[LAYER], UNITS[LAYER], BLOCK)
    total = rank_sum(ranks[LAYER], UNITS[LAYER])
    columns = inside + tl.arange(0, BLOCK)
    first = split * (WARPS * WORDS)
    rows = first + tl.arange(0, WARPS)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    whole = in_features // 32
    if v_tail is None:
        words = _words(v + ranks_before, columns[None, :], rows, whole, columns, rank, total, False)
    else:
        tail = _tail_words(v_tail + ranks_before, columns, rank, in_features % 32, total)
        words = _words(v + ranks_before, tail[None, :], rows, whole, columns, rank, total, True)
    k = first * 32 + tl.arange(0, WARPS)[:, None] * (WORDS * 32) + tl.arange(0, WORDS * 32)[None, :]
    gain = tl.load(scale_in + path * in_features + k, mask=k < in_features, other=0.0).to(tl.float32)
    _wait(EARLY)
    t = tl.arange(0, TOKENS)
    live = (k < in_features)[:, :, None] & (t < tokens)[None, None, :]
    values = tl.load(x + t.to(tl.int64)[None, None, :] * stride_x + k[:, :, None], mask=live, other=0.0).to(tl.float32)
    right = _columns(values * gain[:, :, None], TOKENS, PLANES, COLUMNS)
    result = tl.dot(_pair_signs(words, ones).to(OPERAND), right.to(OPERAND))
    sums = tl.sum(_tokens(result, TOKENS, PLANES), axis=0)
    place = (split * TOKENS + t)[None, :] * width + (before + ranks_before + columns)[:, None]
    tl.store(partial + place, sums, mask=(columns < rank)[:, None])


@triton.jit(do_not_specialize=["tokens", "ones"])
def _stage_one(
    x,
    layers,
    partial,
    in_features,
    stride_x,
    tokens,
    ones,
    ranks,
    UNITS: tl.constexpr,
    TOKENS: tl.constexpr,
    PLANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
    WORDS: tl.constexpr,
    EARLY: tl.constexpr,
):
    block = tl.program_id(0)
    width = 0
    for layer in tl.static_range(len(ranks)):
        width += rank_sum(ranks[layer], UNITS[layer])
    before = 0
    for layer in tl.static_range(len(ranks)):
        blocks = block_count(ranks[layer], UNITS[layer], BLOCK)
        if len(ranks) == 1 or (block >= 0) & (block < blocks):
            _layer_one(
                block,
                x,
                layers,
                partial,
                in_features,
                stride_x,
                tokens,
                ones,
                ranks,
                before,
                width,
                UNITS,
                layer,
                TOKENS,
                PLANES,
                COLUMNS,
                BLOCK,
                WARPS,
                WORDS,
                EARLY,
            )
        block -= blocks
        before += rank_sum(ranks[layer], UNITS[layer])


@triton.jit
def _paths(ranks, UNIT: tl.constexpr, batch, SHARE: tl.constexpr):
    """Of every warp, whose paths have SHARE warps each: (path, its rank, ranks, word rows and tail rows before it), [batch]."""
    path = batch // SHARE
    rank = batch * 0
    before = batch * 0
    words = batch * 0
    tails = batch * 0
    ranks_seen = 0
    words_seen = 0
    tails_seen = 0
    for index in tl.static_range(len(ranks)):
        here = path == index
        own = ranks[index] * UNIT
        rank = tl.where(here, own, rank)
        before = tl.where(here, ranks_seen, before)
        words = tl.where(here, words_seen, words)
        tails = tl.where(here, tails_seen, tails)
        ranks_seen += own
        words_seen += own // 32
        tails_seen += tl.cdiv(own % 32, 8)
    return path, rank, before, words, tails


@triton.jit
def _layer_two(
    block,
    partial,
    layers,
    tokens,
    ones,
    ranks,
    before,
    width,
    UNITS: tl.constexpr,
    LAYER: tl.constexpr,
    TOKENS: tl.constexpr,
    PLANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
    SHARE: tl.constexpr,
    WORDS: tl.constexpr,
    ROUNDS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Stage two of a block of a layer's outputs."""
    u, u_tail, scale_out, scale_rank, bias, y, out_features = layers[LAYER]
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < out_features
    batch = tl.arange(0, WARPS)
    path, rank, ranks_before, words_before, tails_before = _paths(ranks[LAYER], UNITS[LAYER], batch, SHARE)
    live = path < len(ranks[LAYER])
    t = tl.arange(0, TOKENS)
    gains = tl.load(
        scale_out + path[:, None] * out_features + columns[None, :], mask=live[:, None] & inside[None, :], other=0.0
    ).to(tl.float32)
    sums = tl.zeros([WARPS, BLOCK, TOKENS], tl.float32)
    for turn in tl.static_range(ROUNDS):
        start = (turn * SHARE + batch % SHARE) * WORDS
        rows = start[:, None] + tl.arange(0, WORDS)[None, :]
        places = words_before[:, None] + rows
        end = (words_before + rank // 32)[:, None]
        if u_tail is None:
            words = _words(u, columns[None, :], places, end, columns, out_features, out_features, False)
        else:
            pointers = u_tail + tails_before[:, None] * out_features
            tail = _tail_words(pointers, columns[None, :], out_features, (rank % 32)[:, None], out_features)
            words = _words(u, tail, places, end, columns, out_features, out_features, True)
        j = start[:, None] * 32 + tl.arange(0, WORDS * 32)[None, :]
        known = j < rank[:, None]
        gain = tl.load(scale_rank + ranks_before[:, None] + j, mask=known, other=0.0).to(tl.float32)
        if turn == 0:
            _wait(EARLY)
        latent = tl.zeros([WARPS, WORDS * 32, TOKENS], tl.float32)
        source = partial + (before + ranks_before)[:, None] + j
        for split in tl.static_range(SPLITS):
            pointers = source[:, :, None] + (split * TOKENS + t)[None, None, :] * width
            latent += tl.load(pointers, mask=known[:, :, None], other=0.0)
        right = _columns(latent * gain[:, :, None], TOKENS, PLANES, COLUMNS)
        result = tl.dot(_pair_signs(words, ones).to(OPERAND), right.to(OPERAND))
        sums += _tokens(result, TOKENS, PLANES)
    result = tl.sum(sums * gains[:, :, None], axis=0)
    if bias is not None:
        result += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[:, None]
    place = t[None, :].to(tl.int64) * out_features + columns[:, None]
    tl.store(y + place, result.to(y.dtype.element_ty), mask=inside[:, None] & (t < tokens)[None, :])


@triton.jit(do_not_specialize=["tokens", "ones"])
def _stage_two(
    partial,
    layers,
    tokens,
    ones,
    ranks,
    UNITS: tl.constexpr,
    TOKENS: tl.constexpr,
    PLANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
    SHARES: tl.constexpr,
    WORDS: tl.constexpr,
    ROUNDS: tl.constexpr,
    EARLY: tl.constexpr,
):
    block = tl.program_id(0)
    width = 0
    for layer in tl.static_range(len(ranks)):
        width += rank_sum(ranks[layer], UNITS[layer])
    before = 0
    for layer in tl.static_range(len(ranks)):
        blocks = tl.cdiv(layers[layer][6], BLOCK)
        if len(ranks) == 1 or (block >= 0) & (block < blocks):
            _layer_two(
                block,
                partial,
                layers,
                tokens,
                ones,
                ranks,
                before,
                width,
                UNITS,
                layer,
                TOKENS,
                PLANES,
                COLUMNS,
                SPLITS,
                BLOCK,
                WARPS,
                SHARES[layer],
                WORDS,
                ROUNDS[layer],
                EARLY,
            )
        block -= blocks
        before += rank_sum(ranks[layer], UNITS[layer])


class _Plan(NamedTuple):
    """What both launches take from the layers' sizes."""

    ranks: Tuple[Tuple[int, ...], ...]  # of each layer, in its unit
    width: int  # of `partial`: the ranks of all layers
    splits: int
    blocks_one: int
    blocks_two: int
    one: dict
    two: dict


@functools.lru_cache(maxsize=4096)
def _plan(
    in_features: int, outs: Tuple[int, ...], ranks: Tuple[Tuple[int, ...], ...], tokens: int, planes: int, config: Any,
    early: bool,
) -> _Plan:
    scaled, units = zip(*map(in_units, ranks))  # noqa: B905 Python 3.9
    every = [rank for each in ranks for rank in each]
    splits = -(-in_features // (32 * config.warps_one * config.words_one))
    shares = tuple(max(1, config.warps_two // _power(len(each))) for each in ranks)
    rounds = tuple(
        -(-max(each) // (32 * share * config.words_two)) for each, share in zip(ranks, shares)  # noqa: B905
    )
    both = {
        "UNITS": units,
        "TOKENS": tokens,
        "PLANES": planes,
        "COLUMNS": max(8, tokens * planes),
        "EARLY": early,
        "num_stages": 1,
        **({"launch_pdl": True} if early else {}),
    }
    one = {"BLOCK": config.columns_one, "WARPS": config.warps_one, "WORDS": config.words_one}
    two = {"BLOCK": config.columns_two, "WARPS": config.warps_two, "WORDS": config.words_two}
    return _Plan(
        scaled,
        sum(every),
        splits,
        sum(-(-rank // config.columns_one) for rank in every),
        sum(-(-out // config.columns_two) for out in outs),
        {**both, **one, "num_warps": config.warps_one},
        {**both, **two, "SPLITS": splits, "SHARES": shares, "ROUNDS": rounds, "num_warps": config.warps_two},
    )


def _power(value: int) -> int:
    """The smallest power of two that is at least `value`."""
    return 1 << (value - 1).bit_length()


def launches(
    x: torch.Tensor, layers: Sequence[Sequence[Any]], results: Sequence[torch.Tensor], config: Any, early: bool
) -> Iterator[Tuple[Any, Tuple[int, ...], Tuple[Any, ...], dict]]:
    """(kernel, grid, arguments, options) of both launches of results[i] [tokens, out_features] of layers[i] and x.

    Args:
        x: [tokens, in_features], one to four tokens, whose rows are contiguous.
        layers: (u, u_tail, v, v_tail, scale_out, scale_rank, scale_in, bias, ranks) each, checked and contiguous, of at most
            config.warps_two paths.
        config: a tuning.Few. early: the device starts kernels before the one before them has ended.
    """
    tokens, in_features = x.shape
    outs = tuple([y.shape[1] for y in results])
    planes = 4 if x.dtype == torch.float32 else 2
    plan = _plan(in_features, outs, tuple([layer[8] for layer in layers]), _power(tokens), planes, config, early)
    partial = torch.empty(plan.splits, plan.one["TOKENS"], plan.width, dtype=torch.float32, device=x.device)
    ones, twos = [], []
    for (u, u_tail, v, v_tail, scale_out, scale_rank, scale_in, bias, _), y, out in zip(layers, results, outs):  # noqa: B905
        ones.append((v, v_tail, scale_in))
        twos.append((u, u_tail, scale_out, scale_rank, bias, y, out))
    first = (x, tuple(ones), partial, in_features, x.stride(0), tokens, ONES, plan.ranks)
    yield _stage_one, (plan.blocks_one, plan.splits), first, plan.one
    yield _stage_two, (plan.blocks_two,), (partial, tuple(twos), tokens, ONES, plan.ranks), plan.two
