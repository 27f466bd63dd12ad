"""One step of a model on its way to being replayed: watched, warmed up and recorded, with its static inputs and its result.

What each of these is for, and which step is recorded when, is told in decode_graph.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .recorder import Constants, Recorder, Watch
from .static_cache import spies
from .step_inputs import StepInputs

__all__ = ["Call", "RecordedStep"]

Call = Callable[..., Any]  # of a model: call(model, **inputs)


def _eager(model: Any, **inputs: Any) -> Any:
    return model(**inputs)


class RecordedStep:
    """One step: how often it ran, its static inputs and result once it is recorded.

    Args:
        call: what is recorded; it is given the model and the inputs.
        compiled: whether torch.compile made it.
    """

    def __init__(self, call: Call = _eager, compiled: bool = False) -> None:
        self.call, self.compiled = call, compiled
        # A compiled call may be compiled once more when it sees what the first one left behind.
        self.warm_ups = 2 if compiled else 1
        self.runs = 0
        self.unfit: str | None = None  # why it cannot be recorded
        self.constants: dict[Any, Tensor] = {}
        self.static: dict[str, Tensor] = {}
        self.replay: Callable[[], None] | None = None
        self.output: tuple[type, Tensor] | None = None

    def watched(self, model: Any, inputs: StepInputs, sliding: list[Any]) -> tuple[Any, str | None]:
        """(result of the eager step, why it cannot be recorded or None)."""
        with (
            Constants(self.constants, recording=False) as constants,
            Watch(constants) as watch,
            spies(sliding) as asked,
        ):
            result = (_eager if self.compiled else self.call)(model, **inputs.given)
        self.runs = 1
        return result, watch.reason or (f"a step asks a sliding-window layer for {asked[0]}" if asked else None)

    def _fixed(self, inputs: StepInputs) -> dict[str, Any]:
        """The inputs with static tensors, into which those of now are copied."""
        if not self.static:
            self.static = inputs.static()
        for name, value in inputs.tensors.items():
            self.static[name].copy_(value)
        return inputs.with_tensors(self.static)

    def _constants(self, recording: bool) -> Any:
        # Compiled code has its constants within, and torch.compile would trace the mode.
        return nullcontext() if self.compiled else Constants(self.constants, recording)

    def warmed(self, model: Any, inputs: StepInputs, recorder: Recorder) -> tuple[Any, str | None]:
        """(result of the step on the stream that records, why it cannot be recorded or None)."""
        with torch.inference_mode(False), torch.no_grad():
            fixed = self._fixed(inputs)
            with self._constants(recording=False):
                result = recorder.warm_up(lambda: self.call(model, **fixed), inputs.tokens.device)
        self.runs += 1
        if not isinstance(result, ModelOutput) or not isinstance(result.get("logits"), Tensor):
            return result, f"a step returns a {type(result).__name__} without logits"
        if surplus := [name for name, value in result.items() if name != "logits" and value is not inputs.cache]:
            return result, f"a step returns {', '.join(surplus)}"
        return result, None

    def record(self, model: Any, inputs: StepInputs, recorder: Recorder) -> None:
        """Take the step down; nothing is computed before the first replay."""
        with torch.inference_mode(False), torch.no_grad():
            fixed = self._fixed(inputs)
            with self._constants(recording=True):
                self.replay, result = recorder.record(lambda: self.call(model, **fixed), inputs.tokens.device)
        self.output = type(result), result["logits"]

    def replayed(self, inputs: StepInputs) -> Any:
        """The result of a replay with these inputs; the logits are the caller's own."""
        assert self.replay is not None and self.output is not None
        self._fixed(inputs)
        self.replay()
        output_class, logits = self.output
        return output_class(**{"logits": logits.clone(), inputs.cache_name: inputs.cache})
