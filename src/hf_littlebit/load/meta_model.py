"""A model without its weights: from a config to the class that its checkpoint was saved from, and its modules on meta."""

from __future__ import annotations

import copy
import math
import re
import reprlib
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..internals.transformers import empty_of_class, whole_models

LARGEST = 2**63 - 1  # of the numbers in a config
# What a model has one module each of, or its config one name each, and the most of them.
COUNTED = ((re.compile(r"layer|expert|^depth|(^|_)blocks$"), 10_000), (re.compile(r"^num_labels$"), 200_000))
LONGEST_NAME = 128  # characters of a class's name

__all__ = ["check_sizes", "class_names", "empty_model", "model_class", "saved_class", "saved_names"]


def class_names(architectures: Any) -> list[str]:
    """Names of the classes that a checkpoint was saved from: the `architectures` of its config, checked.

    Raises:
        ValueError: if it is something else than a list of names, or absent (None).
    """
    names = architectures
    if names is not None and not (isinstance(names, list | tuple) and all(map(_is_class_name, names))):
        raise ValueError(
            f"the config's architectures is {reprlib.repr(names)}; it must be a list of class names, e.g. "
            '["LlamaForCausalLM"], or be absent'
        )
    return list(names or ())


def _is_class_name(name: Any) -> bool:
    """Whether `name` can be that of a class. A model card puts it into a text and into Python code."""
    return isinstance(name, str) and name.isidentifier() and name.isascii() and len(name) <= LONGEST_NAME


def saved_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The transformers class that a checkpoint of `config` was saved from; None where the config names none."""
    for name in class_names(config.architectures):
        named: Any = getattr(transformers, name, None)
        # Any name may stand there. A class of another model type is passed over, as AutoModel does.
        if not isinstance(named, type) or not issubclass(named, PreTrainedModel):
            continue
        if isinstance(config, named.config_class or object):
            return named
    return None


def model_class(config: PretrainedConfig) -> Any:
    """The class to load a checkpoint of `config` with: the one it was saved from, else a causal LM or bare model.

    Its type is Any because PreTrainedModel and the AutoModel classes have no common one with a `from_pretrained`.
    """
    default = AutoModelForCausalLM if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModel
    return saved_class(config) or default


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The dense model of `config` on meta: all modules, shapes and tied weights, no memory.

    Raises:
        ValueError: if the config describes no model, e.g. because its activation is unknown.
    """
    found = model_class(config)
    check_sizes(config.to_dict())
    config = copy.deepcopy(config)  # a model completes its config
    try:
        with torch.device("meta"), whole_models():
            if issubclass(found, PreTrainedModel):
                return empty_of_class(found, config)
            return found.from_config(config, trust_remote_code=False)
    except ImportError:
        raise  # it names the package that the model's class needs
    except Exception as error:  # Whatever a class of transformers makes of values that it does not expect.
        words = " ".join(str(error).split())
        raise ValueError(
            f"the config describes no {found.__name__} that can be made ({type(error).__name__}: "
            f"{words if len(words) <= 200 else words[:200] + '...'}); restore or download config.json again"
        ) from error


def check_sizes(options: Any, name: str = "config.json") -> None:
    """Refuse numbers in the dict of a config, called `name`, that no model has, before modules are counted by them.

    Raises:
        ValueError: naming the first of them.
    """
    if isinstance(options, dict):
        for key, value in options.items():
            check_sizes(value, str(key))
    elif isinstance(options, list | tuple):
        for value in options:
            check_sizes(value, name)
    elif isinstance(options, int) and abs(options) > next((most for key, most in COUNTED if key.search(name)), LARGEST):
        size = f"{options:,}" if abs(options) < 10**18 else f"a number of {int(math.log10(abs(options))) + 1} digits"
        raise ValueError(
            f"the config's {reprlib.repr(name)} is {size}; no model is that large: restore or download it again"
        )


def saved_names(model: PreTrainedModel) -> set[str] | None:
    """Names of the tensors that a checkpoint of `model.config` holds by its class; None if that is `model`'s, or unknown."""
    found = saved_class(model.config)
    if found is None or isinstance(model, found):
        return None
    return set(empty_model(model.config).state_dict())
