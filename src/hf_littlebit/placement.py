"""Where a model computes and where its weights are, which accelerate keeps apart for models larger than the memory.

A model with `device_map={"model.layers.1": "disk"}`, or from `accelerate.cpu_offload`, holds empty tensors on the meta device.
A hook on each module puts the weights there right before the module's forward and takes them away after
it. So `parameter.device` does not say where the input belongs, and the values cannot be read off the parameters:

    input_device(model)         where to put input_ids: the device that the embeddings compute on
    stored_parameters(model)    the values themselves, one at a time
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from .internals.accelerate import execution_device
from .internals.torch import own_parameters
from .internals.transformers import tied_weights

__all__ = ["input_device", "stored_parameters"]


NATIVE_BF16 = ("avx512_bf16", "amx_bf16", "arm_bf16")  # of torch.cpu.get_capabilities: a CPU that multiplies bf16
CONTROL_GROUP = "/sys/fs/cgroup"  # within a container its own
VERSIONS = (
    ("", "memory.max", "memory.current"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)  # 2 and 1


def compute_dtype(device: torch.device) -> torch.dtype:
    """What training is fastest in on `device`: bf16 where its matrix units take it, else fp32.

    A CPU without them would emulate bf16, several times slower than fp32. A torch that cannot tell, before 2.11, counts as one.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return torch.bfloat16 if any(capabilities.get(name) for name in NATIVE_BF16) else torch.float32
    return torch.float32


def check_device(name: str | None, option: str = "svd_device", remedy: str = "'cpu' or None") -> None:
    """Refuse a device, which `option` names, that this machine does not have; None is each weight's own.

    Raises:
        ValueError: with the reason.
    """
    if name is None:
        return
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{option} is {name!r}, which this machine does not offer ({reason}); use {remedy}") from None


def free_memory(device: torch.device) -> float | None:
    """Bytes of memory on `device` that can be had without swapping; None where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = {line.split(":")[0]: line.split()[1] for line in file}
        return min(float(found["MemAvailable"]) * 1024, container_room())
    except (OSError, KeyError, IndexError, ValueError):
        pass
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return None


def container_room(root: str = CONTROL_GROUP) -> float:
    """Bytes that the container of this process may still take, by its control group; infinity where nothing limits it."""
    room = math.inf
    for folder, limit, usage in VERSIONS:
        try:
            with open(os.path.join(root, folder, limit), encoding="ascii") as file:
                most = file.read().strip()
            with open(os.path.join(root, folder, usage), encoding="ascii") as file:
                used = int(file.read())
            with open(os.path.join(root, folder, "memory.stat"), encoding="ascii") as file:
                stat = dict(line.split() for line in file)
        except (OSError, ValueError):
            continue
        if most != "max":
            # Files that the system only keeps in case they are read again count as used.
            room = min(room, max(0.0, int(most) - used + float(stat.get("inactive_file", 0))))
    return room


def input_device(model: Any, default: torch.device | str = "cpu") -> torch.device:
    """The device that `model` takes its tokens on.

    Args:
        model: anything with `get_input_embeddings`, such as a PreTrainedModel.
        default: for embeddings that have no parameters, or empty ones without a hook that says where they compute.
    """
    embeddings = model.get_input_embeddings()
    device = execution_device(embeddings)
    if device is not None:
        return device
    # A packed embedding has buffers alone.
    values = (value for value in (*embeddings.parameters(), *embeddings.buffers()) if value.numel())
    weight = next(values, None)
    return torch.device(default) if weight is None or weight.is_meta else weight.device


def stored_parameters(model: nn.Module) -> Iterator[Tensor]:
    """The values of all parameters in the order of `model.parameters()`, also of those that are offloaded.

    Tied parameters come once, as they do there, although offloading makes two empty tensors of them. An offloaded module is
    read whole and freed before the next one, so no more than one is held in addition.
    """
    tied = tied_weights(model)
    seen: set[str] = set()
    for name in [name for name, _ in model.named_parameters()]:
        source = tied.get(name, name)
        if source in seen:
            continue
        seen.add(source)
        module_name, _, own = name.rpartition(".")
        module = model.get_submodule(module_name)
        with align_module_device(module):
            value = own_parameters(module)[own]
            assert value is not None
            yield value.detach()
