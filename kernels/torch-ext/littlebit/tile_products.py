"""Kernels of the two products of many tokens: words of signs times bf16 terms, into rank space and out of it.

    expand       rank_acts[t, j] = scale_rank[j] sum_k F[k, j] terms[p, t, k]         p: the path of rank j
    contract     y[t, n] = sum_p scale_last[p, n] sum_j G_p[j, n] rank_acts[t, j] + bias[n]

gemm.py launches them and says what F, G and scale_last are. Both compute tiles of [ranks or outputs, tokens] by `add_signs`
(sums.py) and differ in where the signs of a tile lie: a block of ranks belongs to one path, whose rows of words follow those of
the paths before it; an output sums over all paths, two of them in one loop.

Splits of a sum are the grid's third axis. They write fp32 sums into `partial`, which scaled.py adds in a fixed order.
"""

import triton
import triton.language as tl

from . import scaled
from .signs import in_pair_order, pair_of, row_pointers, segment, segments, tail_word, wait
from .sums import add_signs
from .tiles import rank_sum

__all__ = ["contract", "expand"]


@triton.jit(do_not_specialize=["height", "splits"])
def expand(
    terms,
    words,
    tail,
    scale_rank,
    partial,
    features,
    height,
    width,
    splits,
    ranks,
    UNIT: tl.constexpr,
    PAD: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TERMS: tl.constexpr,
    CARRY: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PTX: tl.constexpr,
    EARLY: tl.constexpr,
):
    """rank_acts, behind the PLANES planes of terms, or its sums of a split in `partial`, if that is not None."""
    split = tl.program_id(2)
    path, rank, before, words_before, slots, inside = segment(tl.program_id(1), ranks, UNIT, BLOCK, PAD)
    rows = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    plane = height.to(tl.int64) * width
    values = terms + path * TERMS * plane + rows[None, :] * width + tl.arange(0, BLOCK_K)[:, None]
    columns = inside + tl.arange(0, BLOCK)
    total = rank_sum(ranks, UNIT)
    held = tl.minimum(columns, rank - 1)
    tails = held
    along = features // 32
    if TRANSPOSED:
        pointers = row_pointers(
            words + words_before * features,
            tail,
            inside // 32,
            path,
            rank // 32,
            features,
            BLOCK // 32,
            tail is not None,
        )
        along = features
    else:
        pointers = words + before
        if tail is not None:
            tails = tail_word(tail + before, held, rank, features, total)
    wait(EARLY)
    steps = width // BLOCK_K
    ones = pair_of(tl.full([BLOCK], 1.0, tl.float32))
    result = add_signs(
        pointers,
        tails,
        tails,
        held,
        along,
        total,
        values,
        plane,
        split * steps // splits,
        (split + 1) * steps // splits,
        ones,
        ones,
        0,
        0,
        0,
        0,
        BLOCK,
        BLOCK_T,
        BLOCK_K,
        TERMS,
        TRANSPOSED,
        not TRANSPOSED and tail is not None,
        False,
        CARRY,
        PTX,
    )
    all_slots = segments(ranks, UNIT, PAD)
    plane_out = height.to(tl.int64) * all_slots
    place = rows[None, :] * all_slots + (slots + inside + tl.arange(0, BLOCK))[:, None]
    if partial is not None:
        tl.store(partial + split * plane_out + place, in_pair_order(result, BLOCK, BLOCK_T))
    else:
        gain = tl.load(scale_rank + before + columns, mask=columns < rank, other=0.0).to(tl.float32)
        # Behind the last rank the signs mean nothing, and whoever reads rank_acts needs zeros.
        result = in_pair_order(tl.where((columns < rank)[:, None], result * gain[:, None], 0.0), BLOCK, BLOCK_T)
        scaled.store_terms(terms + PLANES * plane + place, plane_out, result, rows[None, :] < height, TERMS)


