"""The machine that a benchmark runs on: what its figures depend on, waiting for its device, and the memory that work takes."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ...kernels import cpu, gpu

__all__ = ["cpu_name", "growth", "kernel", "machine", "wait"]


@contextmanager
def growth(device: torch.device) -> Iterator[list[int | None]]:
    """A list that holds, after the block, by how many bytes memory grew at most in it; None where nothing tells."""
    result: list[int | None] = [None]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield result
        result[0] = torch.cuda.max_memory_allocated(device) - before
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
        first = _status("VmHWM")
    except (OSError, StopIteration):
        yield result
        return
    yield result
    result[0] = max(0, _status("VmHWM") - first)  # Linux counts in batches of pages


def _status(key: str) -> int:
    """Bytes in a line of Linux's /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def wait(device: torch.device) -> None:
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
    kind, asked = torch.device(device).type, os.environ.get("LITTLEBIT_BACKEND")
    if asked == "reference":
        return "reference"
    # Asked for on a CPU, triton interprets; loading the library would then put its operators before triton's.
    if kind == "cpu" and asked != "triton":
        return cpu.select() if cpu.load() else "reference"
    if kind in (*gpu.DEVICES, "cpu") and gpu.load():
        return f"triton {importlib.import_module('triton').__version__}"
    return "reference"


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures of a benchmark depend on: the machine, its load, the versions."""
    packages = ("torch", "transformers", "hf-littlebit")
    kind = torch.device(device).type
    backend: Any = getattr(torch, kind, None)
    return {
        "device": backend.get_device_name(device) if hasattr(backend, "get_device_name") else kind,
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
