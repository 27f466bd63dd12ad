"""What the parts of a model are for: its heads, its routers, and in a model of several senses what is not its text model.

They are found by structure, because class names differ from model to model:

    heads        the output head, whatever is tied to another weight, and the last module
    routers      linear layers that choose experts: those in a module of a Router class, and those with as many outputs as
                 the config counts experts that stand beside experts, or are called or held by what is called like a router
    senses       a composite model has a config for each part, e.g. text_config and vision_config. Its text models are the
                 parts whose configs are called so, or which read tokens; other parts are vision towers, audio encoders and
                 the like, and what belongs to no part is what joins them: projectors

A model of one config is no composite, whatever it reads: ViT and Whisper have no other part to quantize.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .internals.transformers import tied_weights
from .weight_reads import read_weights

__all__ = ["dense_parts", "kept_modules", "other_senses", "routers"]

# Why a part stays dense by default.
OTHER_SENSE = "they are a vision tower, an audio encoder or a projector (text_only=False quantizes these too)"
ROUTER = "they choose experts"
READ = "the model's code reads their weight itself, and would find bits"

COUNTS = re.compile(r".*expert")  # attributes of a config that count experts ...
NO_COUNTS = re.compile(r".*(size|dim|hidden|per_tok|top_?k|layer|capacity|freq|interval|step|period)")  # ... and others
ROUTER_CLASS = re.compile(r".*Router")
# Names of router layers and of their holders, and classes of these; a gated MLP ("GatedMLP") is none.
ROUTING = re.compile(r"(?i:router|gate|gating|classifier|wg|switch)$|.*(Router|Gat(e|ing))(?![a-z])")
TEXT = re.compile(r".*(text|decoder|generator|language|llm|talker)")  # names of configs of text models
# Names of layers that turn pictures or sound into what a text model reads, where they stand in the text model itself.
SENSES = re.compile(
    r"(^|.*[._])(vision|visual|image|img|audio|speech|video|multi_?modal|mm|projector|connector|merger|q_?former|resampler)(_|\.|$)"
)


def kept_modules(model: nn.Module) -> set[str]:
    """Names of the modules that stay dense in any model: the output head, tied weights, and the last module (a task's head)."""
    tied = tied_weights(model)
    parameters = {*tied, *tied.values(), list(model.named_parameters())[-1][0]}
    modules = {name.rpartition(".")[0] for name in parameters}
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return modules | {name for name, module in model.named_modules() if head is not None and module is head}


def dense_parts(model: nn.Module, text_only: bool) -> dict[str, set[str]]:
    """{reason: names of the modules that stay dense for it} of a model, beside its heads.

    Args:
        text_only: leave what is not the text model of a composite dense.
    """
    others = tuple(f"{name}." for name in other_senses(model)) if text_only else ()
    return {
        OTHER_SENSE: {name for name, _ in model.named_modules() if f"{name}.".startswith(others)},
        ROUTER: routers(model),
        READ: read_weights(model),
    }


def routers(model: nn.Module) -> set[str]:
    """Names of the linear layers that choose experts."""
    counts = _expert_counts(getattr(model, "config", None))
    modules = dict(model.named_modules())
    inside: tuple[str, ...] = ()
    found: set[str] = set()
    for name, module in modules.items():
        if ROUTER_CLASS.match(type(module).__name__) and not any(
            _is_experts(each) for each, _ in module.named_modules()
        ):
            inside = (*inside, f"{name}.")
        if not isinstance(module, nn.Linear):
            continue
        parent, _, own = name.rpartition(".")
        holder = modules.get(parent, model)
        called = ROUTING.match(own) or ROUTING.match(parent.rpartition(".")[2]) or ROUTING.match(type(holder).__name__)
        beside = any(_is_experts(each) for each, _ in holder.named_children())
        if name.startswith(inside) or (module.out_features in counts and (called or beside)):
            found.add(name)
    return found


def _is_experts(name: str) -> bool:
    return name.rpartition(".")[2] == "experts"


def _expert_counts(config: Any) -> set[int]:
    """Every number of experts in a config and its parts, and sums of two of one config: some count idle experts apart."""
    found: set[int] = set()
    for each in _configs(config):
        own = {
            value
            for name, value in vars(each).items()
            if isinstance(value, int) and value > 1 and COUNTS.match(name) and not NO_COUNTS.match(name)
        }
        found |= own | {a + b for a, b in combinations(sorted(own), 2)}
    return found


def _configs(config: Any) -> Iterator[Any]:
    """A config and the configs in it."""
    if config is not None and hasattr(config, "__dict__"):
        yield config
        for value in list(vars(config).values()):
            if hasattr(value, "model_type"):
                yield from _configs(value)


def other_senses(model: nn.Module) -> list[str]:
    """Names of the modules of a composite model that are outside of its text models: towers, encoders, projectors.

    A module's name stands for all that is in it. Empty for a model of one part, and where all parts read text.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel) or not _part_configs(config):
        return []
    parts = {"": ""}  # name of a part -> "text", "tower", or "" for one that has parts itself
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or not name:
            continue
        around = next(each for each in _prefixes(name) if each in parts)
        own, holder = module.config, model.get_submodule(around).config if around else config
        keys = [key for key, part in _part_configs(holder).items() if type(part) is type(own)]
        if parts[around] or type(own) is type(holder) or not keys:
            continue
        if _part_configs(own):
            parts[name] = ""
        else:
            parts[name] = "text" if any(_is_text(key, module) for key in keys) else "tower"
    found = [name for name, kind in parts.items() if kind == "tower"]
    configs = {name: model.get_submodule(name).config for name, kind in parts.items() if not kind}
    joined = {name for name, own in configs.items() if found and not _is_text_itself(own)}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        around = next(each for each in _prefixes(name) if each in parts)
        outside = isinstance(module, nn.Linear) and module is not head and parts[around] == ""
        if outside and (around in joined or SENSES.match(name)):
            found.append(name)
    return found


def _is_text_itself(config: Any) -> bool:
    """Whether the config of a composite is also that of its text model: its layers are then not in a part of their own."""
    try:
        return config.get_text_config() is config
    except ValueError:  # there are several, e.g. an encoder's and a decoder's
        return False


def _prefixes(name: str) -> Iterator[str]:
    """`name`, and the names of the modules around it, the nearest first."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _part_configs(config: Any) -> dict[str, Any]:
    """{name: config} of the parts of a composite config."""
    names = getattr(type(config), "sub_configs", None) or {}
    return {name: getattr(config, name) for name in names if hasattr(getattr(config, name, None), "model_type")}


def _is_text(key: str, module: PreTrainedModel) -> bool:
    """Whether a part with the config called `key` is a text model."""
    if TEXT.match(key):
        return True
    senses = getattr(module, "input_modalities", "text")
    size = getattr(module.config, "vocab_size", None)
    tokens = any(isinstance(each, nn.Embedding) and each.num_embeddings == size for each in module.modules())
    return ((senses,) if isinstance(senses, str) else tuple(senses)) == ("text",) and tokens
