"""What the products of many tokens multiply signs by: numbers scaled, cut into bf16 terms and put in pair order, once.

A number is stored as TERMS bf16 numbers that add up to it, in planes one behind the other: three terms hold all 24 bits of
fp32, two hold 16 (all of a bf16 x times a bf16 scale), one rounds as a dense bf16 layer does. Rows are filled up with zeros
to a multiple of the step, so that the products need no masks.

    scale       terms[p, term, t, slot] of  x[t, k] scale_first[p, k]                      k = place(slot)
    combine     terms[term, t, slot]    of  scale_rank[j] sum_s partial[s, t, slot]        rank_acts, from the splits of its sum
    finish      y[t, n] = sum_p scale_last[p, n] sum_s partial[p, s, t, n] + bias[n]       the result, from the splits of its sum
    tail_rows   the tail bytes of every path as a row of words
"""

import triton
import triton.language as tl

from .signs import place, segments, tail_word, wait

__all__ = ["combine", "finish", "scale", "store_terms", "tail_rows"]


@triton.jit
def store_terms(pointers, plane, values, kept, TERMS: tl.constexpr):
    """Cut fp32 values into bf16 terms, which are stored `plane` apart."""
    for term in tl.static_range(TERMS):
        part = values.to(tl.bfloat16)
        tl.store(pointers + term * plane, part, mask=kept)
        values -= part.to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "height"])
def scale(
    x,
    scale_in,
    terms,
    tokens,
    features,
    stride_x,
    height,
    width,
    PATHS: tl.constexpr,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Planes of `height` rows of `width` slots."""
    wait(EARLY)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    start = tl.program_id(1) * BLOCK
    k = start + 32 * tl.arange(0, BLOCK // 32)[:, None] + tl.arange(0, 16)[None, :]
    pointers = x + rows * stride_x + k[None, :, :]
    live = (rows < tokens) & (k < features)[None, :, :]
    left = tl.load(pointers, mask=live, other=0.0).to(tl.float32)
    live = (rows < tokens) & (k + 16 < features)[None, :, :]
    right = tl.load(pointers + 16, mask=live, other=0.0).to(tl.float32)
    slots = start + tl.arange(0, BLOCK)[None, :]
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    kept = (rows < tokens) & (slots < width)
    plane = height.to(tl.int64) * width
    for path in tl.static_range(PATHS):
        gain = tl.load(scale_in + path * features + k, mask=k < features, other=0.0).to(tl.float32)
        more = tl.load(scale_in + path * features + k + 16, mask=k + 16 < features, other=0.0).to(tl.float32)
        values = tl.reshape(tl.interleave(left * gain[None, :, :], right * more[None, :, :]), [ROWS, BLOCK])
        store_terms(terms + path * TERMS * plane + rows * width + slots, plane, values, kept, TERMS)


@triton.jit(do_not_specialize=["height", "splits"])
def combine(
    partial,
    scale_rank,
    terms,
    height,
    width,
    splits,
    ranks,
    PLANES: tl.constexpr,
    UNIT: tl.constexpr,
    PAD: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The terms of rank_acts behind PLANES planes of `height` rows of `width` slots, those of `scale`."""
    wait(EARLY)
    total = segments(ranks, UNIT, PAD)
    slots = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept = slots < total
    row = tl.program_id(0).to(tl.int64) * total
    plane = height.to(tl.int64) * total
    sums = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        sums += tl.load(partial + split * plane + row + slots, mask=kept, other=0.0)
    j = place(slots)
    rank_before = 0
    slot_before = 0
    gain = tl.zeros([BLOCK], tl.float32)
    for path in tl.static_range(len(ranks)):
        rank = ranks[path] * UNIT
        inside = (j >= slot_before) & (j < slot_before + rank)
        gain += tl.load(scale_rank + rank_before + j - slot_before, mask=inside, other=0.0).to(tl.float32)
        rank_before += rank
        slot_before += tl.cdiv(rank, PAD) * PAD
    terms += PLANES * height.to(tl.int64) * width
    # Slots behind a path's last rank hold sums of signs that mean nothing: they become zeros.
    store_terms(terms + row + slots, plane, tl.where(gain != 0, sums * gain, 0.0), kept, TERMS)


@triton.jit(do_not_specialize=["height", "splits"])
def finish(
    partial,
    scale_out,
    bias,
    y,
    features,
    height,
    splits,
    PATHS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """PATHS: of sums that are not scaled yet; 0 where they are."""
    wait(EARLY)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < features
    row = tl.program_id(0).to(tl.int64) * features
    plane = height.to(tl.int64) * features
    result = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        result += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    for path in tl.static_range(max(1, PATHS)):
        sums = tl.zeros([BLOCK], tl.float32)
        for split in range(splits):
            sums += tl.load(partial + split * plane + row + columns, mask=inside, other=0.0)
        partial += splits * plane
        if PATHS:
            sums *= tl.load(scale_out + path * features + columns, mask=inside, other=0.0).to(tl.float32)
        result += sums
    tl.store(y + row + columns, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def tail_rows(tail, rows, width, ranks, UNIT: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """rows[p, n]: the tail bytes of path p as a word."""
    wait(EARLY)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for path in tl.static_range(len(ranks)):
        rank = ranks[path] * UNIT
        tl.store(rows + path * width + columns, tail_word(tail, columns, width, rank, width), mask=columns < width)
        tail += tl.cdiv(rank % 32, 8) * width
