"""What the operators of ops.py are to those who differentiate or batch them: autograd, torch.func, forward-mode derivatives.

A packed layer is linear in x, and its bits and scales are constants:

    linear          y = x W^T + b       backward  dx = dy W, db = sum dy        forward mode  ty = tx W^T + tb
    linear_grad     dx = dy W           backward  ddy = ddx W^T                 forward mode  tdx = tdy W
    linears         `linear` of every layer where anything is recorded, and one call where nothing is

Each derivative is one of the operators again, so derivatives of any order and kind are right, for every backend, compiled
or not. They are registered at the operators' Autograd key, where each level of torch.func's transforms and forward mode
asks for them; `torch.library.register_autograd`, the public way there, gives neither.

vmap flattens nothing: a batch of x is one more leading axis. Where the parts themselves are batched (an ensemble), it is a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..internals.torch import (
    OneLevelFunction,
    below_autograd,
    in_forward_mode,
    in_function_transform,
    one_level,
    recording,
)

__all__ = ["differentiable", "register", "split_layers"]

PART_COUNT = 8  # of a layer in `linears`: the parts and the bias
SCALES = (
    "the scales of a packed LittleBit layer ask for a gradient, but they are constants; "
    "freeze them (requires_grad_(False)), or train a model loaded with LittleBitConfig(..., format='latent')"
)


def differentiable(*tensors: Tensor | None) -> bool:
    """Whether autograd would record a product of these."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110 any() over a generator takes twice as long
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def split_layers(parts: Sequence[Any], ranks: Sequence[int], paths: Sequence[int]) -> list[tuple[list[Any], list[int]]]:
    """(parts and bias, ranks) of every layer in the flat arguments of `linears`."""
    layers, first = [], 0
    for index, count in enumerate(paths):
        layers.append((list(parts[PART_COUNT * index :][:PART_COUNT]), list(ranks[first : first + count])))
        first += count
    return layers


def register(library: torch.library.Library) -> None:
    """Give the operators `linear`, `linear_grad` and `linears` of `library` their derivatives and their rules for vmap."""
    for name, derivative, vmap in (
        ("linear", _linear, _vmap_linear),
        ("linear_grad", _linear_grad, _vmap_linear_grad),
        ("linears", _linears, _vmap_linears),
    ):
        library.impl(name, derivative, "Autograd")
        torch.library.register_vmap(f"{library.ns}::{name}", vmap, lib=library)


def _recorded(*tensors: Tensor | None) -> bool:
    """Whether anyone may want derivatives of a product of these."""
    return in_function_transform() or in_forward_mode() or differentiable(*tensors)


# -- autograd and forward mode ------------------------------------------------------------------------------------------------


def _keep(ctx: Any, parts: Sequence[Any]) -> None:
    """Keep the parts, which are constants, for the derivatives of both modes; refuse scales that ask for a gradient."""
    if any(ctx.needs_input_grad[1:PART_COUNT]):
        raise RuntimeError(SCALES)
    ctx.save_for_backward(*parts)
    ctx.save_for_forward(*parts)
    ctx.set_materialize_grads(False)  # what has no tangent is None, so that scales with one are seen


class _Linear(OneLevelFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *parts, bias, ranks = rest
        _keep(ctx, parts)
        ctx.ranks, ctx.bias_dtype = ranks, None if bias is None else bias.dtype
        with recording(in_function_transform()):
            y: Tensor = torch.ops.hf_littlebit.linear(x, *parts, bias, ranks)
        ctx.shape, ctx.dtype = y.shape, y.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_x = grad_bias = None
        if grad is None:
            return (None,) * (PART_COUNT + 2)
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.hf_littlebit.linear_grad(grad, *ctx.saved_tensors, ctx.ranks)
        if ctx.needs_input_grad[PART_COUNT]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).float().sum(dim=0).to(ctx.bias_dtype)
        return grad_x, *(None,) * (PART_COUNT - 1), grad_bias, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        of_x, *of_parts, of_bias, _ = tangents
        _refuse_tangents(of_parts)
        if of_x is None:
            return of_bias.to(ctx.dtype).expand(ctx.shape).clone()
        tangent: Tensor = torch.ops.hf_littlebit.linear(of_x, *ctx.saved_tensors, of_bias, ctx.ranks)
        return tangent


