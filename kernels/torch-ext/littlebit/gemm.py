"""Many tokens: the layer and its gradient with respect to x, as two products whose left operand is made of words.

    scale        terms[p, t, k] = i_p[k] x[t, k]                                     scaled.py: cut into bf16 terms, reordered
    expand       latent[t, j] = l[j] sum_k F[k, j] terms[p, t, k]                     p: the path of rank j
    contract     y[t, n] = sum_p o_p[n] sum_j G_p[j, n] latent[t, j] + bias[n]

    forward      F = V, i = scale_in,  G = U,   o = scale_out
    gradient     F = U^T, i = scale_out,  G = V^T,  o = scale_in:  the same words, read across (TRANSPOSED)

The products compute [outputs, tokens] tiles: matrix units take their left operand from registers, where the signs are made
(signs.py), and the right one, plain bf16 with the sum's axis contiguous, from shared memory, where asynchronous copies put
it. Where there are few tiles the sum is cut into splits, which write side by side and are added in a fixed order.

Matrix units cut off what they add to an fp32 sum: with three terms, which hold fp32, the sum is carried over to another
one every CARRY steps. Devices without matrix units for bf16 compute in plain.py.
"""

import functools
from typing import Any, Iterator, NamedTuple, Optional, Sequence, Tuple

import torch
import triton
import triton.language as tl

from . import plain, scaled, unpacked
from .signs import add_across, add_along, in_pair_order, padded, segment, segments, tail_word, wait
from .tiles import in_units, rank_sum

__all__ = ["form_of", "launches", "product"]

CARRY = 256  # summed places


@triton.jit
def _sum_along(
    words,
    tails,
    columns,
    whole,
    stride,
    values,
    plane,
    first,
    last,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TERMS: tl.constexpr,
    TAIL: tl.constexpr,
    CARRY: tl.constexpr,
):
    """`add_along`, carried over every CARRY steps."""
    result = tl.zeros([BLOCK, BLOCK_T], tl.float32)
    for start in range(first, last, CARRY):
        stop = min(start + CARRY, last)
        part = tl.zeros([BLOCK, BLOCK_T], tl.float32)
        place = values + (start - first) * BLOCK_K
        result += add_along(
            part, words, tails, columns, whole, stride, place, plane, start, stop, BLOCK, BLOCK_K, TERMS, TAIL
        )
    return result


@triton.jit
def _sum_across(
    rows,
    length,
    values,
    plane,
    first,
    last,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TERMS: tl.constexpr,
    CARRY: tl.constexpr,
):
    result = tl.zeros([BLOCK, BLOCK_T], tl.float32)
    for start in range(first, last, CARRY):
        stop = min(start + CARRY, last)
        part = tl.zeros([BLOCK, BLOCK_T], tl.float32)
        place = values + (start - first) * BLOCK_K
        result += add_across(part, rows, length, place, plane, start, stop, BLOCK, BLOCK_K, TERMS)
    return result


@triton.jit
def _row_pointers(words, tails, first, before, path, whole, width, ROWS: tl.constexpr, TAIL: tl.constexpr):
    """The first word of ROWS rows from `first` on, of a path that has `whole` rows, `before` of others above them.

    The row after the last is the path's in `tails` (scaled.tail_rows), or one of no meaning.
    """
    rows = first + tl.arange(0, ROWS)
    if TAIL:
        return tl.where(rows < whole, words + (before + rows) * width, tails + path * width + rows * 0)
    return words + (before + tl.minimum(rows, whole - 1)) * width


