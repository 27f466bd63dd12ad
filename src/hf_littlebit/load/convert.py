"""A whole model changed in place between its three forms: dense, latent (trainable) and packed.

    latent_model    dense -> latent     factorizes layer by layer; each dense weight is freed as soon as it is factored
    pack_model      latent -> packed    exact: signs and scales are the latent model's, and in fp32 so are the logits; bf16
                                        rounds their products at other places
    unpack_model    packed -> latent    exact; to go on training

`from_pretrained` makes the same models while it loads (quantizer.py); these are for models that are in memory.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..config import LittleBitConfig
from ..generate.generation import fast_generate, plain_generate
from ..initialize.calibration import Importance
from ..layers.experts import LittleBitExperts
from ..layers.linear import FactorModule, LatentLittleBitLinear
from ..layers.parts import LATENT_PARTS, part_name
from ..layers.shared_input import share_as_asked
from ..plan import Plan, fp32_modules, needs_fp32, plan_model
from .conversion import factor_weight
from .quantizer import LittleBitHfQuantizer, replace_modules
from .source import HUB_ID, quantization_of

__all__ = [
    "balance_scales",
    "factor_modules",
    "is_latent",
    "latent_model",
    "latents_and_scales",
    "pack_model",
    "refuse_latents",
    "unpack_model",
    "unwrapped",
    "weight_ranks",
]

logger = logging.getLogger("hf_littlebit")


def factor_modules(model: nn.Module) -> dict[str, Any]:
    """{name: module} of all LittleBit layers, latent or packed."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FactorModule)}


def is_latent(module: FactorModule) -> bool:
    """True for a layer on latents, False for a packed one."""
    return module.latent if isinstance(module, LittleBitExperts) else isinstance(module, LatentLittleBitLinear)


def latent_model(
    model: Any,
    config: LittleBitConfig,
    device: Any = None,
    progress: bool = True,
    importance: Mapping[str, Importance] | None = None,
) -> Any:
    """Factorize the layers of a dense `model` in place, one after the other, into latent ones; returns it.

    Args:
        config: as for `from_pretrained`; its `format` does not matter.
        device: that factorizes, if neither `config.svd_device` nor the weight's own is to.
        importance: of the weights' rows and columns, by name, from `calibrate(model, batches)`; weights that it lacks
            (stacked experts, and layers that no token reached) are factorized with all errors counted alike.

    Raises:
        ValueError: for a model that is quantized, offloaded or partitioned, and for weights that cannot be factorized.
    """
    quantized = quantization_of(model.config)
    if quantized is not None or factor_modules(model):
        raise ValueError("the model has LittleBit layers already; only a dense model can be factorized")
    config = _with_format(config, "latent")
    config.svd_device = config.svd_device or (None if device is None else str(device))
    source = getattr(model.config, "name_or_path", "") or ""
    if config.base_model is None and HUB_ID.fullmatch(source) and not os.path.isdir(source):
        config.base_model = source
    plan, known = plan_model(model, config), dict(importance or {})
    plan.settle(config)
    _check_in_memory(model, plan)
    for message in plan.warnings():
        logger.warning("%s", message)
    with torch.no_grad(), tqdm(total=len(plan.weights), desc="factorizing", unit="layer", disable=not progress) as bar:
        for name, weights in plan.by_module().items():
            dense = model.get_submodule(name)
            parts: dict[str, torch.Tensor] = {}
            for weight in weights:
                parts |= factor_weight(getattr(dense, weight.weight).detach(), weight, config, known.get(weight.name))
                bar.update()
            replace_modules(model, Plan(weights), config, placeholders=False)
            latent = model.get_submodule(name)
            if getattr(dense, "bias", None) is not None:
                latent.bias = dense.bias
            for weight in weights:
                latent.fill(weight.weight, _of(weight, parts))
            del dense
    _mark(model, config)
    return model


