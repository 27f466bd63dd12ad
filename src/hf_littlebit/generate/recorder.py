"""What records a decode step, and what looks whether it can be recorded (decode_graph.py).

A CUDA graph takes down launches and addresses. While it does, nothing may wait for the device or copy from the host, and a
recording that is spoiled so leaves torch's allocator in a state of its own. So the step is watched first, while it runs
eagerly, by modes that see every operator (`Watch`) and every tensor made from Python numbers (`Constants`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..internals.torch import TorchDispatchMode

__all__ = ["Constants", "CudaRecorder", "Recorder", "Unfit", "Watch"]

_ATEN = torch.ops.aten
WAITS = {_ATEN._local_scalar_dense.default, _ATEN.nonzero.default, _ATEN.equal.default, _ATEN.masked_select.default}
COPIES = {_ATEN._to_copy.default, _ATEN.copy_.default}

Step = Callable[[], Any]


class Unfit(RuntimeError):
    """A step that cannot be recorded, and why."""


class Recorder(Protocol):
    """What records steps; the tests have one for CPUs."""

    device_types: tuple[str, ...]

    def busy(self) -> bool: ...

    def stream(self, device: torch.device) -> Any: ...

    def warm_up(self, step: Step, device: torch.device) -> Any: ...

    def record(self, step: Step, device: torch.device) -> tuple[Callable[[], None], Any]: ...


class CudaRecorder:
    """Records with torch.cuda.CUDAGraph on one side stream per device."""

    device_types: tuple[str, ...] = ("cuda",)

    def __init__(self) -> None:
        self._sides: dict[torch.device, torch.cuda.Stream] = {}

    def busy(self) -> bool:
        """Whether the caller is recording a graph of its own."""
        return torch.cuda.is_current_stream_capturing()

    def stream(self, device: torch.device) -> int:
        """The stream that the caller works on: graphs of two streams must not share tensors."""
        return torch.cuda.current_stream(device).cuda_stream

    def warm_up(self, step: Step, device: torch.device) -> Any:
        """Run `step` on the side stream, between what the caller's stream did and what it will do."""
        current, side = torch.cuda.current_stream(device), self._side(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            result = step()
        # The side stream reuses the result's memory once it is freed; by then it waits for what the caller's stream read.
        current.wait_stream(side)
        return result

    def record(self, step: Step, device: torch.device) -> tuple[Callable[[], None], Any]:
        """(replay, the step's static result). Nothing is computed before the first replay."""
        # set_stream makes the stream's device the current one: undone here.
        with torch.cuda.device(device):
            current, side = torch.cuda.current_stream(device), self._side(device)
            side.wait_stream(current)
            graph = torch.cuda.CUDAGraph()
            try:
                # Only what this thread does while it records can spoil the graph; other threads may go on with theirs.
                with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                    result = step()
            finally:
                # torch.cuda.graph does not leave the side stream if CUDA reports a spoiled graph at its end.
                torch.cuda.set_stream(current)
        return graph.replay, result

    def _side(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._sides:
            self._sides[device] = torch.cuda.Stream(device)
        return self._sides[device]


class Watch(TorchDispatchMode):
    """Finds operators that make the host wait for the device, which a recording does not allow."""

    def __init__(self, constants: Constants) -> None:
        super().__init__()
        self.constants = constants
        self.reason: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.constants.making:
            return result
        if func in WAITS:
            self.reason = f"a step waits for the device in {func}"
        elif func in COPIES and len({value.device for value in (result, *args) if isinstance(value, Tensor)}) > 1:
            self.reason = f"a step copies between devices in {func}"
        return result


class Constants(TorchFunctionMode):
    """Keeps the tensors that a step makes from Python numbers: making one copies from the host, which cannot be recorded.

    Sliding-window layers index with `torch.tensor([-1])`. A constant that is new while recording was made from numbers that
    change from step to step, and then the step is unfit.
    """

    def __init__(self, known: dict[Any, Tensor], recording: bool):
        super().__init__()
        self.known, self.recording = known, recording
        self.making = False  # a constant, which copies from the host, but only now

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and args and _is_number(args[0]):
            key = (repr(args), repr(sorted(kwargs.items(), key=str)))
            if key not in self.known:
                if self.recording:
                    raise Unfit(f"a step makes a tensor of numbers that change, {args[0]}")
                self.making = True
                try:
                    self.known[key] = func(*args, **kwargs)
                finally:
                    self.making = False
            return self.known[key].clone()
        return func(*args, **kwargs)


def _is_number(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_number(part) for part in value)
    return isinstance(value, bool | int | float)