@triton.jit(do_not_specialize=["height", "span"])
def _expand(
    terms,
    words,
    tail,
    scale_rank,
    partial,
    features,
    height,
    width,
    span,
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
    SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The latent, behind the PLANES planes of terms, or its sums of a split in `partial`."""
    split = tl.program_id(2)
    path, rank, before, words_before, tails_before, slots, inside = segment(tl.program_id(1), ranks, UNIT, BLOCK, PAD)
    first = split * span
    last = min(first + span, width // BLOCK_K)
    rows = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    plane = height.to(tl.int64) * width
    values = terms + path * TERMS * plane + rows[None, :] * width + (first * BLOCK_K + tl.arange(0, BLOCK_K))[:, None]
    columns = inside + tl.arange(0, BLOCK)
    result = tl.zeros([BLOCK, BLOCK_T], tl.float32)
    if TRANSPOSED:
        pointers = _row_pointers(
            words, tail, inside // 32, words_before, path, rank // 32, features, BLOCK // 32, tail is not None
        )
        wait(EARLY)
        if CARRY:
            result = _sum_across(
                pointers, features, values, plane, first, last, BLOCK, BLOCK_T, BLOCK_K, TERMS, CARRY
            )
        else:
            result = add_across(result, pointers, features, values, plane, first, last, BLOCK, BLOCK_K, TERMS)
    else:
        total = rank_sum(ranks, UNIT)
        held = tl.minimum(columns, rank - 1)
        tails = held
        if tail is not None:
            tails = tail_word(tail + before, held, rank, features, total)
        wait(EARLY)
        if CARRY:
            result = _sum_along(
                words + before,
                tails,
                held,
                features // 32,
                total,
                values,
                plane,
                first,
                last,
                BLOCK,
                BLOCK_T,
                BLOCK_K,
                TERMS,
                tail is not None,
                CARRY,
            )
        else:
            result = add_along(
                result,
                words + before,
                tails,
                held,
                features // 32,
                total,
                values,
                plane,
                first,
                last,
                BLOCK,
                BLOCK_K,
                TERMS,
                tail is not None,
            )
    all_slots = segments(ranks, UNIT, PAD)
    plane_out = height.to(tl.int64) * all_slots
    place = rows[None, :] * all_slots + (slots + inside + tl.arange(0, BLOCK))[:, None]
    if SPLIT:
        tl.store(partial + split * plane_out + place, in_pair_order(result, BLOCK, BLOCK_T))
    else:
        gain = tl.load(scale_rank + before + columns, mask=columns < rank, other=0.0).to(tl.float32)
        # Behind the last rank the signs mean nothing, and whoever reads the latent needs zeros.
        result = in_pair_order(tl.where((columns < rank)[:, None], result * gain[:, None], 0.0), BLOCK, BLOCK_T)
        scaled.store_terms(terms + PLANES * plane + place, plane_out, result, rows[None, :] < height, TERMS)


@triton.jit
def _ratio(held, scale):
    """(held / next, next): next is `scale`, unless that is so small that the quotient would leave fp32."""
    least = tl.abs(held) * 8.7e-19  # 2^-60
    following = tl.where(tl.abs(scale) < least, least, scale)
    return tl.where(following == 0, 0.0, held / tl.where(following == 0, 1.0, following)), following


@triton.jit(do_not_specialize=["tokens", "height", "span"])
def _contract(
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
    span,
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
    SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """y, or its sums of a split in `partial`. `width` is that of the planes before the latent."""
    split = tl.program_id(2)
    rows = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    made = tl.program_id(1) * BLOCK
    columns = made + tl.arange(0, BLOCK)
    held = tl.minimum(columns, features - 1)
    all_slots = segments(ranks, UNIT, PAD)
    plane = height.to(tl.int64) * all_slots
    latent = terms + PLANES * height.to(tl.int64) * width + rows[None, :] * all_slots + tl.arange(0, BLOCK_K)[:, None]
    result = tl.zeros([BLOCK, BLOCK_T], tl.float32)
    pointers = held
    if TRANSPOSED:
        pointers = _row_pointers(
            words, tail, made // 32, 0, 0, features // 32, rank_sum(ranks, UNIT), BLOCK // 32, tail is not None
        )
    wait(EARLY)
    scale = tl.load(scale_out + held).to(tl.float32)
    begin = split * span
    for path in tl.static_range(len(ranks)):
        rank = ranks[path] * UNIT
        first = 0
        last = tl.cdiv(rank, BLOCK_K)
        if SPLIT:
            # Of the steps of all paths, one after the other, this split has begin .. begin + span - 1.
            last = min(last, max(0, begin + span))
            first = max(0, begin)
            begin -= tl.cdiv(rank, BLOCK_K)
        if path > 0:
            # One sum serves all paths: what it holds is rescaled, so that the next path's scale fits it.
            gain = tl.load(scale_out + path * features + held).to(tl.float32)
            if CARRY:
                scale = gain
            else:
                quotient, scale = _ratio(scale, gain)
                result *= quotient[:, None]
        values = latent + first * BLOCK_K
        if TRANSPOSED:
            if CARRY:
                part = _sum_across(
                    pointers, rank, values, plane, first, last, BLOCK, BLOCK_T, BLOCK_K, TERMS, CARRY
                )
                result += part * scale[:, None]
            else:
                result = add_across(result, pointers, rank, values, plane, first, last, BLOCK, BLOCK_K, TERMS)
            pointers += rank
        else:
            tails = held
            if tail is not None:
                tails = tail_word(tail, held, features, rank, features)
            if CARRY:
                part = _sum_along(
                    words,
                    tails,
                    held,
                    rank // 32,
                    features,
                    values,
                    plane,
                    first,
                    last,
                    BLOCK,
                    BLOCK_T,
                    BLOCK_K,
                    TERMS,
                    tail is not None,
                    CARRY,
                )
                result += part * scale[:, None]
            else:
                result = add_along(
                    result,
                    words,
                    tails,
                    held,
                    rank // 32,
                    features,
                    values,
                    plane,
                    first,
                    last,
                    BLOCK,
                    BLOCK_K,
                    TERMS,
                    tail is not None,
                )
            words += (rank // 32) * features
            if tail is not None:
                tail += tl.cdiv(rank % 32, 8) * features
        latent += tl.cdiv(rank, PAD) * PAD
    if not CARRY:
        result *= scale[:, None]
    kept = (rows < tokens)[None, :] & (columns < features)[:, None]
    place = rows[None, :] * features + columns[:, None]
    if SPLIT:
        tl.store(partial + split * height.to(tl.int64) * features + place, result, mask=kept)
    else:
        if bias is not None:
            result += tl.load(bias + held).to(tl.float32)[:, None]
        tl.store(y + place, result.to(y.dtype.element_ty), mask=kept)


class _Plan(NamedTuple):
    """What the launches take from a layer's sizes and tiles, whatever the tokens."""

    units: Tuple[int, ...]
    unit: int
    width: int  # slots of a row of x
    slots: int  # of a row of the latent
    pad: int  # of a path's slots
    blocks_one: int  # of ranks
    blocks_two: int  # of outputs
    span_one: int  # steps of a split
    span_two: int
    splits_one: int
    splits_two: int
    rows: int  # the padded tokens are a multiple of this
    early: bool
    scale: dict
    combine: dict
    finish: dict
    tails: dict
    expand: dict
    contract: dict


@functools.lru_cache(maxsize=None)
def _overlaps(device: torch.device) -> bool:
    """Kernels of this device may start before the one before them has ended."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0)


def _spans(steps: int, splits: int) -> Tuple[int, int]:
    """(steps of a split, splits that have any)."""
    span = -(-steps // splits)
    return span, -(-steps // span)


@functools.lru_cache(maxsize=4096)
def _plan(summed: int, made: int, ranks: Tuple[int, ...], config: Any, transposed: bool, early: bool) -> _Plan:
    units, unit = in_units(ranks)
    step = 32 * config.words
    width = -(-summed // step) * step
    pad = max(config.ranks, step)
    slots = sum(padded(ranks, pad))
    span_one, splits_one = _spans(width // step, config.splits_one)
    span_two, splits_two = _spans(sum(-(-rank // step) for rank in ranks), config.splits_two)
    launch = {"EARLY": early, **({"launch_pdl": True} if early else {})}
    small = {**launch, "num_warps": 4}
    terms = {"TERMS": config.terms}
    shared = {
        "UNIT": unit,
        "PAD": pad,
        "PLANES": len(ranks) * config.terms,
        **terms,
        "BLOCK_K": step,
        "CARRY": max(1, CARRY // step) if config.terms == 3 else 0,
        "TRANSPOSED": transposed,
        **launch,
    }
    return _Plan(
        units,
        unit,
        width,
        slots,
        pad,
        slots // config.ranks,
        -(-made // config.outputs),
        span_one,
        span_two,
        splits_one,
        splits_two,
        max(config.tokens_one, config.tokens_two),
        early,
        {"PATHS": len(ranks), **terms, "BLOCK": 2048 if width >= 2048 else 256, **small},
        {"PLANES": len(ranks) * config.terms, "UNIT": unit, "PAD": pad, **terms, "BLOCK": 512, **small},
        {"BLOCK": 1024, **small},
        {"UNIT": 1, "BLOCK": 256, **small},
        {
            **shared,
            "BLOCK": config.ranks,
            "BLOCK_T": config.tokens_one,
            "SPLIT": splits_one > 1,
            "num_warps": config.warps_one,
            "num_stages": config.stages_one,
        },
        {
            **shared,
            "BLOCK": config.outputs,
            "BLOCK_T": config.tokens_two,
            "SPLIT": splits_two > 1,
            "num_warps": config.warps_two,
            "num_stages": config.stages_two,
        },
    )


def launches(
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
) -> Iterator[Tuple[Any, Tuple[int, ...], Tuple[Any, ...], dict]]:
    """(kernel, grid, arguments, options) of every launch of `product`, in order; its scratch is allocated here."""
    if transposed:
        first, first_tail, scale_first, second, second_tail, scale_last = u, u_tail, scale_out, v, v_tail, scale_in
    else:
        first, first_tail, scale_first, second, second_tail, scale_last = v, v_tail, scale_in, u, u_tail, scale_out
    (tokens, features), made, device = x.shape, y.shape[1], x.device
    plan = _plan(features, made, tuple(ranks), config, transposed, _overlaps(device))
    width, slots, units = plan.width, plan.slots, plan.units
    height = -(-tokens // plan.rows) * plan.rows
    terms = torch.empty(
        config.terms * height * (len(units) * width + slots), dtype=torch.bfloat16, device=device
    )
    partial = None
    sums = max(plan.splits_one * slots if plan.splits_one > 1 else 0, plan.splits_two * made if plan.splits_two > 1 else 0)
    if sums:
        partial = torch.empty(height * sums, dtype=torch.float32, device=device)
    rows = 1 if tokens <= 64 else 4
    block = plan.scale["BLOCK"]
    yield (
        scaled.scale,
        (-(-tokens // rows), -(-width // block)),
        (x, scale_first, terms, tokens, features, x.stride(0), height, width),
        {**plan.scale, "ROWS": rows},
    )
    if transposed:
        if first_tail is not None:
            first_tail, bytes_of = torch.empty(len(units), features, dtype=torch.int32, device=device), first_tail
            yield (
                scaled.tail_rows,
                (-(-features // 256),),
                (bytes_of, first_tail, features, tuple(ranks)),
                plan.tails,
            )
        if second_tail is not None:
            total = scale_rank.shape[0]
            second_tail, bytes_of = torch.empty(1, total, dtype=torch.int32, device=device), second_tail
            yield scaled.tail_rows, (-(-total // 256),), (bytes_of, second_tail, total, (made,)), plan.tails
    yield (
        _expand,
        (-(-tokens // config.tokens_one), plan.blocks_one, plan.splits_one),
        (
            terms,
            first,
            first_tail,
            scale_rank,
            partial if plan.splits_one > 1 else None,
            features,
            height,
            width,
            plan.span_one,
            units,
        ),
        plan.expand,
    )
    if plan.splits_one > 1:
        yield (
            scaled.combine,
            (tokens, -(-slots // 512)),
            (partial, scale_rank, terms, height, width, plan.splits_one, units),
            plan.combine,
        )
    yield (
        _contract,
        (-(-tokens // config.tokens_two), plan.blocks_two, plan.splits_two),
        (
            terms,
            second,
            second_tail,
            scale_last,
            bias,
            y,
            partial if plan.splits_two > 1 else None,
            tokens,
            made,
            height,
            width,
            plan.span_two,
            units,
        ),
        plan.contract,
    )
    if plan.splits_two > 1:
        yield (
            scaled.finish,
            (tokens, -(-made // 1024)),
            (partial, bias, y, made, height, plan.splits_two),
            plan.finish,
        )


def form_of(config: Any, dtype: torch.dtype) -> Tuple[Any, bool]:
    """The function that lists the launches for these tiles and results of this dtype, and whether they are all of the work."""
    if not config.terms:
        return plain.launches, True
    if config.unpacked and config.terms == 1 and dtype == torch.bfloat16:
        return unpacked.launches, False
    return launches, True


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
        config: a tuning.Tiles.
    """
    form, _ = form_of(config, y.dtype)
    parts = (u, u_tail, v, v_tail, scale_out, scale_rank, scale_in, bias)
    for kernel, grid, arguments, options in form(x, *parts, ranks, y, config, transposed):
        kernel[grid](*arguments, **options)
