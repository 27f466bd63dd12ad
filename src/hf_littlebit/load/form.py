"""What makes a model a LittleBit model. Every way to one ends here, so that all of them end in the same place:

    from_pretrained    a dense checkpoint that is quantized while it is read, or a saved model    (quantizer.py)
    latent_model       dense -> latent, in memory                                                 (convert.py)
    pack_model         latent -> packed
    unpack_model       packed -> latent

A model has a form when

    replace_modules    has swapped its layers for LittleBit layers,
    record             has written into its config what is saved besides the user's options, and
    finish             has given it what transformers and the forward look for: the quantizer, the output head, how it is saved
                       and shared, and for a packed model shared inputs and faster generation.

`make_dense` takes all of it away again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..config import LittleBitConfig
from ..generate.generation import fast_generate, plain_generate
from ..internals.transformers import (
    mark_quantized,
    plain_saving,
    save_through,
    save_under_held_names,
    unmark_quantized,
    upload_through,
)
from ..layers.experts import LittleBitExperts
from ..layers.linear import FactorModule, LatentLittleBitLinear, LittleBitLinear
from ..layers.output_head import attach_head, detach_head
from ..layers.shared_input import share_as_asked
from ..plan import Plan, plan_model
from .finite import refuse_overflow
from .resize import resize_tables
from .saving import save_whole
from .tables import table_modules, unpack_tables

__all__ = [
    "Quantizer",
    "base_model",
    "factor_modules",
    "finish",
    "is_hub_id",
    "make_dense",
    "record",
    "refuse_float64",
    "replace_modules",
]

logger = logging.getLogger("hf_littlebit")

NAMELESS = "None"  # the name that from_pretrained(None, state_dict=...) gives a model


class Quantizer(Protocol):
    """What `finish` needs of LittleBitHfQuantizer, which stands above this file."""

    quantization_config: LittleBitConfig
    pre_quantized: bool
    plan: Plan | None
    upload_files: ClassVar[Callable[..., Any]]


def factor_modules(model: nn.Module) -> dict[str, Any]:
    """{name: module} of all LittleBit layers, latent or packed."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FactorModule)}


def replace_modules(model: nn.Module, plan: Plan, config: LittleBitConfig, placeholders: bool) -> None:
    """Swap the planned modules of `model` for empty LittleBit ones on meta.

    With `placeholders` each keeps its dense weight on meta under the name of U, so that a dense checkpoint finds it.
    """
    latent = config.format == "latent"
    scale_dtype = getattr(torch, config.scale_dtype)
    for name, weights in plan.by_module().items():
        old = model.get_submodule(name)
        new: FactorModule
        if isinstance(old, nn.Linear):
            bias_dtype = None if old.bias is None else old.bias.dtype
            layer_class = LatentLittleBitLinear if latent else LittleBitLinear
            bias = old.bias is not None
            new = layer_class(
                old.in_features, old.out_features, weights[0].ranks, bias, "meta", bias_dtype, scale_dtype
            )
        else:
            new = LittleBitExperts(
                old, {weight.weight: weight.ranks for weight in weights}, latent, "meta", scale_dtype
            )
        if placeholders:
            for weight in weights:
                dense = getattr(old, weight.weight).detach().to("meta")
                new.register_parameter(weight.weight, nn.Parameter(dense, requires_grad=False))
        model.set_submodule(name, new.train(old.training))


def base_model(config: PretrainedConfig) -> str | None:
    """The Hub id of the model that `config` was read with, e.g. "org/name"; None for a folder and for no name at all."""
    name = getattr(config, "name_or_path", "") or NAMELESS
    return name if name != NAMELESS and is_hub_id(name) and not os.path.isdir(name) else None


