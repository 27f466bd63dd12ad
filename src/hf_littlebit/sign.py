"""The sign of a latent, with the gradients that quantization-aware training uses.

forward     sign(x), with sign(0) = +1
SmoothSign  backward alpha * (1 - tanh(alpha x)^2), alpha = 100 (LittleBit, arXiv 2506.13771, section 3.3)
STE         backward 1 where |x| < 1, else 0 (the straight-through estimator)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["ALPHA", "SIGN_GRADIENTS", "latent_sign"]

ALPHA = 100.0
SIGN_GRADIENTS = ("smooth", "ste")


class SmoothSign(torch.autograd.Function):
    """sign(x) whose gradient is that of tanh(alpha x)."""

    @staticmethod
    def forward(x: Tensor, alpha: float) -> Tensor:
        return _sign(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.alpha = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * (ctx.alpha * (1 - torch.tanh(ctx.alpha * x).square())), None


class StraightThroughSign(torch.autograd.Function):
    """sign(x) whose gradient passes where |x| < 1."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _sign(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * (x.abs() < 1)


def latent_sign(latent: Tensor, gradient: str = "smooth", alpha: float = ALPHA) -> Tensor:
    """±1 of `latent`'s shape and dtype, with the named gradient ("smooth" or "ste")."""
    if gradient == "smooth":
        return SmoothSign.apply(latent, alpha)
    if gradient == "ste":
        return StraightThroughSign.apply(latent)
    raise ValueError(f"sign gradient is {gradient!r}; choose one of {', '.join(SIGN_GRADIENTS)}")


def _sign(x: Tensor) -> Tensor:
    return torch.where(x < 0, -torch.ones_like(x), torch.ones_like(x))
