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
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..compat import float_dtype
from ..config import LittleBitConfig
from ..initialize.calibration import Importance
from ..internals.deepspeed import is_partitioned
from ..internals.torch import compiled_model
from ..internals.transformers import fp32_modules
from ..layers.experts import LittleBitExperts
from ..layers.linear import FactorModule, LatentLittleBitLinear, LittleBitLinear
from ..layers.parts import LATENT_PARTS, part_name
from ..module_names import needs_fp32
from ..placement import check_device
from ..plan import Plan, plan_model
from ..weight_plan import WeightPlan
from .conversion import factor_weight
from .diverged import refuse_diverged
from .finite import refuse_non_finite
from .form import factor_modules, finish, record, refuse_float64, replace_modules
from .quantizer import LittleBitHfQuantizer
from .source import quantization_of
from .tables import pack_tables, plan_tables, unpack_tables

__all__ = [
    "balance_scales",
    "cast_dense",
    "check_in_memory",
    "factor_modules",
    "latent_model",
    "latents_and_scales",
    "pack_model",
    "pack_modules",
    "put_latents",
    "refuse_latents",
    "unpack_model",
    "unwrapped",
    "weight_ranks",
    "with_format",
]

Model = TypeVar("Model", bound=PreTrainedModel)
logger = logging.getLogger("hf_littlebit")


def latent_model(
    model: Model,
    config: LittleBitConfig,
    device: torch.device | str | None = None,
    progress: bool = True,
    importance: Mapping[str, Importance] | None = None,
) -> Model:
    """Factorize the layers of a dense `model` in place, one after the other, into latent ones; returns it.

    Args:
        config: as for `from_pretrained`; its `format` does not matter.
        device: the one that factorizes where `config.svd_device` names none; by default each weight's own.
        progress: show a progress bar.
        importance: what `calibrate(model, batches)` found for the weights' rows and columns. Weights that it lacks (stacked
            experts, and layers that no token reached) are factorized with all errors counted alike.

    Raises:
        ValueError: for a model that is quantized, offloaded or partitioned, that holds NaN or Inf, and for weights that cannot be
            factorized.
    """
    quantized = quantization_of(model.config)
    if quantized is not None or factor_modules(model):
        raise ValueError("the model has LittleBit layers already; only a dense model can be factorized")
    config = with_format(config, "latent")
    config.svd_device = config.svd_device or (None if device is None else str(device))
    check_device(config.svd_device)
    refuse_float64(model)
    plan, tables, known = plan_model(model, config), plan_tables(model, config), dict(importance or {})
    record(config, plan, model)
    check_in_memory(model, plan)
    refuse_non_finite(model, dense=True)
    for message in (*plan.warnings(), *tables.warnings()):
        logger.warning("%s", message)
    with tqdm(total=len(plan.weights), desc="factorizing", unit="layer", disable=not progress) as bar:
        for name, weights in plan.by_module().items():
            dense = model.get_submodule(name)
            parts: dict[str, Tensor] = {}
            with torch.no_grad():
                for weight in weights:
                    value = getattr(dense, weight.weight).detach()
                    try:
                        parts |= factor_weight(value, weight, config, known.get(weight.name))
                    except ValueError as error:
                        begun = bool(factor_modules(model))
                        again = "; the layers before it are factorized already: load the model again" if begun else ""
                        raise ValueError(f"{error}{again}") from error
                    bar.update()
            put_latents(model, weights, config, parts)
            del dense
    finish(model, LittleBitHfQuantizer(config))
    return model


def put_latents(
    model: nn.Module, weights: Sequence[WeightPlan], config: LittleBitConfig, parts: Mapping[str, Tensor]
) -> None:
    """Put a latent module in the place of the dense one of `model` that holds `weights`, all of one module.

    Args:
        config: of format "latent". parts: {parameter name in the model: tensor}, as `factor_weight` makes them.
    """
    name = weights[0].module
    bias = getattr(model.get_submodule(name), "bias", None)
    replace_modules(model, Plan(list(weights)), config, placeholders=False)
    latent = model.get_submodule(name)
    assert isinstance(latent, FactorModule), type(latent)
    if bias is not None:
        latent.bias = bias
    for weight in weights:
        latent.fill(weight.weight, _parts_of(weight, parts))


def pack_model(model: Model, dtype: torch.dtype | str | None = None, moment: Tensor | None = None) -> Model:
    """Pack every latent layer of `model` in place, one after the other; returns the model, ready to save and share.

    Args:
        dtype: of the parameters that stay dense, e.g. torch.bfloat16. They are trained in fp32, and stay so with None.
        moment: `head_moment(model, batches)` of some text, for which a head of 4 bits (`head_bits=4`) is rounded. That loses a
            fraction of what rounding it for its weights alone does.

    Raises:
        ValueError: if it has no latent layers, or if they are partitioned over devices; for a dtype that is not floating-point;
            and, naming the first, for latents and scales that are not finite, or too large for the stored dtype. Then nothing
            has changed.
    """
    dtype = float_dtype(dtype)
    config = quantization_of(model.config)
    modules = {name: module for name, module in factor_modules(model).items() if module.latent}
    if config is None or not modules:
        raise ValueError("the model has no latent LittleBit layers, so there is nothing to pack")
    refuse_diverged(model)
    pack_tables(model, with_format(config, "packed"), moment)  # first, because it can be refused
    pack_modules(model)
    if dtype is not None:
        cast_dense(model, dtype)
    finish(model, LittleBitHfQuantizer(with_format(config, "packed")))
    return model


def pack_modules(module: nn.Module) -> None:
    """Pack every latent layer inside of `module`, a model or a part of one, in place."""
    with torch.no_grad():
        for name, latent in factor_modules(module).items():
            if latent.latent:
                module.set_submodule(name, latent.pack())


