"""Embeddings and output heads on a packed table: rows in 8 or 4 bits (kernels/table.py), gathered or multiplied as they are.

    PackedEmbedding    takes the place of an `nn.Embedding`, or of a class whose forward goes through `super().forward` (Gemma's
                       scaled embedding, say), which stays in front of it
    PackedHead         takes the place of an `nn.Linear`

Both hold two buffers, `codes` and `scale`: no optimizer sees them, and a model's dtype is not read off them. The parameter
`like` is empty; transformers reads the dtype off it, casts reach it, and rows have its dtype. Where a model ties weights, one
module owns the table and the others hold the owner, so that the table is in memory and in the file once.

Code of models asks the `weight` of an embedding for its dtype or its device. It finds a `TableWeight`, which knows these and is
no tensor: whoever computes with it gets an error.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..internals.transformers import marked_initialized
from ..kernels import table_shapes, unpack_table
from .linear import autocast_input
from .output_head import OutputHead
from .parts import keeping_dtypes
from .table_ops import embedding, head

__all__ = [
    "ROWS_LIKE",
    "TABLE_PARTS",
    "PackedEmbedding",
    "PackedHead",
    "PackedTableModule",
    "TableWeight",
    "pack_module",
    "refusal",
]

TABLE_PARTS = ("codes", "scale")
ROWS_LIKE = "like"  # the empty parameter
UNTRAINED = (
    "a packed table cannot be trained, as PEFT's modules_to_save or otherwise; train adapters, freeze it "
    "(requires_grad_(False)), or load the model with embedding_bits=16 and head_bits=16"
)
NO_VALUES = (
    "a packed table has no weight to {}; call the module, take its dense(), load the model with embedding_bits=16 and "
    "head_bits=16, or make it dense with model.dequantize()"
)
SLAB = 1 << 22  # weights unpacked to fp32 at a time


class TableWeight:
    """What code finds as the `weight` of a packed embedding or head: its shape, dtype and device, and no values."""

    _is_hf_initialized = True  # transformers draws no random numbers for it
    requires_grad = False
    ndim = 2

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype, self.device = shape, dtype, device

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """2."""
        return self.ndim

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(NO_VALUES.format(f"take .{name} of"))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ValueError(NO_VALUES.format(f"give to {getattr(func, '__name__', func)}"))

    def _no_values(self, *args: Any) -> Any:
        raise ValueError(NO_VALUES.format("compute with"))

    # Python looks these up in the class, past __getattr__.
    __getitem__ = __setitem__ = __iter__ = __neg__ = __abs__ = _no_values
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _no_values
    __matmul__ = __rmatmul__ = __pow__ = _no_values

    def __len__(self) -> int:
        return int(self.shape[0])


class PackedTableModule(nn.Module):
    """A module that owns a packed table [rows, columns], or reads that of another module, its owner."""

    rows: int
    columns: int
    table_bits: int
    owner: tuple[PackedTableModule, ...] = ()  # in a tuple, so that it is no submodule; empty for an owner
    source_class: type[nn.Module]
    like: nn.Parameter  # of an owner

    def declare_table(
        self,
        size: tuple[int, int],
        bits: int,
        dtype: torch.dtype,
        scale_dtype: torch.dtype,
        owner: PackedTableModule | None = None,
    ) -> None:
        """Register the parts on meta, or none of them where `owner` has them. `dtype`: of rows, until the model is cast."""
        self.rows, self.columns = size
        self.table_bits = bits
        if owner is not None:
            self.owner = (owner,)
            return
        like = nn.Parameter(torch.empty(0, dtype=dtype, device="meta"), requires_grad=False)
        self.register_parameter(ROWS_LIKE, marked_initialized(like))
        for part, (shape, part_dtype) in table_shapes(*size, bits, scale_dtype=scale_dtype).items():
            self.register_buffer(part, torch.empty(shape, dtype=part_dtype, device="meta"))

    def table(self) -> tuple[Tensor, Tensor]:
        """(codes, scale) of the owner."""
        held = self.holder()
        return held.codes, held.scale  # type: ignore[return-value]

    def holder(self) -> PackedTableModule:
        """The module that has the parts: the owner, or this one."""
        return self.owner[0] if self.owner else self

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The table that the parts stand for, [rows, columns] of `dtype`. A tied table is made anew by each module."""
        codes, scale = self.table()
        result = torch.empty(self.rows, self.columns, dtype=dtype, device=codes.device)
        step = max(1, SLAB // self.columns)
        for first in range(0, self.rows, step):
            last = first + step
            result[first:last] = unpack_table(codes[first:last], scale[first:last], self.columns)
        return result

    def dense_module(self, weight: nn.Parameter) -> nn.Module:
        """The module that this one took the place of, with `weight`."""
        module = self.source_class.__new__(self.source_class)
        nn.Module.__init__(module)
        _adopt(module, self)
        module.register_parameter("weight", weight)
        return module.train(self.training)

    def parts(self) -> tuple[Tensor, Tensor, torch.dtype]:
        """(codes, scale, dtype of rows), for a forward.

        Raises:
            RuntimeError: the table asks for a gradient, as of PEFT's modules_to_save.
        """
        held = self.holder()
        if held.like.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(UNTRAINED)
        return held.codes, held.scale, held.like.dtype  # type: ignore[return-value]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # Copied alone, it would take a copy of the table along that nothing else knows.
        if self.owner and not memo:
            raise ValueError(f"{UNTRAINED}. This module reads the table of another, so it cannot be copied alone")
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # As of FactorModule: a cast of the model leaves the dtypes of the stored parts as they are.
        kept = {id(self._buffers.get(part)) for part in TABLE_PARTS}
        return super()._apply(keeping_dtypes(fn, kept), recurse)

    def extra_repr(self) -> str:
        tied = ", tied" if self.owner else ""
        return f"{self.rows}, {self.columns}, bits={self.table_bits}{tied}"


def _weight(self: Any) -> TableWeight:
    return TableWeight(torch.Size((self.rows, self.columns)), self.holder().like.dtype, self.table()[0].device)


class PackedEmbedding(PackedTableModule, nn.Embedding):
    """Rows of a packed table: indices [...] of int64 or int32 -> [..., columns] of the dtype that the model was cast to."""

    weight = property(_weight)  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        codes, scale, dtype = self.parts()
        return embedding(input, codes, scale, self.columns, dtype)


class PackedHead(PackedTableModule, nn.Linear):
    """The product with a packed table: x [..., columns] of fp32, bf16 or fp16 -> x W^T + bias, [..., rows] of the same dtype.

    The bias is an ordinary parameter. A head that reads the table of an embedding on another device computes there.
    """

    weight = property(_weight)  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        x = autocast_input(input)
        codes, scale, _ = self.parts()
        if x.device == codes.device or codes.is_meta:
            return head(x, codes, scale, self.bias)
        bias = None if self.bias is None else self.bias.to(codes.device)
        return head(x.to(codes.device), codes, scale, bias).to(x.device)


def refusal(module: nn.Module) -> str:
    """Why `module` cannot read a packed table, or "" if it can."""
    kind = type(module)
    if isinstance(module, PackedTableModule) or kind in (nn.Linear, OutputHead):
        return ""
    if not isinstance(module, nn.Embedding):
        return f"{kind.__name__} is neither an embedding nor a linear layer"
    if module.max_norm is not None:
        return "its rows are renormalized as they are read (max_norm)"
    if kind.forward is nn.Embedding.forward:
        return ""
    code = kind.forward.__code__
    if "super" not in code.co_names or "embedding" in code.co_names:
        return f"{kind.__name__}'s forward is its own"
    return ""


@functools.cache
def _embedding_class(source: type[nn.Embedding]) -> type[PackedEmbedding]:
    """PackedEmbedding, with the forward of `source` in front of it where that has its own."""
    if source.forward is nn.Embedding.forward:
        return PackedEmbedding
    own = {"weight": PackedEmbedding.weight, "__reduce_ex__": _reduced}
    return type(f"Packed{source.__name__}", (source, PackedEmbedding), own)


def _reduced(self: Any, protocol: Any) -> tuple[Any, ...]:
    """As `object.__reduce_ex__`, but a class that is made here is found by what it is made of."""
    return _blank, (self.source_class,), vars(self)


def _blank(source: Any) -> Any:
    kind: Any = _embedding_class(source)
    return kind.__new__(kind)


def pack_module(
    module: nn.Module, bits: int, scale_dtype: torch.dtype, owner: PackedTableModule | None = None
) -> PackedTableModule:
    """An empty packed module that takes the place of an `nn.Embedding` or `nn.Linear`, with its bias and whatever else it has.

    Args:
        owner: the module whose table it reads; by default it has one of its own, on meta.
    """
    source = nn.Linear if isinstance(module, nn.Linear) else type(module)
    kind: Any = PackedHead if source is nn.Linear else _embedding_class(source)  # type: ignore[arg-type]
    packed = kind.__new__(kind)
    nn.Module.__init__(packed)
    weight: Any = module.weight
    packed.source_class = source
    packed.declare_table(tuple(weight.shape), bits, weight.dtype, scale_dtype, owner)
    _adopt(packed, module)
    return packed.train(module.training)


_OWN = {"training", "rows", "columns", "table_bits", "owner", "source_class", ROWS_LIKE, "codes", "scale", "weight"}


def _adopt(new: nn.Module, old: nn.Module) -> None:
    """Give `new` whatever `old` has besides its weight or table."""
    for key, value in vars(old).items():
        if not key.startswith("_") and key not in _OWN:
            setattr(new, key, value)
    if isinstance(old, nn.Linear) and old.bias is None:
        new.register_parameter("bias", None)
    for name, parameter in old.named_parameters(recurse=False):
        if name not in _OWN:
            new.register_parameter(name, parameter)
    saved = old.state_dict()
    for name, buffer in old.named_buffers(recurse=False):
        if name not in _OWN:
            new.register_buffer(name, buffer, persistent=name in saved)
    for name, child in old.named_children():
        new.add_module(name, child)
