"""One to four tokens by matrix units: layers that read the same tokens, in two Triton launches that cover all layers and paths.

    stage one    partial[s, t, j] = sum over split s of  scale_in[p, k] x[t, k] V[k, j]          p: the path of column j
    stage two    y[t, n] = sum_p scale_out[p, n] sum_j (scale_rank[j] sum_s partial[s, t, j]) U[j, n] + bias[n]

So few tokens are a matter of latency: a layer's words fit into the registers of the whole device. Every program asks for its
words first, waits for what the kernel before it writes (programmatic dependent launch, where the device has it), and then
computes. A warp is one matrix of a batch: it sums its own words of every column, and the warps' sums are added at the end,
so that a long sum needs few splits and stage two reads little.

The signs are the left operand of a matrix product and are made in registers, in pair order (signs.py). The right one has eight
columns or sixteen: the bf16 terms of every token's value, two for 16-bit tokens and three (of four) for fp32, repeated where
there are fewer. A product of a sign and a bf16 term is exact, and every warp's sum starts anew, so that fp32 holds what fp32
promises. The terms cost nothing, and four tokens cost little more than one. `partial` is in pair order too.

What is read before the wait are the layer's own parts. Like every kernel that starts early, this one relies on them not being
written by the very kernel before it; a copy from the host, or any kernel in between, is enough.

gemv.py computes the same without matrix units, for devices that have none for bf16.
"""

import functools
from typing import Any, Dict, Iterator, NamedTuple, Sequence, Tuple

import torch

from .launch import Step
from .parts import PackedLayer, few_tokens
from .signs import padded
from .stages import stage_one, stage_two
from .tiles import in_units

__all__ = ["launches"]

TRAFFIC = (
    32 << 20
)  # bytes of `partial` that the programs of stage two read at the most, all together, if fewer splits help


class _Plan(NamedTuple):
    """What both launches take from the layers' sizes."""

    ranks: Tuple[Tuple[int, ...], ...]  # of each layer, in its unit
    width: int  # of `partial`: the slots of all layers
    splits: int
    blocks_one: int
    blocks_two: int
    one: Dict[str, Any]
    two: Dict[str, Any]


@functools.lru_cache(maxsize=4096)
def _plan(
    in_features: int,
    outs: Tuple[int, ...],
    ranks: Tuple[Tuple[int, ...], ...],
    tokens: int,
    planes: int,
    config: Any,
    abilities: Tuple[bool, bool],
) -> _Plan:
    scaled, units = zip(*map(in_units, ranks))  # noqa: B905 Python 3.9
    pad = max(32, config.columns_one)
    width = sum(sum(padded(each, pad)) for each in ranks)
    blocks_two = sum(-(-out // config.columns_two) for out in outs)
    steps = -(-in_features // (32 * config.warps_one * config.words_one))
    rounds = 1
    while rounds < steps and -(-steps // rounds) * tokens * width * 4 * blocks_two > TRAFFIC:
        rounds += 1
    splits = -(-steps // rounds)
    shares = tuple(config.warps_two // _at_least(len(each)) for each in ranks)
    turns = tuple(
        -(-max(each) // (32 * share * config.words_two))
        for each, share in zip(ranks, shares)  # noqa: B905
    )
    ptx, early = abilities
    both = {
        "UNITS": units,
        "TOKENS": tokens,
        "PLANES": planes,
        "COLUMNS": max(8, tokens * planes),
        "PAD": pad,
        "PTX": ptx,
        "EARLY": early,
        "num_stages": 1,
        **({"launch_pdl": True} if early else {}),
    }
    one = {"BLOCK": config.columns_one, "WARPS": config.warps_one, "WORDS": config.words_one, "ROUNDS": rounds}
    two = {"BLOCK": config.columns_two, "WARPS": config.warps_two, "WORDS": config.words_two, "ROUNDS": turns}
    return _Plan(
        scaled,
        width,
        splits,
        width // config.columns_one,
        blocks_two,
        {**both, **one, "num_warps": config.warps_one},
        {**both, **two, "SPLITS": splits, "SHARES": shares, "num_warps": config.warps_two},
    )


def _at_least(value: int) -> int:
    """The smallest power of two that is at least `value`."""
    return 1 << (value - 1).bit_length()


def launches(
    x: torch.Tensor,
    layers: Sequence[PackedLayer],
    results: Sequence[torch.Tensor],
    config: Any,
    abilities: Tuple[bool, bool],
) -> Iterator[Step]:
    """(kernel, grid, arguments, options) of both launches of results[i] [tokens, out_features] of layers[i] and x.

    Args:
        x: [tokens, in_features], one to four tokens, whose rows are contiguous.
        layers: checked and contiguous, of at most
            config.warps_two paths.
        config: a tuning.Few. abilities: as `device.abilities` gives them for x's device.
    """
    tokens, in_features = x.shape
    outs = tuple([y.shape[1] for y in results])
    planes = 4 if x.dtype == torch.float32 else 2
    plan = _plan(
        in_features, outs, tuple([tuple(layer.ranks) for layer in layers]), _at_least(tokens), planes, config, abilities
    )
    partial = torch.empty(plan.splits, plan.one["TOKENS"], plan.width, dtype=torch.float32, device=x.device)
    ones, twos = few_tokens(layers, results)
    first = (x, ones, partial, in_features, x.stride(0), tokens, plan.ranks)
    yield stage_one, (plan.blocks_one, plan.splits), first, plan.one
    yield stage_two, (plan.blocks_two,), (partial, twos, tokens, plan.ranks), plan.two
