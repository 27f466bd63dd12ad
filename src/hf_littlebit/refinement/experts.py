"""Which experts of a mixture saw tokens: those that saw none were factored for their weights alone, and a user should know.

An expert that the router sends nothing to has no inputs to be weighed by, and no gradient that could tune it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..layers.experts import LittleBitExperts
from ..layers.linear import FactorModule

__all__ = ["ExpertCounts", "warn_of_unseen"]

logger = logging.getLogger("hf_littlebit")
NAMED = 8  # experts that a warning names


class ExpertCounts:
    """Counts the tokens that reach each part of `block`, called `name` in the model, until `remove`."""

    def __init__(self, block: nn.Module, name: str):
        self._stacks: dict[str, list[int]] = {}  # of stacked experts: tokens by expert
        self._layers: dict[str, int] = {}  # of linear layers, among them the experts of a list
        self._handles = []
        for own, module in block.named_modules():
            whole = f"{name}.{own}"
            if isinstance(module, LittleBitExperts):
                count = next(iter(module.sizes.values()))[0]
                self._stacks[whole] = [0] * count
                self._handles.append(module.register_forward_pre_hook(self._of_stack(whole), with_kwargs=True))
            elif isinstance(module, FactorModule):
                self._layers[whole] = 0
                self._handles.append(module.register_forward_pre_hook(self._of_layer(whole)))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def unseen(self) -> list[str]:
        """Names of what no token reached: "model.layers.3.mlp.experts[5]", or of a linear layer."""
        stacked = [f"{name}[{e}]" for name, counts in self._stacks.items() for e, n in enumerate(counts) if not n]
        return stacked + [name for name, count in self._layers.items() if not count]

    def _of_stack(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
            counts = self._stacks[name]
            # An index equal to their number marks a token that another rank serves.
            found = torch.bincount(index.flatten().cpu(), minlength=len(counts))[: len(counts)].tolist()
            self._stacks[name] = [have + more for have, more in zip(counts, found, strict=True)]

        return hook

    def _of_layer(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args:
                self._layers[name] += args[0].shape[:-1].numel()

        return hook


def warn_of_unseen(names: Sequence[str]) -> None:
    """Tell the user which of `ExpertCounts.unseen` there are, if any."""
    if names:
        logger.warning(
            "no token of the text reached %s%s: factored for the weights alone, and not tuned. Give more text.",
            ", ".join(names[:NAMED]),
            f" and {len(names) - NAMED} more" if len(names) > NAMED else "",
        )
