"""littlebit: matrix products with packed binary factors.

    W ~ sum_p diag(scale_out_p) U_p diag(scale_rank_p) V_p^T diag(scale_in_p)

The public functions take and return tensors and know nothing of transformers. `packing` is the layout of one factor and `parts`
that of a layer: together they are the file format. `reference` is the product in plain torch, `cpu` the compiled one, `gpu` the
Triton kernels; the functions here choose one at each call, from x's device. Every device that none of them serves computes in
plain torch, after one warning. `head`, `head_grad` and `embedding` do the same for a table of rows in 8 or 4 bits (`table`, with
`table_reference`, `table_cpu` and `table_gpu`).

The environment variable LITTLEBIT_BACKEND names the implementation (backend.py). It is read once per kind of device, at its
first product in the process, because from then on the dispatcher calls the compiled operators without asking Python. It
also chooses for the passes over latents in training (`compiled`), for which there is nothing to warn of.
"""

import functools
from typing import Any, List, Optional, Sequence

import torch

from . import backend, cpu, gpu, packing, reference, table_cpu, table_gpu, table_reference
from .backend import BACKENDS
from .packing import FORMAT_VERSION, factor_shape, pack_signs, stored_bits, unpack_signs
from .parts import PARTS, PackedLayer, factor_shapes, places
from .table import PackedTable, table_shapes, unpack_table
from .table_fit import quantize_table

__all__ = [
    "BACKENDS",
    "FORMAT_VERSION",
    "PARTS",
    "PackedLayer",
    "PackedTable",
    "backend",
    "compiled",
    "cpu",
    "embedding",
    "factor_shape",
    "factor_shapes",
    "gpu",
    "head",
    "head_grad",
    "littlebit_linear",
    "littlebit_linear_grad",
    "littlebit_linears",
    "pack_signs",
    "packing",
    "places",
    "products",
    "quantize_table",
    "reference",
    "stored_bits",
    "table_shapes",
    "unpack_signs",
    "unpack_table",
]


def products(x: torch.Tensor, layers: Sequence[PackedLayer], transposed: bool = False) -> List[torch.Tensor]:
    """What `reference.products` gives, by the fastest implementation: y [..., out_features] of every layer that reads x.

    Args:
        x: [..., in_features] of fp32, bf16 or fp16; for the gradient (transposed) [..., out_features].

    Raises:
        RuntimeError: as the implementation's own `products`; or the one that LITTLEBIT_BACKEND names cannot run.
        ValueError: LITTLEBIT_BACKEND holds an unknown name.
    """
    return _backend(x).products(x, layers, transposed)


def littlebit_linear(x: torch.Tensor, *layer: Any, **named: Any) -> torch.Tensor:
    """`products` of one layer, whose fields follow x in the order of `PackedLayer` or by their names."""
    return _backend(x).products(x, (PackedLayer(*layer, **named),))[0]


def littlebit_linears(x: torch.Tensor, layers: Sequence[Sequence[Any]]) -> List[torch.Tensor]:
    """`products` of several layers, each a PackedLayer or any sequence of its fields."""
    return _backend(x).products(x, [PackedLayer(*layer) for layer in layers])


def littlebit_linear_grad(
    grad: torch.Tensor,
    u: torch.Tensor,
    u_tail: Optional[torch.Tensor],
    v: Optional[torch.Tensor],
    v_tail: Optional[torch.Tensor],
    scale_out: torch.Tensor,
    scale_rank: torch.Tensor,
    scale_in: torch.Tensor,
    ranks: Sequence[int],
) -> torch.Tensor:
    """The gradient of one layer with respect to x: grad [..., out_features] -> [..., in_features] of grad's dtype."""
    layer = PackedLayer(u, u_tail, v, v_tail, scale_out, scale_rank, scale_in, None, ranks)
    return _backend(grad).products(grad, (layer,), True)[0]


def head(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """y = x W^T + bias of a packed table W: x [..., columns] of fp32, bf16 or fp16 -> [..., rows] of x's dtype.

    Args:
        codes, scale: the table's parts (table.py). bias: floats [rows].

    Raises:
        RuntimeError: a part has another shape, dtype or device than the others and x ask for; or the implementation that
            LITTLEBIT_BACKEND names cannot run.
        ValueError: LITTLEBIT_BACKEND holds an unknown name.
    """
    return _tables(x).head(x, codes, scale, bias)


def head_grad(grad: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, columns: int) -> torch.Tensor:
    """The gradient of `head` with respect to x: grad [..., rows] -> grad W, [..., columns] of grad's dtype. Errors as `head`."""
    return _tables(grad).head_grad(grad, codes, scale, columns)


def embedding(
    indices: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """Rows of a packed table: indices [...] of int64 or int32 -> [..., columns] of dtype (fp32, bf16 or fp16).

    Errors as `head`. An index outside of the table is an error on a CPU; the Triton kernel gives NaN for it.
    """
    return _tables(indices).embedding(indices, codes, scale, columns, dtype)


def _tables(x: torch.Tensor) -> Any:
    """The module that computes with tables for x: the neighbour of the one that computes with layers."""
    return {reference: table_reference, cpu: table_cpu, gpu: table_gpu}[_backend(x)]


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
def _accelerated(device_type: str) -> Any:
    """The module for tensors on devices of this type; errors as `_choice`."""
    name = backend.asked()
    known = device_type in gpu.DEVICES
    if name == "reference" or device_type == "meta":
        return reference
    if known and gpu.load():
        return gpu
    why = (
        gpu.missing()
        if known
        else f"there are no kernels for {device_type} devices, only for {', '.join(gpu.DEVICES)} and cpu"
    )
    if name == "triton":
        raise backend.refusal(why)
    backend.warn(
        why,
        f"Packed layers run in plain torch on {device_type}, which unpacks them at every call and is slower than the dense layer",
    )
    return reference
