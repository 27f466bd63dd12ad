"""The decode step as torch.compile makes it, in the form that can be recorded: without CUDA graphs of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import CompileConfig

__all__ = ["compiled_step"]

# What torch.compile is asked for instead: its modes that differ from the others by CUDA graphs alone.
WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def compiled_step(config: CompileConfig) -> Callable[..., Any] | None:
    """`call(model, **inputs)`, compiled as `config` says; one and the same for all configs that say the same.

    None where the config asks for options of the backend, which may be about CUDA graphs, or for a backend of the user's own.
    """
    asked = config.to_dict()
    if asked.get("options") or not isinstance(asked.get("backend"), str):
        return None
    mode = asked.get("mode")
    asked["mode"] = WITHOUT_GRAPHS.get(str(mode), mode)
    return _compiled(json.dumps(asked, sort_keys=True))


@cache
def _compiled(asked: str) -> Callable[..., Any]:
    # A function of the model, not a method of it: nothing here keeps a model alive.
    def step(model: Any, **inputs: Any) -> Any:
        return model(**inputs)

    return torch.compile(step, **json.loads(asked))
