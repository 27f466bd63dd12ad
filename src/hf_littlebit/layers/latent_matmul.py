"""The product of a layer on latents, as training needs it, over all paths:

    y = x diag(scale_in) sign(V) diag(scale_rank) sign(U)^T diag(scale_out)          (LittleBit, arXiv 2506.13771, eq. 5)

The scales are multiplied into the signs, not into the activations: a step has more tokens than a layer has rows or
columns, and elementwise work on them would cost more than the matrix products save. Two paths side by side are then two
products of twice the rank. With v_scaled = scale_in * sign(V) and u_scaled = scale_out * sign(U) * scale_rank:

    forward      rank_acts = x v_scaled               y = rank_acts u_scaled^T
    backward     d u_scaled = dy^T rank_acts          d v_scaled = x^T (dy u_scaled)          dx = (dy u_scaled) v_scaled^T

and from these, elementwise on matrices of the factors' size, the gradients of U and V (through the slope of the sign's
surrogate, sign.py) and of the scales. The scales are rounded to the stored dtype in the forward; the gradient passes unchanged.

On a CPU the elementwise work waits for memory: the compiled library (kernels/cpu.py) does it in one pass instead of 5 to 14.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..internals.torch import is_watched
from ..kernels import compiled, cpu, places
from .sign import SignGradient, sign, surrogate, times_slope

__all__ = ["factored_product", "plain_product", "scaled_signs", "scaled_signs_grad"]

WIDTH = 32  # 16-bit products on a CPU go by tiles of so many columns, and are up to a third slower where one is cut


def factored_product(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    scale_out: Tensor,
    scale_rank: Tensor,
    scale_in: Tensor,
    ranks: tuple[int, ...],
    scale_dtype: torch.dtype,
    gradient: SignGradient,
) -> Tensor:
    """x [..., in] times the weight that latents and scales stand for: [..., out] in x's dtype, differentiable in all six.

    Args:
        u, v: latents [out, R] and [in, R], where R is the sum of `ranks`, one for each path.
        scale_out, scale_rank, scale_in: [paths, out], [R] and [paths, in], rounded to `scale_dtype` before they are used.
        gradient: what passes the sign backward.

    Derivatives beyond the first, in forward mode and in torch.func's transforms are those of `plain_product`, which has the
    same values.
    """
    if not torch.compiler.is_compiling() and is_watched():
        return plain_product(x, u, v, scale_out, scale_rank, scale_in, ranks, scale_dtype, gradient)
    rows = x.reshape(-1, x.shape[-1])
    out = _FactoredProduct.apply(rows, u, v, scale_out, scale_rank, scale_in, ranks, scale_dtype, gradient)
    # Shaped out here: what a Function returns as a view must not be changed in place, which models do (Llama 4).
    return out.view(*x.shape[:-1], out.shape[-1])


def plain_product(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    scale_out: Tensor,
    scale_rank: Tensor,
    scale_in: Tensor,
    ranks: tuple[int, ...],
    scale_dtype: torch.dtype,
    gradient: SignGradient,
) -> Tensor:
    """`factored_product` in operations that torch can differentiate in every way and order, with more memory and time.

    The sign's derivatives are those of the function that stands for it backward (`surrogate`), of every order.
    """
    out, rank, features = (_rounded(scale, scale_dtype) for scale in (scale_out, scale_rank, scale_in))
    own = [place.columns for place in places(ranks)]
    u_signs, v_signs = surrogate(u, gradient), surrogate(v, gradient)
    u_scaled = torch.cat([u_signs[:, columns] * out[path][:, None] for path, columns in enumerate(own)], dim=1) * rank
    v_scaled = torch.cat([v_signs[:, columns] * features[path][:, None] for path, columns in enumerate(own)], dim=1)
    return (x @ v_scaled.to(x.dtype)) @ u_scaled.to(x.dtype).T


def _rounded(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as it is stored, with derivatives as if nothing was rounded."""
    return scale.detach().to(dtype).to(scale.dtype) + (scale - scale.detach())


