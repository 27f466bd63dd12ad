"""What a dense block gives its linear layers, and what they make of it: the layers' inputs and outputs, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .blocks import Call

__all__ = ["in_fp32", "inputs_of", "watched", "with_one_input"]


class _Stop(Exception):
    """Ends a block's forward where nothing behind is needed."""


def in_fp32(call: Call) -> Call:
    """The same call with every 16-bit float in it widened: rotary embeddings, masks."""

    def widened(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.float() if value.is_floating_point() else value
        if type(value) in (tuple, list):
            return type(value)(map(widened, value))
        return {key: widened(each) for key, each in value.items()} if type(value) is dict else value

    return Call(widened(call.args), widened(call.kwargs), call.key)


def watched(
    block: nn.Module, calls: Sequence[Call], hidden: Sequence[Tensor], layers: dict[str, nn.Linear]
) -> tuple[dict[str, list[Tensor]], list[tuple[str, Tensor]], list[Tensor]]:
    """Run `block` on `hidden`, a batch at a time, and note what its `layers` do.

    Returns:
        {layer: its output for every batch}, of those that are called once for each; (layer, its input in the first batch), as
        they are called; the block's outputs.
    """
    outputs: dict[str, list[Tensor]] = {}
    order: list[tuple[str, Tensor]] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if name not in outputs:
                order.append((name, args[0]))
            outputs.setdefault(name, []).append(output)

        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        after = [call(block, each) for call, each in zip(calls, hidden, strict=True)]
    finally:
        for handle in handles:
            handle.remove()
    outputs = {name: each for name, each in outputs.items() if len(each) == len(calls)}
    return outputs, [(name, x) for name, x in order if name in outputs], after


def with_one_input(order: Sequence[tuple[str, Tensor]]) -> list[list[str]]:
    """The layers of `watched` in groups that read the same tensor, e.g. q, k and v."""
    groups: list[tuple[Tensor, list[str]]] = []
    for name, x in order:
        group = next((names for known, names in groups if known is x), None)
        if group is None:
            groups.append((x, [name]))
        else:
            group.append(name)
    return [names for _, names in groups]


def inputs_of(block: nn.Module, calls: Sequence[Call], hidden: Sequence[Tensor], layer: nn.Linear) -> list[Tensor]:
    """What `layer` is given when `block` runs on `hidden`: its first input of every batch. Nothing behind it is computed."""
    found: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise _Stop

    handle = layer.register_forward_pre_hook(stop)
    try:
        for call, each in zip(calls, hidden, strict=True):
            try:
                call(block, each)
            except _Stop:
                continue
    finally:
        handle.remove()
    return found
