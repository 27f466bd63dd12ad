"""What a layer's parts must be for a product with x: their shapes, dtypes, device and memory.

A wrong part gives wrong numbers in plain torch, which broadcasts, and reads past the end of a tensor in a kernel. So every
implementation refuses it in the same words: plain torch and Triton by this file, once for each layer that they meet
(bound.py), and the compiled library, which the dispatcher calls without Python, by the same rules in C++ at each call
(kernels/littlebit_cpu/binding.cpp). kernels/tests/wrong_layers.py lists what all three refuse.
"""

import functools
from typing import Any, List, Sequence, Tuple

import torch

from .parts import PARTS, PackedLayer, part_shapes

__all__ = ["FLOATS", "checked"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of x, of the scales and of the bias
_LARGEST_RANK = 2**31


def checked(x: torch.Tensor, layer: PackedLayer, transposed: bool) -> PackedLayer:
    """The layer as the kernels take it: its parts contiguous and not negated lazily, its ranks a tuple.

    A tail of no rows becomes None; words of no rows become u's, which are then never read.

    Args:
        x: [..., in_features], or the gradient [..., out_features] (transposed), for which the bias is left out.

    Raises:
        RuntimeError: a part is missing, or has another shape, dtype, layout or device than the ranks and x ask for, or no
            memory.
    """
    ranks = _checked_ranks(layer.ranks)
    for name, part in zip((*PARTS, "bias"), layer[:8]):  # noqa: B905 Python 3.9
        if part is not None and not isinstance(part, torch.Tensor):
            raise RuntimeError(f"{name} is a {type(part).__name__}, but must be a tensor")
    scale_out, scale_in = layer.scale_out, layer.scale_in
    # These two say how many features there are; all else is measured by them.
    for name, scale in (("scale_out", scale_out), ("scale_in", scale_in)):
        if scale is None:
            raise RuntimeError(f"{name} is missing: the layer needs [{len(ranks)}, its features]")
        if scale.dim() != 2:
            raise RuntimeError(f"{name} has {scale.dim()} dimensions, but must have 2")
    name, features = ("grad", scale_out.shape[1]) if transposed else ("x", scale_in.shape[1])
    _check_values(name, x)
    if x.layout is not torch.strided:
        raise RuntimeError(f"{name} is {x.layout}, but must be dense; use its to_dense()")
    if not x.dim() or x.shape[-1] != features:
        raise RuntimeError(f"{name} is {list(x.shape)}, but its last dimension must be {features}")
    ready: List[Any] = []
    for name, part, (shape, dtype) in zip(PARTS, layer[:7], _expected(scale_in.shape[1], scale_out.shape[1], ranks)):  # noqa: B905
        if part is None:
            if shape[0] or name == "u":  # u has the memory that words of no rows are given
                raise RuntimeError(f"{name} is missing: the layer needs {list(shape)}")
            ready.append(None)
            continue
        _check_part(name, part, shape, dtype, x)
        ready.append(_plain(part) if shape[0] else None)
    bias = layer.bias
    if bias is not None:
        _check_part("bias", bias, (scale_out.shape[1],), torch.float32, x)
        bias = _plain(bias)
    if transposed:
        bias = None  # of which the gradient with respect to the input has no part
    for index in (0, 2):
        ready[index] = layer.u if ready[index] is None else ready[index]
    return PackedLayer._make([*ready, bias, ranks])


def _checked_ranks(ranks: Sequence[int]) -> Tuple[int, ...]:
    if not isinstance(ranks, (list, tuple)) or not all(isinstance(rank, int) for rank in ranks):
        raise RuntimeError(f"ranks is {ranks!r}, but must be a list of integers, one for each path")
    if not ranks:
        raise RuntimeError("ranks is empty, but a layer has at least one path")
    for rank in ranks:
        if not 1 <= rank <= _LARGEST_RANK:
            raise RuntimeError(f"a rank is {rank}, but must be from 1 to {_LARGEST_RANK}")
    return tuple(ranks)


@functools.lru_cache(maxsize=4096)
def _expected(in_features: int, out_features: int, ranks: Tuple[int, ...]) -> List[Tuple[Tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of every part, in the order of PARTS; a floating dtype stands for all of FLOATS."""
    shapes = part_shapes(in_features, out_features, ranks)
    return [shapes[name] for name in PARTS]


def _check_part(name: str, part: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, x: torch.Tensor) -> None:
    if tuple(part.shape) != tuple(shape):
        raise RuntimeError(f"{name} is {list(part.shape)}, but must be {list(shape)}")
    if dtype.is_floating_point:
        _check_values(name, part)
    elif part.dtype != dtype:
        raise RuntimeError(f"{name} is {_name(part.dtype)}, but must be {_name(dtype)}")
    if part.device != x.device:
        raise RuntimeError(f"{name} is on {part.device}, but x is on {x.device}; move both to one device")
    if part.layout is not torch.strided:
        raise RuntimeError(f"{name} is {part.layout}, but must be dense; use its to_dense()")
    # Tensors on meta and those of a tracer stand for others and have no memory to ask for.
    if part.numel() and not part.is_meta and type(part) in (torch.Tensor, torch.nn.Parameter) and not part.data_ptr():
        raise RuntimeError(
            f"{name} has no memory: it is sharded or released; gather it, or call the layer through its wrapper"
        )


def _check_values(name: str, value: torch.Tensor) -> None:
    if value.dtype not in FLOATS:
        raise RuntimeError(f"{name} is {_name(value.dtype)}, but must be float32, bfloat16 or float16")


def _plain(part: torch.Tensor) -> torch.Tensor:
    """The part with its values in memory as they are: a lazily negated view's memory holds the other signs."""
    return (part.resolve_neg() if part.is_neg() else part).contiguous()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).replace("torch.", "")
