"""What a GPU does while a model decodes: kernels for each token, and how long they run, by torch's profiler.

A trace is a streamer for `generate` that starts the profiler when the first new token has come and stops it some tokens
later. The file of the profiler is read, not its events: there a kernel is a kernel, also one that a CUDA graph launches,
while among the events stand the ranges that torch.compile marks on the device, which would be counted twice.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .clock import Ticks

__all__ = ["Load", "Trace", "load_of"]

logger = logging.getLogger("hf_littlebit")

TOKENS = 8  # that are traced at most
WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace's events that take time on the device


@dataclass(frozen=True)
class Load:
    """What one step of decoding asks of the device."""

    kernels: float  # copies and fills too
    microseconds: float  # that they run: the rest of the step, the device waits for the host


def load_of(trace: dict[str, Any], steps: int) -> Load | None:
    """The load of each of `steps` steps in a profiler's trace; None for a trace without work of a device."""
    work = sorted(
        (float(event.get("ts", 0)), float(event.get("dur", 0)))
        for event in trace["traceEvents"]
        if event.get("cat") in WORK
    )
    # Kernels that start before the one before them has ended overlap: a moment counts once.
    busy, until = 0.0, float("-inf")
    for start, spent in work:
        busy += max(0.0, start + spent - max(start, until))
        until = max(until, start + spent)
    return Load(len(work) / steps, busy / steps) if work else None


class Trace(Ticks):
    """The load of decoding on `device`, taken while `generate` streams into it."""

    def __init__(self, device: torch.device):
        super().__init__()
        activities = {"cuda": torch.profiler.ProfilerActivity.CUDA, "xpu": torch.profiler.ProfilerActivity.XPU}
        self.activity = activities.get(device.type)
        self.profiler: Any = None
        self.steps = 0

    def measure(self, run: Callable[[Trace], Any]) -> Load | None:
        """Call `run`, which gives this trace to `generate`. None, and a warning, where the profiler does not work."""
        if self.activity is None:
            return None
        run(self)
        self._stop()
        if self.profiler is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            self._profile(lambda: self.profiler.export_chrome_trace(str(file)))
            return load_of(json.loads(file.read_text(errors="replace")), self.steps) if file.exists() else None

    def put(self, value: Any) -> None:
        super().put(value)
        steps = len(self.times) - 2  # the prompt's, and that of the first new token
        if steps == 0:
            self._profile(self._start)
        elif steps == TOKENS:
            self._stop()

    def _start(self) -> None:
        assert self.activity is not None
        self.profiler = torch.profiler.profile(activities=[self.activity])
        self.profiler.start()

    def _stop(self) -> None:
        if self.profiler is not None and not self.steps:
            self.steps = min(TOKENS, len(self.times) - 2)
            self._profile(self.profiler.stop)

    def _profile(self, action: Callable[[], Any]) -> None:
        """Do something with the profiler, which is given up when that fails."""
        try:
            action()
        except (RuntimeError, OSError, AssertionError) as error:
            # A driver may deny its counters, and another profiler may hold them: figures without the load are worth having.
            logger.warning("kernels are not counted, the profiler does not work here: %s", error)
            self.profiler = None
