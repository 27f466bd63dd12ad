"""The private doors of DeepSpeed: parameters that ZeRO-3 took apart, and the groups that its optimizers step.

ZeRO-3 keeps of every parameter only this process's part, and writes on the parameter what it needs to join the parts again
(`ds_id`, `ds_tensor`, ...). Every function is one door, tested with DeepSpeed 0.19 by tests/test_internals.py where it is
installed. DeepSpeed itself is not imported here: a parameter or an optimizer shows that it runs already.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["is_partitioned", "local_part", "stepped_groups"]


def is_partitioned(value: Tensor) -> bool:
    """Whether ZeRO-3 took this parameter apart, so that it is empty between uses.

    Public way: `deepspeed.zero.GatheredParameters` joins the parts of those that are, and passes the others by.
    """
    return hasattr(value, "ds_id")


def local_part(value: Any) -> tuple[Tensor, int | None]:
    """(this process's part of a partitioned parameter, flat and detached; where that part begins in the flat whole).

    A part that is kept on the disk is given as an empty tensor, at None. Public way: `safe_get_local_fp32_param` of
    deepspeed.utils, which copies it, and only once the optimizer is made.
    """
    part, size = value.ds_tensor.detach().flatten(), value.ds_tensor.ds_numel
    if part.numel() < size:
        return part.new_empty(0), None
    first = size * dist.get_rank(value.ds_process_group)
    return part[: max(0, min(size, value.ds_numel - first))], first


def stepped_groups(optimizer: Any) -> list[tuple[list[nn.Parameter], dict[str, Any]]] | None:
    """[(a model's parameters, their group of options)] of a DeepSpeed optimizer, which itself steps flat copies of them.

    None for another optimizer, and empty if this version of DeepSpeed keeps them elsewhere. The weight decay of a parameter is
    found by it. Public way: none; `param_groups` of such an optimizer holds the flat copies.
    """
    if not type(optimizer).__name__.startswith("DeepSpeed"):
        return None
    while optimizer is not None:
        for name in ("bit16_groups", "bf16_groups", "fp16_groups"):
            parts = getattr(optimizer, name, None)
            if parts:
                # ZeRO-3 cuts large groups into smaller ones.
                origin = getattr(optimizer, "sub_group_to_group_id", None) or range(len(parts))
                options = optimizer.optimizer.param_groups
                return [(list(values), options[origin[index]]) for index, values in enumerate(parts)]
        optimizer = getattr(optimizer, "optimizer", None)
    return []
