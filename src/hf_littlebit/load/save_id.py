"""The save id: a random number that says which files were saved together.

save_pretrained writes several files, one after the other, and a kill in between leaves some of the model before. Each save
draws an id. It stands in config.json, as the `save_id` of the quantization config, and in the metadata of every safetensors
file; whoever reads the files compares them.

What cannot be compared passes: a config without an id (an older version's, or one that a person wrote), files that all have
none and a config that has none, and files that another program has rewritten without our metadata.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors import safe_open

from .replacement import weight_variant

__all__ = ["METADATA", "check_save", "draw", "id_of", "read_id", "recorded_id", "refuse_mixed"]

METADATA = "save_id"  # its name in a file's metadata and in the quantization config
FORM = re.compile(r"[0-9a-f]{16}")
SHARDS = re.compile(r"-of-(\d{5})\.safetensors")
OLDER = ""  # stands for the id of a file that a version without ids wrote


def draw() -> str:
    """A new id: 16 hexadecimal digits."""
    return secrets.token_hex(8)


def id_of(metadata: Mapping[str, str] | None) -> str | None:
    """The id in a safetensors file's `metadata`; "" where an older hf-littlebit wrote the file, None where another program did."""
    metadata = metadata or {}
    if metadata.get("quant_method") != "littlebit":
        return None
    return metadata.get(METADATA, OLDER)


def recorded_id(options: Any) -> str | None:
    """The id in `options`, the dict of a config.json or of its quantization_config; None where it holds none."""
    options = options.get("quantization_config", options) if isinstance(options, dict) else None
    value = options.get(METADATA) if isinstance(options, dict) else None
    return value if isinstance(value, str) and FORM.fullmatch(value) else None


def check_save(folder: str, files: Sequence[str], alone: bool = False) -> None:
    """Refuse weight `files` in `folder` that were not saved together, or not with the config.json in it.

    Args:
        alone: they are to leave the folder without its other variants, so the config.json must be their own.

    Raises:
        ValueError: naming two files whose ids differ.
    """
    ids = {os.path.basename(file): read_id(file) for file in files}
    recorded = _read_config(folder)
    refuse_mixed(folder, ids, None)
    try:
        refuse_mixed(folder, ids, recorded)
    except ValueError:
        # A variant that was saved later, into the same folder, brought a config.json of its own.
        if alone or recorded not in _other_saves(folder, set(ids)):
            raise


def refuse_mixed(where: str, ids: Mapping[str, str | None], recorded: str | None) -> None:
    """Refuse files of different saves: `ids` is {file: id_of its metadata}, `recorded` the id of their config, if there is one.

    Raises:
        ValueError: naming two files whose ids differ.
    """
    found = [(file, id) for file, id in ids.items() if id is not None]
    if recorded is not None:
        found.insert(0, ("config.json", recorded))
    for file, id in found[1:]:
        if id != found[0][1]:
            raise ValueError(
                f"{where}: these files are of different saves; save again: {found[0][0]} ({found[0][1] or 'no id'}) and {file} "
                f"({id or 'no id'}). The last save was interrupted, or files of two models were put into one folder"
            )


def read_id(file: str) -> str | None:
    """The id in the metadata of a safetensors `file`, as `id_of` gives it."""
    with safe_open(file, framework="pt") as tensors:
        return id_of(tensors.metadata())


def _read_config(folder: str) -> str | None:
    """The id that config.json in `folder` holds; None where there is no such file."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            return recorded_id(json.load(file))
    except (OSError, ValueError):  # transformers, which reads it first, says more of a damaged one
        return None


def _other_saves(folder: str, files: set[str]) -> set[str]:
    """The ids of complete saves in `folder` of other variants than `files` are."""
    own = {weight_variant(name) for name in files}
    by_variant: dict[str, dict[str, str | None]] = {}
    for name in os.listdir(folder):
        variant = weight_variant(name)
        path = os.path.join(folder, name)
        if variant is not None and variant not in own and name.endswith(".safetensors") and os.path.isfile(path):
            by_variant.setdefault(variant, {})[name] = read_id(path)
    found = set()
    for ids in by_variant.values():
        total = SHARDS.search(next(iter(ids)))
        if len(set(ids.values())) == 1 and len(ids) == int(total[1] if total else 1):
            found.add(next(iter(ids.values())))
    return {id for id in found if id}
