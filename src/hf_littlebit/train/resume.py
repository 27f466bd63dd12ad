"""Going on with a training that was interrupted: from which checkpoint, and whether it is still the same training."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..load.tables import table_modules
from ..placement import stored_parameters

__all__ = ["OPTIONS", "fingerprint", "keep_options", "kept_options", "last_checkpoint", "model_fingerprint"]

logger = logging.getLogger("hf_littlebit")
STATE = "trainer_state.json"  # the last file that Trainer writes of a checkpoint
OPTIONS = "options.json"


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint-* folder in `folder`; None if there is none.

    A process that is killed while it saves leaves a checkpoint that Trainer cannot read, and takes for the last one. Those
    are passed over with a warning.
    """
    if not os.path.isdir(folder):
        return None
    steps = [name[11:] for name in os.listdir(folder) if name.startswith("checkpoint-")]
    for step in sorted((int(step) for step in steps if step.isdigit()), reverse=True):
        checkpoint = os.path.join(folder, f"checkpoint-{step}")
        if _is_complete(checkpoint):
            return checkpoint
        logger.warning("%s is passed over: it was not written to its end.", checkpoint)
    return None


def _is_complete(checkpoint: str) -> bool:
    """True if the last file that Trainer writes can be read, and no file is empty, as a kill or a full disk leaves one.

    Texts may be: a tokenizer without merges has a merges.txt of nothing.
    """
    try:
        with open(os.path.join(checkpoint, STATE), encoding="utf-8") as file:
            json.load(file)
    except (OSError, ValueError):
        return False
    files = [os.path.join(root, name) for root, _, names in os.walk(checkpoint) for name in names]
    return all(os.path.getsize(file) > 0 for file in files if not file.endswith(".txt"))


def keep_options(folder: str, options: Mapping[str, Any], resumed: bool, main: bool = True) -> None:
    """Write what a training is made of to `folder` when it starts, and compare when it goes on; `main` writes.

    Raises:
        ValueError: if an option of a resumed training has another value than at its start.
    """
    file = os.path.join(folder, OPTIONS)
    if not resumed:
        if main:
            os.makedirs(folder, exist_ok=True)
            with open(file + ".part", "w", encoding="utf-8") as stream:
                json.dump(dict(options), stream, indent=1)
            os.replace(file + ".part", file)
        return
    first = kept_options(folder)
    for option, value in json.loads(json.dumps(dict(options))).items():
        if option in first and first[option] != value:
            if option.startswith("the ") and isinstance(value, str | None):  # a fingerprint says nothing to a user
                raise ValueError(
                    f"this work was started with another {option[4:]}; give that one, or start anew in another --out"
                )
            raise ValueError(
                f"this work was started with {option} {first[option]!r}, and is to be resumed with {value!r}; give the "
                "first value, or start anew in another --out"
            )


def kept_options(folder: str) -> dict[str, Any]:
    """What `keep_options` wrote when a training started; nothing where it did not, in a version before it."""
    file = os.path.join(folder, OPTIONS)
    if not os.path.isfile(file):
        return {}
    with open(file, encoding="utf-8") as stream:
        return dict(json.load(stream))


def fingerprint(tokens: Tensor) -> str:
    """A short name of `tokens`, on the CPU and of any shape and integer dtype."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()[:16]


def model_fingerprint(model: Any) -> bytes:
    """A short name of a model: of its config and a slice of every parameter and packed table."""
    digest = hashlib.blake2b(digest_size=8)
    config = json.loads(model.config.to_json_string())
    config.pop("transformers_version", None)  # of the library that runs, and not the model's
    digest.update(json.dumps(config, sort_keys=True).encode())
    tables = (part for table in table_modules(model).values() for part in table.table())
    for value in itertools.chain(stored_parameters(model), tables):
        digest.update(value.flatten()[:64].float().cpu().numpy().tobytes())
    return digest.digest()
