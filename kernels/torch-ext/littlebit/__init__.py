"""littlebit: matrix products with packed binary factors, W ~ sum_p diag(h_p) U_p diag(l_p) V_p^T diag(g_p).

The public functions take and return tensors and know nothing of transformers. `packing` is the layout (the file format),
`reference` the product in plain torch, `cpu` the compiled one; the functions here choose at each call, from x's device.
"""

from typing import Any

import torch

from . import cpu, packing, reference
from .packing import LAYOUT_VERSION, factor_shape, factor_shapes, pack_signs, stored_bits, unpack_signs

__all__ = [
    "LAYOUT_VERSION",
    "cpu",
    "factor_shape",
    "factor_shapes",
    "littlebit_linear",
    "littlebit_linear_grad",
    "pack_signs",
    "packing",
    "reference",
    "stored_bits",
    "unpack_signs",
]


def littlebit_linear(x: torch.Tensor, *parts: Any, **named: Any) -> torch.Tensor:
    """x [..., in_features] -> [..., out_features], by the fastest implementation; arguments as in reference.py."""
    return _backend(x).littlebit_linear(x, *parts, **named)


def littlebit_linear_grad(grad: torch.Tensor, *parts: Any, **named: Any) -> torch.Tensor:
    """grad [..., out_features] -> [..., in_features], by the fastest implementation; arguments as in reference.py."""
    return _backend(grad).littlebit_linear_grad(grad, *parts, **named)


def _backend(x: torch.Tensor) -> Any:
    """The module that computes for x."""
    return cpu if x.device.type == "cpu" and cpu.load() else reference
