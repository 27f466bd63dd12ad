"""The product of a layer on latents, as training needs it: y = x diag(g) sign(V) diag(l) sign(U)^T diag(h), over all paths.

The scales are multiplied into the signs, not into the activations: a step has more tokens than a layer has rows or
columns, and elementwise work on them would cost more than the matrix products save. Two paths side by side are then two
products of twice the rank. Backward, with right = g * sign(V) and left = h * sign(U) * l:

    d right = x^T (dy left),  d left = dy^T (x right),  dx = (dy left) right^T

and from these, elementwise on matrices of the factors' size, the gradients of U, V (through the slope of the sign's
surrogate, sign.py), h, l and g. The scales are rounded to the stored dtype in the forward; the gradient passes unchanged.

On a CPU the elementwise work waits for memory: the compiled library (kernels/cpu.py) does it in one pass instead of 5 to 14.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels import compiled, cpu
from .sign import SignGradient, sign, times_slope

__all__ = ["factored_product", "scaled_signs", "scaled_signs_grad"]

WIDTH = 32  # 16-bit products on a CPU go by tiles of so many columns, and are up to a third slower where one is cut


def factored_product(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    h: Tensor,
    l: Tensor,  # noqa: E741
    g: Tensor,
    ranks: tuple[int, ...],
    scale_dtype: torch.dtype,
    gradient: SignGradient,
) -> Tensor:
    """x [..., in] times the weight of latents u [out, R] and v [in, R] and scales h [paths, out], l [R], g [paths, in],
    where R is the sum of `ranks`, one for each path. In x's dtype."""
    return _FactoredProduct.apply(x, u, v, h, l, g, ranks, scale_dtype, gradient)


class _FactoredProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, u, v, h, l, g, ranks, scale_dtype, gradient):  # noqa: E741
        ctx.ranks, ctx.gradient = ranks, gradient
        h, l, g = (scale.to(scale_dtype).to(scale.dtype) for scale in (h, l, g))  # noqa: E741
        left, right = scaled_signs(u, h, l, ranks, x.dtype), scaled_signs(v, g, None, ranks, x.dtype)
        inner = x.reshape(-1, x.shape[-1]) @ right
        ctx.save_for_backward(x, inner, left, right, u, v, h, l, g)
        return (inner @ left.T).view(*x.shape[:-1], left.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):  # type: ignore[override]
        x, inner, left, right, u, v, h, l, g = ctx.saved_tensors  # noqa: E741
        need_x, need_u, need_v, need_h, need_l, need_g = ctx.needs_input_grad[:6]
        dx = du = dv = dh = dl = dg = None
        rows = dy.reshape(-1, dy.shape[-1])
        with torch.autocast(dy.device.type, enabled=False):
            inner_grad = rows @ left
            if need_x:
                dx = (inner_grad @ right.T).view(x.shape)
            if need_u or need_h or need_l:
                du, dh, dl = scaled_signs_grad(rows.T @ inner, u, h, l, ctx.ranks, ctx.gradient)
            if need_v or need_g:
                right_grad = x.reshape(-1, x.shape[-1]).T @ inner_grad
                dv, dg, _ = scaled_signs_grad(right_grad, v, g, None, ctx.ranks, ctx.gradient)
        return dx, du, dv, dh, dl, dg, None, None, None


def scaled_signs(
    latent: Tensor, outer: Tensor, inner: Tensor | None, ranks: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """outer * sign(latent) * inner, [rows, R] of `dtype`, or wider: columns of zeros may follow.

    Args:
        latent: [rows, R], fp32, the paths side by side.
        outer: a scale for each row, [paths, rows]. inner: one for each column, [R], or None for ones.

    The compiled library multiplies in fp32 and rounds once; plain torch rounds every scale to `dtype` first, which makes a
    difference only for scales with more digits than `dtype` has.
    """
    if _compiled(latent):
        width = sum(ranks) if dtype == torch.float32 else -(-sum(ranks) // WIDTH) * WIDTH
        return cpu.scaled_signs(latent, outer, inner, ranks, dtype, width)
    scaled = sign(latent, dtype)
    for path, columns in enumerate(_columns(ranks)):
        scaled[:, columns].mul_(outer[path].to(dtype)[:, None])
    return scaled if inner is None else scaled.mul_(inner.to(dtype))


def scaled_signs_grad(
    grad: Tensor,
    latent: Tensor,
    outer: Tensor,
    inner: Tensor | None,
    ranks: tuple[int, ...],
    gradient: SignGradient,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of `scaled_signs` with respect to latent, outer and inner, fp32, from the one of its result."""
    if _compiled(latent):
        alpha = gradient.alpha if gradient.kind == "smooth" else None
        return cpu.scaled_signs_grad(grad, latent, outer, inner, ranks, alpha)
    signed = sign(latent, latent.dtype).mul_(grad.to(latent.dtype))
    if inner is None:
        outer_grad = torch.stack([signed[:, columns].sum(1) for columns in _columns(ranks)])
        inner_grad, scaled = None, grad.to(latent.dtype, copy=True)
    else:
        paths = list(enumerate(_columns(ranks)))
        outer_grad = torch.stack([signed[:, columns] @ inner[columns] for _, columns in paths])
        inner_grad = torch.cat([outer[path] @ signed[:, columns] for path, columns in paths])
        scaled = grad.to(latent.dtype) * inner
    for path, columns in enumerate(_columns(ranks)):
        scaled[:, columns].mul_(outer[path][:, None])
    return times_slope(scaled, latent, gradient), outer_grad, inner_grad


def _compiled(latent: Tensor) -> bool:
    return latent.dtype == torch.float32 and latent.device.type == "cpu" and compiled()


def _columns(ranks: tuple[int, ...]) -> list[slice]:
    """Where each path's columns are in u and v."""
    ends = [sum(ranks[: path + 1]) for path in range(len(ranks))]
    return [slice(end - rank, end) for rank, end in zip(ranks, ends, strict=True)]
