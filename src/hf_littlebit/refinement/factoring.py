"""From the dense weights of one block to latents: factored for what their errors cost the block's output.

Of a change E of a weight, the squared error of the block's output is about sum over tokens of |J E i|^2, where i is the layer's
input and J the derivative of the block's output by the layer's. Random directions e, of mean 0 and variance 1 for every number of
the output, give the squares of J without ever making it: the gradient o of the product e . output has the mean square of J's
columns. So rows ~ mean o^2 and cols ~ mean i^2 as in calibration.py, with the block's own error, in which tuning measures it too,
in the place of the model's KL; it needs no backward through the model, and no more memory than tuning does.

Moments of a few thousand tokens are noisy, and tuning evens out what the start has neglected, so that both are drawn towards their
mean by SHRINKAGE (NanoQuant, arXiv 2602.06694, has 0.2 to 0.6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LittleBitConfig
from ..initialize.calibration import Importance, Recorder
from ..load.conversion import factor_weight
from ..load.convert import balance_scales, put_latents
from ..plan import Plan
from ..weight_plan import WeightPlan

__all__ = ["block_importance", "factor_block", "restore_block", "shrunk"]

SHRINKAGE = 0.4


def block_importance(
    block: nn.Module,
    name: str,
    forward: Callable[[Any, Tensor], Tensor],
    inputs: Iterable[tuple[Any, Tensor]],
    seed: int,
) -> dict[str, Importance]:
    """{weight name: Importance} of every linear layer of the dense `block`, called `name` in the model, that a token reached.

    Args:
        forward: (row numbers, their hidden states [rows, length, size]) -> the block's output, with gradients.
        inputs: such row numbers and hidden states to measure on, batch by batch.
        seed: of the random directions.
    """
    generator = torch.Generator().manual_seed(seed)
    recorder = Recorder({f"{name}.{own}": module for own, module in block.named_modules()})
    trained = [value for value in block.parameters() if value.requires_grad]
    try:
        for value in trained:
            value.requires_grad_(False)
        for rows, hidden in inputs:
            with torch.enable_grad():
                out = forward(rows, hidden.requires_grad_()).float()
                # Every token counts as its relative error does in tuning.
                direction = torch.randn(out.shape, generator=generator).to(out.device)
                size = out.detach().norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
                (out * direction / size).sum().backward()
    finally:
        recorder.remove()
        for value in trained:
            value.requires_grad_(True)
    return {name: Importance(shrunk(each.rows), shrunk(each.cols)) for name, each in recorder.result().items()}


def shrunk(value: Tensor) -> Tensor:
    """Root mean squares whose squares are drawn by SHRINKAGE towards their mean."""
    squares = value.square()
    return (squares * (1 - SHRINKAGE) + squares.mean() * SHRINKAGE).sqrt()


def factor_block(
    model: nn.Module, weights: Sequence[WeightPlan], config: LittleBitConfig, importance: dict[str, Importance]
) -> None:
    """Put latent modules in the place of the dense ones of `model` that hold `weights`, factored as `config` says."""
    for own in Plan(list(weights)).by_module().values():
        dense = model.get_submodule(own[0].module)
        parts: dict[str, Tensor] = {}
        with torch.no_grad():
            for weight in own:
                value = getattr(dense, weight.weight).detach()
                parts |= factor_weight(value, weight, config, importance.get(weight.name))
        put_latents(model, own, config, parts)
    balance_scales(model)


def restore_block(
    model: nn.Module, name: str, weights: Sequence[WeightPlan], config: LittleBitConfig, state: Mapping[str, Tensor]
) -> None:
    """Put latent modules where dense ones hold `weights` into the block called `name`, all of whose parameters are in `state`.

    Args:
        state: {name of a parameter in the model: its value}.
    """
    for own in Plan(list(weights)).by_module().values():
        put_latents(model, own, config, state)
    with torch.no_grad():
        for own_name, value in model.get_submodule(name).named_parameters():
            value.data = state[f"{name}.{own_name}"].to(value.device)
