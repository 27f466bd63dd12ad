"""Many tokens: the layer and its gradient with respect to x, as two products whose left operand is made of words.

    scale        terms[p, t, k] = scale_first[p, k] x[t, k]                           scaled.py: cut into bf16 terms, reordered
    expand       rank_acts[t, j] = scale_rank[j] sum_k F[k, j] terms[p, t, k]         p: the path of rank j
    contract     y[t, n] = sum_p scale_last[p, n] sum_j G_p[j, n] rank_acts[t, j] + bias[n]

    forward      F = V,    scale_first = scale_in,     G = U,      scale_last = scale_out
    gradient     F = U^T,  scale_first = scale_out,    G = V^T,    scale_last = scale_in: the same words, read across (TRANSPOSED)

The products compute [outputs, tokens] tiles: matrix units take their left operand from registers, where the signs are made
(signs.py), and the right one, plain bf16 with the sum's axis contiguous, from shared memory, where asynchronous copies put
it. Where there are few tiles the sum is cut into splits, which write side by side and are added in a fixed order.

Matrix units cut off what they add to an fp32 sum: with three terms, which hold fp32, the sum is carried over to another
one every CARRY steps. Devices without matrix units for bf16 compute in plain.py.
"""

import functools
from typing import Any, Iterator, NamedTuple, Tuple

import torch

from . import plain, scaled, tile_products, unpacked
from .device import abilities
from .launch import Step
from .parts import PackedLayer, operands
from .signs import padded
from .tiles import in_units

__all__ = ["form_of", "launches"]

CARRY = 256  # summed places


class _Plan(NamedTuple):
    """What the launches take from a layer's sizes and tiles, whatever the tokens."""

    units: Tuple[int, ...]
    unit: int
    width: int  # slots of a row of x
    slots: int  # of a row of the activations in rank space
    pad: int  # of a path's slots
    blocks_one: int  # of ranks
    blocks_two: int  # of outputs
    splits_one: int  # of at least one step of every path each
    splits_two: int
    paths: int  # that are summed apart
    rows: int  # the padded tokens are a multiple of this
    scale: dict
    combine: dict
    finish: dict
    tails: dict
    expand: dict
    contract: dict


@functools.lru_cache(maxsize=4096)
def _plan(
    summed: int, made: int, ranks: Tuple[int, ...], config: Any, exact: bool, transposed: bool, ptx: bool, early: bool
) -> _Plan:
    units, unit = in_units(ranks)
    step = 32 * config.words
    width = -(-summed // step) * step
    pad = max(config.ranks, step)
    slots = sum(padded(ranks, pad))
    splits_one = min(config.splits_one, width // step)
    # Scales take the place of ones in bf16, or the paths are summed apart.
    apart = len(ranks) > 2 or (len(ranks) == 2 and not exact and config.terms > 1)
    splits_two = min(config.splits_two, -(-min(ranks) // step))
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
        "PTX": ptx,
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
        splits_one,
        splits_two,
        len(ranks) if apart else 1,
        max(config.tokens_one, config.tokens_two),
        {"PATHS": len(ranks), **terms, "BLOCK": 2048 if width >= 2048 else 256, **small},
        {"PLANES": len(ranks) * config.terms, "UNIT": unit, "PAD": pad, **terms, "BLOCK": 512, **small},
        {"PATHS": len(ranks) if apart else 0, "BLOCK": 1024, **small},
        {"UNIT": 1, "BLOCK": 256, **small},
        {
            **shared,
            "BLOCK": config.ranks,
            "BLOCK_T": config.tokens_one,
            "num_warps": config.warps_one,
            "num_stages": config.stages_one,
        },
        {
            **shared,
            "BLOCK": config.outputs,
            "BLOCK_T": config.tokens_two,
            "APART": apart,
            "num_warps": config.warps_two,
            "num_stages": config.stages_two,
        },
    )


def launches(
    x: torch.Tensor, layer: PackedLayer, y: torch.Tensor, config: Any, transposed: bool = False
) -> Iterator[Step]:
    """(kernel, grid, arguments, options) of every launch of a layer's product, in order; its scratch is allocated here.

    Args:
        x: [tokens, in_features], whose rows are contiguous; layer: checked and contiguous (bound.py); y: [tokens, out_features].
        config: a tuning.Tiles. transposed: the gradient, which reads x [tokens, out_features] and writes y [tokens, in_features].
    """
    ranks, scale_rank, bias = layer.ranks, layer.scale_rank, layer.bias
    (first, first_tail, scale_first), (last, last_tail, scale_last) = operands(layer, transposed)
    (tokens, features), made, device = x.shape, y.shape[1], x.device
    plan = _plan(
        features, made, tuple(ranks), config, scale_last.dtype == torch.bfloat16, transposed, *abilities(device)
    )
    width, slots, units = plan.width, plan.slots, plan.units
    height = -(-tokens // plan.rows) * plan.rows
    terms = torch.empty(config.terms * height * (len(units) * width + slots), dtype=torch.bfloat16, device=device)
    partial = None
    sums_two = plan.splits_two * plan.paths
    sums = max(plan.splits_one * slots if plan.splits_one > 1 else 0, sums_two * made if sums_two > 1 else 0)
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
        if last_tail is not None:
            total = scale_rank.shape[0]
            last_tail, bytes_of = torch.empty(1, total, dtype=torch.int32, device=device), last_tail
            yield scaled.tail_rows, (-(-total // 256),), (bytes_of, last_tail, total, (made,)), plan.tails
    yield (
        tile_products.expand,
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
            plan.splits_one,
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
        tile_products.contract,
        (-(-tokens // config.tokens_two), plan.blocks_two, sums_two),
        (
            terms,
            last,
            last_tail,
            scale_last,
            bias,
            y,
            partial if sums_two > 1 else None,
            tokens,
            made,
            height,
            width,
            plan.splits_two,
            units,
        ),
        plan.contract,
    )
    if sums_two > 1:
        yield (
            scaled.finish,
            (tokens, -(-made // 1024)),
            (partial, scale_last, bias, y, made, height, plan.splits_two),
            plan.finish,
        )


def form_of(config: Any, dtype: torch.dtype) -> Any:
    """The function that lists the steps for these tiles and results of this dtype."""
    if not config.terms:
        return plain.launches
    unpacks = config.unpacked and config.terms == 1 and dtype == torch.bfloat16
    return unpacked.launches if unpacks else launches
