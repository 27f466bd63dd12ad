"""Latents and scales that are no numbers: found by name, before they are saved, packed or multiplied.

A training that diverges, or a damaged file, leaves NaN or Inf in a few tensors. A sign can be made of them without an error, so
that a packed model would be quietly wrong.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..layers.path import is_finite
from .form import factor_modules

__all__ = ["refuse_diverged"]


def refuse_diverged(model: nn.Module) -> None:
    """Refuse to pack a model with parameters that are not finite, or whose latent layers have scales that leave the stored range.

    Raises:
        ValueError: naming the first of them.
    """
    for name, value, stored in _parts(model):
        if not is_finite(value):
            raise ValueError(
                f"{name} holds NaN or Inf, so the model cannot be packed; its training has diverged: go on from an earlier "
                "checkpoint, with a lower learning rate"
            )
        if stored is not None and not is_finite(value.to(stored)):
            raise ValueError(
                f"{name} reaches {float(value.abs().max()):.4g}, but scale_dtype {str(stored).removeprefix('torch.')} ends at "
                f"{torch.finfo(stored).max:.4g}, so the model cannot be packed; use scale_dtype='bfloat16'"
            )


def _parts(model: nn.Module) -> Iterator[tuple[str, Tensor, torch.dtype | None]]:
    """(name, value, the dtype that packing gives it: None where it keeps its own) of all parameters that are in memory."""
    ours = factor_modules(model)
    for name, module in model.named_modules():
        for part, value in module.named_parameters(recurse=False):
            if value.is_meta or not value.is_floating_point():
                continue
            scale = name in ours and part in ours[name].part_dtypes and "scale_" in part
            yield f"{name}.{part}".removeprefix("."), value.detach(), ours[name].scale_dtype if scale else None