def is_hub_id(name: str) -> bool:
    """Whether `name` can be a repository's: org/name, or the name alone of the Hub's oldest models."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def refuse_float64(model: PreTrainedModel) -> None:
    """Refuse a model in float64, which no product with packed bits computes in, before work is done for it.

    Raises:
        ValueError: with the way out.
    """
    if model.dtype == torch.float64:
        raise ValueError(
            "the model is in float64, but LittleBit layers compute in float32, bfloat16 or float16; load it with "
            "dtype=torch.float32 (--dtype float32), or call model.float()"
        )


def record(config: LittleBitConfig, plan: Plan, model: PreTrainedModel) -> None:
    """Write into `config`, which is to be saved, what quantizing the dense `model` by `plan` has found out.

    That is the kv_factor, where it was automatic, the ranks, where bits were shared out, and the base model, where the user
    named none.
    """
    plan.record(config)
    if config.base_model is None:
        config.base_model = base_model(model.config)


def finish(model: PreTrainedModel, quantizer: Quantizer) -> None:
    """Make `model`, whose layers hold their values, what every way to a model of `quantizer`'s config returns.

    Call it again whenever the form changes, with a quantizer of the new config.
    """
    config = quantizer.quantization_config
    quantizer.pre_quantized = True
    quantizer.plan = plan_model(model, config, stored=model.state_dict().keys())
    instance: Any = model  # what follows are attributes of this one model, which its class does not declare
    instance.hf_quantizer = quantizer
    instance.is_quantized = True
    instance.quantization_method = config.quant_method
    instance.config.quantization_config = config
    for part in _parts_with_configs(model):
        mark_quantized(part.config)
    save_under_held_names(model)
    save_through(model, save_whole)
    upload_through(model, quantizer.upload_files)
    vars(model).pop("resize_token_embeddings", None)
    for table in table_modules(model).values():
        table.holder().like.requires_grad_(False)  # as transformers does not leave it
    if table_modules(model):
        instance.resize_token_embeddings = partial(resize_tables, model)
    attach_head(model)
    if config.format == "packed":
        for module in factor_modules(model).values():
            for name in module.part_dtypes:
                module.get_parameter(name).requires_grad_(False)
        if not share_as_asked(model, config.share_inputs) and config.share_inputs:
            logger.warning("share_inputs: no packed layers of this model are called like layers with one input")
        fast_generate(model)
    else:
        plain_generate(model)


def make_dense(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Turn `model` into an ordinary model of its class in place, saved and shared as its class does.

    The quantizer and the config's quantization_config stay; transformers takes them away after this.

    Args:
        dtype: of the replaced weights, and of all parameters that have the model's own dtype. What a model keeps in another
            one (norms in fp32, say) stays there.

    Raises:
        ValueError: if a layer is offloaded, or if values leave the range of `dtype`; then nothing has changed.
    """
    modules = factor_modules(model)
    for name, module in modules.items():
        if any(value.is_meta for value in module.parameters(recurse=False)):
            raise ValueError(
                f"{name} is offloaded, so the model cannot be dequantized in place; load it with device_map='cpu'"
            )
    for name, table in table_modules(model).items():
        if any(part.is_meta for part in table.table()):
            raise ValueError(
                f"{name} is on meta, so the model cannot be dequantized in place; load it with device_map='cpu'"
            )
    parts = {id(value) for module in modules.values() for value in module.parameters(recurse=False)}
    others = [value.dtype for value in model.parameters() if id(value) not in parts and value.is_floating_point()]
    former = next(iter(others), dtype)
    refuse_overflow(model, dtype, former)
    for name, module in modules.items():
        model.set_submodule(name, _dense_module(module, dtype))
    unpack_tables(model, dtype)
    for parameter in model.parameters():
        if parameter.dtype == former:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    detach_head(model)
    plain_generate(model)
    plain_saving(model)
    vars(model).pop("resize_token_embeddings", None)
    for part in _parts_with_configs(model):
        unmark_quantized(part.config)


def _dense_module(module: LittleBitExperts | LittleBitLinear | LatentLittleBitLinear, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, LittleBitExperts):
        return module.dense_module(dtype)
    with torch.device("meta"):
        dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, dtype=dtype)
    dense.weight = nn.Parameter(module.dense(dtype))
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.detach().to(dtype))
    return dense.train(module.training)


def _parts_with_configs(model: nn.Module) -> list[PreTrainedModel]:
    """`model` and the models inside it, which may have configs of their own, as those of pictures and text do."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]