def pack_model(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Pack every latent layer of `model` in place, one after the other; returns the model, ready to save and share.

    Args:
        dtype: of the parameters that stay dense, which are trained in fp32 and saved as they are; None leaves them.

    Raises:
        ValueError: if it has no latent layers, or if they are partitioned over devices.
    """
    config = quantization_of(model.config)
    modules = {name: module for name, module in factor_modules(model).items() if is_latent(module)}
    if config is None or not modules:
        raise ValueError("the model has no latent LittleBit layers, so there is nothing to pack")
    with torch.no_grad():
        for name, module in modules.items():
            twin = module.pack()
            for part, parameter in twin.named_parameters(recurse=False):
                parameter.requires_grad_(part == "bias" and parameter.requires_grad)
            model.set_submodule(name, twin)
        if dtype is not None:
            _cast_dense(model, dtype)
    _mark(model, _with_format(config, "packed"))
    return model


def unpack_model(model: Any) -> Any:
    """Turn every packed layer of `model` into a latent one in place; returns the model, ready for more training.

    The signs and scales stay. Latents are ±0.02, because a packed model remembers no magnitudes.

    Raises:
        ValueError: if it has no packed layers.
    """
    config = quantization_of(model.config)
    modules = {name: module for name, module in factor_modules(model).items() if not is_latent(module)}
    if config is None or not modules:
        raise ValueError("the model has no packed LittleBit layers, so there is nothing to unpack")
    with torch.no_grad():
        for name, module in modules.items():
            model.set_submodule(name, module.unpack())
    _mark(model, _with_format(config, "latent"))
    return model


def balance_scales(model: nn.Module) -> None:
    """Share the size of every latent weight evenly among h, l and g, in place, by powers of two: the weight stays as it is.

    Adam moves all entries by about the learning rate, whatever their size. The initialisers leave mean|h| = mean|g| = 1 and
    the weight's size in l, often 0.001, which the steps that h and g need would throw about.
    """
    with torch.no_grad():
        for module in factor_modules(model).values():
            if not is_latent(module):
                continue
            for weight, ranks in weight_ranks(module).items():
                h, l, g = (getattr(module, part_name(weight, part)) for part in LATENT_PARTS[2:])  # noqa: E741
                for path, l_path in enumerate(l.split(ranks, dim=-1)):
                    sides = h[..., path, :], g[..., path, :]
                    outer, inner, rank = (
                        x.abs().mean(-1, keepdim=True).clamp_min(1e-30).log2() for x in (*sides, l_path)
                    )
                    even = (outer + inner + rank) / 3
                    shifts = (even - outer).round(), (even - inner).round()
                    for side, shift in zip(sides, shifts, strict=True):
                        side.mul_(shift.exp2())
                    l_path.mul_((-shifts[0] - shifts[1]).exp2())


def latents_and_scales(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable latents (U, V) and scales (h, l, g) of all latent layers of `model`."""
    latents: list[nn.Parameter] = []
    scales: list[nn.Parameter] = []
    for module in factor_modules(unwrapped(model)).values():
        if is_latent(module):
            for weight in weight_ranks(module):
                for part in LATENT_PARTS:
                    value = getattr(module, part_name(weight, part))
                    if value.requires_grad:
                        (latents if part in ("u", "v") else scales).append(value)
    return latents, scales


def refuse_latents(module: Any, state: dict[str, Tensor], *args: Any) -> None:
    """Before a state dict is loaded into a model that was packed at the end of its training."""
    for name, layer in factor_modules(module).items():
        value = state.get(f"{name}.{next(iter(weight_ranks(layer)))}")
        if value is not None and value.is_floating_point() and not is_latent(layer):
            raise ValueError(
                "a latent checkpoint cannot be loaded into this model, which was packed when its training ended; make a new "
                "Trainer to resume"
            )


def unwrapped(model: Any) -> Any:
    """The model inside torch.compile's and distributed wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in (
            "DistributedDataParallel",
            "FullyShardedDataParallel",
            "DeepSpeedEngine",
        ):
            inner = model.module
        if inner is None:
            return model
        model = inner


def weight_ranks(module: Any) -> dict[str, list[int]]:
    """{weight: rank of each path} of a LittleBit layer."""
    return module.path_ranks if isinstance(module, LittleBitExperts) else {"weight": list(module.ranks)}


def _cast_dense(model: Any, dtype: torch.dtype) -> None:
    """Parameters outside of LittleBit layers, and the biases in them; what the model's code needs in fp32 stays so."""
    parts = {f"{name}.{part}" for name, module in factor_modules(model).items() for part in module.part_dtypes}
    wanted = fp32_modules(model)
    for name, value in model.named_parameters():
        if name not in parts and value.is_floating_point() and not needs_fp32(name, wanted):
            value.data = value.data.to(dtype)


def _of(weight: Any, parts: dict[str, Any]) -> dict[str, Any]:
    return {kind: parts[f"{weight.module}.{part_name(weight.weight, kind)}"] for kind in LATENT_PARTS}


def _with_format(config: LittleBitConfig, format: str) -> LittleBitConfig:
    config = copy.deepcopy(config)
    config.format = format
    return config


def _mark(model: Any, config: LittleBitConfig) -> None:
    """Make `model` one that `from_pretrained` could have returned: saved, shared and checked as such."""
    model.hf_quantizer = LittleBitHfQuantizer(config, pre_quantized=True)
    model.hf_quantizer.plan = plan_model(model, config, stored=model.state_dict().keys())
    model.config.quantization_config = model.hf_quantizer.quantization_config
    model.is_quantized = True
    model.quantization_method = config.quant_method
    # Saved under the names they have; see quantizer.py.
    model._weight_conversions = []
    model._upload_modified_files = partial(model.hf_quantizer.upload_files, model)
    if config.format == "packed":
        fast_generate(model)
        share_as_asked(model, config.share_inputs)
    else:
        plain_generate(model)


def _check_in_memory(model: nn.Module, plan: Plan) -> None:
    for weight in plan.weights:
        value = model.get_parameter(weight.name)
        if hasattr(value, "ds_id"):
            raise ValueError(
                "DeepSpeed ZeRO-3 has partitioned the model already, so its layers cannot be factorized; load it with "
                "from_pretrained(..., quantization_config=LittleBitConfig(..., format='latent')), or before TrainingArguments"
            )
        if value.is_meta:
            raise ValueError(
                f"{weight.name} is offloaded, so it cannot be factorized in place; load the model with device_map='cpu'"
            )
