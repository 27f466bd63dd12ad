"""What a model must not have for its steps to be replayed, and what a recorded step takes as fixed.

Both are asked for every text that is generated, and with hundreds of layers that takes as long as a decode step: so one walk
answers both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..internals.accelerate import has_placement
from ..internals.torch import has_global_hooks, has_own_call, module_hooks, module_state
from ..internals.transformers_generation import attention_implementation, is_quiet_hook

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Look", "look", "obstacle"]


class Look(NamedTuple):
    """What one walk through a model found."""

    obstacle: str | None  # why no step can be replayed, whatever its inputs
    facts: list[Any]  # what a recorded step takes as fixed; incomplete where there is an obstacle


def obstacle(model: PreTrainedModel) -> str | None:
    """Why a step of `model` cannot be replayed, whatever its inputs; None if it can."""
    return look(model).obstacle


def look(model: PreTrainedModel) -> Look:
    """Whether steps of `model` can be replayed, and the classes of its modules, where their tensors are, which are grouped.

    A replay runs no Python, so hooks, wrappers and adapters that could be switched off would be frozen as they were.
    """
    facts: list[Any] = [attention_implementation(model.config)]
    if has_own_call(model):
        return Look("the model is compiled", facts)
    if has_global_hooks():
        return Look("there are hooks on all modules", facts)
    if model.config.is_encoder_decoder:
        return Look("the model has an encoder and a decoder", facts)
    device: torch.device | None = None
    seen: set[int] = set()
    left: list[nn.Module] = [model]
    while left:
        module = left.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        own, parameters, buffers, children, hooked = module_state(module)
        reason = _of_module(module, own, hooked)
        if reason is not None:
            name = next((name for name, one in model.named_modules() if one is module), "") or "the model"
            return Look(f"{name} {reason}", facts)
        facts += type(module), id(own.get("group"))  # the group of shared_input.py
        for value in parameters.values():
            if value is None:
                continue
            if type(value) is not nn.Parameter:
                return Look("the model's parameters are of a class of their own", facts)
            if device is None:
                device = value.device
            elif value.device != device:
                return Look("the model is on several devices", facts)
            facts += value.data_ptr(), value.dtype, value.shape
        for held in (buffers, own):
            for other in held.values():
                if isinstance(other, Tensor):
                    facts += other.data_ptr(), other.dtype, other.shape
        left += [child for child in children.values() if child is not None]
    return Look(None, facts)


def _of_module(module: nn.Module, own: dict[str, Any], hooked: bool) -> str | None:
    if "forward" in own or has_placement(module):
        return "has a forward of its own, as of a model on several devices"
    if hooked and not all(is_quiet_hook(hook) for hook in module_hooks(module)):
        return "has hooks"
    if type(module).__module__.startswith("peft."):
        return "is an adapter"
    return None
