"""Static key-value caches of transformers, as graphs need them: what they remember, and tensors that stay where they are.

StaticLayer                keys and values [batch, heads, places, size] and the count of tokens, all on the device
StaticSlidingWindowLayer   the same of one window, and the count of tokens as a Python number, which decides between
                           writing to the next place and, in a full window, moving all places up by one
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer, StaticSlidingWindowLayer

from ..internals.transformers_generation import has_unknown_state
from .recorder import Unfit

__all__ = ["CacheHome", "layer_shapes", "outgrown", "refuse_unknown", "sliding_layers", "spies"]

TENSORS = ("keys", "values", "cumulative_length")  # of a layer of a static cache


def refuse_unknown(cache: Any) -> None:
    """Raise Unfit for anything but a static cache whose layers remember what is known."""
    if type(cache) is not StaticCache or getattr(cache, "offloading", False):
        raise Unfit(f"the cache is no StaticCache on the GPU, but {type(cache).__name__}")
    for layer in cache.layers:
        if has_unknown_state(layer):
            raise Unfit(f"the cache has a {type(layer).__name__} with a state that is not known")


def sliding_layers(cache: Any) -> list[Any]:
    """The layers of `cache` that count in Python."""
    return [layer for layer in cache.layers if type(layer) is StaticSlidingWindowLayer]


class CacheHome:
    """The cache tensors that some graphs read and write, and the cache that refers to them now.

    Args:
        key: what a cache must have in common with this home to be at home here, e.g. its stream and `layer_shapes`.
    """

    def __init__(self, key: Any = None) -> None:
        self.key = key
        self.thread: int | None = None  # that works with the owner
        self.graphs: OrderedDict[Any, Any] = OrderedDict()
        self.tensors: list[dict[str, Tensor]] = []  # of every layer
        self.owner: Callable[[], Any] = lambda: None

    def is_free(self, cache: Any = None) -> bool:
        """Whether `cache` may take this home over from its owner, if it has one.

        Not while another thread works with the owner: between two steps that thread reads the owner's tensors, e.g. the count
        of tokens for the next mask, and they must not be given the numbers of another text meanwhile.
        """
        owner = self.owner()
        return owner is None or owner is cache or self.thread == get_ident()

    def holds(self, cache: Any) -> bool:
        """Whether every layer of `cache` refers to the tensors here, as after `adopt`."""
        if self.owner() is not cache:
            return False
        for layer, tensors in zip(cache.layers, self.tensors, strict=True):
            for name, tensor in tensors.items():
                if getattr(layer, name) is not tensor:
                    return False
        return True

    def adopt(self, cache: Any) -> None:
        """Take the content of `cache` over, and let its layers refer to the tensors here."""
        # Outside of inference_mode: what is made under it could not be written to by a later generate under no_grad.
        with torch.inference_mode(False), torch.no_grad():
            if not self.tensors:
                self.tensors = [_own(layer) for layer in cache.layers]
            former = self.owner()
            if former is not None and former is not cache:
                self._part(former)
            for layer, tensors in zip(cache.layers, self.tensors, strict=True):
                for name, tensor in tensors.items():
                    value = getattr(layer, name)
                    if value is not tensor:
                        tensor.copy_(value)
                        setattr(layer, name, tensor)
        self.owner, self.thread = weakref.ref(cache), get_ident()

    @property
    def places(self) -> int:
        """How many tokens every layer here has room for."""
        return min(tensors["keys"].shape[2] for tensors in self.tensors)

    @property
    def counts(self) -> list[Tensor]:
        """int64 of no dimension, one for every layer: the number of its tokens."""
        return [tensors["cumulative_length"] for tensors in self.tensors]

    def suits(self, cache: Any, rows: int) -> bool:
        """Whether the layers of `cache`, which are empty, would be of the same shapes as those here for `rows` sequences."""
        return (
            bool(self.tensors)
            and len(cache.layers) == len(self.tensors)
            and all(
                type(layer) is StaticLayer
                and not layer.is_initialized
                and tensors
                and (rows, layer.max_cache_len) == (tensors["keys"].shape[0], tensors["keys"].shape[2])
                for layer, tensors in zip(cache.layers, self.tensors, strict=True)
            )
        )

    def adopt_new(self, cache: Any) -> None:
        """Let the empty layers of `cache` refer to the tensors here; what these hold is to be overwritten.

        For example, the prompt of a next text is read into the tensors of the last one, which need not be made anew.
        """
        with torch.inference_mode(False), torch.no_grad():
            former = self.owner()
            if former is not None and former is not cache:
                self._part(former)
            for layer, tensors in zip(cache.layers, self.tensors, strict=True):
                # The layer notes its sizes itself; no place is made for tokens, and no count is copied to the device.
                places, layer.max_cache_len = layer.max_cache_len, 0
                layer.cumulative_length = tensors["cumulative_length"]
                layer.lazy_initialization(tensors["keys"][:, :, :0], tensors["values"][:, :, :0])
                layer.max_cache_len = places
                for name, tensor in tensors.items():
                    setattr(layer, name, tensor)
        self.owner, self.thread = weakref.ref(cache), get_ident()

    def forget(self) -> None:
        """Count no tokens: the cache that refers to the tensors here is as an empty one."""
        with torch.inference_mode(False), torch.no_grad():
            for count in self.counts:
                count.zero_()

    def _part(self, former: Any) -> None:
        for layer, tensors in zip(former.layers, self.tensors, strict=True):
            for name, tensor in tensors.items():
                if getattr(layer, name) is tensor:
                    setattr(layer, name, tensor.clone())


def _own(layer: Any) -> dict[str, Tensor]:
    """The layer's own tensors, or copies that can be written to under no_grad; the layer then refers to the copies."""
    for name in TENSORS if layer.is_initialized else ():
        value = getattr(layer, name)
        if value.is_inference():
            setattr(layer, name, value.clone())
    return {name: getattr(layer, name) for name in TENSORS if layer.is_initialized}


def layer_shapes(cache: Any) -> tuple[Any, ...]:
    """What two caches must have in common to take turns in one home."""
    return tuple(_layer_shape(layer) for layer in cache.layers)


def _layer_shape(layer: Any) -> Any:
    if not layer.is_initialized:
        return type(layer), None
    return type(layer), layer.max_cache_len, layer.keys.shape, layer.values.shape, layer.keys.dtype, layer.keys.device


def outgrown(old: Any, new: Any) -> bool:
    """Whether two sets of layers differ in their lengths alone, and the old ones are not longer."""
    return len(old) == len(new) and all(
        a[0] == b[0]
        and len(a) == len(b)
        and (len(a) == 2 or (a[1] <= b[1] and a[4:] == b[4:] and a[2][:2] + a[2][3:] == b[2][:2] + b[2][3:]))
        for a, b in zip(old, new, strict=True)
    )


@contextmanager
def spies(layers: list[Any]) -> Iterator[list[str]]:
    """Note which numbers of sliding-window layers are asked for: they change with every step."""
    asked: list[str] = []

    def spy(layer: Any, name: str) -> Callable[..., Any]:
        plain = getattr(type(layer), name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            asked.append(name)
            return plain(layer, *args, **kwargs)

        return noted

    names = ("get_seq_length", "get_mask_sizes")
    for layer in layers:
        for name in names:
            setattr(layer, name, spy(layer, name))
    try:
        yield asked
    finally:
        for layer in layers:
            for name in names:
                delattr(layer, name)
