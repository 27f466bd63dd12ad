"""The private doors of accelerate: where the weights of a module are, once `device_map` has spread or offloaded a model.

accelerate puts a hook on every module that computes elsewhere than its weights are kept, under the name `_hf_hook`. Its
documentation describes hooks for those who write them; nothing public says which one a module has. Every function is one
door, tested with accelerate 1.13 to 1.15 by tests/test_internals.py.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["execution_device", "has_placement", "offload_beside"]


def has_placement(module: nn.Module) -> bool:
    """Whether accelerate moves the inputs or weights of `module` at every call. Public way: none."""
    return "_hf_hook" in vars(module)


def execution_device(module: nn.Module) -> torch.device | None:
    """Where an offloaded or spread `module` computes; None where nothing but its weights decides.

    Inputs have to be put there, e.g. tokens for an embedding whose weights are on the disk. Public way: `model.hf_device_map`
    says where the weights of a module are kept, which may be "disk".
    """
    device: Any = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return None if device is None else torch.device(device)


def offload_beside(module: nn.Module, name: str, value: Tensor, neighbour: str) -> None:
    """Write `value` to the disk as the offloaded tensor `name`, into the folder where its `neighbour` was offloaded to.

    Args:
        module: the layer whose hook loads both.
        name, neighbour: full names of two tensors of it.

    transformers takes an offloaded tensor whose name the checkpoint has from the checkpoint. Where a packed tensor bears a
    dense weight's name, that would be the dense one, so it is given a file of its own. Public way: `offload_weight` writes the
    file, but the index that the hook reads, and the folder, are found by the hook alone.
    """
    from accelerate.utils import offload_weight

    hook: Any = module._hf_hook
    index = hook.weights_map.dataset.index
    offload_weight(value, name, os.path.dirname(index[neighbour]["safetensors_file"]), index)
