"""A packed table as torch.library operators, so that torch.compile, fake tensors and autograd see one opaque node each.

    hf_littlebit::head(x, codes, scale, bias) -> y                          x [..., columns] -> [..., rows] of x's dtype
    hf_littlebit::head_grad(grad, codes, scale, columns) -> grad_x
    hf_littlebit::embedding(indices, codes, scale, columns, dtype) -> rows of the table, [..., columns] of dtype

Parts as in kernels/table.py. The gradient is that of x and of the bias; it runs through the same codes, with no dense copy. Codes
and scales are constants here, and indices have no gradient. As in ops.py, plain torch is registered for every device, and the
dispatcher goes to the compiled CPU kernel by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..internals.torch import below_autograd
from .ops import differentiable

__all__ = ["embedding", "head"]

_LIBRARY = torch.library.Library("hf_littlebit", "FRAGMENT")  # lives as long as the module: dropping it unregisters


def head(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., columns] of fp32, bf16 or fp16 -> x W^T + bias, [..., rows] of the same dtype, accumulated in fp32.

    Raises:
        RuntimeError: a part has another shape, dtype or device than x asks for, or the scales ask for a gradient.
    """
    if torch.compiler.is_compiling() or differentiable(x, scale, bias):
        return _HEAD(x, codes, scale, bias)
    with below_autograd():
        return _HEAD(x, codes, scale, bias)


def embedding(indices: Tensor, codes: Tensor, scale: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """indices [...] of int64 or int32 -> rows of the table, [..., columns] of dtype. No gradient is recorded.

    Raises:
        RuntimeError: a part has another shape, dtype or device than the others ask for; on a CPU, an index is outside of the table.
    """
    if torch.compiler.is_compiling():
        return _EMBEDDING(indices, codes, scale, columns, dtype)
    with below_autograd():
        return _EMBEDDING(indices, codes, scale, columns, dtype)


def _head_fake(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    _same_device(x, codes)
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _head_grad_fake(grad: Tensor, codes: Tensor, scale: Tensor, columns: int) -> Tensor:
    _same_device(grad, codes)
    return grad.new_empty(*grad.shape[:-1], columns)


def _embedding_fake(indices: Tensor, codes: Tensor, scale: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    _same_device(indices, codes)
    return indices.new_empty(*indices.shape, columns, dtype=dtype)


def _same_device(x: Tensor, codes: Tensor) -> None:
    # A fake implementation is also what the dispatcher finds for parts on meta: x elsewhere would get uninitialised memory.
    if x.device.type != codes.device.type:
        raise RuntimeError(
            f"the input is on {x.device}, but the packed table is on {codes.device}; load the weights, or move both to one device"
        )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, bias = inputs
    if ctx.needs_input_grad[2]:
        raise RuntimeError(
            "the scales of a packed table ask for a gradient, but they are constants; freeze them (requires_grad_(False))"
        )
    ctx.save_for_backward(codes, scale)
    ctx.columns = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.hf_littlebit.head_grad(grad, *ctx.saved_tensors, ctx.columns)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).float().sum(dim=0).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias


def _register() -> None:
    _LIBRARY.define("head(Tensor x, Tensor codes, Tensor scale, Tensor? bias) -> Tensor")
    _LIBRARY.define("head_grad(Tensor grad, Tensor codes, Tensor scale, int columns) -> Tensor")
    _LIBRARY.define("embedding(Tensor indices, Tensor codes, Tensor scale, int columns, ScalarType dtype) -> Tensor")
    for name, function, fake in (
        ("head", kernels.head, _head_fake),
        ("head_grad", kernels.head_grad, _head_grad_fake),
        ("embedding", kernels.embedding, _embedding_fake),
    ):
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"hf_littlebit::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd("hf_littlebit::head", _backward, setup_context=_setup_context, lib=_LIBRARY)


_register()
_HEAD = torch.ops.hf_littlebit.head.default
_EMBEDDING = torch.ops.hf_littlebit.embedding.default
