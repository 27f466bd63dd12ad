"""The plugin of vLLM: `vllm serve DIR` and `LLM(DIR)` then read packed checkpoints as they are.

pyproject.toml names `register` under the entry point `vllm.general_plugins`. vLLM calls it in every one of its processes, for
whatever model it is to serve; so it registers a name and a class, and imports nothing else of vLLM:

    vllm_config.py     what vLLM asks about a checkpoint: LittleBitQuantization
    vllm_linear.py     how a linear layer is loaded and computed: LittleBitLinearMethod
    partition.py       what one process of a tensor-parallel group keeps of a stored weight; plain tensors
    vllm_version.py    the versions it was tested with

A vLLM that has moved what the plugin needs still serves every other model. For a packed one it says what is missing.
"""

from __future__ import annotations

import logging
from typing import Any

from .vllm_version import explain_layout

__all__ = ["NAME", "register"]

NAME = "littlebit"  # the quant_method of a packed model's config.json

logger = logging.getLogger("hf_littlebit")


def register() -> None:
    """Make "littlebit" a quantization method of vLLM; a second call changes nothing. Never raises.

    Where vLLM has another layout than the plugin was written for, a method is registered that refuses packed models with the
    reason, or, if there is no registering any more, the reason is logged.
    """
    try:
        with explain_layout():
            from vllm.model_executor.layers.quantization import register_quantization_config
            from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    except ImportError as error:
        logger.error("vLLM cannot serve packed models: %s", error)
        return
    try:
        with explain_layout():
            from .vllm_config import LittleBitQuantization
    except ImportError as error:
        register_quantization_config(NAME)(_refusing(QuantizationConfig, error))
        return
    register_quantization_config(NAME)(LittleBitQuantization)


def _refusing(base: type, reason: ImportError) -> type:
    """A quantization method that cannot read any checkpoint, and says why."""

    def from_config(cls: Any, config: dict[str, Any]) -> Any:
        raise ImportError(str(reason)) from reason

    return type("LittleBitUnavailable", (base,), {"from_config": classmethod(from_config)})
