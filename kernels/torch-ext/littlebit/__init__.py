"""littlebit: matrix products with packed binary factors, W ~ sum_p diag(h_p) U_p diag(l_p) V_p^T diag(g_p).

The public functions take and return tensors and know nothing of transformers. `packing` is the layout (the file format),
`reference` the product in plain torch, `cpu` the compiled one, `gpu` the Triton kernels; the functions here choose at each
call, from x's device. Every other device computes in plain torch, after one warning.

The environment variable LITTLEBIT_BACKEND names the implementation (backend.py). It is read once per kind of device, at its
first product in the process, because from then on the dispatcher calls the compiled operators without asking Python. It
also chooses for the passes over latents in training (`compiled`), for which there is nothing to warn of.
"""

import functools
from typing import Any, List, Sequence

import torch

from . import backend, cpu, gpu, packing, reference
from .backend import BACKENDS
from .packing import FORMAT_VERSION, factor_shape, factor_shapes, pack_signs, stored_bits, unpack_signs

__all__ = [
    "BACKENDS",
    "FORMAT_VERSION",
    "backend",
    "compiled",
    "cpu",
    "factor_shape",
    "factor_shapes",
    "gpu",
    "littlebit_linear",
    "littlebit_linear_grad",
    "littlebit_linears",
    "pack_signs",
    "packing",
    "reference",
    "stored_bits",
    "unpack_signs",
]


def littlebit_linear(x: torch.Tensor, *parts: Any, **named: Any) -> torch.Tensor:
    """x [..., in_features] -> [..., out_features], by the fastest implementation; arguments as in reference.py."""
    return _backend(x).littlebit_linear(x, *parts, **named)


def littlebit_linears(x: torch.Tensor, layers: Sequence[Sequence[Any]]) -> List[torch.Tensor]:
    """[littlebit_linear(x, *layer) for layer in layers], in one call where the implementation has one."""
    return _backend(x).littlebit_linears(x, layers)


def littlebit_linear_grad(grad: torch.Tensor, *parts: Any, **named: Any) -> torch.Tensor:
    """grad [..., out_features] -> [..., in_features], by the fastest implementation; arguments as in reference.py."""
    return _backend(grad).littlebit_linear_grad(grad, *parts, **named)


@torch.compiler.assume_constant_result  # torch.compile cannot trace the loading
def compiled() -> bool:
    """Whether `cpu.scaled_signs` and `cpu.scaled_signs_grad` are there and wanted.

    Raises:
        ValueError: LITTLEBIT_BACKEND holds an unknown name.
        RuntimeError: LITTLEBIT_BACKEND=cpu, and the library is missing or does not load.
    """
    return _compiled()


@functools.lru_cache(maxsize=None)
def _compiled() -> bool:
    name = backend.asked()
    if name == "cpu" and not cpu.load():
        raise backend.refusal(cpu.missing())
    return name in ("", "cpu") and cpu.load()


def _backend(x: torch.Tensor) -> Any:
    """The module that computes for x."""
    return _choice() if x.device.type == "cpu" else _accelerated(x.device.type)


@functools.lru_cache(maxsize=None)
def _choice() -> Any:
    """The module for CPU tensors.

    Raises:
        ValueError: LITTLEBIT_BACKEND holds an unknown name.
        RuntimeError: LITTLEBIT_BACKEND=cpu, and the library is missing or does not load; or LITTLEBIT_BACKEND=triton, and
            triton is missing or compiles.
    """
    name = backend.asked()
    if name == "reference":
        return reference
    if name == "triton":
        if gpu.interpreted():
            return gpu
        why = "triton compiles for GPUs only, and x is on the CPU: move the model" if gpu.load() else gpu.missing()
        raise backend.refusal(why)
    if cpu.load():
        return cpu
    if name == "cpu":
        raise backend.refusal(cpu.missing())
    backend.warn(
        cpu.missing(),
        "Until then packed layers run in plain torch on the CPU, which unpacks them at every call and is 10 to 100 times slower",
    )
    return reference


@functools.lru_cache(maxsize=None)
def _accelerated(kind: str) -> Any:
    """The module for tensors on devices of this type; errors as `_choice`."""
    name = backend.asked()
    known = kind in gpu.DEVICES
    if name == "reference" or kind == "meta":
        return reference
    if known and gpu.load():
        return gpu
    why = (
        gpu.missing()
        if known
        else f"there are no kernels for {kind} devices, only for {', '.join(gpu.DEVICES)} and cpu"
    )
    if name == "triton":
        raise backend.refusal(why)
    backend.warn(
        why,
        f"Packed layers run in plain torch on {kind}, which unpacks them at every call and is slower than the dense layer",
    )
    return reference
