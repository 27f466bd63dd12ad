"""What a user's word for a model stands for: a folder, a config.json or a Hub id, read without loading any weight.

folder        config.json and, if the model was saved quantized, the headers of its safetensors files
config.json   the config alone
org/name      the same two things from the Hub: one small download, and range requests for the headers
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import HfApi
from transformers import AutoConfig, PretrainedConfig

from .checkpoint import Header, read_headers
from .config import LittleBitConfig

__all__ = ["HUB_ID", "Source", "find_source", "quantization_of"]

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
WEIGHTS = "model.safetensors"


@dataclass
class Source:
    """A model before it is loaded. `header` is None where no saved tensors are known, as for a config alone."""

    name: str
    config: PretrainedConfig
    quantization: LittleBitConfig | None = None  # None for a dense model
    header: Header | None = None
    files: list[str] = field(default_factory=list)  # safetensors files on this machine
    file_bytes: int | None = None  # size of all safetensors files, headers included


def find_source(name: str | os.PathLike[str]) -> Source:
    """The source called `name`: a folder, a config.json, or a Hub id.

    Raises:
        ValueError: if it is none of these, if the folder lacks files, or if another method quantized the model.
        OSError: if the Hub does not have it or cannot be reached.
    """
    name = os.fspath(name)
    local = os.path.exists(name)
    if not local and (name.endswith(".json") or not HUB_ID.fullmatch(name)):
        raise ValueError(f"{name} does not exist; give a folder, a config.json, or a Hub id such as org/name")
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(f"{name} holds no config.json; give the folder that save_pretrained wrote")
    try:
        # False, not the default: transformers would ask on the terminal whether to run a repository's code.
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        if local:
            raise
        raise OSError(f"{name} is no folder here, and the Hub did not give it: {error}") from error
    source = Source(name, config, quantization_of(config))
    if source.quantization is None or os.path.isfile(name):
        return source
    if os.path.isdir(name):
        source.files = weight_files(name)
        source.header = read_headers(source.files)
        source.file_bytes = sum(os.path.getsize(file) for file in source.files)
    else:
        _read_hub(source)
    return source


def quantization_of(config: PretrainedConfig) -> LittleBitConfig | None:
    """The LittleBitConfig that a model's config carries, or None for a dense model.

    Raises:
        ValueError: if the model is quantized by another method.
    """
    options: Any = getattr(config, "quantization_config", None)
    if options is None or isinstance(options, LittleBitConfig):
        return options
    options = options if isinstance(options, dict) else options.to_dict()
    method = options.get("quant_method")
    if method != "littlebit":
        raise ValueError(
            f"the model is quantized with {method!r} already; LittleBit starts from the original, dense model"
        )
    return LittleBitConfig.from_dict(options)


def weight_files(folder: str) -> list[str]:
    """Paths of the safetensors files that hold the model saved in `folder`.

    Raises:
        ValueError: if there are none, or the index of a sharded model cannot be read.
    """
    single, index = os.path.join(folder, WEIGHTS), os.path.join(folder, f"{WEIGHTS}.index.json")
    if os.path.isfile(single):
        return [single]
    if not os.path.isfile(index):
        raise ValueError(f"{folder} holds no {WEIGHTS}; the checkpoint is incomplete: download or save it again")
    try:
        with open(index, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: {error!r}; download or save the checkpoint again") from error
    if not all(isinstance(name, str) and name == os.path.basename(name) for name in names):
        raise ValueError(f"{index} names files outside its folder; save the checkpoint again")
    return [os.path.join(folder, name) for name in names]


def _read_hub(source: Source) -> None:
    api = HfApi()
    metadata = api.get_safetensors_metadata(source.name)
    source.header = {
        tensor: (info.dtype, tuple(info.shape), file)
        for file, content in metadata.files_metadata.items()
        for tensor, info in content.tensors.items()
    }
    listed = api.get_paths_info(source.name, list(metadata.files_metadata))
    source.file_bytes = sum(entry.size for entry in listed if hasattr(entry, "size"))
