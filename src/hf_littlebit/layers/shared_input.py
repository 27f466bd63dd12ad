"""Layers that read the same tensor (q, k and v; gate and up) computed in one call, when the first of them is called.

Attention calls `q_proj(x)`, `k_proj(x)`, `v_proj(x)` one after the other. The first call computes all three and keeps the
results of the others until they are asked for with the same x: on a GPU one token then takes two launches instead of six, on
a CPU the threads meet twice instead of six times. Nothing is merged or moved, so what is saved is the same file, and every
result is the layer's own product: bit for bit on a CPU, and on a GPU where the layers alone would get the same tiles.

Layers are put together by their names, but only ever share what they are really given. Another x, a changed one, another
autocast, stream or thread, gradients switched on, a layer whose weights are elsewhere (offloaded, sharded): computed as
without. A group whose members turn out to read different tensors is dissolved, and a copy of a model shares nothing.

What cannot be seen is a model that changes its own weights between the calls, or, under torch.compile and
torch.inference_mode, x in place.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Sequence
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ..internals.torch import cuda_stream, in_function_transform, own_parameters, version
from . import ops
from .eager import Repeated, repeated
from .linear import LittleBitLinear, autocast_input

__all__ = ["SharedInput", "share_as_asked", "share_inputs", "siblings", "unshare_inputs"]

logger = logging.getLogger("hf_littlebit")

# Names that models give to modules of one parent with one input, in the order in which they are called.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
PATIENCE = 2  # rounds in a row with results that nobody asked for, after which a group is dissolved

Results = list[Tensor | None]  # of every member; None where it was asked for


class _Round:
    """Results for one x that are waiting to be asked for."""

    __slots__ = ("left", "results", "state", "x")

    def __init__(self, x: weakref.ref[Tensor], state: tuple[Any, ...], results: Results, left: int):
        self.x, self.state, self.results, self.left = x, state, results, left


class SharedInput:
    """A group of packed layers, at least two, of the same in_features. Holds results between the calls of one round only."""

    def __init__(self, members: Sequence[LittleBitLinear], everywhere: bool = True):
        # Weak: a layer that is replaced, or a model that is deleted, takes its memory along.
        self._members = [weakref.ref(member) for member in members]
        self.everywhere = everywhere  # else not on a CPU: a layer asks for x there alone
        self._rounds: dict[int, _Round] = {}  # by thread
        self._traced: tuple[Tensor, Results] | None = None  # the round that torch.compile is tracing
        self._wasted = 0
        self._repeated: Repeated | None = None
        for place, member in enumerate(members):
            member.group, member.place = self, place

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied layer computes alone: which other copies it belongs to is not known."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def product(self, place: int, x: Tensor) -> Tensor | None:
        """The result of member `place` for x, or None if it has to compute alone."""
        if torch.is_grad_enabled():
            return None
        if torch.compiler.is_compiling():
            return self._product_in_trace(place, x)
        thread = get_ident()
        held = self._rounds.pop(thread, None)
        if held is not None:
            result = held.results[place]
            if held.x() is x and result is not None and held.state == _state(x):
                held.results[place] = None
                held.left -= 1
                if held.left:
                    self._rounds[thread] = held
                else:
                    self._wasted = 0
                return result
            self._wasted += 1
            if self._wasted >= PATIENCE:
                self.dissolve()
                logger.info(
                    "%d layers that are called like siblings read different tensors: apart again", len(self._members)
                )
                return None
        if in_function_transform():  # vmap knows the single operator only
            return None
        results = self._compute(x)
        if results is None:
            return None
        result, results[place] = results[place], None
        self._rounds[thread] = _Round(weakref.ref(x), _state(x), results, len(results) - 1)
        return result

    def _product_in_trace(self, place: int, x: Tensor) -> Tensor | None:
        """`product` by what torch.compile can follow: it sees which tensors are one, but neither threads nor changes."""
        if self._traced is not None:
            held, results = self._traced
            result = results[place]
            if held is x and result is not None:
                results[place] = None
                if all(other is None for other in results):
                    self._traced = None
                return result
            self.dissolve()
            return None
        computed = self._compute(x)
        if computed is None:
            return None
        result, computed[place] = computed[place], None
        self._traced = x, computed
        return result

    def _compute(self, x: Tensor) -> Results | None:
        members: list[Any] = [reference() for reference in self._members]
        if None in members:
            return None
        holders = [own_parameters(member) for member in members]
        x = autocast_input(x)
        if not torch.compiler.is_compiling() and self._repeated is not None:
            again = self._repeated(x, holders)
            if again is not None:
                return [*again]
        layers = []
        for member in members:
            layer = member.packed()
            u = layer.u
            # A part that is released (offloaded, or sharded and not gathered) is on meta or has no elements.
            if u is None or u.device != x.device or u.dim() != 2:
                return None
            layers.append(layer)
        results: Results = [*ops.linears(x, layers)]
        if not torch.compiler.is_compiling() and x.is_cuda:
            self._repeated = repeated(x, layers, holders)
        return results

    def dissolve(self) -> None:
        """Every member computes alone from now on."""
        self._rounds, self._traced = {}, None
        for reference in self._members:
            member = reference()
            if member is not None and member.group is self:
                member.group = None


def _state(x: Tensor) -> tuple[Any, ...]:
    """What a result depends on besides x's identity and the weights. A tensor made under inference_mode counts no changes."""
    device_type = x.device.type
    under_autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    autocast = torch.get_autocast_dtype(device_type) if under_autocast else None
    stream = cuda_stream(x.get_device()) if device_type == "cuda" else None
    return version(x), autocast, torch.is_inference_mode_enabled(), stream


def siblings(names: Iterable[str]) -> list[list[str]]:
    """Of the dotted names of layers, those that are called like layers with one input: lists of two names or more."""
    parents: dict[str, set[str]] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        parents.setdefault(parent, set()).add(own)
    found = []
    for parent, children in parents.items():
        for alike in SIBLINGS:
            there = [f"{parent}.{own}" if parent else own for own in alike if own in children]
            if len(there) > 1:
                found.append(there)
    return found


def share_inputs(model: nn.Module, everywhere: bool = True) -> int:
    """Compute packed layers that read the same tensor together; see the module's text. Returns the number of groups.

    Args:
        everywhere: on a CPU too. False is what a packed model is loaded with: on a GPU alone, where it is faster.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LittleBitLinear)}
    groups = 0
    for names in siblings(layers):
        members = [layers[name] for name in names]
        if len({member.in_features for member in members}) == 1:
            SharedInput(members, everywhere)
            groups += 1
    return groups


def share_as_asked(model: nn.Module, wanted: bool | None) -> int:
    """What `LittleBitConfig(share_inputs=wanted)` stands for; returns the number of groups."""
    return 0 if wanted is False else share_inputs(model, everywhere=bool(wanted))


def unshare_inputs(model: nn.Module) -> None:
    """Undo `share_inputs`."""
    for module in model.modules():
        if isinstance(module, LittleBitLinear):
            module.group = None
