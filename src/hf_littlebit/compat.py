"""What differs between the transformers versions that hf-littlebit runs on, and what is said about other versions."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch
import transformers
from torch import Tensor

__all__ = ["CACHE_NAMES", "check_transformers", "explain_missing", "next_logits", "resolve_dtype"]

logger = logging.getLogger("hf_littlebit")

# The minor versions that the tests have run on, those of constraints-oldest.txt and constraints.txt.
TESTED = ((5, 17), (5, 24))

# transformers names a model's cache the first from 5.24 on, and the second until 5.23. From 5.40 on it forgets the second.
CACHE_NAMES = ("cache", "past_key_values")

# transformers calls these while it loads and saves a model. Ours replace them, and would silently never run without them.
REPLACED = {
    "transformers.quantizers.base.HfQuantizer": (
        "_dequantize",
        "_process_model_after_weight_loading",
        "_process_model_before_weight_loading",
        "adjust_max_memory",
        "get_quantize_ops",
        "get_state_dict_and_metadata",
        "param_element_size",
        "param_needs_quantization",
        "validate_environment",
    ),
    "transformers.modeling_utils.PreTrainedModel": ("_upload_modified_files", "mark_tied_weights_as_initialized"),
}


def _installed_and_tested() -> str:
    """The end of a message: the installed version, the tested ones, and how to get one of these."""
    (_, low), (major, high) = TESTED
    return (
        f"transformers {transformers.__version__} is installed, and this hf-littlebit is tested with {major}.{low} to "
        f"{major}.{high}; pip install 'transformers>={major}.{low},<{major}.{high + 1}', or a newer hf-littlebit"
    )


@contextmanager
def explain_missing() -> Iterator[None]:
    """Turn an import that fails because transformers lacks a name into an ImportError that says which versions have it.

    What other packages lack is reported as it is.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        # An ImportError has the name of a module, an AttributeError the module itself.
        module = error.name if isinstance(error, ImportError) else getattr(error.obj, "__name__", None)
        if (module or "").partition(".")[0] != "transformers":
            raise
        raise ImportError(f"{error}: {_installed_and_tested()}", name=module) from error


@cache
def check_transformers() -> None:
    """Warn, once in a process, about a transformers that is newer than all that were tested.

    Raises:
        RuntimeError: if transformers lacks a method that hf-littlebit replaces.
    """
    for owner, names in REPLACED.items():
        module, _, class_name = owner.rpartition(".")
        with explain_missing():
            found = getattr(import_module(module), class_name)
        for name in names:
            if not hasattr(found, name):
                raise RuntimeError(
                    f"hf-littlebit replaces {class_name}.{name}, which is missing: {_installed_and_tested()}"
                )
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) > TESTED[1]:
        logger.warning("Newer than what was tested: %s if anything fails", _installed_and_tested())


def next_logits(model: Any, tokens: Tensor, past: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Run a causal language model one step further with its cache.

    Args:
        tokens: all tokens so far [rows, length].
        past: the model's cache as this function returned it one token ago, as a keyword argument; empty at first.

    Returns:
        The logits of the token after the last [rows, vocabulary], and `past` for the next step, empty where the model returns
        no cache: then the next step computes all tokens again.

    Raises:
        RuntimeError: if the model did not use the cache that it was given. Its `**kwargs` swallow unknown names in silence,
            and each token would then depend on one token before it only.
    """
    from transformers import Cache

    out = model(input_ids=tokens[:, -1:] if past else tokens, use_cache=True, **past)
    # The keys in a tuple: a transformers that knows both names warns when the output itself is asked for the old one.
    returned = [name for name in CACHE_NAMES if name in tuple(out.keys())]
    state = out[returned[0]] if returned else None
    for name, given in past.items():
        if isinstance(given, Cache) and state is not given:
            instead = "none" if state is None else "another"
            raise RuntimeError(
                f"{type(model).__name__} ignored the cache that it was given as {name!r} and returned {instead}, so its text "
                f"would not follow from its own past: {_installed_and_tested()}"
            )
    # A model that is not part of transformers may accept one name and, through transformers' output class, return the other.
    accepted = [name for name in CACHE_NAMES if name in inspect.signature(model.forward).parameters]
    return out.logits[:, -1], {} if state is None else {(accepted or returned)[0]: state}


def resolve_dtype(dtype: Any) -> torch.dtype:
    """A torch dtype from one, from its name (which configs hold), or float32 from None."""
    if isinstance(dtype, str):
        return getattr(torch, dtype.removeprefix("torch."))
    return torch.float32 if dtype is None else dtype


def float_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that weights are to have, from one or from its name; None stays None.

    Raises:
        ValueError: for what is no floating-point dtype.
    """
    known = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; give a floating-point one, such as torch.bfloat16")
    return known
