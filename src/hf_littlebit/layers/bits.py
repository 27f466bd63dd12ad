"""`layer.weight` of a packed layer as other libraries get it: a tensor that is never taken for a dense weight by mistake.

A packed layer is an `nn.Linear` so that adapters attach to it, and its `.weight` is U's words (parts.py). Whoever reads it as
numbers, to merge an adapter or to take a norm, would go on with nonsense where the shapes happen to fit, and fail with sizes
that mean nothing where they do not. So the attribute gives

    Bits          to everybody: shape, dtype, device, moving, copying and integer operations are as ever; what makes floats of
                  the words, mixes them with floats, or puts other values in their place is an error that says what to do
    DenseWeight   to PEFT, whose adapters start from the weight's shape and values, and some multiply it in every forward: they
                  get what the layer stands for; writing to it, as merging does, is the same error

`parameters()`, `state_dict()` and the layer itself hold and use the plain parameter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..internals.torch import without_overrides

__all__ = ["WAY_OUT", "Bits", "DenseWeight", "asked_by_peft"]

WAY_OUT = (
    "LittleBit layers hold bits, no dense weight that could be changed; call model.dequantize() and merge then "
    "(adapters stay as they are). For a copy of a layer's weight call layer.dequantize()"
)
_MOVES = (Tensor.to, Tensor.cpu, Tensor.cuda)
_GET_DATA, _SET_DATA = Tensor.data.__get__, Tensor.data.__set__  # type: ignore[attr-defined]
_GET_DEVICE, _IS_META = Tensor.device.__get__, Tensor.is_meta.__get__  # type: ignore[attr-defined]
_SET_REQUIRES_GRAD = Tensor.requires_grad.__set__  # type: ignore[attr-defined]
_SHAPE = (
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.is_floating_point, Tensor.is_complex),
    *(Tensor.shape.__get__, Tensor.ndim.__get__, Tensor.dtype.__get__),  # type: ignore[attr-defined]
    *(Tensor.requires_grad.__get__, Tensor.grad.__get__, Tensor.layout.__get__),  # type: ignore[attr-defined, union-attr]
)
_OPERATORS = "add sub mul truediv floordiv mod div matmul pow and or xor lshift rshift"
_IN_PLACE = (*(f"__i{name}__" for name in _OPERATORS.split()), "__setitem__")
# In place, but not with other values: those that loading puts there are bits too.
_KEEPS_BITS = ("copy_", "requires_grad_", "detach_", "share_memory_", "rename_")


def asked_by_peft() -> bool:
    """Whether the caller of the function that asks this is code of PEFT, which tells a layer by no other sign what it wants."""
    here = inspect.currentframe()
    try:
        asker = None if here is None or here.f_back is None else here.f_back.f_back
        return asker is not None and str(asker.f_globals.get("__name__")).partition(".")[0] == "peft"
    finally:
        del here  # it holds itself, and through its callers all that these hold, until a collection


def _leaves(tree: Any) -> Iterator[Any]:
    """What is in lists, tuples and dictionaries, as the arguments and results of torch's functions are."""
    if isinstance(tree, list | tuple | dict):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(branch)
    else:
        yield tree


def _changed(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The same lists, tuples and dictionaries with `change` of what is in them; those of another class are left as they are."""
    if type(tree) is dict:
        return {key: _changed(branch, change) for key, branch in tree.items()}
    return type(tree)(_changed(branch, change) for branch in tree) if type(tree) in (list, tuple) else change(tree)


class Bits(Tensor):
    """The words of a weight, int32 as kernels/parts.py says, sharing memory with the layer's parameter.

    Raises:
        ValueError: for every operation that takes the words for numbers of a dense weight.
    """

    _is_param = True  # isinstance(layer.weight, nn.Parameter), as of any linear layer

    @classmethod
    def of(cls, parameter: Tensor) -> Bits:
        """`parameter` as Bits, with the attributes that libraries have left on it."""
        bits = parameter.detach().as_subclass(cls)
        vars(bits).update(vars(parameter))
        return bits

    def __deepcopy__(self, memo: dict[int, Any]) -> Bits:
        return self.clone()  # type: ignore[return-value]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        with without_overrides():
            if str(func).startswith("hf_littlebit."):  # our own operators, which take words for words
                return func(*args, **(kwargs or {}))
            name = getattr(func, "__name__", "")
            kept = name in _KEEPS_BITS or (name == "__set__" and func != _SET_DATA)
            if (not kept and _writes(func, args, kwargs or {}, cls)) or any(map(_is_float, _leaves((args, kwargs)))):
                raise ValueError(WAY_OUT)
            try:
                result = func(*args, **(kwargs or {}))
            except (RuntimeError, TypeError) as error:  # sizes that do not fit, a norm of integers
                raise ValueError(f"{WAY_OUT} ({error})") from error
            if any(isinstance(value, Tensor) and _is_float(value) for value in _leaves(result)):
                raise ValueError(WAY_OUT)
            if func in _MOVES:
                # What is moved becomes a parameter elsewhere, as accelerate's hooks do it.
                return result.as_subclass(Tensor) if isinstance(result, Bits) else result
            return _changed(result, _as_bits)


def _is_float(value: Any) -> bool:
    dtype = value.dtype if isinstance(value, Tensor) else value
    return isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)


def _as_bits(value: Any) -> Any:
    return value.as_subclass(Bits) if type(value) is Tensor and value.dtype == torch.int32 else value


class DenseWeight(Tensor):
    """The fp32 weight [out_features, in_features] that a packed layer stands for, computed when its values are asked for.

    Shape, dtype and device cost nothing. An operation gets a fresh dense copy and returns ordinary tensors.

    Raises:
        ValueError: for every operation that would write to it.
    """

    _is_param = True
    _layer: Any
    _device: torch.device

    @classmethod
    def of(cls, layer: Any) -> DenseWeight:
        """The weight of a packed `layer`."""
        shape = layer.out_features, layer.in_features
        weight = torch.empty(shape, dtype=torch.float32, device="meta").as_subclass(cls)
        weight.__dict__.update(_layer=layer, _device=layer.scale_in.device)
        return weight

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with without_overrides():
            first = args[0] if args else None
            if isinstance(first, cls):
                if func in _SHAPE:
                    return func(*args, **kwargs)
                if func == _GET_DEVICE:
                    return first._device
                if func == _IS_META:
                    return first._device.type == "meta"
                if func == _GET_DATA or func is Tensor.detach:
                    return first
                if func == _SET_REQUIRES_GRAD and not args[1]:
                    return None  # frozen as it is
            if _writes(func, args, kwargs, cls):
                raise ValueError(WAY_OUT)
            args, kwargs = _changed((tuple(args), kwargs), _dense)
        return func(*args, **kwargs)


def _dense(value: Any) -> Any:
    return value._layer.dense() if isinstance(value, DenseWeight) else value


def _writes(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], kind: type[Tensor]) -> bool:
    """Whether a call changes a tensor of a `kind`, by torch's names: those that end in one underscore work in place."""
    name = getattr(func, "__name__", "")
    in_place = name in _IN_PLACE or name == "__set__" or (name.endswith("_") and not name.endswith("__"))
    return (in_place and bool(args) and isinstance(args[0], kind)) or isinstance(kwargs.get("out"), kind)
