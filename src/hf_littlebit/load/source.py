"""What a user's word for a model stands for: a folder, a config.json or a Hub id, read without loading any weight.

    folder        config.json and, if the model was saved quantized, the headers of its safetensors files
    config.json   the config alone
    org/name      the same two things from the Hub: one small download, and range requests for the headers

Weight files are those that from_pretrained reads: model.safetensors, else the shards of its index. Where a folder has
neither, a variant's serve (`save_pretrained(variant="fp16")`: model.fp16.safetensors), if there is one variant only.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError, StrictDataclassError
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_NAME

from ..config import LittleBitConfig
from .form import is_hub_id
from .meta_model import check_sizes, class_names
from .replacement import interrupted
from .save_id import check_save, id_of, recorded_id, refuse_mixed
from .verify import Header, read_headers, refuse_special

__all__ = ["Source", "find_source", "quantization_of"]

# Group 1 is the variant of a file, e.g. "fp16" of model.fp16.safetensors, and group 2 that of an index.
WEIGHT_NAME = re.compile(r"model(?:\.([^.]+))?\.safetensors|model\.safetensors\.index(?:\.([^.]+))?\.json")
SHARD = re.compile(r".*-\d+-of-\d+\.safetensors")
# transformers' config classes raise these for values of a type or size that they do not expect.
UNFIT = (StrictDataclassError, TypeError, AttributeError, LookupError, ArithmeticError)


@dataclass
class Source:
    """A model before it is loaded. `header` is None if no saved tensors are known, as for a config alone."""

    name: str
    config: PretrainedConfig
    quantization: LittleBitConfig | None = None  # None for a dense model
    header: Header | None = None
    files: list[str] = field(default_factory=list)  # safetensors files on this machine
    index: str | None = None  # the file that lists them, if there is one
    variant: str | None = None  # what from_pretrained must be given under this name to read them
    file_bytes: int | None = None  # size of all safetensors files, headers included


def find_source(name: str | os.PathLike[str]) -> Source:
    """The source called `name`: a folder, a config.json, or a Hub id.

    Raises:
        ValueError: if it is none of these, if the folder lacks files, if its config.json holds values that describe no
            model, if its files are of different saves, or if another method quantized the model.
        OSError: if the Hub does not have it or cannot be reached.
    """
    name = os.fspath(name)
    local = os.path.exists(name)
    aside = None if local else interrupted(name)
    if aside is not None:
        raise ValueError(
            f"{name} does not exist: replacing it was interrupted. What it held is {aside}; rename that to {name}"
        )
    if not local and (name.endswith(".json") or not is_hub_id(name)):
        raise ValueError(f"{name} does not exist; give a folder, a config.json, or a Hub id such as org/name")
    refuse_special(name)
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(f"{name} holds no config.json; give the folder that save_pretrained wrote")
    with _explain(name, local):
        options = {**PretrainedConfig.get_config_dict(name)[0]}  # a TypeError, if the file holds no JSON object
    # These are checked before AutoConfig reads them: its errors do not say which value is wrong.
    check_sizes(options)
    _quantization(options.get("quantization_config"))
    class_names(options.get("architectures"))
    with _explain(name, local):
        # With trust_remote_code=None, the default, transformers would ask on the terminal whether to run a repository's code.
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    source = Source(name, config, quantization_of(config))
    if source.quantization is None or os.path.isfile(name):
        return source
    if os.path.isdir(name):
        source.files, source.index, source.variant = _weights(name)
        source.header = read_headers(source.files)
        check_save(name, source.files)
        source.file_bytes = sum(os.path.getsize(file) for file in source.files)
    else:
        _read_hub(source, recorded_id(options))
    return source


@contextmanager
def _explain(name: str, local: bool) -> Iterator[None]:
    """Say which model it is that transformers cannot read the config of; nothing but calls of transformers belongs in here."""
    try:
        yield
    except OSError as error:
        if local:
            raise
        raise OSError(f"{name} is no folder here, and the Hub did not give it: {error}") from error
    except UNFIT as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"{name} has a config.json that describes no model ({what}); restore or download it again"
        ) from error


def quantization_of(config: PretrainedConfig) -> LittleBitConfig | None:
    """The LittleBitConfig that a model's config carries, or None for a dense model.

    Raises:
        ValueError: if the model is quantized by another method, or the config does not say by which.
    """
    options: Any = getattr(config, "quantization_config", None)
    return options if isinstance(options, LittleBitConfig) else _quantization(options)


def _quantization(options: Any) -> LittleBitConfig | None:
    """The LittleBitConfig that `options`, the quantization_config of a model's config, stands for; errors as there."""
    options = options.to_dict() if hasattr(options, "to_dict") else options
    if options is None:
        return None
    method = options.get("quant_method") if isinstance(options, dict) else None
    if method is None and isinstance(options, dict) and (options.get("load_in_4bit") or options.get("load_in_8bit")):
        method = "bitsandbytes"  # which once wrote no quant_method
    if not isinstance(method, str):
        raise ValueError(
            f"the config's quantization_config is {reprlib.repr(options)}; it must be a dict with a quant_method, such as "
            "'littlebit', or be absent for a dense model"
        )
    if method != "littlebit":
        raise ValueError(
            f"the model is quantized with {method!r} already; LittleBit starts from the original, dense model"
        )
    own = LittleBitConfig.from_dict(options)
    if own.bpw is None:
        raise ValueError(
            "the config's quantization_config has no bpw; config.json is damaged: download or save it again"
        )
    return own


