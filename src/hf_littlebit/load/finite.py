"""Numbers that are none: NaN and Inf in a model, and values that would become Inf in another dtype.

They pass through a whole quantization unseen, since only what is packed is computed with, and come out as logits of NaN. So
all parameters are looked at once when a model is quantized, and before it is made dense in a dtype of a smaller range.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..layers.experts import LittleBitExperts
from ..layers.linear import FactorModule
from ..layers.path import Path, cast, dense_weight, is_finite
from ..layers.table import PackedTableModule

__all__ = ["refuse_non_finite", "refuse_overflow"]


def refuse_non_finite(model: nn.Module, dense: bool) -> None:
    """Refuse a model that holds NaN or Inf, before they are found in its output. What is offloaded is not looked at.

    Args:
        dense: look at all parameters, those outside of the LittleBit layers too.

    Raises:
        ValueError: naming the first of them.
    """
    for name, module in model.named_modules():
        ours = isinstance(module, FactorModule | PackedTableModule)
        values = [*module.named_parameters(recurse=False)] if ours or dense else []
        if isinstance(module, PackedTableModule):
            values += module.named_buffers(recurse=False)
        for part, value in values:
            if not value.is_floating_point() or value.is_meta or is_finite(value):
                continue
            held = f"{name}.{part}".removeprefix(".") + " holds NaN or Inf"
            if ours:
                raise ValueError(f"{held}; the checkpoint is damaged: download or save it again")
            dtype = str(value.dtype).removeprefix("torch.")
            raise ValueError(
                f"{held} in {dtype}: the checkpoint is damaged, or its values do not fit {dtype}, which holds at most "
                f"{torch.finfo(value.dtype).max:.3g}; download it again, or load it with dtype=torch.bfloat16"
            )


def refuse_overflow(model: nn.Module, dtype: torch.dtype, former: torch.dtype) -> None:
    """Refuse to make `model` dense in a `dtype` that would turn finite values into Inf.

    Args:
        former: the dtype of the parameters that are cast beside the weights of LittleBit layers.

    Raises:
        ValueError: naming the first module with such values.
    """
    for name, module in model.named_modules():
        ours = isinstance(module, FactorModule)
        try:
            for part, value in module.named_parameters(recurse=False):
                if value.dtype == former if not ours else part == "bias":
                    cast(value.detach(), dtype)
            if (
                isinstance(module, PackedTableModule)
                and float(module.table()[1].abs().max()) * 128 > torch.finfo(dtype).max
            ):
                cast(module.dense(), dtype)
            for weight in _weights(module) if ours else ():  # type: ignore[arg-type]
                if not _bound(module, weight) <= torch.finfo(dtype).max:
                    for paths in _paths(module, weight):
                        cast(dense_weight(paths), dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def _weights(module: FactorModule) -> list[str]:
    return [*module.sizes] if isinstance(module, LittleBitExperts) else ["weight"]


def _bound(module: FactorModule, weight: str) -> float:
    """More than any value of the weight, by its scales alone: every sign at its worst."""
    scale_out, scale_rank, scale_in = (
        part.detach().float().abs() for part in module.parts(weight, ("scale_out", "scale_rank", "scale_in")).values()
    )
    return 1.01 * float(scale_out.max() * scale_rank.sum(-1).max() * scale_in.max())  # latents' scales are rounded


def _paths(module: FactorModule, weight: str) -> Iterator[list[Path]]:
    """The factors of every matrix of a weight."""
    if isinstance(module, LittleBitExperts):
        for expert in range(module.sizes[weight][0]):
            yield module.paths(weight, expert)
    else:
        yield module.paths()  # type: ignore[operator]  # of every linear form
