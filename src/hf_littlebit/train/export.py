"""From what a training leaves on disk, or gathers from its devices, to a packed model.

What a checkpoint holds, in the order in which it is looked for:

    model.safetensors, or its index     plain, DDP, FSDP2 with FULL_STATE_DICT, ZeRO-2, ZeRO-3 that gathers when it saves
    pytorch_model_fsdp_0/               FSDP2 with SHARDED_STATE_DICT: read by torch.distributed.checkpoint (shards.py)
    pytorch_model_fsdp.bin              FSDP2 with FULL_STATE_DICT, saved by accelerate alone
    latest, global_step*/               ZeRO: read by deepspeed.utils.zero_to_fp32

Code in a checkpoint is run nowhere: pickles are read with weights_only, or by shards.py.
"""

from __future__ import annotations

import copy
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..internals.transformers import whole_models
from ..load.convert import pack_model
from ..load.meta_model import model_class
from ..load.source import UNFIT, quantization_of
from ..load.verify import refuse_special
from .shards import read_shards

__all__ = ["latent_checkpoint", "pack_what_is_saved", "packed_model", "saved_config"]

SHARDS = "pytorch_model_fsdp_0"
WHOLE = "pytorch_model_fsdp.bin"
PLAIN = ("model.safetensors", "model.safetensors.index.json")


def latent_checkpoint(folder: str, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The latent model, on the CPU, of a checkpoint that a training left in `folder`, whatever engine wrote it.

    Args:
        dtype: of what is neither latent nor scale; "auto" as in the checkpoint.

    Raises:
        ValueError: if the folder holds no latent checkpoint, or only a part of one.
        ImportError: if its format needs DeepSpeed, which is not installed.
    """
    config = _config(folder)
    for root, _, files in os.walk(folder):
        for file in files:
            refuse_special(os.path.join(root, file))
    trained_class = model_class(config)
    if any(os.path.isfile(os.path.join(folder, name)) for name in PLAIN):
        return trained_class.from_pretrained(folder, dtype=dtype)
    if os.path.isdir(os.path.join(folder, SHARDS)):
        shards = os.path.join(folder, SHARDS)
        with _one_line(shards):
            state = read_shards(shards)
    elif os.path.isfile(os.path.join(folder, WHOLE)):
        with _one_line(folder):
            state = torch.load(os.path.join(folder, WHOLE), map_location="cpu", weights_only=True, mmap=True)
    elif os.path.isfile(os.path.join(folder, "latest")):
        state = _read_zero(folder)
    else:
        raise ValueError(
            f"{folder} holds a config.json but no weights ({PLAIN[0]}, {SHARDS}/, {WHOLE}, or latest of DeepSpeed); give a "
            "checkpoint-* folder of a training"
        )
    return trained_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype)


def packed_model(
    config: PreTrainedConfig,
    state: dict[str, Tensor],
    dtype: torch.dtype | None = None,
    generation_config: GenerationConfig | None = None,
) -> PreTrainedModel:
    """A packed model on the CPU from a latent one's whole `state` dict, e.g. gathered from its shards, and its saved config.

    Args:
        dtype: of what stays dense, as for pack_model.
        generation_config: of the latent model; None for the one that its config gives.
    """
    with whole_models():
        model = model_class(config).from_pretrained(None, config=config, state_dict=state, dtype="auto")
    packed: PreTrainedModel = pack_model(model, dtype)
    if generation_config is not None:
        packed.generation_config = generation_config
    return packed


def saved_config(model: PreTrainedModel, trained_class: type[PreTrainedModel]) -> PreTrainedConfig:
    """A copy of `model`'s config that names `trained_class` as its class, as save_pretrained writes it."""
    config = copy.deepcopy(model.config)
    config.architectures = [trained_class.__name__]
    config.quantization_config = config.quantization_config.to_dict()  # as from_pretrained expects it
    return config


def pack_what_is_saved(model: PreTrainedModel, pack: Callable[[dict[str, Tensor]], PreTrainedModel]) -> None:
    """Let `model.save_pretrained` pack the whole latent state that it is given, and save that; the model stays as it is.

    A plain Trainer gathers the state of a sharded model and passes it so. `pack` makes a packed model of such a state.
    """
    plain = model.save_pretrained

    def save_pretrained(
        self: PreTrainedModel, folder: Any, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        if not state_dict:
            kwargs["state_dict"] = state_dict
            plain(folder, *args, **kwargs)
        elif kwargs.get("is_main_process", True):
            pack(state_dict).save_pretrained(folder, *args, **kwargs)

    model.save_pretrained = types.MethodType(save_pretrained, model)  # type: ignore[method-assign]


def _config(folder: str) -> PreTrainedConfig:
    """The config of the latent checkpoint in `folder`; a ValueError says what else the folder holds."""
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is no folder here; give a checkpoint-* folder of a training")
    names = os.listdir(folder)
    steps = [int(name[11:]) for name in names if name.startswith("checkpoint-") and name[11:].isdigit()]
    if "config.json" not in names and steps:
        raise ValueError(
            f"{folder} holds {len(steps)} checkpoints; give one of them, e.g. {folder}/checkpoint-{max(steps)}"
        )
    if "config.json" not in names:
        raise ValueError(
            f"{folder} holds no config.json, which says what the weights are; give a checkpoint-* folder of a training, or "
            "copy the config.json of an earlier checkpoint of the same training into it"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        quantization = quantization_of(config)
    except UNFIT as error:
        what = " ".join(str(error).split())
        raise ValueError(f"{folder} has a config.json that describes no model ({what}); restore it") from error
    if quantization is None:
        raise ValueError(f"{folder} is of a dense model, so there is nothing to pack; use littlebit quantize or train")
    if quantization.format != "latent":
        raise ValueError(f"{folder} is packed already; give a checkpoint-* folder of a training")
    return config


def _read_zero(folder: str) -> dict[str, Tensor]:
    """The model's fp32 state dict from DeepSpeed's files, by DeepSpeed's own tool, which is held to weights_only."""
    try:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise ImportError(
            f"{folder} was saved by DeepSpeed, which is needed to read it ({error}): pip install deepspeed"
        ) from error
    known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # the tool itself asks for more, which this overrides
    former = os.environ.get(name)
    os.environ[name] = "1"
    try:
        # The tool prints as it goes; a command's own output is its result alone.
        with _one_line(folder), redirect_stdout(sys.stderr), torch.serialization.safe_globals(known):
            return dict(get_fp32_state_dict_from_zero_checkpoint(folder))
    finally:
        os.environ.pop(name)
        if former is not None:
            os.environ[name] = former


@contextmanager
def _one_line(path: str) -> Iterator[None]:
    """Turn whatever a reader of torch or DeepSpeed says of damaged or missing files into one ValueError.

    They raise errors of many classes. Only a call of theirs goes inside, so that no mistake of ours is taken for a bad file.
    """
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {text}); files of some processes may be missing: copy the "
            "checkpoint as a whole, from all machines of the training"
        ) from error