def _weights(folder: str) -> tuple[list[str], str | None, str | None]:
    """(paths of the safetensors files, path of their index, variant) of the quantized model in `folder`.

    Raises:
        ValueError: if there are no files, if there are several variants to choose from, or if the index cannot be read.
    """
    variants: dict[str | None, str] = {}  # variant (None: the plain names) -> its file or its index
    for name in sorted(os.listdir(folder)):  # "model.safetensors" before its index, which transformers then ignores
        match = WEIGHT_NAME.fullmatch(name)
        if match and not SHARD.fullmatch(name):
            variants.setdefault(match[1] or match[2], os.path.join(folder, name))
    if not variants:
        raise ValueError(
            f"{folder} holds no {SAFE_WEIGHTS_NAME}; the checkpoint is incomplete: download or save it again"
        )
    if None not in variants and len(variants) > 1:
        raise ValueError(
            f"{folder} holds the variants {', '.join(map(str, variants))} and no {SAFE_WEIGHTS_NAME}; leave one of "
            "them in the folder"
        )
    variant = None if None in variants else next(iter(variants))
    path = variants[variant]
    return ([path], None, variant) if path.endswith(".safetensors") else (_shards(path), path, variant)


def _shards(index: str) -> list[str]:
    """Paths of the files that `index` names.

    Raises:
        ValueError: if it cannot be read, or names files elsewhere.
    """
    refuse_special(index)
    try:
        with open(index, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: {error!r}; download or save the checkpoint again") from error
    if not all(isinstance(name, str) and name == os.path.basename(name) for name in names):
        raise ValueError(f"{index} names files outside its folder; save the checkpoint again")
    return [os.path.join(os.path.dirname(index), name) for name in names]


def _read_hub(source: Source, recorded: str | None) -> None:
    """Complete a `source` on the Hub with its tensors' names, dtypes and shapes and its files' size; no weights are read.

    Args:
        recorded: the id of the save in its config.json.
    """
    api = HfApi()
    try:
        metadata = api.get_safetensors_metadata(source.name)
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise ValueError(
            f"{source.name} has no readable {SAFE_WEIGHTS_NAME} on the Hub ({error}); for a variant or another layout, "
            "download the repository and give the folder"
        ) from error
    ids = {file: id_of(content.metadata) for file, content in metadata.files_metadata.items()}
    refuse_mixed(source.name, ids, recorded)
    source.header = {
        tensor: (info.dtype, tuple(info.shape), file)
        for file, content in metadata.files_metadata.items()
        for tensor, info in content.tensors.items()
    }
    listed = api.get_paths_info(source.name, list(metadata.files_metadata))
    source.file_bytes = sum(entry.size for entry in listed if hasattr(entry, "size"))
