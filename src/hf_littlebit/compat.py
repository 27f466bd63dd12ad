"""What differs between the transformers versions that hf-littlebit runs on (5.17 to 5.23): all of it, in one place."""

from __future__ import annotations

from typing import Any

import torch
from transformers.quantizers import auto

__all__ = ["register", "resolve_dtype"]


def register(name: str, config_class: type, quantizer_class: type) -> None:
    """Make `name` a quantization method of transformers; a second call changes nothing."""
    if name not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(name)(config_class)
    if name not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(name)(quantizer_class)
    # Only the config classes of this tuple may override loading options (dequantize, share_inputs, ...) of a saved model.
    types = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    if config_class not in types:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*types, config_class)  # type: ignore[assignment]


def resolve_dtype(dtype: Any) -> torch.dtype:
    """A torch dtype from one, from its name (which configs hold), or float32 from None."""
    if isinstance(dtype, str):
        return getattr(torch, dtype.removeprefix("torch."))
    return torch.float32 if dtype is None else dtype
