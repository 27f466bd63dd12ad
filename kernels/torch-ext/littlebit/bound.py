"""Layers that the Triton kernels have met: their parts, checked once, and what was launched for them.

Checking eight parts of a layer takes the host longer than launching two kernels. So a layer is checked when it is first met,
and remembered by the identity of its parts and by where their memory is. A part that is replaced, resized or moved is found
out by that, and the layer is checked anew:

    Bound.holds(layers)     the same tensors, with the same memory, as those that were checked
    Bound.recorded          launches of this layer (launch.py), by number of tokens, dtype, alignment and row stride
    Bound.again(x)          the product for an x like one that was launched for, through none of the checks

The table of all layers holds them only as long as their parts live.
"""

import functools
import weakref
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch

from .launch import Recorded
from .parts import PARTS, PackedLayer, part_shapes

__all__ = ["Bound", "bind", "checked", "find", "forget", "known"]

RECORDS = 64  # numbers of tokens, dtypes ... of a layer whose launches are kept
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
        if address % 16 or not x.is_contiguous() or x.is_neg() or x.get_device() != self.index:
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
        return bool(x.shape) and x.shape[-1] == self.features and x.device == self.device and x.dtype in _DTYPES

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
    key = _key(layers, transposed)

    def drop(_: Any) -> None:
        # Whoever still keeps it must not launch with the addresses of a part that is gone.
        made.forget()
        if _all.get(key) is made:
            del _all[key]

    made = Bound(x, layers, transposed, drop)
    _all[key] = made
    return made


def known() -> int:
    """How many layers, or groups of them, are remembered: none whose parts have died."""
    return len(_all)


def forget() -> None:
    """Drop what is known of all layers: tile sizes were measured anew, or a test changes them."""
    for one in _all.values():
        one.forget()
    _all.clear()


@functools.lru_cache(maxsize=4096)
def _expected(in_features: int, out_features: int, ranks: Tuple[int, ...]) -> List[Tuple[Tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of every part, in the order of PARTS; a floating dtype stands for all that the kernels take."""
    if not ranks or min(ranks) < 1:
        raise RuntimeError(f"ranks is {list(ranks)}, but a layer has one path or more, each of rank 1 or more")
    shapes = part_shapes(in_features, out_features, ranks)
    return [shapes[name] for name in PARTS]


def checked(x: torch.Tensor, layer: PackedLayer, transposed: bool) -> PackedLayer:
    """The layer, its parts contiguous, as the kernels take it: a wrong shape would read past the end of a tensor.

    A tail of no rows becomes None; words of no rows become u's, which are then never read.
    """
    parts, bias, ranks = layer[:7], layer.bias, tuple(layer.ranks)
    u, scale_out, scale_in = layer.u, layer.scale_out, layer.scale_in
    if u is None or scale_out is None or scale_in is None or scale_out.dim() != 2 or scale_in.dim() != 2:
        raise RuntimeError("u, scale_out and scale_in are needed, the scales with 2 dimensions: [paths, features]")
    features = (scale_out if transposed else scale_in).shape[1]
    if x.dtype not in _DTYPES:
        raise RuntimeError(f"x is {x.dtype}, but must be float32, bfloat16 or float16")
    if not x.dim() or x.shape[-1] != features:
        raise RuntimeError(f"x is {list(x.shape)}, but its last dimension must be {features}")
    ready: List[Any] = []
    for name, part, (shape, dtype) in zip(PARTS, parts, _expected(scale_in.shape[1], scale_out.shape[1], ranks)):  # noqa: B905
        if part is None:
            if shape[0]:
                raise RuntimeError(f"{name} is missing: the layer needs {list(shape)}")
            ready.append(None)
            continue
        if tuple(part.shape) != tuple(shape):
            raise RuntimeError(f"{name} is {list(part.shape)}, but must be {list(shape)}")
        if part.device != x.device:
            raise RuntimeError(f"{name} is on {part.device}, but x is on {x.device}; move both to one device")
        if part.dtype != dtype and not (dtype.is_floating_point and part.dtype in _DTYPES):
            wanted = "a float" if dtype.is_floating_point else str(dtype).replace("torch.", "")
            raise RuntimeError(f"{name} is {part.dtype}, but must be {wanted}")
        ready.append(part.contiguous() if shape[0] else None)
    if bias is not None and (tuple(bias.shape) != (scale_out.shape[1],) or bias.device != x.device):
        raise RuntimeError(
            f"bias is {list(bias.shape)} on {bias.device}, but must be [{scale_out.shape[1]}] on {x.device}"
        )
    for name, part in zip((*PARTS, "bias"), (*parts, bias)):  # noqa: B905 Python 3.9
        if part is not None and part.numel() and not part.data_ptr():
            raise RuntimeError(
                f"{name} has no memory: it is sharded or released; gather it, or call the layer through its wrapper"
            )
    for index in (0, 2):
        ready[index] = u if ready[index] is None else ready[index]
    return PackedLayer._make([*ready, None if bias is None else bias.contiguous(), ranks])
