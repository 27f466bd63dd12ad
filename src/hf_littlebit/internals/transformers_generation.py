"""The private doors of transformers' `generate`: its cache, its prompt, and what a step that is recorded has to know.

As in transformers.py, every function is one door, with its reason, and tests/test_internals.py walks through each.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer
from transformers.generation.utils import GenerationMixin

if TYPE_CHECKING:
    from transformers import CompileConfig, PretrainedConfig, PreTrainedModel

__all__ = [
    "PREFILL",
    "PREPARE_CACHE",
    "attention_implementation",
    "cache_request",
    "compile_on_every_device",
    "compiles_whole",
    "has_unknown_state",
    "is_quiet_hook",
    "longest_cache",
    "prompt_request",
    "takes_attention",
]

# Where `generate` makes the cache; a model that has a function of this name on its instance is asked instead of its class.
# `generate` has decided the mode of decoding, the batch and the length by then. Public way: none; cache_implementation in the
# generation config is saved with the model, and holds on every device.
PREPARE_CACHE = "_prepare_cache_for_generation"

# Where `generate` reads the prompt, with the cache made and empty; asked on the instance as well. Public way: none; the prompt
# goes through the model's own call, as everything else does.
PREFILL = "_prefill"

# A class whose module compares the name of its attention with others.
_COMPARED = re.compile(r"_attn_implementation\s*(==|!=|in\b|not in\b)")

# All that a layer of a static cache remembers.
_STATIC_LAYER = {
    *("keys", "values", "cumulative_length", "is_initialized", "max_cache_len", "device", "dtype"),
    *("batch_size", "num_heads", "k_head_dim", "v_head_dim"),
}
_STATIC_STATES: dict[type, set[str]] = {
    StaticLayer: _STATIC_LAYER,
    StaticSlidingWindowLayer: _STATIC_LAYER | {"cumulative_length_int", "_is_croppable"},
}


def attention_implementation(config: PretrainedConfig) -> str | None:
    """The attention in use, e.g. "sdpa" or "eager".

    Public way: `attn_implementation` is an argument of from_pretrained and set_attn_implementation, but nothing public
    returns what was chosen.
    """
    return getattr(config, "_attn_implementation", None)


def takes_attention(model: PreTrainedModel) -> bool:
    """Whether `model` asks AttentionInterface for its attention, whatever its name, and has no parts with choices of their own.

    Public way: set_attn_implementation warns where a class does not ask, and gives all parts the same. Some classes ask, but do
    something else for names that they do not know (DeepSeek-V3.2 leaves its selection of keys out).
    """
    if model.config.sub_configs or not model._can_set_attn_implementation():
        return False
    try:
        source = inspect.getsource(inspect.getmodule(type(model)) or type(model))
    except (OSError, TypeError):  # a class that was typed in
        return False
    return not _COMPARED.search(source)


def compiles_whole(model: PreTrainedModel) -> bool:
    """Whether the model's authors say that its decode step can be compiled whole, and so works on a static cache.

    Public way: none.
    """
    return model._can_compile_fullgraph


def longest_cache(model: PreTrainedModel) -> int:
    """The number of tokens of the longest static cache that `generate` made for this model so far; 0 if it made none.

    It makes no shorter one later, so this counts for the memory that the next one takes. Public way: none.
    """
    return max(0, getattr(model, "_previous_max_cache_length", 0))


def cache_request(model: PreTrainedModel, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """{name: argument} of a call of PREPARE_CACHE on `model` with `args` and `kwargs`, whichever of them have names.

    Known are generation_config, model_kwargs, generation_mode, batch_size and max_cache_length.
    """
    return inspect.signature(getattr(type(model), PREPARE_CACHE)).bind(model, *args, **kwargs).arguments


def prompt_request(model: PreTrainedModel, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """{name: argument} of a call of PREFILL on `model`; None where its class reads prompts in a way of its own.

    Known are input_ids, generation_config, model_kwargs and is_first_iteration.
    """
    plain = getattr(type(model), PREFILL)
    if plain is not getattr(GenerationMixin, PREFILL):
        return None
    bound = inspect.signature(plain).bind(model, *args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def has_unknown_state(layer: Any) -> bool:
    """Whether a layer of a static cache remembers more than what is known of its class.

    A decode step that is replayed runs no Python, so what a layer counts has to be advanced by hand; what is unknown cannot
    be. Public way: none; the attributes of a cache layer are not documented.
    """
    return not vars(layer).keys() <= _STATIC_STATES.get(type(layer), set())


def is_quiet_hook(hook: Any) -> bool:
    """Whether a module's hook is one of those with which transformers collects hidden states and attentions.

    They stay on a model once they were used, and do nothing in a forward that does not ask for them. Public way: none.
    """
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def compile_on_every_device(config: CompileConfig) -> None:
    """Make `generate` compile the decode step on a CPU too, where it leaves `config` aside otherwise.

    Public way: none; without it `--compile` on a CPU would measure eager code.
    """
    config._compile_all_devices = True  # type: ignore[assignment]