class _LinearGrad(OneLevelFunction):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, *rest: Any) -> Tensor:
        *parts, ranks = rest
        _keep(ctx, parts)
        ctx.ranks = ranks
        with recording(in_function_transform()):
            grad_x: Tensor = torch.ops.hf_littlebit.linear_grad(grad, *parts, ranks)
        return grad_x

    @staticmethod
    def backward(ctx: Any, outer: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if outer is None:
            return (None,) * (PART_COUNT + 1)
        return torch.ops.hf_littlebit.linear(outer, *ctx.saved_tensors, None, ctx.ranks), *(None,) * PART_COUNT

    @staticmethod
    def jvp(ctx: Any, of_grad: Tensor, *of_rest: Any) -> Tensor:
        _refuse_tangents(of_rest[:-1])
        tangent: Tensor = torch.ops.hf_littlebit.linear_grad(of_grad, *ctx.saved_tensors, ctx.ranks)
        return tangent


def _refuse_tangents(of_parts: Sequence[Any]) -> None:
    if any(tangent is not None for tangent in of_parts):
        raise RuntimeError(SCALES)


def _linear(x: Tensor, *rest: Any) -> Tensor:
    if _recorded(x, *rest[:-1]):
        with one_level():
            return _Linear.apply(x, *rest)  # type: ignore[attr-defined, no-any-return]
    with below_autograd():
        return torch.ops.hf_littlebit.linear(x, *rest)


def _linear_grad(grad: Tensor, *rest: Any) -> Tensor:
    if _recorded(grad, *rest[:-1]):
        with one_level():
            return _LinearGrad.apply(grad, *rest)  # type: ignore[attr-defined, no-any-return]
    with below_autograd():
        return torch.ops.hf_littlebit.linear_grad(grad, *rest)


def _linears(x: Tensor, parts: list[Tensor | None], ranks: list[int], paths: list[int]) -> list[Tensor]:
    if _recorded(x, *parts):
        return [torch.ops.hf_littlebit.linear(x, *own, of_own) for own, of_own in split_layers(parts, ranks, paths)]
    with below_autograd():
        return list(torch.ops.hf_littlebit.linears(x, parts, ranks, paths))


# -- vmap ---------------------------------------------------------------------------------------------------------------------


def _vmap_linear(info: Any, dims: Sequence[Any], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
    *parts, bias, ranks = rest
    operator = torch.ops.hf_littlebit.linear
    if any(dim is not None for dim in dims[1:PART_COUNT]):
        return _one_by_one(operator, info.batch_size, dims, x, *rest)
    batched = dims[0] is not None
    x = x.movedim(dims[0], 0) if batched else x
    if dims[PART_COUNT] is None:
        return operator(x, *parts, bias, ranks), 0
    y = operator(x, *parts, None, ranks)
    bias = bias.movedim(dims[PART_COUNT], 0)
    return y + bias.view(len(bias), *(1,) * (y.dim() - 1 - batched), -1).to(y.dtype), 0


def _vmap_linear_grad(info: Any, dims: Sequence[Any], grad: Tensor, *rest: Any) -> tuple[Tensor, int]:
    operator = torch.ops.hf_littlebit.linear_grad
    if any(dim is not None for dim in dims[1:PART_COUNT]):
        return _one_by_one(operator, info.batch_size, dims, grad, *rest)
    return operator(grad.movedim(dims[0], 0), *rest), 0


def _vmap_linears(
    info: Any, dims: Sequence[Any], x: Tensor, parts: list[Any], ranks: list[int], paths: list[int]
) -> tuple[list[Tensor], list[int]]:
    results = []
    layers = split_layers(parts, ranks, paths)
    of_layers = split_layers(dims[1], ranks, paths)
    for (own, of_own), (own_dims, _) in zip(layers, of_layers, strict=True):
        if dims[0] is None and not any(dim is not None for dim in own_dims):
            y = torch.ops.hf_littlebit.linear(x, *own, of_own)
            results.append(y.expand(info.batch_size, *y.shape))
        else:
            results.append(_vmap_linear(info, (dims[0], *own_dims, None), x, *own, of_own)[0])
    return results, [0] * len(results)


def _one_by_one(
    operator: Callable[..., Tensor], count: int, dims: Sequence[Any], *arguments: Any
) -> tuple[Tensor, int]:
    """Each element of the batch on its own, for layers that differ within it."""
    *tensors, ranks = arguments
    each = [
        operator(
            *(
                value if value is None or dim is None else value.select(dim, index).contiguous()
                for value, dim in zip(tensors, dims, strict=False)
            ),
            ranks,
        )
        for index in range(count)
    ]
    return torch.stack(each), 0
