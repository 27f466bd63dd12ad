"""The machine that a benchmark runs on: what its figures depend on, waiting for its device, and the memory that work takes."""

from __future__ import annotations

import importlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ...kernels import backend, cpu, gpu

__all__ = ["PeakMemory", "cpu_name", "kernel", "machine", "wait"]


class PeakMemory:
    """By how many bytes the memory in use grew at most inside a `with` block, on a GPU or, for a CPU, of this process.

    Afterwards `growth` holds the bytes, or None where the system does not tell: only Linux lets a process set its peak back.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.growth: int | None = None
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
            self._before = _status("VmHWM")
        except (OSError, StopIteration):
            self._before = None
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is None:
            return
        if self.device.type == "cuda":
            self.growth = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self.growth = max(0, _status("VmHWM") - self._before)  # Linux counts in batches of pages


def _status(key: str) -> int:
    """Bytes in a line of Linux's /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def cpu_name() -> str:
    """The processor's name, as Linux tells it."""
    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return name


def kernel(device: str = "cpu") -> str:
    """What computes the packed layers there: an instruction set ("amx"), "triton 3.6.0", or "reference" (plain torch)."""
    device_type, asked = torch.device(device).type, backend.asked()
    if asked == "reference":
        return "reference"
    # Asked for on a CPU, triton interprets; loading the library would then put its operators before triton's.
    if device_type == "cpu" and asked != "triton":
        return cpu.select() if cpu.load() else "reference"
    if device_type in (*gpu.DEVICES, "cpu") and gpu.load():
        return f"triton {importlib.import_module('triton').__version__}"
    return "reference"


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures of a benchmark depend on: the machine, its load, the versions."""
    packages = ("torch", "transformers", "hf-littlebit")
    device_type = torch.device(device).type
    namespace: Any = getattr(torch, device_type, None)  # torch.cuda, torch.xpu ...
    return {
        "device": namespace.get_device_name(device) if hasattr(namespace, "get_device_name") else device_type,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "kernel": kernel(device),
        "system": platform.system(),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
    }
