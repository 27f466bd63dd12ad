"""Random weights in place of real ones, for measuring: time depends on the shapes of a model, not on its values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...config import LittleBitConfig
from ...internals.transformers import tied_weights
from ...layers.table import ROWS_LIKE
from ...load.conversion import part_shapes
from ...load.tables import Tables, plan_tables
from ...plan import Plan

__all__ = ["random_state"]

TILE = 1 << 20  # random values that a random tensor repeats


def random_state(
    model: Any, dtype: torch.dtype, packed: tuple[Plan, LittleBitConfig] | None, device: torch.device | None = None
) -> dict[str, Tensor]:
    """A random state dict for the dense `model` (on meta) or, by a plan and its config, for its packed form.

    It is made on `device` (by default the CPU): a GPU fills the 13 GB of a dense 7B model in less than a second.
    """
    device = device or torch.device("cpu")
    draw = torch.Generator(device).manual_seed(0)
    state: dict[str, Tensor] = {}
    plan, config = packed or (Plan(), None)
    for weight in plan.weights:
        # Scales that keep the variance: activations that overflow or vanish would be slow for reasons of their own.
        sizes = {"scale_out": 1, "scale_rank": sum(weight.ranks), "scale_in": weight.in_features}
        assert config is not None
        for name, (shape, dtype_of_part) in part_shapes(weight, config).items():
            if dtype_of_part.is_floating_point:
                size = next(size for part, size in sizes.items() if name.endswith(part))
                state[name] = torch.full(shape, size**-0.5, dtype=dtype_of_part, device=device)
            else:
                limits = torch.iinfo(dtype_of_part)
                words = torch.empty(shape, dtype=dtype_of_part, device=device)
                state[name] = words.random_(limits.min, limits.max, generator=draw)
    tables = Tables() if config is None else plan_tables(model, config)
    for table in tables.tables:
        for name, (shape, dtype_of_part) in table.shapes().items():
            if dtype_of_part.is_floating_point:
                state[name] = torch.full(shape, 0.08 / 2**table.bits, dtype=dtype_of_part, device=device)
            else:
                limits = torch.iinfo(dtype_of_part)
                state[name] = torch.empty(shape, dtype=dtype_of_part, device=device)
                state[name].random_(limits.min + 1, limits.max, generator=draw)  # -128 is no code
        state[f"{table.owner}.{ROWS_LIKE}"] = torch.empty(0, dtype=dtype, device=device)
    replaced = {weight.name for weight in plan.weights} | tables.by_weight().keys()
    tied = tied_weights(model)
    tile = (0.02 * torch.randn(TILE, generator=draw, device=device)).to(dtype)
    for name, value in model.state_dict().items():
        if name in replaced or name in tied:
            continue
        if not value.is_floating_point():
            state[name] = torch.zeros(value.shape, dtype=value.dtype, device=device)
        elif value.ndim == 1:
            constant = 0.0 if name.endswith("bias") else 1.0
            state[name] = torch.full(value.shape, constant, dtype=dtype, device=device)
        else:
            flat = torch.empty(value.numel(), dtype=dtype, device=device)
            for part in flat.split(TILE):
                part.copy_(tile[: len(part)])
            state[name] = flat.view(value.shape)
    return state
