"""The sign of a latent, with the gradients that quantization-aware training uses.

forward     sign(x), with sign(0) = +1
SmoothSign  backward alpha * (1 - tanh(alpha x)^2), alpha = 100 (LittleBit, arXiv 2506.13771, section 3.3)
STE         backward 1 where |x| < 1, else 0 (the straight-through estimator)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["ALPHA", "SIGN_GRADIENTS", "SignGradient", "latent_sign", "sign", "times_slope"]

ALPHA = 100.0
SIGN_GRADIENTS = ("smooth", "ste")


class SignGradient(NamedTuple):
    """Which gradient passes the sign: "smooth" with its steepness, or "ste"."""

    kind: str = "smooth"
    alpha: float = ALPHA


class LatentSign(torch.autograd.Function):
    """sign(x) with the gradient that a SignGradient names."""

    @staticmethod
    def forward(x: Tensor, gradient: SignGradient, dtype: torch.dtype) -> Tensor:
        return sign(x, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, SignGradient, torch.dtype], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.gradient = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return times_slope(grad.to(x.dtype), x, ctx.gradient), None, None


def latent_sign(
    latent: Tensor, gradient: str = "smooth", alpha: float = ALPHA, dtype: torch.dtype | None = None
) -> Tensor:
    """±1 of `latent`'s shape in `dtype` (the latent's if None), with the named gradient ("smooth" or "ste"), in the
    latent's dtype."""
    if gradient not in SIGN_GRADIENTS:
        raise ValueError(f"sign gradient is {gradient!r}; choose one of {', '.join(SIGN_GRADIENTS)}")
    return LatentSign.apply(latent, SignGradient(gradient, alpha), latent.dtype if dtype is None else dtype)


def sign(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """±1 of x's shape in `dtype` (x's own if None), a new tensor; without autograd, which this is below."""
    # 0 or 1 straight in the wanted dtype, then scaled in place: a seventh of the time of torch.where on a CPU.
    return torch.lt(x, 0, out=torch.empty_like(x, dtype=dtype)).mul_(-2).add_(1)


def times_slope(grad: Tensor, x: Tensor, gradient: SignGradient) -> Tensor:
    """`grad` times the slope of the sign's surrogate at `x`."""
    if gradient.kind == "ste":
        return grad * (x.abs() < 1)
    # tanh's own backward, grad * (1 - tanh^2), reads each operand once; a training step waits for memory here.
    tanh = (gradient.alpha * x).tanh_()
    return torch.ops.aten.tanh_backward(grad, tanh).mul_(gradient.alpha)
