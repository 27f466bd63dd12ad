"""Where a model's time goes: a clock that forward hooks set on and off, one sum of seconds for each part of a model.

Time goes to the innermost counted module that is running: that of attention is without the projections in it. What runs
in no counted module (activations, residual sums, embeddings, `generate` itself) is the rest. The hooks cost some
microseconds for each module, so that throughput is measured without them.

On a GPU the clock waits for the device at every hook. What a call costs the host, which launches kernels and goes on, is
HostClock's: with one token at a time, that is often all the time there is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...plan import Plan
from .machine import wait

__all__ = ["PARTS", "Clock", "HostClock", "Ticks", "groups_of"]

LAYERS, HEAD, ATTENTION, NORMS, REST = "linear layers", "output head", "attention", "norms", "rest"
PARTS = (LAYERS, HEAD, ATTENTION, NORMS, REST)


class Ticks:
    """A streamer for `generate` that keeps when each token came; the first entry is the prompt's."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.cpu: list[float] = []  # the process's CPU seconds by then

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def end(self) -> None: ...


class Clock(Ticks):
    """Seconds by part, in the step that reads the prompt and in the steps after it."""

    def __init__(self, groups: dict[nn.Module, str], device: torch.device):
        super().__init__()
        self.groups, self.device = groups, device
        self.prefill, self.decode = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)
        self.stack = [REST]
        self.since = 0.0

    def measure(self, run: Callable[[Clock], Any]) -> None:
        """Call `run`, which gives this clock to `generate` as its streamer, with the hooks in place."""
        hooks: list[Any] = []
        for module, group in self.groups.items():
            hooks.append(module.register_forward_pre_hook(lambda *_, group=group: self._step(group), prepend=True))
            hooks.append(module.register_forward_hook(lambda *_: self._step(None)))
        self.since = time.perf_counter()
        try:
            run(self)
        finally:
            for hook in hooks:
                hook.remove()
        self._charge()

    def put(self, value: Any) -> None:
        self._charge()
        super().put(value)

    def _charge(self) -> None:
        wait(self.device)
        now = time.perf_counter()
        # The prompt and the first token came: what follows is decoding.
        (self.prefill if len(self.times) < 2 else self.decode)[self.stack[-1]] += now - self.since
        self.since = now

    def _step(self, group: str | None) -> None:
        self._charge()
        if group is None:
            self.stack.pop()
        else:
            self.stack.append(group)


class HostClock(Ticks):
    """Host seconds in the calls of the linear layers while tokens are decoded; nothing is waited for."""

    def __init__(self, groups: dict[nn.Module, str]):
        super().__init__()
        self.layers = [module for module, group in groups.items() if group == LAYERS]
        self.calls: list[float] = []  # of the running step
        self.steps: list[float] = []  # a call's mean seconds in each step after the prompt's
        self.since = 0.0

    def measure(self, run: Callable[[HostClock], Any]) -> float | None:
        """Microseconds of a call, hooks excluded: the mean over a step's layers, because one call of a group of layers that
        share their input computes all of them, then the median over the steps. None if no layer was called."""
        hooks: list[Any] = []
        for module in self.layers:
            hooks.append(module.register_forward_pre_hook(self._enter))
            hooks.append(module.register_forward_hook(self._leave, prepend=True))
        try:
            run(self)
        finally:
            for hook in hooks:
                hook.remove()
        # The first step after the prompt's meets shapes for the first time.
        return 1e6 * statistics.median(self.steps[1:] or self.steps) if self.steps else None

    def put(self, value: Any) -> None:
        super().put(value)
        if len(self.times) > 2 and self.calls:
            self.steps.append(statistics.fmean(self.calls))
        self.calls = []

    def _enter(self, *_: Any) -> None:
        self.since = time.perf_counter()

    def _leave(self, *_: Any) -> None:
        self.calls.append(time.perf_counter() - self.since)


def groups_of(model: Any, plan: Plan) -> dict[nn.Module, str]:
    """The part that each counted module belongs to; the same modules of the dense and the packed model."""
    planned, head = plan.by_module(), model.get_output_embeddings()
    groups: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        class_name = type(module).__name__
        if name in planned:
            groups[module] = LAYERS
        elif module is head:
            groups[module] = HEAD
        elif "Attention" in class_name:
            groups[module] = ATTENTION
        elif "Norm" in class_name:
            groups[module] = NORMS
    return groups
