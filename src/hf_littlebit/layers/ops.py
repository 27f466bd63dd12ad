"""The layer as a torch.library operator, so that torch.compile, fake tensors and autograd see one opaque node.

    hf_littlebit::linear(x, u, u_tail, v, v_tail, scale_out, scale_rank, scale_in, bias, ranks) -> y
    hf_littlebit::linears(x, parts, ranks, paths) -> y of every layer
    hf_littlebit::linear_grad(grad, u, u_tail, v, v_tail, scale_out, scale_rank, scale_in, ranks) -> grad_x

Parts as in kernels/parts.py. Derivatives are those of x and of the bias (derivatives.py); they run through the same packed
parts, with no dense copy. Scales and bits are constants here: they are trained as a latent layer (linear.py).

The plain-torch implementation is registered for every device; where the compiled CPU kernel is loaded (kernels/cpu.py) the
dispatcher goes to it without a step through Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..internals.torch import below_autograd, is_watched
from ..kernels import PackedLayer, littlebit_linear, littlebit_linear_grad, products
from .derivatives import PART_COUNT, differentiable, register, split_layers
from .eager import unseen

__all__ = ["PART_COUNT", "differentiable", "linear", "linears"]


_PARTS = "Tensor u, Tensor? u_tail, Tensor? v, Tensor? v_tail, Tensor scale_out, Tensor scale_rank, Tensor scale_in"
_LIBRARY = torch.library.Library("hf_littlebit", "FRAGMENT")  # lives as long as the module: dropping it unregisters


def linear(x: Tensor, layer: PackedLayer) -> Tensor:
    """x [..., in_features] of fp32, bf16 or fp16 -> [..., out_features] of the same dtype, accumulated in fp32.

    Raises:
        RuntimeError: a part has another shape, dtype or device than x and the ranks ask for, or the scales ask for a gradient.
    """
    if torch.compiler.is_compiling() or differentiable(x, *layer[:PART_COUNT]):
        return _OPERATOR(x, *layer)
    if not x.is_cpu and unseen(x):
        return products(x, (layer,))[0]
    if is_watched():
        return _OPERATOR(x, *layer)
    # Nothing to record: autograd's step through Python costs as much as all the rest of a call on a small layer.
    with below_autograd():
        return _OPERATOR(x, *layer)


def linears(x: Tensor, layers: Sequence[PackedLayer]) -> list[Tensor]:
    """`linear` of several layers with the same x, in one call. Only where none is `differentiable`: no gradient is recorded."""
    if not torch.compiler.is_compiling() and unseen(x):
        return products(x, layers)
    parts = [part for layer in layers for part in layer[:PART_COUNT]]
    ranks = [rank for layer in layers for rank in layer.ranks]
    paths = [len(layer.ranks) for layer in layers]
    if torch.compiler.is_compiling() or is_watched():
        return _TOGETHER(x, parts, ranks, paths)
    with below_autograd():
        return _TOGETHER(x, parts, ranks, paths)


def _refuse_onnx() -> None:
    """ONNX has no operator for packed bits, which its exporter says in words that help nobody. It asks the fake implementation
    in every way it has of capturing a model; torch.compile answers the same question with no, wherever it follows Python."""
    if torch.onnx.is_in_onnx_export():
        raise ValueError(
            "packed LittleBit layers have no ONNX operator; call model.dequantize() first, and export the dense model"
        )


def _linears(x: Tensor, parts: list[Tensor | None], ranks: list[int], paths: list[int]) -> list[Tensor]:
    return products(x, [PackedLayer._make([*own, of_own]) for own, of_own in split_layers(parts, ranks, paths)])


def _linears_fake(x: Tensor, parts: list[Any], ranks: list[int], paths: list[int]) -> list[Tensor]:
    return [_linear_fake(x, *parts[PART_COUNT * index : PART_COUNT * (index + 1)]) for index in range(len(paths))]


def _linear_fake(x: Tensor, u: Tensor, *rest: Any) -> Tensor:
    _refuse_onnx()
    _same_device(x, u, *rest)
    return x.new_empty(*x.shape[:-1], u.shape[-1])


def _linear_grad_fake(grad: Tensor, u: Tensor, *rest: Any) -> Tensor:
    *_, scale_in, _ = rest
    _same_device(grad, u, *rest)
    return grad.new_empty(*grad.shape[:-1], scale_in.shape[-1])


def _same_device(x: Tensor, *parts: Any) -> None:
    # A fake implementation is also what the dispatcher finds for parts on meta: x elsewhere would get uninitialised memory.
    for part in parts:
        if isinstance(part, Tensor) and x.device.type != part.device.type:
            raise RuntimeError(
                f"x is on {x.device}, but the packed weight is on {part.device}; load the weights, or move both to one device"
            )


def _register() -> None:
    _LIBRARY.define(f"linear(Tensor x, {_PARTS}, Tensor? bias, int[] ranks) -> Tensor")
    _LIBRARY.define(f"linear_grad(Tensor grad, {_PARTS}, int[] ranks) -> Tensor")
    _LIBRARY.define("linears(Tensor x, Tensor?[] parts, int[] ranks, int[] paths) -> Tensor[]")
    _LIBRARY.impl("linears", _linears, "CompositeExplicitAutograd")
    torch.library.register_fake("hf_littlebit::linears", _linears_fake, lib=_LIBRARY)
    _LIBRARY.impl("linear", littlebit_linear, "CompositeExplicitAutograd")
    _LIBRARY.impl("linear_grad", littlebit_linear_grad, "CompositeExplicitAutograd")
    torch.library.register_fake("hf_littlebit::linear", _linear_fake, lib=_LIBRARY)
    torch.library.register_fake("hf_littlebit::linear_grad", _linear_grad_fake, lib=_LIBRARY)
    register(_LIBRARY)


_register()
_OPERATOR = torch.ops.hf_littlebit.linear.default
_TOGETHER = torch.ops.hf_littlebit.linears.default
