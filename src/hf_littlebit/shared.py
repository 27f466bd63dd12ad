"""Layers that read the same tensor (q, k and v; gate and up) computed in one call, when the first of them is called.

Attention calls `q_proj(x)`, `k_proj(x)`, `v_proj(x)` one after the other. The first call computes all three and keeps the
results of the others until they are asked for with the same x: on a GPU one token then takes two launches instead of six, on
a CPU the threads meet twice instead of six times. Nothing is merged or moved, so what is saved is the same file, and every
result is the layer's own product (on a CPU bit for bit; on a GPU the sum over the inputs may be cut at other places).

Layers are put together by their names, but only ever share what they are really given: another x, a gradient to record or a
layer whose weights are elsewhere (offloaded) is computed as without. A group whose members turn out to read different
tensors is dissolved. Only a model that changes x in place between the calls, which none that is known does, would have to be
kept from torch.compile and torch.inference_mode, where such a change cannot be seen.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .linear import LittleBitLinear, autocast_input

__all__ = ["SharedInput", "share_inputs", "unshare_inputs"]

logger = logging.getLogger("hf_littlebit")

# Names that models give to siblings with one input, in the order in which they are called.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
PATIENCE = 2  # rounds in a row with results that nobody asked for, after which a group is dissolved


class SharedInput:
    """A group of packed layers, at least two, of the same in_features. Holds results between the calls of one round only."""

    def __init__(self, members: Sequence[LittleBitLinear]):
        self.members = list(members)
        self._ranks = [rank for member in self.members for rank in member.ranks]
        self._paths = [len(member.ranks) for member in self.members]
        self._x: Tensor | None = None
        self._version = 0
        self._results: list[Tensor | None] = []
        self._wasted = 0
        for place, member in enumerate(self.members):
            member.group, member.place = self, place

    def product(self, place: int, x: Tensor) -> Tensor | None:
        """The result of member `place` for x, or None if it has to compute alone."""
        if x is self._x and self._results[place] is not None and _version(x) == self._version:
            result, self._results[place] = self._results[place], None
            if all(other is None for other in self._results):
                self._x, self._wasted = None, 0
            return result
        if self._x is not None:
            self._x, self._results = None, []
            self._wasted += 1
            if self._wasted >= PATIENCE:
                self.dissolve()
                return None
        parts = [part for member in self.members for part in member.factors()]
        if any(u.device != x.device for u in parts[::8]) or ops.differentiable(x, *parts):  # type: ignore[union-attr]
            return None
        results: list[Tensor | None] = [*ops.linears(autocast_input(x), parts, self._ranks, self._paths)]
        result, results[place] = results[place], None
        self._x, self._version, self._results = x, _version(x), results
        return result

    def dissolve(self) -> None:
        """Every member computes alone from now on."""
        for member in self.members:
            member.group = None
        logger.info("layers called like siblings read different tensors and are computed apart: %s", self.members)


def _version(x: Tensor) -> int:
    """Counts changes in place, where there is a count: not under torch.compile and torch.inference_mode."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


def share_inputs(model: nn.Module) -> int:
    """Compute packed layers that read the same tensor together; see the module's text. Returns the number of groups."""
    groups = 0
    for parent in model.modules():
        children: dict[str, Any] = dict(parent.named_children())
        for names in SIBLINGS:
            found = [children[name] for name in names if isinstance(children.get(name), LittleBitLinear)]
            if len(found) > 1 and len({member.in_features for member in found}) == 1:
                SharedInput(found)
                groups += 1
    return groups


def unshare_inputs(model: nn.Module) -> None:
    """Undo `share_inputs`."""
    for module in model.modules():
        if isinstance(module, LittleBitLinear):
            module.group = None
