"""A folder that another program wrote, perhaps with bad intentions: what it holds, checked before anything is made of it.

Tensors come from safetensors files alone. A pickle (.bin, .pt, .pth ...) can run code when it is read: it is refused in words
and never opened. Names, shapes and dtypes are those of the files' headers, whose offsets the safetensors library compares
with the length of the file. JSON is read up to a size, and numbers in config.json that no model has are refused before any
module is made.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterator
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..form import is_hub_id
from ..meta_model import check_sizes
from ..source import UNFIT
from ..verify import Header, read_headers, refuse_special, regular_file

__all__ = ["Folder", "checked_json", "fetch", "model_config", "read_json"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
LARGEST_JSON = 2**26  # bytes; an index of a million tensors takes no more
LARGEST_NUMBER = 2**31 - 1  # in config.json: no size of a model comes near
# A model is built with a module for each of these, so that the files must hold a tensor for each.
COUNTS = {
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"),
    *("num_encoder_layers", "num_decoder_layers"),
}
# A packed artifact of the layout llama.cpp-i32-lsb-v1 keeps its files in folders of their own, and one of these beside them.
DESCRIPTORS = ("nanoquant-packed-model.json", "nanoquant-runtime-bundle.json")
DEPTH = 3  # of such folders
MODEL = "model"  # the one of them that holds config.json


class Folder:
    """The tensors and the config of a checkpoint.

    Args:
        path: a folder with safetensors files.

    Raises:
        ValueError: for what is no folder, for one without safetensors files, and for files that are no regular files, are
            damaged, or hold one tensor twice.
    """

    def __init__(self, path: str):
        self.path = path
        self.header: Header = {}
        self._files: dict[str, str] = {}  # tensor -> path of its file
        for each in (path, os.path.join(path, MODEL)):
            # Whoever reads the model's other files in it would wait for a pipe.
            for inside in sorted(os.listdir(each)) if os.path.isdir(each) else ():
                refuse_special(os.path.join(each, inside))
        for file in _weight_files(path):
            regular_file(file)
            for name, entry in read_headers([file]).items():
                if not name.isprintable():
                    raise ValueError(f"{file} has a tensor called {name!r}; names are printable: download it again")
                if name in self.header:
                    raise ValueError(
                        f"{name} is in {self._files[name]} and in {file}; leave one checkpoint in {path}, not two"
                    )
                self.header[name], self._files[name] = entry, file

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, on the CPU; its memory is the file's where the library can map it.

        Raises:
            ValueError: if its file cannot be read.
        """
        file = self._files[name]
        try:
            with safe_open(file, framework="pt") as tensors:
                value: Tensor = tensors.get_tensor(name)
                return value
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"{name} in {file} cannot be read ({error}); download the checkpoint again") from error

    @property
    def config_folder(self) -> str | None:
        """The folder that config.json and the tokenizer are in; None without a config.json."""
        places = (self.path, os.path.join(self.path, MODEL))
        found = [folder for folder in places if os.path.lexists(os.path.join(folder, "config.json"))]
        return found[0] if found else None


def fetch(name: str) -> str:
    """The folder called `name`, or the one that a repository of the Hub is downloaded to, without any pickle.

    Raises:
        ValueError: if `name` is neither.
        OSError: if the Hub does not have it or cannot be reached.
    """
    if os.path.lexists(name) or not is_hub_id(name):
        return name
    return snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"])


def model_config(folder: str, tensors: int) -> tuple[PretrainedConfig, dict[str, Any]]:
    """(the config of the model in `folder`, without what another program says in it; what that says of its quantization).

    Args:
        tensors: how many tensors the files hold, which bounds how many layers there can be.

    Raises:
        ValueError: for a config that describes no model, or sizes that no model has.
    """
    options = checked_json(os.path.join(folder, "config.json"), tensors)
    check_sizes(options)
    quantization = options.get("quantization_config")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except UNFIT as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{folder} has a config.json that describes no model ({what}); restore it") from error
    for name in ("quantization_config", "auto_map"):  # of another program, and of code that came with it
        if hasattr(config, name):
            delattr(config, name)
    return config, quantization if isinstance(quantization, dict) else {}


def checked_json(path: str, tensors: int | None = None) -> dict[str, Any]:
    """`read_json`, with every number in it small enough for a model.

    Args:
        tensors: how many tensors the files hold, if that bounds the numbers of layers.

    Raises:
        ValueError: for a larger one, with its name.
    """
    options = read_json(path)
    for name, value in _numbers(options):
        if abs(value) > LARGEST_NUMBER:
            raise ValueError(
                f"{path} has {name} {value}; numbers up to {LARGEST_NUMBER} are read: restore the original file"
            )
        if tensors is not None and name in COUNTS and value > tensors:
            raise ValueError(
                f"{path} has {name} {value}, but the files hold {tensors} tensors; it is of another model, or the checkpoint "
                "is incomplete: download it again"
            )
    return options


def read_json(path: str) -> dict[str, Any]:
    """The object in a JSON file, or {} if there is no such file.

    Raises:
        ValueError: for a file that is no regular one, is too large, or holds something else.
    """
    if not os.path.lexists(path):
        return {}
    size = regular_file(path).st_size
    if size > LARGEST_JSON:
        raise ValueError(f"{path} has {size:,} bytes; at most {LARGEST_JSON:,} are read of a JSON file")
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file ({error}); download the checkpoint again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {reprlib.repr(found)}; it must hold a JSON object")
    return found


def _weight_files(path: str) -> list[str]:
    """Paths of the safetensors files of the checkpoint in `path`: those that its index names, if it has one, else all.

    Raises:
        ValueError: if there are none, with the reason.
    """
    if not os.path.isdir(path):
        kind = "a pickle, which can run code when it is read" if path.endswith(PICKLES) else "no folder"
        raise ValueError(f"{path} is {kind}; give a folder that holds config.json and safetensors files")
    names = sorted(os.listdir(path))
    index = read_json(os.path.join(path, SAFE_WEIGHTS_INDEX_NAME)).get("weight_map")
    if index is not None:
        files = sorted(set(map(str, index.values()))) if isinstance(index, dict) else [""]
        if not all(name == os.path.basename(name) and name.endswith(".safetensors") for name in files):
            raise ValueError(f"{path} has an index that names files outside of it; download the checkpoint again")
        return [os.path.join(path, name) for name in files]
    depth = DEPTH if any(name in names for name in DESCRIPTORS) else 0
    files = list(_safetensors(path, depth))
    if files:
        return files
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise ValueError(
            f"{path} holds {pickles[0]}, a pickle, which can run code when it is read, and no safetensors file; save its "
            "state dict with safetensors.torch.save_file on a machine that trusts it, and give that"
        )
    if any(name.endswith(".gguf") for name in names):
        raise ValueError(f"{path} holds GGUF files, which are not read; give the safetensors that they were made from")
    raise ValueError(f"{path} holds no safetensors file; give the folder of a whole checkpoint")


def _safetensors(path: str, depth: int) -> Iterator[str]:
    for name in sorted(os.listdir(path)):
        place = os.path.join(path, name)
        if name.endswith(".safetensors"):
            yield place
        elif depth and os.path.isdir(place) and not os.path.islink(place):
            yield from _safetensors(place, depth - 1)


def _numbers(options: Any) -> Iterator[tuple[str, int]]:
    """(key, value) of every integer in a JSON value, of its lists and objects too."""
    left = [("", options)]
    while left:
        name, value = left.pop()
        if isinstance(value, dict):
            left.extend(value.items())
        elif isinstance(value, list):
            left.extend((name, each) for each in value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield name, value
