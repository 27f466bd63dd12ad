"""What a device can do, asked once each: its name, its cores, its shared memory, and which instructions it takes.

Tile sizes follow from these (tuning.py), and some kernels are compiled otherwise where a device takes more (gemm.py, decode.py).
A CPU stands for the interpreter, which runs kernels on CPU tensors in tests.
"""

import functools
import re
from typing import Optional, Tuple

import torch

__all__ = ["abilities", "capability", "cores", "device_name", "multiplies_bf16", "shared_memory"]


@functools.lru_cache(maxsize=None)
def device_name(device: torch.device) -> str:
    """A device's name as a file's name, e.g. nvidia-h100-80gb-hbm3."""
    known = "cpu" if device.type == "cpu" else getattr(torch, device.type).get_device_name(device)
    return re.sub(r"[^a-z0-9]+", "-", known.lower()).strip("-")


@functools.lru_cache(maxsize=None)
def cores(device: torch.device) -> int:
    """How many programs run side by side at the least: streaming multiprocessors, or what corresponds to them."""
    if device.type == "cpu":
        return 2
    properties = getattr(torch, device.type).get_device_properties(device)
    for attribute in ("multi_processor_count", "gpu_subslice_count"):
        if getattr(properties, attribute, 0):
            return int(getattr(properties, attribute))
    return 64


@functools.lru_cache(maxsize=None)
def capability(device: torch.device) -> Optional[Tuple[int, int]]:
    """An NVIDIA GPU's compute capability; None for all else (torch.version.hip: AMD's numbers mean other things)."""
    nvidia = device.type == "cuda" and not torch.version.hip
    return torch.cuda.get_device_capability(device) if nvidia else None


@functools.lru_cache(maxsize=None)
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take."""
    if capability(device):
        return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 << 10))
    return 64 << 10


@functools.lru_cache(maxsize=None)
def abilities(device: torch.device) -> Tuple[bool, bool]:
    """(takes NVIDIA's PTX, starts kernels before the one before them has ended: programmatic dependent launch)."""
    found = capability(device)
    return found is not None, found is not None and found >= (9, 0)


@functools.lru_cache(maxsize=None)
def multiplies_bf16(device: torch.device) -> bool:
    """NVIDIA's matrix units with bf16: those of others want larger tiles than decode.py has. The interpreter has all."""
    found = capability(device)
    return device.type == "cpu" or (found is not None and found >= (8, 0))
