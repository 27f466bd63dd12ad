"""A packed table on a GPU, by the Triton kernels: the parts are checked, and a kernel is chosen by the number of tokens.

One token goes to table_gemv.py, more of them and every gradient to table_gemm.py. Same functions and arguments as
table_reference.py. Nothing here waits for the device or asks it for a value, and a kernel is compiled per dtype, bits, tile and
divisibility of the table's sizes: a call can be captured in a CUDA graph once it has run.
"""

from typing import Any, Dict, NamedTuple, Optional

import torch

from . import gpu
from .device import capability, cores, shared_memory
from .launch import Step, run
from .table import GROUP, bits_of, checked, checked_grad, checked_indices, groups_of

__all__ = ["One", "Tile", "embedding", "head", "head_grad", "one_tile", "tile"]


class One(NamedTuple):
    """Tile of one token: rows and warps of a program, which lie along the columns, and the loads' stages (1: no pipeline)."""

    rows: int
    warps: int
    stages: int


class Tile(NamedTuple):
    """Tile of several tokens: rows, tokens and columns of a step, warps, stages."""

    rows: int
    tokens: int
    columns: int
    warps: int
    stages: int


WIDTH = {8: 256, 4: 1024}  # columns that a warp reads of a row at a time (table_gemv.py)


def one_tile(bits: int, columns: int) -> One:
    """For one token."""
    warps = 1
    while warps < 4 and 2 * warps * WIDTH[bits] <= columns:
        warps *= 2
    # Columns that are no multiple of 16 are loaded byte by byte, which takes registers.
    return One(16 if bits == 8 and columns % 16 == 0 else 8, warps, 1)


def tile(device: torch.device, per_row: bool, tokens: int, terms: int) -> Tile:
    """For several tokens of so many terms. A sum with one scale for a row may take longer steps than a group."""
    block = 16
    while block < min(tokens, 128):
        block *= 2
    stages = 3 if shared_memory(device) > 64 << 10 else 2
    if block > 64:
        return Tile(128, block, GROUP, 8, stages)
    return Tile(64, block, 2 * GROUP if per_row and terms == 1 else GROUP, 4, stages)


def _ready(x: torch.Tensor) -> None:
    if not gpu.load():
        raise RuntimeError(gpu.missing())
    if x.device.type == "cpu" and not gpu.interpreted():
        raise RuntimeError("x is on the CPU, but triton compiles for GPUs only; move it, or set TRITON_INTERPRET=1")


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as [tokens, features] whose rows are contiguous."""
    x = x.resolve_neg() if x.is_neg() else x
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _terms(dtype: torch.dtype, device: torch.device, gradient: bool) -> int:
    """Of table_gemm.py. A scaled gradient has more than 16 bits even where the gradient itself has not."""
    old = capability(device)
    if old is not None and old < (8, 0):
        return 0
    return 3 if dtype == torch.float32 else 2 if gradient else 1


def head(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """What `table_reference.head` gives.

    Raises:
        RuntimeError: as there; there is no triton; x is on the CPU and the kernels are not interpreted.
    """
    _ready(x)
    codes, scale, bias = checked(x, codes, scale, bias)
    y = x.new_empty(*x.shape[:-1], codes.shape[0])
    if not y.numel():
        return y
    values = _rows(x)
    bits, groups, (tokens, columns) = bits_of(codes), scale.shape[1], values.shape
    shared: Dict[str, Any] = {"PER_ROW": groups == 1 and bits == 8}
    if tokens == 1:
        from . import table_gemv

        one = one_tile(bits, columns)
        width = one.warps * WIDTH[bits]
        arguments = (values, codes, scale, bias, y, codes.shape[0], columns, groups)
        step: Step = (
            table_gemv.one8 if bits == 8 else table_gemv.one4,
            (-(-codes.shape[0] // one.rows),),
            arguments if bits == 8 else (*arguments, table_gemv.MAGIC),
            {**shared, "BLOCK_N": one.rows, "BLOCK_K": width, "EVEN": columns % width == 0}
            | {"STAGES": one.stages, "num_warps": one.warps},
        )
    else:
        from . import table_gemm

        terms = _terms(x.dtype, x.device, False)
        sizes = tile(x.device, shared["PER_ROW"], tokens, terms)
        step = (
            table_gemm.many,
            (-(-tokens // sizes.tokens), -(-codes.shape[0] // sizes.rows)),
            (values, codes, scale, bias, y, tokens, codes.shape[0], columns, groups, values.stride(0)),
            {**shared, "BLOCK_N": sizes.rows, "BLOCK_T": sizes.tokens, "BLOCK_K": sizes.columns, "BITS": bits}
            | {"EVEN": columns % sizes.columns == 0, "TERMS": terms}
            | {"num_warps": sizes.warps, "num_stages": sizes.stages},
        )
    with gpu.on(x):
        run([step])
    return y


def head_grad(grad: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, columns: int) -> torch.Tensor:
    """What `table_reference.head_grad` gives; errors as `head`."""
    _ready(grad)
    codes, scale = checked_grad(grad, codes, scale, columns)
    y = grad.new_empty(*grad.shape[:-1], columns)
    if not y.numel():
        return y
    if not grad.numel():
        return y.zero_()
    from . import table_gemm

    values = _rows(grad)
    tokens, rows = values.shape
    bits, groups = bits_of(codes), scale.shape[1]
    block_t, block_n = (16 if tokens <= 16 else 64), 64
    blocks, steps = -(-tokens // block_t) * groups_of(columns), -(-rows // block_n)
    # Two programs a core; each split has a result of its own, and they are added in their order.
    span = -(-steps // max(1, min(steps, 2 * cores(grad.device) // blocks)))
    splits = -(-steps // span)
    made = y if splits == 1 else torch.empty(splits, tokens, columns, dtype=torch.float32, device=y.device)
    step = (
        table_gemm.gradient,
        (-(-tokens // block_t), groups_of(columns), splits),
        (values, codes, scale, made, tokens, rows, columns, groups, values.stride(0), span),
        {"BLOCK_N": block_n, "BLOCK_T": block_t, "BITS": bits, "PER_ROW": groups == 1, "EVEN": columns % GROUP == 0}
        | {
            "TERMS": _terms(grad.dtype, grad.device, True),
            "num_warps": 4,
            "num_stages": 3 if shared_memory(grad.device) > 64 << 10 else 2,
        },
    )
    with gpu.on(grad):
        run([step])
    if splits > 1:
        y.view(tokens, columns).copy_(made.sum(dim=0))
    return y


def embedding(
    indices: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """What `table_reference.embedding` gives; an index outside of the table gives NaN. Errors as `head`."""
    _ready(indices)
    codes, scale = checked_indices(indices, codes, scale, columns, dtype)
    y = scale.new_empty(*indices.shape, columns, dtype=dtype)
    if not y.numel():
        return y
    if not codes.shape[0]:
        return y.fill_(float("nan"))
    from . import table_gemv

    block = 1024
    while block > 64 and block // 2 >= columns:
        block //= 2
    step = (
        table_gemv.gather,
        (indices.numel(), -(-columns // block)),
        (indices.contiguous(), codes, scale, y, codes.shape[0], columns, scale.shape[1]),
        {"BLOCK": block, "BITS": bits_of(codes), "PER_ROW": scale.shape[1] == 1, "num_warps": 4},
    )
    with gpu.on(indices):
        run([step])
    return y
