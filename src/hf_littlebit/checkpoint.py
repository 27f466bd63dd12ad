"""Saved models: what a packed checkpoint must hold, checked from the files' headers before anything is loaded.

transformers fills tensors that a checkpoint lacks with random numbers and warns. For a quantized model that is never what
was meant, so names, shapes and dtypes are compared first, and every difference is an error that says where it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from .config import LittleBitConfig
from .conversion import part_shapes
from .plan import Plan

__all__ = ["Header", "read_headers", "refuse_quantized", "verify"]

Header = dict[str, tuple[str, tuple[int, ...], str]]  # tensor -> (safetensors dtype, shape, file name)
INTEGERS = {"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
DTYPES = {
    "torch.int32": "I32",
    "torch.uint8": "U8",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.float32": "F32",
}


def read_headers(files: Sequence[str]) -> Header:
    """Names, dtypes and shapes of all tensors in some safetensors files, without their data.

    Raises:
        ValueError: for a missing, damaged or foreign file, with its name.
    """
    header: Header = {}
    for file in files:
        name = os.path.basename(file)
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"{name} is no safetensors file; quantized models are stored in safetensors only")
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  (no dict: it has no iterator)
                    part = tensors.get_slice(key)
                    header[key] = (part.get_dtype(), tuple(part.get_shape()), name)
        except FileNotFoundError:
            raise ValueError(f"{file} is missing; download or save the checkpoint again") from None
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise ValueError(f"{name} is damaged: {error}; download or save the checkpoint again") from error
    return header


def verify(model: Any, plan: Plan, config: LittleBitConfig, files: Sequence[str]) -> None:
    """Compare the headers of `files` with the quantized `model` (on meta) that they are to be loaded into.

    Raises:
        ValueError: if a tensor is missing, or has another shape or dtype than the config implies.
    """
    header = read_headers(files)
    prefix = getattr(model, "base_model_prefix", "")
    expected = {name: entry for weight in plan.weights for name, entry in part_shapes(weight, config).items()}
    found = {name: _find(header, name, prefix) for name in expected}
    lacking = [name for name, entry in found.items() if entry is None]
    if len(lacking) == len(expected):
        raise ValueError(
            f"no tensor of the checkpoint is a part of a LittleBit layer (e.g. {lacking[0]} is absent from {_files(files)}); "
            "its config says quant_method 'littlebit', but another program wrote it, or it is of another model"
        )
    for name, (shape, dtype) in expected.items():
        entry = found[name]
        if entry is None:
            continue
        kind = DTYPES[str(dtype)]
        if entry[:2] != (kind, shape):
            raise ValueError(
                f"{name} is {entry[0]} {list(entry[1])} in {entry[2]}, but the config (bpw {config.bpw:g}, format "
                f"{config.format!r}) implies {kind} {list(shape)}; the file is damaged or its config.json was changed"
            )
    for name, parameter in model.named_parameters():
        entry = None if name in expected else _find(header, name, prefix)
        if entry is not None and parameter.is_floating_point() and entry[0] in INTEGERS:
            raise ValueError(
                f"{name} is packed ({entry[0]} {list(entry[1])}) in {entry[2]}, but the config leaves that layer dense; "
                "config.json was changed after the model was saved"
            )
    # A model of another class than the saved one may well have a new head; one of the same class may not lack anything.
    if type(model).__name__ in (model.config.architectures or ()):
        lacking += [name for name in _dense_names(model, expected) if _find(header, name, prefix) is None]
    if lacking:
        raise ValueError(
            f"{len(lacking)} tensor(s) are missing from {_files(files)}, e.g. {lacking[0]}; "
            "the checkpoint is incomplete: download or save it again"
        )


def refuse_quantized(files: Sequence[str]) -> None:
    """Refuse to quantize a checkpoint whose matrices are integers or 8-bit floats: another method quantized it already.

    Raises:
        ValueError: naming the first such tensor. transformers would cast it to the model's dtype without a word.
    """
    for name, (kind, shape, file) in read_headers([f for f in files if str(f).endswith(".safetensors")]).items():
        if len(shape) > 1 and (kind in INTEGERS or kind.startswith("F8") or kind.startswith("F4")):
            raise ValueError(
                f"{name} is {kind} {list(shape)} in {file}: the checkpoint is quantized already. "
                "Load the original 16-bit or 32-bit checkpoint to quantize it"
            )


def _find(header: Header, name: str, prefix: str) -> tuple[str, tuple[int, ...], str] | None:
    """The entry of `name`, which a base model and a model with a head call by different names."""
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate in header:
            return header[candidate]
    return None


def _dense_names(model: nn.Module, expected: Iterable[str]) -> list[str]:
    known = set(expected) | set(getattr(model, "all_tied_weights_keys", None) or {})
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    return [name for name in model.state_dict() if name not in known and not any(p.search(name) for p in ignored)]


def _files(files: Sequence[str]) -> str:
    return os.path.basename(files[0]) if len(files) == 1 else f"{len(files)} files"
