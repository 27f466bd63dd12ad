"""A model without its weights: from a config to the class that its checkpoint was saved from, and its modules on meta."""

from __future__ import annotations

import copy
import reprlib
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..internals.transformers import empty_of_class, whole_models

__all__ = ["class_names", "empty_model", "model_class", "saved_class", "saved_names"]


def class_names(architectures: Any) -> list[str]:
    """Names of the classes that a checkpoint was saved from: the `architectures` of its config, checked.

    Raises:
        ValueError: if it is something else than a list of names, or absent (None).
    """
    names = architectures
    if names is not None and not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        raise ValueError(
            f"the config's architectures is {reprlib.repr(names)}; it must be a list of class names, e.g. "
            '["LlamaForCausalLM"], or be absent'
        )
    return list(names or ())


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
    """The dense model of `config` on meta: all modules, shapes and tied weights, no memory."""
    found = model_class(config)
    config = copy.deepcopy(config)  # a model completes its config
    with torch.device("meta"), whole_models():
        if issubclass(found, PreTrainedModel):
            return empty_of_class(found, config)
        return found.from_config(config, trust_remote_code=False)


def saved_names(model: PreTrainedModel) -> set[str] | None:
    """Names of the tensors that a checkpoint of `model.config` holds by its class; None if that is `model`'s, or unknown."""
    found = saved_class(model.config)
    if found is None or isinstance(model, found):
        return None
    return set(empty_model(model.config).state_dict())