class _FactoredProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        u: Tensor,
        v: Tensor,
        scale_out: Tensor,
        scale_rank: Tensor,
        scale_in: Tensor,
        ranks: tuple[int, ...],
        scale_dtype: torch.dtype,
        gradient: SignGradient,
    ) -> Tensor:
        ctx.ranks, ctx.gradient, ctx.scale_dtype = ranks, gradient, scale_dtype
        given = scale_out, scale_rank, scale_in
        scale_out, scale_rank, scale_in = (
            scale.to(scale_dtype).to(scale.dtype) for scale in (scale_out, scale_rank, scale_in)
        )
        u_scaled = scaled_signs(u, scale_out, scale_rank, ranks, x.dtype)
        v_scaled = scaled_signs(v, scale_in, None, ranks, x.dtype)
        rank_acts = x @ v_scaled
        ctx.save_for_backward(x, rank_acts, u_scaled, v_scaled, u, v, scale_out, scale_rank, scale_in, *given)
        return rank_acts @ u_scaled.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, rank_acts, u_scaled, v_scaled, u, v, scale_out, scale_rank, scale_in, *given = ctx.saved_tensors
        if (
            torch.is_grad_enabled() and not torch.compiler.is_compiling()
        ):  # create_graph=True: a derivative of this is wanted
            return *_recorded_backward(ctx, dy, (x, u, v, *given)), None, None, None
        need_x, need_u, need_v, need_out, need_rank, need_in = ctx.needs_input_grad[:6]
        of_x = of_u = of_v = of_out = of_rank = of_in = None
        with torch.autocast(dy.device.type, enabled=False):
            rank_grad = dy @ u_scaled
            if need_x:
                of_x = rank_grad @ v_scaled.T
            if need_u or need_out or need_rank:
                of_u, of_out, of_rank = scaled_signs_grad(
                    dy.T @ rank_acts, u, scale_out, scale_rank, ctx.ranks, ctx.gradient
                )
            if need_v or need_in:
                of_v, of_in, _ = scaled_signs_grad(x.T @ rank_grad, v, scale_in, None, ctx.ranks, ctx.gradient)
        return of_x, of_u, of_v, of_out, of_rank, of_in, None, None, None


def _recorded_backward(ctx: Any, dy: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor | None]:
    """The gradients of the six `inputs` as results of recorded operations, so that they can be differentiated again."""
    with torch.autocast(dy.device.type, enabled=False):
        # An input that is no leaf would lead past this product to its own, and one given twice would count twice.
        own = [value.view_as(value) for value in inputs]
        x, u, v, out, rank, features = own
        y = plain_product(x, u, v, out, rank, features, ctx.ranks, ctx.scale_dtype, ctx.gradient)
        of_wanted = [value for value, needed in zip(own, ctx.needs_input_grad, strict=False) if needed]
        found = iter(torch.autograd.grad(y, of_wanted, dy, create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:6]]


def scaled_signs(
    latent: Tensor, scale_feature: Tensor, scale_rank: Tensor | None, ranks: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """scale_feature * sign(latent) * scale_rank, [rows, R] of `dtype`, or wider: columns of zeros may follow.

    Args:
        latent: [rows, R], fp32, the paths side by side; the rows are the layer's outputs (U) or its inputs (V).
        scale_feature: a scale for each row, [paths, rows]: scale_out for U, scale_in for V.
        scale_rank: one for each column, [R], or None for ones.

    The compiled library multiplies in fp32 and rounds once; plain torch rounds every scale to `dtype` first, which makes a
    difference only for scales with more digits than `dtype` has.
    """
    if _compiled(latent):
        width = sum(ranks) if dtype == torch.float32 else -(-sum(ranks) // WIDTH) * WIDTH
        return cpu.scaled_signs(latent, scale_feature, scale_rank, ranks, dtype, width)
    scaled = sign(latent, dtype)
    for path, place in enumerate(places(ranks)):
        scaled[:, place.columns].mul_(scale_feature[path].to(dtype)[:, None])
    return scaled if scale_rank is None else scaled.mul_(scale_rank.to(dtype))


def scaled_signs_grad(
    grad: Tensor,
    latent: Tensor,
    scale_feature: Tensor,
    scale_rank: Tensor | None,
    ranks: tuple[int, ...],
    gradient: SignGradient,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of `scaled_signs` with respect to latent, scale_feature and scale_rank (None without), fp32.

    Args:
        grad: the gradient of its result, [rows, R or more], of which the first R columns count.
    """
    if _compiled(latent):
        alpha = gradient.alpha if gradient.surrogate == "smooth" else None
        return cpu.scaled_signs_grad(grad, latent, scale_feature, scale_rank, ranks, alpha)
    columns = [place.columns for place in places(ranks)]
    signed = sign(latent, latent.dtype).mul_(grad.to(latent.dtype))
    if scale_rank is None:
        feature_grad = torch.stack([signed[:, own].sum(1) for own in columns])
        rank_grad, scaled = None, grad.to(latent.dtype, copy=True)
    else:
        feature_grad = torch.stack([signed[:, own] @ scale_rank[own] for own in columns])
        rank_grad = torch.cat([scale_feature[path] @ signed[:, own] for path, own in enumerate(columns)])
        scaled = grad.to(latent.dtype) * scale_rank
    for path, own in enumerate(columns):
        scaled[:, own].mul_(scale_feature[path][:, None])
    return times_slope(scaled, latent, gradient), feature_grad, rank_grad


def _compiled(latent: Tensor) -> bool:
    return latent.dtype == torch.float32 and latent.device.type == "cpu" and compiled()