def unpack_model(model: Model) -> Model:
    """Turn every packed layer of `model` into a latent one in place; returns the model, ready for more training.

    The signs and scales stay. Latents are ±0.02, because a packed model remembers no magnitudes.

    Raises:
        ValueError: if it has no packed layers.
    """
    config = quantization_of(model.config)
    modules = {name: module for name, module in factor_modules(model).items() if not module.latent}
    if config is None or not modules:
        raise ValueError("the model has no packed LittleBit layers, so there is nothing to unpack")
    with torch.no_grad():
        for name, module in modules.items():
            model.set_submodule(name, module.unpack())
        unpack_tables(model)
    finish(model, LittleBitHfQuantizer(with_format(config, "latent")))
    return model


def balance_scales(model: nn.Module) -> None:
    """Share the size of every latent weight evenly among its three scales, in place.

    Adam moves all entries by about the learning rate, whatever their size. The initialisers leave scale_out and scale_in at a
    mean of 1 and the weight's size in scale_rank, often 0.001, which the steps that the other two need would throw about. The
    factors are powers of two, so the weight itself stays as it is.
    """
    with torch.no_grad():
        for module in factor_modules(model).values():
            if not module.latent:
                continue
            for weight, ranks in weight_ranks(module).items():
                scale_out, scale_rank, scale_in = (
                    getattr(module, part_name(weight, part)) for part in ("scale_out", "scale_rank", "scale_in")
                )
                for path, ranked in enumerate(scale_rank.split(ranks, dim=-1)):
                    _balance_path(scale_out[..., path, :], ranked, scale_in[..., path, :])


def _balance_path(scale_out: Tensor, scale_rank: Tensor, scale_in: Tensor) -> None:
    """Multiply the scales of one path, each a view, by powers of two whose product is 1."""
    size_out, size_rank, size_in = (
        scale.abs().mean(-1, keepdim=True).clamp_min(1e-30).log2() for scale in (scale_out, scale_rank, scale_in)
    )
    even = (size_out + size_in + size_rank) / 3
    shift_out, shift_in = (even - size_out).round(), (even - size_in).round()
    scale_out.mul_(shift_out.exp2())
    scale_in.mul_(shift_in.exp2())
    scale_rank.mul_((-shift_out - shift_in).exp2())


def latents_and_scales(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable latents (u, v) and scales of all latent layers of `model`."""
    latents: list[nn.Parameter] = []
    scales: list[nn.Parameter] = []
    for module in factor_modules(unwrapped(model)).values():
        if module.latent:
            for weight in weight_ranks(module):
                for part in LATENT_PARTS:
                    value = getattr(module, part_name(weight, part))
                    if value.requires_grad:
                        (latents if part in ("u", "v") else scales).append(value)
    return latents, scales


def refuse_latents(module: nn.Module, state: dict[str, Tensor], *args: Any) -> None:
    """Refuse a latent `state` dict in a packed model: a pre-hook of load_state_dict, where training ended with packing.

    Raises:
        ValueError: if `state` holds a latent for a packed layer, as when that Trainer is asked to resume.
    """
    for name, layer in factor_modules(module).items():
        value = state.get(f"{name}.{next(iter(weight_ranks(layer)))}")
        if value is not None and value.is_floating_point() and not layer.latent:
            raise ValueError(
                "a latent checkpoint cannot be loaded into this model, which was packed when its training ended; make a new "
                "Trainer to resume"
            )


def unwrapped(model: Any) -> Any:
    """The model inside torch.compile's and distributed wrappers."""
    while True:
        inner = compiled_model(model)
        if inner is None and type(model).__name__ in (
            "DistributedDataParallel",
            "FullyShardedDataParallel",
            "DeepSpeedEngine",
        ):
            inner = model.module
        if inner is None:
            return model
        model = inner


def weight_ranks(module: nn.Module) -> dict[str, list[int]]:
    """{weight: rank of each path} of a LittleBit layer, e.g. {"weight": [544, 544]}."""
    if isinstance(module, LittleBitExperts):
        return module.path_ranks
    assert isinstance(module, LittleBitLinear | LatentLittleBitLinear), type(module)
    return {"weight": list(module.ranks)}


def cast_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters outside of LittleBit layers, and the biases in them; what the model's code needs in fp32 stays so."""
    parts = {f"{name}.{part}" for name, module in factor_modules(model).items() for part in module.part_dtypes}
    wanted = fp32_modules(model, dtype)
    for name, value in model.named_parameters():
        if name not in parts and value.is_floating_point() and not needs_fp32(name, wanted):
            value.data = value.data.to(dtype)


def _parts_of(weight: WeightPlan, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{part: tensor} of `weight`, from `parts` by the parameters' names in the model."""
    return {part: parts[f"{weight.module}.{part_name(weight.weight, part)}"] for part in LATENT_PARTS}


def with_format(config: LittleBitConfig, format: str) -> LittleBitConfig:
    config = copy.deepcopy(config)
    config.format = format
    return config


def check_in_memory(model: nn.Module, plan: Plan) -> None:
    """Refuse a model whose weights are elsewhere: in other processes, or offloaded.

    Raises:
        ValueError: naming the first such weight, or DeepSpeed.
    """
    for weight in plan.weights:
        value = model.get_parameter(weight.name)
        if is_partitioned(value):
            raise ValueError(
                "DeepSpeed ZeRO-3 has partitioned the model already, so its layers cannot be factorized; load it with "
                "from_pretrained(..., quantization_config=LittleBitConfig(..., format='latent')), or before TrainingArguments"
            )
        if value.is_meta:
            raise ValueError(
                f"{weight.name} is offloaded, so it cannot be factorized in place; load the model with device_map='cpu'"
            )