@triton.jit(do_not_specialize=["tokens", "height", "splits"])
def contract(
    terms,
    words,
    tail,
    scale_out,
    bias,
    y,
    partial,
    tokens,
    features,
    height,
    width,
    splits,
    ranks,
    UNIT: tl.constexpr,
    PAD: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TERMS: tl.constexpr,
    CARRY: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    APART: tl.constexpr,
    PTX: tl.constexpr,
    EARLY: tl.constexpr,
):
    """y, or its sums of a split in `partial`, if that is not None. `width` is that of the planes before rank_acts.

    Two paths are summed together, by signs of their scales instead of ones. APART: each by itself, without its scale.
    """
    split = tl.program_id(2)
    rows = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    made = tl.program_id(1) * BLOCK
    columns = made + tl.arange(0, BLOCK)
    held = tl.minimum(columns, features - 1)
    all_slots = segments(ranks, UNIT, PAD)
    plane = height.to(tl.int64) * all_slots
    rank_acts = (
        terms + PLANES * height.to(tl.int64) * width + rows[None, :] * all_slots + tl.arange(0, BLOCK_K)[:, None]
    )
    rank = ranks[0] * UNIT
    more = rank
    before = 0
    words_before = 0
    tails_before = 0
    slots_before = 0
    ones = pair_of(tl.full([BLOCK], 1.0, tl.float32))
    more_ones = ones
    TWO: tl.constexpr = len(ranks) == 2 and not APART
    if APART:
        path = split // splits
        part = split % splits
        for index in tl.static_range(1, len(ranks)):
            last = ranks[index - 1] * UNIT
            here = path >= index
            before += tl.where(here, last, 0)
            words_before += tl.where(here, last // 32, 0)
            tails_before += tl.where(here, tl.cdiv(last % 32, 8), 0)
            slots_before += tl.where(here, tl.cdiv(last, PAD) * PAD, 0)
            rank = tl.where(path == index, ranks[index] * UNIT, rank)
    else:
        part = split
        if TWO:
            more = ranks[1] * UNIT
            ones = pair_of(tl.load(scale_out + held).to(tl.float32))
            more_ones = pair_of(tl.load(scale_out + features + held).to(tl.float32))
    tails = held
    more_tails = held
    if TRANSPOSED:
        pointers = row_pointers(
            words, tail, made // 32, 0, features // 32, rank_sum(ranks, UNIT), BLOCK // 32, tail is not None
        )
        pointers += before
        along = rank
        more_along = more
        more_words = rank
    else:
        pointers = words + words_before * features
        along = rank // 32
        more_along = more // 32
        more_words = along
        if tail is not None:
            tails = tail_word(tail + tails_before * features, held, features, rank, features)
            if TWO:
                more_tails = tail_word(tail + tl.cdiv(rank % 32, 8) * features, held, features, more, features)
    turn = max(1, tl.cdiv(rank, BLOCK_K))
    steps = turn
    if TWO:
        steps += tl.cdiv(more, BLOCK_K)
    first = 0
    last = steps
    if partial is not None:
        first = part * steps // splits
        last = (part + 1) * steps // splits
    wait(EARLY)
    result = add_signs(
        pointers,
        tails,
        more_tails,
        held,
        along,
        features,
        rank_acts + slots_before,
        plane,
        first,
        last,
        ones,
        more_ones,
        turn,
        more_along,
        more_words,
        tl.cdiv(rank, PAD) * PAD,
        BLOCK,
        BLOCK_T,
        BLOCK_K,
        TERMS,
        TRANSPOSED,
        not TRANSPOSED and tail is not None,
        TWO,
        CARRY,
        PTX,
    )
    if not TWO and not APART:
        result *= tl.load(scale_out + held).to(tl.float32)[:, None]
    kept = (rows < tokens)[None, :] & (columns < features)[:, None]
    place = rows[None, :] * features + columns[:, None]
    if partial is not None:
        tl.store(partial + split * height.to(tl.int64) * features + place, result, mask=kept)
    else:
        if bias is not None:
            result += tl.load(bias + held).to(tl.float32)[:, None]
        tl.store(y + place, result.to(y.dtype.element_ty), mask=kept)
