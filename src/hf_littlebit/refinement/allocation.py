"""Bits where they matter: every block's bits per weight by what an error of its output does to the model's next tokens.

To the output of one block of the dense model at a time a random error is added, of NOISE times the squared size of what the block
changes of every token's hidden state, and the KL of the next tokens from the dense model's is measured: the block's level. How an
error falls with bits is not measured but taken from the theory of rate and distortion,

    cost(bits) = level * exp(-2 ln 2 * (bits - asked))

and the bits are shared out so that one more costs the same everywhere: the Lagrangian of the sum of the costs. Blocks keep within
LEAST and MOST of what was asked, because costs of single blocks say little of a model all of whose blocks are quantized, and
below the bits at which a layer's rank is full.

On SmolLM2-135M the levels put the blocks into much the order of what each costs once it is quantized and tuned, for half a forward
of the dense model each. Blocks that are factored but not tuned are too far off for that (docs/refinement.md).

Sources: public ablations of NanoQuant (arXiv 2602.06694) on Gemma-3-1B, for measuring one unit at a time by the KL on the whole
vocabulary and for the limits; Shannon's bound for a Gaussian source, for the slope.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..config import LittleBitConfig
from ..layers.precision import mixed
from ..placement import input_device
from ..plan import Plan, plan_model
from .blocks import BlockList, Calls

__all__ = ["allocate", "can_share", "measure_costs", "shares"]

LEAST, MOST = 0.6, 1.5  # of the bits asked, for one block
NOISE = 0.1  # of a block's squared change; tuned blocks of 0.55 bits have 0.1 to 0.2 where they begin
SLOPE = 2 * math.log(2)  # per bit and weight
LOW, HIGH = 0.5, 1.2  # of the bits wanted, between which rounded ranks take what was asked
NEAR = 0.002  # of the bits asked: near enough
RAISED = 1.2  # what a single block may get more, of what rounding left over
LEVELS = 60  # halvings in the search for the multiplier
SMALLEST = 1e-9  # nats per token


def shares(costs: Sequence[float], sizes: Sequence[int], asked: float, most: Sequence[float]) -> list[float]:
    """Bits per weight of every block, `asked` on the average over `sizes` weights, at the least sum of the costs.

    Where no limit holds, the derivative of a block's cost by its bits is the same for every weight: SLOPE * cost / size.

    Args:
        costs: of the blocks at the bits asked, in nats per token.
        most: bits that each block can use; MOST holds besides.
    """

    limits = [min(MOST * asked, max(asked, each)) for each in most]

    def at(multiplier: float) -> list[float]:
        return [
            min(max(asked + math.log(max(cost, SMALLEST) / (size * multiplier)) / SLOPE, LEAST * asked), limit)
            for cost, size, limit in zip(costs, sizes, limits, strict=True)
        ]

    low, high = -80.0, 80.0  # logarithm of the multiplier: the larger, the fewer bits
    total = asked * sum(sizes)
    for _ in range(LEVELS):
        middle = (low + high) / 2
        taken = sum(bits * size for bits, size in zip(at(math.exp(middle)), sizes, strict=True))
        low, high = (middle, high) if taken > total else (low, middle)
    return at(math.exp(high))


def measure_costs(
    blocks: BlockList, tokens: Tensor, *, device: torch.device, dtype: torch.dtype, seed: int, progress: bool
) -> list[float]:
    """The level of every block of the dense model, on `tokens` [rows, length], in nats per token.

    Args:
        dtype: to compute in. seed: of the errors.

    Raises:
        ValueError: where the model's next tokens are no numbers.
    """
    calls = [Calls(blocks, index, tokens, device) for index in range(len(blocks))]
    rows = slice(0, len(tokens))
    generator = torch.Generator().manual_seed(seed)
    home = input_device(blocks.model)

    def run(first: int, hidden: Tensor) -> Tensor:
        """What the dense blocks from `first` on make of `hidden`."""
        for index in range(first, len(blocks)):
            hidden = one(index, hidden)
        return hidden

    def divergence(found: Tensor, expected: Tensor) -> float:
        """KL of the next tokens for two outputs of the last block, row by row: a vocabulary may be large."""
        total = 0.0
        for row in range(len(tokens)):
            at = slice(row, row + 1)
            # Norm and head stay where they are; only blocks were moved to `device`.
            p, q = (
                blocks.logits(tokens[at].long(), each[at].to(home)).float().log_softmax(-1)
                for each in (expected, found)
            )
            total += float(F.kl_div(q, p, reduction="sum", log_target=True))
        return total / tokens.numel()

    def one(index: int, hidden: Tensor) -> Tensor:
        block: nn.Module = blocks[index]
        home = next(block.parameters()).device
        out = calls[index](rows)(block.to(device), hidden)
        block.to(home)
        return out

    costs = []
    with torch.no_grad(), mixed(device, dtype):
        hidden = blocks.first_input(tokens.long()).to(device)
        expected = run(0, hidden)
        for index in tqdm(range(len(blocks)), desc="measuring", unit="block", disable=not progress):
            out = one(index, hidden)
            size = NOISE**0.5 * (out.float() - hidden.float()).norm(dim=-1, keepdim=True)
            error = F.normalize(torch.randn(out.shape, generator=generator), dim=-1).to(device)
            found = run(index + 1, (out.float() + size * error).to(out.dtype))
            costs.append(divergence(found, expected))
            if not math.isfinite(costs[-1]):
                raise ValueError(f"an error of {blocks.names[index]}'s output makes the model's next tokens NaN or Inf")
            hidden = out
    return costs


def _usable(plan: Plan, prefix: str) -> float:
    """Bits per weight of the signs of the first layer under `prefix` that has its full rank, in as many paths as are planned."""
    inside = [weight for weight in plan.weights if weight.module.startswith(prefix)]
    sides = [(len(weight.ranks), weight.out_features, weight.in_features) for weight in inside]
    return min((paths * (1 + min(pair) / max(pair)) for paths, *pair in sides), default=0.0)


def can_share(config: LittleBitConfig, plan: Plan, blocks: BlockList) -> bool:
    """Whether bits can be shared out: some blocks can use more than are asked, and their number is asked and not their ranks."""
    usable = [_usable(plan, f"{name}.") for name in blocks.names]
    return len(usable) > 1 and config.bpw is not None and not config.ranks and max(usable) > config.bpw


def _with(values: Sequence[float], index: int, value: float) -> list[float]:
    """`values` with another one at `index`."""
    return [*values[:index], value, *values[index + 1 :]]


def allocate(model: nn.Module, config: LittleBitConfig, blocks: BlockList, costs: Sequence[float]) -> LittleBitConfig:
    """A copy of `config` whose module_config gives every block its bits, all together what `config` gives them.

    Where steps of ranks are too coarse for that, as in small models at a tenth of a bit, no block gets bits of its own. A bpw that
    the user wrote for some modules holds as before, because later entries of module_config win.
    """
    assert config.bpw is not None
    plan = plan_model(model, config)
    sizes = {name: sum(w.numel for w in plan.weights if w.module.startswith(f"{name}.")) for name in blocks.names}
    names = [name for name in blocks.names if sizes[name]]  # others stay dense
    levels = [cost for name, cost in zip(blocks.names, costs, strict=True) if sizes[name]]
    usable = [_usable(plan, f"{name}.") for name in names]
    wanted = shares(levels, [sizes[name] for name in names], config.bpw, usable)

    def planned(given: Sequence[float]) -> tuple[LittleBitConfig, float]:
        """The config that gives the blocks these bits, and what they take then, of what they may."""
        found = copy.deepcopy(config)
        own = {
            f"{name}.*": {"bpw": round(bits, 5), "kv_factor": plan.kv_factor}
            for name, bits in zip(names, given, strict=True)
        }
        found.module_config = {**own, **(config.module_config or {})}
        return found, plan_model(model, found).bits / plan.bits

    def largest(low: float, high: float, tries: int, bits: Callable[[float], list[float]]) -> list[float]:
        """`bits` of the largest number from `low`, which fits, to `high` that does not take too much."""
        for _ in range(tries):
            middle = (low + high) / 2
            low, high = (middle, high) if planned(bits(middle))[1] <= 1 else (low, middle)
        return bits(low)

    # Ranks are rounded down to multiples, so that the sum of the bits asked is not that of the bits taken.
    given = largest(LOW, HIGH, 13, lambda factor: [factor * bits for bits in wanted])
    found, taken = planned(given)
    if taken > 1:
        return copy.deepcopy(config)
    for index in sorted(range(len(names)), key=lambda index: -levels[index]):
        if taken > 1 - NEAR:
            break
        most = max(given[index], min(RAISED * given[index], MOST * config.bpw, usable[index]))
        given = largest(given[index], most, 6, partial(_with, given, index))
        found, taken = planned(given)
    return found
