"""The joint pass over one block: all its latents, scales and norms move at once until it does what the dense block did.

    loss = mean over tokens of  sum_c (s_tc - d_tc)^2 / sum_c d_tc^2

s is what the block makes of the refined prefix's hidden states, d what the dense block made of the dense ones. Every token's error
is measured against that token's own size, because a few tokens have hidden states a thousand times as large as all others
("massive activations"): of a plain mean of squares they own nearly everything.

What is measured on rows that are not trained on decides which state is kept: the best, the start included. A step with a NaN or
Inf in its loss or gradients is not taken.

Sources: NanoQuant (arXiv 2602.06694) for inputs from the compressed prefix and targets from the dense block; double binary
factorization (arXiv 2505.11076). That latents are worth a rate of their own, and one joint pass more than a pass for every layer,
others have measured before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..load.convert import factor_modules, latents_and_scales
from ..train.flips import SignFlips

__all__ = ["Outcome", "Rates", "relative_error", "tune_block"]

WARM_UP = 0.05  # of the steps
LAST_RATE = 0.05  # of the rates, where the cosine ends
BETAS = (0.9, 0.99)  # a block has tens to hundreds of steps: a longer memory of squares would be its start's
CHECKS = 4  # measurements on the held-out rows after the first


class Rates(NamedTuple):
    """Learning rates of Adam: of U and V, of the scales, and of everything else in a block (norms, biases)."""

    latents: float
    scales: float
    rest: float


class Outcome(NamedTuple):
    """What became of a block.

    Attributes:
        before, after: relative error on the rows held out, of the start and of the state that was kept.
        flipped: share of signs that differ from the start's.
        steps: taken. undone: those that were not, for a NaN or Inf.
    """

    before: float
    after: float
    flipped: float
    steps: int
    undone: int


def relative_error(student: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of |student - target|^2 / |target|^2, of hidden states [..., size]; fp32 scalar, differentiable."""
    target = target.float()
    size = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((student.float() - target).square().sum(-1) / size).mean()


def tune_block(
    block: nn.Module,
    forward: Callable[[Tensor], Tensor],
    targets: Callable[[Tensor], Tensor],
    rows: int,
    held_out: int,
    steps: int,
    batch: int,
    rates: Rates,
    seed: int,
) -> Outcome:
    """Train the parameters of `block`, which is latent, in place.

    Args:
        forward: row numbers [n] -> what the block makes of these rows, [n, length, size], with gradients for its parameters.
        targets: row numbers [n] -> what it should make of them.
        rows: how many there are; the last `held_out` are measured on, the others trained on.
        batch: rows per step, at most all that are trained on.
        seed: of the order of rows.
    """
    generator = torch.Generator().manual_seed(seed)
    trained = rows - held_out
    test = torch.arange(trained, rows)

    def measure() -> float:
        with torch.no_grad():
            errors = [float(relative_error(forward(part), targets(part))) * len(part) for part in test.split(batch)]
        return sum(errors) / len(test)

    groups = _groups(block, rates)
    optimizer = torch.optim.Adam(groups, betas=BETAS, fused=True)
    parameters = [value for group in groups for value in group["params"]]
    flips = SignFlips(latents_and_scales(block)[0])
    before = best = measure()
    kept = [value.detach().clone() for value in parameters]
    check = {math.ceil(steps * (number + 1) / CHECKS) for number in range(CHECKS)}
    undone = 0
    order = torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(trained, generator=generator)])
        chosen, order = order[:batch].sort().values, order[batch:]
        loss = relative_error(forward(chosen), targets(chosen))
        loss.backward()
        if _is_finite(loss, parameters):
            for group, rate in zip(optimizer.param_groups, rates_of(groups), strict=True):
                group["lr"] = rate * schedule(step, steps)
            optimizer.step()
        else:
            undone += 1
        optimizer.zero_grad()
        if step in check:
            error = measure()
            if error < best:
                best = error
                for value, trained_value in zip(kept, parameters, strict=True):
                    value.copy_(trained_value.detach())
    with torch.no_grad():
        for value, former in zip(parameters, kept, strict=True):
            value.copy_(former)
    flipped = flips.fractions().get("flipped_since_start", 0.0)
    return Outcome(before, best, flipped, steps - undone, undone)


def schedule(step: int, steps: int) -> float:
    """What part of its rate step number `step` of `steps`, from 1 on, has: a short rise, then a cosine down to LAST_RATE."""
    rise = min(1.0, step / max(1.0, steps * WARM_UP))
    fall = (1 + math.cos(math.pi * (step - 1) / steps)) / 2
    return rise * (LAST_RATE + (1 - LAST_RATE) * fall)


def rates_of(groups: list[dict[str, Any]]) -> list[float]:
    """The rate that every group of parameters was given."""
    return [float(group["rate"]) for group in groups]


def _groups(block: nn.Module, rates: Rates) -> list[dict[str, Any]]:
    """The block's parameters in groups for an optimizer, trainable from now on; empty groups are left out.

    Dense matrices, such as a mixture's router, stay as they are: they are few, and the text is too short to move them.
    """
    for module in factor_modules(block).values():
        for value in module.parameters(recurse=False):
            value.requires_grad_(True)
    latents, scales = latents_and_scales(block)
    known = {id(value) for value in (*latents, *scales)}
    for value in block.parameters():
        value.requires_grad_(id(value) in known or (value.ndim == 1 and value.is_floating_point()))
    rest = [value for value in block.parameters() if value.requires_grad and id(value) not in known]
    groups: list[dict[str, Any]] = []
    for values, rate in ((latents, rates.latents), (scales, rates.scales), (rest, rates.rest)):
        if values:
            groups.append({"params": values, "lr": rate, "rate": rate})
    return groups


def _is_finite(loss: Tensor, parameters: list[nn.Parameter]) -> bool:
    grads = [value.grad for value in parameters if value.grad is not None]
    norms = torch.stack([norm.to(loss.device) for norm in torch.nn.utils.get_total_norm(grads).view(1)])
    return bool(torch.isfinite(loss) & torch.isfinite(norms).all())
