"""What a model is called with in a step: its cache, its tensors, and the rest, which a recorded step takes as fixed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compat import CACHE_NAMES
from .recorder import Unfit

__all__ = ["StepInputs", "cache_of", "step_inputs"]

INPUTS = ("input_ids", "position_ids", "attention_mask", "cache_position")  # tensors that a step may be given


class StepInputs(NamedTuple):
    """The inputs of one step, by what becomes of them in a recording."""

    given: dict[str, Any]  # all of them, as the model is called with them
    cache_name: str
    cache: Any
    tensors: dict[str, Tensor]  # copied into static ones; masks of a dictionary are named attention_mask.KIND
    others: tuple[Any, ...]  # (name, value), fixed

    @property
    def tokens(self) -> Tensor:
        """int64 [sequences, tokens]."""
        return self.tensors["input_ids"]

    @property
    def shapes(self) -> tuple[Any, ...]:
        """What the tensors of two steps must have in common to be copied into the same static ones."""
        return tuple((name, value.shape, value.dtype, value.device) for name, value in self.tensors.items())

    def static(self) -> dict[str, Tensor]:
        """Uninitialised tensors for a recording, of the names, shapes and types of these."""
        # Outside of inference_mode: what is made under it could not be written to by a later generate under no_grad.
        with torch.inference_mode(False), torch.no_grad():
            return {name: torch.empty_like(value).contiguous() for name, value in self.tensors.items()}

    def with_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The inputs with these tensors in place of their own, masks in a dictionary too."""
        fixed = {name: tensors.get(name, value) for name, value in self.given.items()}
        if isinstance(masks := self.given.get("attention_mask"), dict):
            fixed["attention_mask"] = {kind: tensors.get(f"attention_mask.{kind}") for kind in masks}
        return fixed


def cache_of(inputs: dict[str, Any]) -> Any:
    """The cache among a model's inputs, by whichever of its names; None where there is none."""
    return next((inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None), None)


def step_inputs(inputs: dict[str, Any]) -> StepInputs:
    """The inputs of a model, sorted.

    Raises:
        Unfit: something is given that a recording would not know what to do with.
    """
    cache_name, cache, tensors, others = "", None, {}, []
    for name, value in inputs.items():
        if value is None:
            continue
        if name in CACHE_NAMES:
            cache_name, cache = name, value
        elif name in INPUTS and isinstance(value, Tensor):
            tensors[name] = value
        elif name == "attention_mask" and isinstance(value, dict):
            tensors |= {f"{name}.{layer_type}": mask for layer_type, mask in value.items() if mask is not None}
        elif isinstance(value, bool | int | float | str):
            others.append((name, value))
        else:
            raise Unfit(f"a step is given {name}")
    if inputs.get("output_attentions") or inputs.get("output_hidden_states"):
        raise Unfit("attentions or hidden states are asked for")
    tokens = tensors.get("input_ids")
    if tokens is None or tokens.dim() != 2:
        raise Unfit("a step is not of tokens")
    masks = [mask for name, mask in tensors.items() if name.startswith("attention_mask")]
    # With any other mask the model would make its own, from numbers that may be those of one step only.
    if not masks or not all(isinstance(mask, Tensor) and mask.dim() == 4 for mask in masks):
        raise Unfit("a step has no 4-D attention mask")
    if any(value.device != tokens.device for value in tensors.values()):
        raise Unfit("a step's inputs are on several devices")
    return StepInputs(inputs, cache_name, cache, tensors, tuple(others))
