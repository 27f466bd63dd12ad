"""The eager call of packed layers on a CUDA device: what was checked and launched once is launched again.

`nn.Linear` costs the host about 20 microseconds a call, and a model makes hundreds of calls for a token. Here a call of a
layer (or of several that read one x) that was made before, with as many tokens, goes to the kernels' launches directly:
through neither the dispatcher nor the checks of the parts. What can have changed since then is looked at: which parameters
the modules hold, where their memory is, and whether anything but the kernels wants to see the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..internals.torch import is_watched
from ..kernels import PackedLayer, gpu
from ..kernels.bound import Bound

__all__ = ["Repeated", "repeated", "unseen"]

_PLAIN = (Tensor, nn.Parameter)


def _addresses(holders: Sequence[dict[str, Any]]) -> list[int]:
    return [part.data_ptr() for holder in holders for part in holder.values() if part is not None]


def unseen(x: Tensor) -> bool:
    """Whether nothing but the kernels is to see this call: then the dispatcher's two steps through Python are saved.

    Not unseen: subclasses of tensors, vmap and the other transforms of torch.func, forward-mode derivatives, dispatch modes
    (fake tensors, counters of operations), tracing. On a CPU the dispatcher goes to the compiled kernel by itself. Whoever
    may be traced by torch.compile asks for that first.
    """
    return (
        not torch.compiler.is_compiling()  # first, because torch.compile cannot follow the rest
        and type(x) in _PLAIN
        and x.device.type in gpu.DEVICES
        and not is_watched()
    )


class Repeated:
    """The product of packed layers, as it was launched before.

    Args:
        holders: the `_parameters` of every layer. bound: what the kernels keep of the layers.
    """

    __slots__ = ("_addresses", "_bound", "_names")

    def __init__(self, holders: Sequence[dict[str, Any]], bound: Bound):
        self._bound = bound
        self._names = [[*holder, *map(id, holder.values())] for holder in holders]
        self._addresses = _addresses(holders)

    def __call__(self, x: Tensor, holders: Sequence[dict[str, Any]]) -> list[Tensor] | None:
        """The results for x, or None where this call is not like one that was launched before. Only without gradients."""
        if not unseen(x) or [[*holder, *map(id, holder.values())] for holder in holders] != self._names:
            return None
        if _addresses(holders) != self._addresses:
            return None
        return self._bound.again(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied layer has other parameters."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def repeated(x: Tensor, layers: Sequence[PackedLayer], holders: Sequence[dict[str, Any]]) -> Repeated | None:
    """What to keep after a product of `layers` (as `ops.linears` takes them) with x; None where it cannot be repeated."""
    if not x.is_cuda or not gpu.load():
        return None
    held = {id(part) for holder in holders for part in holder.values()}
    if any(part is not None and id(part) not in held for layer in layers for part in layer[:-1]):
        return None  # a wrapper (parametrizations, sharding) makes the parts anew for every call
    bound = gpu.bound(x, layers)
    return None if bound is None else Repeated(holders, bound)
