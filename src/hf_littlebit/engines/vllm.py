"""The plugin of vLLM: `vllm serve DIR` and `LLM(DIR)` then read packed checkpoints as they are.

pyproject.toml names `register` under the entry point `vllm.general_plugins`. vLLM calls it in every one of its processes, for
whatever model it is to serve; so it registers a name and a class, and leaves everything else for the first packed model:

    vllm_config.py     what vLLM asks about a checkpoint: LittleBitQuantization
    vllm_linear.py     how a linear layer is loaded and computed: LittleBitLinearMethod
    vllm_table.py      the same of a packed embedding or head: LittleBitTableMethod
    partition.py       what one process of a tensor-parallel group keeps of a stored weight; plain tensors
    vllm_version.py    the versions it was tested with

A vLLM that has moved what the plugin needs still serves every other model. For a packed one it says what is missing.
"""

from __future__ import annotations

import logging

from .vllm_version import explain_layout

__all__ = ["NAME", "register"]

NAME = "littlebit"  # the quant_method of a packed model's config.json

logger = logging.getLogger("hf_littlebit")


def register() -> None:
    """Make "littlebit" a quantization method of vLLM; a second call changes nothing.

    Where vLLM has no such registering any more, the reason is logged and nothing raised, because the model that this process
    is to serve may be another. What else is missing is said when a packed model is opened (`LittleBitQuantization`).
    """
    try:
        with explain_layout():
            from vllm.model_executor.layers.quantization import register_quantization_config

            from .vllm_config import LittleBitQuantization
    except ImportError as error:
        logger.error("vLLM cannot serve packed models of hf-littlebit: %s", error)
        return
    register_quantization_config(NAME)(LittleBitQuantization)
