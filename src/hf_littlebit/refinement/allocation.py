"""Bits where they matter: every block's bits per weight by what its errors do to the model's next tokens.

One block at a time is factored and put into the dense model, and the KL of the spliced model's next tokens from the dense one's is
measured, at two numbers of bits. Between and beyond them it is taken for exponential,

    cost(bits) = cost(asked) * exp(-slope * (bits - asked))

and the bits are shared out so that one more costs the same everywhere: the Lagrangian of the sum of the costs. Blocks keep within
LEAST and MOST of what was asked, because costs of single blocks say little of a model all of whose blocks are quantized.

Source: public ablations of NanoQuant (arXiv 2602.06694) on Gemma-3-1B: splice single units into the dense model, take the KL on the
whole vocabulary, and trust it near the uniform share only. There a unit is one layer; here it is a block, which takes fewer probes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..config import LittleBitConfig
from ..plan import Plan, plan_model
from .blocks import BlockList, Calls
from .factoring import factor_block

__all__ = ["Cost", "allocate", "measure_costs", "probe_of", "shares"]

LEAST, MOST = 0.6, 1.5  # of the bits asked, for one block
PROBES = (0.75, 1.25)  # of the bits asked, where costs are measured
PROBE_STEPS = 20  # of ADMM
STEEPEST, FLATTEST = 16.0, 0.5  # slopes per bit: noise makes others
LEVELS = 60  # halvings in the search for the multiplier


class Cost(NamedTuple):
    """What quantizing one block alone costs, in nats per token: `level` at the bits asked, and how it falls with bits."""

    level: float
    slope: float


def cost_of(few: float, many: float, asked: float) -> Cost:
    """The exponential through the costs at PROBES of `asked` bits."""
    few, many = max(few, 1e-9), max(many, 1e-9)
    slope = math.log(few / many) / ((PROBES[1] - PROBES[0]) * asked)
    return Cost(math.sqrt(few * many), min(max(slope, FLATTEST), STEEPEST))


def shares(costs: Sequence[Cost], sizes: Sequence[int], asked: float) -> list[float]:
    """Bits per weight of every block, `asked` on the average over `sizes` weights, at the least sum of the costs.

    Where no limit holds, the derivative of a block's cost by its bits is the same for every weight: slope * cost / size.
    """

    def at(multiplier: float) -> list[float]:
        return [
            min(max(asked + math.log(c.level * c.slope / (size * multiplier)) / c.slope, LEAST * asked), MOST * asked)
            for c, size in zip(costs, sizes, strict=True)
        ]

    low, high = -80.0, 80.0  # logarithm of the multiplier: the larger, the fewer bits
    total = asked * sum(sizes)
    for _ in range(LEVELS):
        middle = (low + high) / 2
        taken = sum(bits * size for bits, size in zip(at(math.exp(middle)), sizes, strict=True))
        low, high = (middle, high) if taken > total else (low, middle)
    return at(math.exp(high))


def probe_of(model: nn.Module, blocks: BlockList, index: int, bpw: float, config: LittleBitConfig) -> nn.Module:
    """A copy of the dense block `index` of `model`, factored at `bpw` bits per weight, quickly and for its weights alone.

    Args:
        config: what it is factored with but for its bits, in the latent format; `steps` None means PROBE_STEPS here.
    """
    name, dense = blocks.names[index], blocks[index]
    config = copy.deepcopy(config)
    config.bpw = bpw
    if config.init == "admm":
        config.steps = min(PROBE_STEPS, config.steps or PROBE_STEPS)
    weights = [each for each in plan_model(model, config).weights if each.module.startswith(f"{name}.")]
    model.set_submodule(name, copy.deepcopy(dense))
    try:
        factor_block(model, weights, config, {})
        return blocks[index]
    finally:
        model.set_submodule(name, dense)


def measure_costs(
    blocks: BlockList,
    tokens: Tensor,
    factored: Callable[[int, float], nn.Module],
    asked: float,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool,
) -> list[Cost]:
    """The cost of every block of the dense model, on `tokens` [rows, length].

    Args:
        factored: (number of a block, bits per weight) -> a copy of the block, quantized, on `device`.
        dtype: to compute in.
    """
    calls = [Calls(blocks, index, tokens, device) for index in range(len(blocks))]
    rows = slice(0, len(tokens))

    def run(first: int, hidden: Tensor) -> Tensor:
        """The log-probabilities that the dense blocks from `first` on make of `hidden`."""
        for index in range(first, len(blocks)):
            hidden = calls[index](rows)(blocks[index].to(device), hidden)
        return blocks.logits(tokens.long(), hidden).float().flatten(0, -2).log_softmax(-1)

    costs = []
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        hidden = blocks.first_input(tokens.long()).to(device)
        expected = run(0, hidden)
        for index in tqdm(range(len(blocks)), desc="measuring", unit="block", disable=not progress):
            found = []
            for share in PROBES:
                out = calls[index](rows)(factored(index, share * asked), hidden)
                found.append(
                    float(F.kl_div(run(index + 1, out), expected, reduction="sum", log_target=True)) / len(expected)
                )
            costs.append(cost_of(found[0], found[1], asked))
            hidden = calls[index](rows)(blocks[index], hidden)
    return costs


def allocate(model: nn.Module, config: LittleBitConfig, blocks: BlockList, costs: Sequence[Cost]) -> LittleBitConfig:
    """A copy of `config` whose module_config gives every block its bits, all together what `config` gives them.

    A bpw that the user wrote for some modules holds as before, because later entries of module_config win.
    """
    assert config.bpw is not None
    plan = plan_model(model, config)
    sizes = [sum(w.numel for w in plan.weights if w.module.startswith(f"{name}.")) for name in blocks.names]
    wanted = shares(costs, sizes, config.bpw)

    def scaled(factor: float) -> tuple[LittleBitConfig, Plan]:
        found = copy.deepcopy(config)
        own = {
            f"{name}.*": {"bpw": round(bits * factor, 5), "kv_factor": plan.kv_factor}
            for name, bits in zip(blocks.names, wanted, strict=True)
        }
        found.module_config = {**own, **(config.module_config or {})}
        return found, plan_model(model, found)

    # Ranks are rounded down to multiples, so that the sum of the bits asked is not that of the bits taken.
    low, high = 0.9, 1.2
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if scaled(middle)[1].bits <= plan.bits else (low, middle)
    return scaled(low)[0]
