"""The blocks of a causal model, found by its own list of them, and what each is called with.

A model's forward is embeddings, a list of blocks that are called one after the other, and a head. Refinement takes the blocks one
at a time, so it has to know what the model gives each of them besides the hidden states: masks, rotary embeddings, whatever. It
asks the model itself: every block is replaced for one forward by a stub that notes its arguments and returns the hidden states as
they came, so that nothing is computed but what stands between the blocks. That way a block of any architecture is called as its
model calls it, and the head can be run on hidden states that come from elsewhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..initialize.head_inputs import HEAD_TOKENS, HeadInputs
from ..placement import input_device
from .recipe import spread_rows
from .streams import Stream

__all__ = ["BlockList", "Call", "Calls", "NoChain", "find_blocks"]


class NoChain(ValueError):
    """A model that is not made of blocks which are called one after the other, so that it cannot be refined; it is as it was."""


class Call(NamedTuple):
    """What a model calls one of its blocks with: the place of the hidden states, and everything else.

    Attributes:
        args, kwargs: the arguments, with None in the place of the hidden states.
        key: where the hidden states go: an index of args, or a name of kwargs.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: int | str

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states that `block` makes of `hidden` [rows, length, size]."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.key, int):
            args[self.key] = hidden
        else:
            kwargs[self.key] = hidden
        out = block(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Call:
        """The same call with all of its tensors on `device`, and of `dtype`, if there is one, where they are floating-point."""
        return Call(_moved(self.args, device, dtype), _moved(self.kwargs, device, dtype), self.key)

    def equals(self, other: Call) -> bool:
        """Whether both hold the same values."""
        return _equal(self.args, other.args) and _equal(self.kwargs, other.kwargs)


class BlockList:
    """The blocks of `model`, by `names` in the order in which they are called. Make one with `find_blocks`."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str]):
        self.model, self.names = model, tuple(names)
        self._rest: dict[str, tuple[Any, ...]] = {}  # what a block returns behind the hidden states
        known = inspect.signature(model.forward).parameters
        # Through **kwargs too: a cache is another object in every call, so that no call would be the same for all rows.
        free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        self._options = {"use_cache": False} if free or "use_cache" in known else {}
        self._one_logit = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> nn.Module:
        return self.model.get_submodule(self.names[index])

    def check(self, tokens: Tensor) -> None:
        """Run the model on `tokens` [rows, length], of two rows or more, once, to see that its blocks are a chain.

        Raises:
            NoChain: if a block is left out, called twice or out of order, is not called with hidden states, or has some of another
                shape than [rows, length, size].
            ValueError: if the model does not read rows of that length.
        """
        order: list[str] = []
        shapes: list[tuple[Any, ...]] = []
        handles = []
        for name in self.names:

            def note(module: nn.Module, args: Any, kwargs: Any, out: Any, name: str = name) -> None:
                hidden = out[0] if isinstance(out, tuple) else out
                order.append(name)
                try:
                    shapes.extend((tuple(_hidden(args, kwargs)[1].shape), tuple(hidden.shape)))
                except (LookupError, AttributeError) as error:
                    called = f"block {name} of {type(self.model).__name__} is not called with hidden states ({error})"
                    raise NoChain(f"{called}; train it instead (littlebit train)") from error
                self._rest[name] = tuple(None for _ in out[1:]) if isinstance(out, tuple) else ()
                if isinstance(out, tuple):
                    self._rest[name] = (None, *self._rest[name])

            handles.append(self.model.get_submodule(name).register_forward_hook(note, with_kwargs=True))
        try:
            with torch.no_grad():
                self._forward(tokens, self._one_logit)
        except IndexError as error:
            raise ValueError(
                f"{type(self.model).__name__} does not read rows of {tokens.shape[1]} tokens ({error}); give shorter ones"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        alike = len(set(shapes)) == 1 and len(shapes[0]) == 3 and shapes[0][:2] == tuple(tokens.shape)
        if order != list(self.names) or not alike:
            seen = ", ".join(map(str, dict.fromkeys(shapes)))
            raise NoChain(
                f"{type(self.model).__name__} does not call its {len(self)} blocks as a chain (called: {len(order)}, shapes of "
                f"hidden states for {tokens.shape[0]} rows of {tokens.shape[1]} tokens: {seen}), "
                "so they cannot be refined; train it instead (littlebit train)"
            )

    def call(self, index: int, tokens: Tensor) -> Call:
        """What block `index` is called with when the model reads `tokens` [rows, length]."""
        return self._noted(index, tokens)[0]

    def first_input(self, tokens: Tensor) -> Tensor:
        """The hidden states [rows, length, size] that the first block gets of `tokens`."""
        return self._noted(0, tokens)[1]

    def _noted(self, index: int, tokens: Tensor) -> tuple[Call, Tensor]:
        """What block `index` is called with, and the hidden states that come with it: the embeddings, as they pass all stubs."""
        found: list[tuple[Call, Tensor]] = []

        def note(call: Call, hidden: Tensor) -> Tensor:
            found.append((call, hidden))
            return hidden

        with self._stubs({index: note}), torch.no_grad():
            self._forward(tokens, self._one_logit)
        return found[0]

    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """The model's logits where the last block has made `hidden` of `tokens`: its final norm and its head, nothing else."""
        with self._stubs({len(self) - 1: lambda call, _: hidden}):
            return self._forward(tokens, {}).logits

    def head_moment(self, rows: Tensor, behind: Stream) -> Tensor | None:
        """The second moment of what the head reads (initialize/head_inputs.py) of some of `rows`.

        Args:
            behind: the stream of all of them behind the last block.
        """
        weight: Any = self.model.get_output_embeddings().weight
        chosen = spread_rows(torch.arange(len(rows)), max(1, HEAD_TOKENS // rows.shape[1]))
        with HeadInputs(self.model) as read, torch.no_grad():
            for row in chosen.tolist():
                part = slice(row, row + 1)
                self.logits(rows[part].long(), behind[part].to(weight.device, weight.dtype))
        return read.moment()

    def _forward(self, tokens: Tensor, options: dict[str, Any]) -> Any:
        return self.model(input_ids=tokens.to(input_device(self.model)), **self._options, **options)

    @contextmanager
    def _stubs(self, actions: dict[int, Callable[[Call, Tensor], Tensor]]) -> Iterator[None]:
        """Blocks that return what an action makes of their call and hidden states, or the latter as they came."""
        modules = [self[index] for index in range(len(self))]
        former = [module.__dict__.get("forward") for module in modules]
        try:
            for index, module in enumerate(modules):
                module.forward = _Stub(actions.get(index), self._rest.get(self.names[index], ()))
            yield
        finally:
            for module, forward in zip(modules, former, strict=True):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward


class _Stub:
    def __init__(self, action: Callable[[Call, Tensor], Tensor] | None, rest: tuple[Any, ...]):
        self.action, self.rest = action, rest

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key, hidden = _hidden(args, kwargs)
        if self.action is not None:
            place = list(args)
            if isinstance(key, int):
                place[key] = None
            else:
                kwargs = {**kwargs, key: None}
            hidden = self.action(Call(tuple(place), kwargs, key), hidden)
        return (hidden, *self.rest[1:]) if self.rest else hidden


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str, Tensor]:
    """The hidden states among a block's arguments: the first one, by convention called hidden_states, and its place."""
    return (0, args[0]) if args else ("hidden_states", kwargs["hidden_states"])


def _moved(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """`value` with the tensors in it, in tuples, lists and dicts too, as `Call.to` says."""
    if torch.is_tensor(value):
        return value.to(device, dtype if value.is_floating_point() else None)
    if type(value) in (tuple, list):
        return type(value)(_moved(each, device, dtype) for each in value)
    if type(value) is dict:
        return {key: _moved(each, device, dtype) for key, each in value.items()}
    return value


def _equal(one: Any, other: Any) -> bool:
    """Whether two arguments are the same; those that hold no plain values are if they are one object."""
    if torch.is_tensor(one) and torch.is_tensor(other):
        return one.shape == other.shape and torch.equal(one, other)
    if type(one) in (tuple, list) and type(one) is type(other):
        return len(one) == len(other) and all(map(_equal, one, other))
    if type(one) is dict and type(other) is dict:
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return one is other or (isinstance(one, str | int | float | bool) and one == other)


class Calls:
    """What block `index` is called with for rows of `tokens` [all rows, length], on `device`.

    Most models call a block with masks and positions, which are the same for all rows; some also with what depends on the tokens,
    e.g. embeddings of the block's own. Two batches of different rows tell: what they share is asked of the model once for every
    number of rows, else for every batch. With a `dtype`, what is floating-point has that one.
    """

    def __init__(
        self, blocks: BlockList, index: int, tokens: Tensor, device: torch.device, dtype: torch.dtype | None = None
    ):
        self._blocks, self._index, self._tokens, self._place = blocks, index, tokens, (device, dtype)
        half = max(1, min(2, len(tokens) // 2))
        first, last = self._ask(tokens[:half]), self._ask(tokens[-half:])
        self._shared = first.equals(last)
        self._known: dict[int, Call] = {}

    def __call__(self, rows: slice | Tensor) -> Call:
        """The call for some rows, by their numbers."""
        tokens = self._tokens[rows]
        if not self._shared:
            return self._ask(tokens)
        if len(tokens) not in self._known:
            self._known[len(tokens)] = self._ask(tokens)
        return self._known[len(tokens)]

    def _ask(self, tokens: Tensor) -> Call:
        return self._blocks.call(self._index, tokens.long()).to(*self._place)


def find_blocks(model: PreTrainedModel, planned: Sequence[str]) -> BlockList:
    """The list of blocks that hold the most of the modules named `planned`, e.g. "model.layers" of a Llama.

    Lists inside of blocks, as those of experts, are no candidates. Where several lists stand side by side (a model of text
    and pictures), the one with the most planned modules is the language model's.

    Raises:
        NoChain: if no list of modules holds any of them.
    """
    best: tuple[int, list[str]] = (0, [])
    outer: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or name.startswith(outer or ("\0",)):
            continue
        prefix = f"{name}."
        held = sum(each.startswith(prefix) for each in planned)
        if held:
            outer = (*outer, prefix)
        if held > best[0]:
            best = held, [prefix + key for key in dict(module.named_children())]
    if not best[0]:
        raise NoChain(
            f"{type(model).__name__} keeps none of its layers in a list of blocks, which refinement goes through one by one; "
            "train it instead (littlebit train)"
        )
    return BlockList(model, best[1])
