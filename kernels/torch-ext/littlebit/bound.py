"""Layers that the Triton kernels have met: their parts, checked once, and what was launched for them.

Checking eight parts of a layer takes the host longer than launching two kernels. So a layer is checked when it is first met,
and remembered by the identity of its parts and by where their memory is. A part that is replaced, resized or moved is found
out by that, and the layer is checked anew:

    Bound.holds(layers)     the same tensors, with the same memory, as those that were checked
    Bound.recorded          launches of this layer (launch.py), by number of tokens, dtype, alignment and row stride
    Bound.again(x)          the product for an x like one that was launched for, through none of the checks

The table of all layers holds them only as long as their parts live.
"""

import weakref
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch

from .check import FLOATS, checked
from .launch import Recorded
from .parts import PackedLayer

__all__ = ["Bound", "bind", "check_once", "find", "forget", "known"]

RECORDS = 64  # numbers of tokens, dtypes ... of a layer whose launches are kept


class Bound:
    """Layers whose parts were checked once, and what was launched for them.

    Attributes:
        features: of the input (of the gradient, where transposed). outs: of each result.
        recorded: by number of tokens, dtype, alignment and row stride.
        ready: the layers as the kernels take them, for whoever made this and no longer: None afterwards, so that this keeps
            no part alive.
    """

    __slots__ = (
        "__weakref__",
        "_addresses",
        "_parts",
        "_shapes",
        "device",
        "features",
        "index",
        "outs",
        "ranks",
        "ready",
        "recorded",
    )

    def __init__(self, x: torch.Tensor, layers: Sequence[PackedLayer], transposed: bool, dead: Callable[[Any], None]):
        ready = [checked(x, layer, transposed) for layer in layers]
        self.ready: Any = ready
        self.features = x.shape[-1]
        self.device = x.device
        self.outs = [(layer.scale_in if transposed else layer.scale_out).shape[1] for layer in ready]
        self.ranks = [layer.ranks[:] for layer in layers]
        self.recorded: Dict[Any, Recorded] = {}
        self._shapes: Dict[Any, Tuple[Recorded, List[Tuple[int, ...]]]] = {}
        self.index = x.get_device()
        # Weak: the parts live as long as their layer does, and so does this.
        parts: List[Optional[torch.Tensor]] = [part for layer in layers for part in layer[:8]]
        self._parts = [None if part is None else weakref.ref(part, dead) for part in parts]
        self._addresses = [0 if part is None else part.data_ptr() for part in parts]

    def keep(self, key: Any, recorded: Recorded) -> None:
        """Remember what was launched for `key`."""
        if len(self.recorded) >= RECORDS:
            # The oldest; what `again` knows of it goes with the rest, and comes back when it is asked for.
            del self.recorded[next(iter(self.recorded))]
            self._shapes.clear()
        self.recorded[key] = recorded

    def again(self, x: torch.Tensor) -> Optional[List[torch.Tensor]]:
        """The results for x, a plain CUDA tensor, if launches for one like it are recorded; None otherwise.

        Nothing of the layers is checked: whoever keeps this object answers for their parts being where they were.
        """
        address = x.data_ptr()
        found = self._shapes.get((x.dtype, x.shape))
        if found is None:
            self._learn(x)
            return None
        if not address or address % 16 or not x.is_contiguous() or x.is_neg() or x.get_device() != self.index:
            return None
        if torch._C._cuda_getDevice() != self.index:
            return None
        recorded, shapes = found
        results = [x.new_empty(shape) for shape in shapes]
        recorded.repeat(x, address, results)
        return results

    def _learn(self, x: torch.Tensor) -> None:
        """From now on `again` serves tensors of this shape, if one of as many tokens was recorded."""
        if not x.dim() or x.shape[-1] != self.features:
            return
        tokens = x.shape[:-1].numel()
        recorded = self.recorded.get((tokens, x.dtype, 0, self.features))
        if recorded is not None and tokens:
            if len(self._shapes) >= RECORDS:
                self._shapes.clear()
            self._shapes[x.dtype, x.shape] = recorded, [(*x.shape[:-1], out) for out in self.outs]

    def fits(self, x: torch.Tensor) -> bool:
        """x has the features, the device and a dtype that the layers take."""
        return bool(x.shape) and x.shape[-1] == self.features and x.device == self.device and x.dtype in FLOATS

    def forget(self) -> None:
        """Drop the launches; whoever keeps this object goes through the JIT again."""
        self.recorded.clear()
        self._shapes.clear()

    def holds(self, layers: Sequence[PackedLayer]) -> bool:
        """These are the layers that were checked: the same tensors, with the same memory."""
        index = 0
        for place, layer in enumerate(layers):
            if layer[8] != self.ranks[place]:
                return False
            for part in layer[:8]:
                known: Any = self._parts[index]
                if part is None:
                    if known is not None:
                        return False
                elif known is None or known() is not part or part.data_ptr() != self._addresses[index]:
                    return False
                index += 1
        return index == len(self._parts)


_all: Dict[Any, Bound] = {}


def _key(layers: Sequence[PackedLayer], transposed: bool) -> Tuple[Any, ...]:
    return (transposed, *[id(layer[0]) for layer in layers])


def find(layers: Sequence[PackedLayer], transposed: bool = False) -> Optional[Bound]:
    """What is known of these layers; None if they were never met, or if a part is another one or elsewhere in memory."""
    found = _all.get(_key(layers, transposed))
    return found if found is not None and found.holds(layers) else None


def bind(x: torch.Tensor, layers: Sequence[PackedLayer], transposed: bool) -> Bound:
    """Check the layers and remember them as long as their parts live.

    Raises:
        RuntimeError: as `gpu.products`.
    """
    key, table = _key(layers, transposed), _all

    def drop(_: Any) -> None:
        # Whoever still keeps it must not launch with the addresses of a part that is gone. When Python ends, the names of this
        # module may be gone before the parts are: `table` is not.
        made.forget()
        if table.get(key) is made:
            del table[key]

    made = Bound(x, layers, transposed, drop)
    _all[key] = made
    return made


def check_once(x: torch.Tensor, layers: Sequence[PackedLayer], transposed: bool) -> None:
    """Refuse wrong parts, for an implementation that takes the others as they are; layers that were met cost a look-up.

    Raises:
        RuntimeError: as `check.checked`.
    """
    if torch.compiler.is_compiling() or not _stay(x, layers):
        for layer in layers:
            checked(x, layer, transposed)
        return
    found = find(layers, transposed)
    if found is None or not found.fits(x):
        bind(x, layers, transposed).ready = None


def _stay(x: torch.Tensor, layers: Sequence[PackedLayer]) -> bool:
    """Whether x and all parts are tensors with an identity and an address: those of a tracer have none."""
    plain = (torch.Tensor, torch.nn.Parameter, type(None))
    return type(x) in plain and all(type(part) in plain for layer in layers for part in layer[:8])


def known() -> int:
    """How many layers, or groups of them, are remembered: none whose parts have died."""
    return len(_all)


def forget() -> None:
    """Drop what is known of all layers: tile sizes were measured anew, or a test changes them."""
    for one in _all.values():
        one.forget()
    _all.clear()
