"""From the checkpoint of another program to a packed model of ours, layer by layer.

    headers and scales    everything is compared, and a dtype chosen that holds all scales, before a factor is read
    factors               the signs of one layer at a time are unpacked and packed again in our order
    everything else       the tensors as they are

The weight of every layer is the other program's to the last digit, computed in fp64 by its own formula: signs are signs, and
scales are stored in 16 bits only where these hold them all. LittleBit's latent scale is a product of two vectors with twice
the digits, so that its scales take 32 bits here, unless the user asks to round them.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import str_to_torch_dtype

from ...config import LittleBitConfig
from ...internals.transformers import tied_weights
from ...layers.linear import FactorModule
from ...layers.parts import pack_parts
from ...module_names import aliases
from ...option_rules import CONVERTED_DTYPES, MAX_BPW
from ...plan import Plan
from ...weight_plan import WeightPlan
from ..conversion import check_range, part_shapes
from ..form import factor_modules, finish, is_hub_id, replace_modules
from ..meta_model import empty_model
from ..quantizer import LittleBitHfQuantizer
from ..source import UNFIT
from ..verify import Header, verify
from .folder import Folder, checked_json, model_config, read_json
from .layer import FLOATS, ForeignLayer, holds
from .layouts import LITTLEBIT, NANOQUANT, Layout, find_layout, layers_of

__all__ = ["Converted", "convert_foreign"]

logger = logging.getLogger("hf_littlebit")

COMPILED = "_orig_mod."  # what torch.compile puts into names
# Buffers that older transformers saved and a model computes.
COMPUTED = ("rotary_emb.inv_freq", ".masked_bias", ".position_ids")
DTYPE_NAMES = {dtype: name for name, dtype in str_to_torch_dtype.items()}


@dataclass(frozen=True)
class Converted:
    """A packed model, and where it came from."""

    model: PreTrainedModel
    layout: Layout
    layers: int
    scale_dtype: str
    config_folder: str  # which may hold a tokenizer, too
    exact: bool  # no scale was rounded

    @property
    def summary(self) -> str:
        """What was done, in a line for the user."""
        how = "exact" if self.exact else "rounded"
        return f"{self.layers} layers converted from {self.layout.title}; scales in {self.scale_dtype}, {how}"


def convert_foreign(
    source: str,
    base: str | None = None,
    scale_dtype: str | None = None,
    name: str | None = None,
    progress: bool = True,
) -> Converted:
    """The packed model of a checkpoint that LittleBit, NanoQuant, DBF or OneCompression wrote, on the CPU, to be saved.

    Buffers that no file holds stay on meta; a model to compute with is what `from_pretrained` makes of the saved one.

    Args:
        source: folder of safetensors files. base: folder of the original model, whose config and tensors are taken where
            `source` has none.
        scale_dtype: to round scales to; None for the first of bfloat16, float16 and float32 that holds them all.
        name: what the user calls `source`; a Hub id is named in the model card.

    Raises:
        ValueError: for files that are damaged, of no known layout, or of another model than their config, and for layers
            that ours cannot hold, by name.
    """
    folder, dense = Folder(source), Folder(base) if base else None
    config, config_folder = _config(folder, dense)
    layout = find_layout(folder.header, source)
    model = _empty_model(config, config_folder)
    layers = _matched(model, folder, layout)
    _check_settings(folder, layers)
    own = _own_config(layers, layout, scale_dtype, _origin(source, name))
    plan = Plan([_planned(module, layer, own) for module, layer in layers.items()])
    replace_modules(model, plan, own, placeholders=False)
    rest = _place_rest(model, folder, dense, layers)
    header = {tensor: place.header[found] for tensor, (place, found) in rest.items()}
    some_file = next(iter(folder.header.values()))[2]
    verify(model, plan, own, {**_packed_header(plan, own, some_file), **header})
    # Nothing was read so far but scales and sizes; from here on everything fits.
    dtype = getattr(torch, own.scale_dtype)
    with torch.no_grad():
        for tensor, (place, found) in rest.items():
            _set(model, tensor, place.read(found))
        for module, layer in tqdm(layers.items(), desc="converting", unit="layer", disable=not progress):
            packed = model.get_submodule(module)
            assert isinstance(packed, FactorModule), type(packed)
            packed.fill("weight", pack_parts(layer.factors(), dtype))
    model.tie_weights()
    model.config.dtype = _main_dtype(header)
    finish(model, LittleBitHfQuantizer(own))
    _take_generation_config(model, config_folder)
    exact = all(holds(dtype, values) for layer in layers.values() for _, values in _named_scales(layer))
    return Converted(model, layout, len(layers), own.scale_dtype, config_folder, exact)


def _config(folder: Folder, dense: Folder | None) -> tuple[PretrainedConfig, str]:
    """The model's config, and the folder that it is in."""
    place = folder.config_folder or (dense and dense.config_folder)
    if not place:
        raise ValueError(
            f"{folder.path} holds no config.json, which says what the tensors belong to; name the original model with --base"
        )
    config, quantization = model_config(place, len(folder.header) + (len(dense.header) if dense else 0))
    if quantization.get("quant_method") == "littlebit":
        raise ValueError(f"{folder.path} is a checkpoint of hf-littlebit already; load it with from_pretrained")
    if quantization.get("rotated"):
        raise ValueError(
            f"{folder.path} is of a rotated model (quantization_config.rotated), which multiplies inputs by Hadamard matrices; "
            "no layer of ours does: quantize the original model without rotation"
        )
    return config, place


def _empty_model(config: PretrainedConfig, folder: str) -> PreTrainedModel:
    try:
        return empty_model(config)
    except (RuntimeError, AssertionError, ValueError, *UNFIT) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{folder} has a config.json of which no model can be made ({what}); restore it") from error


def _matched(model: PreTrainedModel, folder: Folder, layout: Layout) -> dict[str, ForeignLayer]:
    """{name of a linear layer of the model: the packed layer that it is in the files}.

    Raises:
        ValueError: for packed layers that are none of the model's linear layers, or whose weight is tied to another.
    """
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    tied = tied_weights(model)
    layers: dict[str, ForeignLayer] = {}
    for name, tensors in layers_of(layout, folder.header).items():
        plain = name.replace(COMPILED, "")
        found = [alias for alias in aliases(plain, model.base_model_prefix) if alias in linears]
        if not found and layout.blocks and plain.startswith("blocks."):
            found = [linear for linear in linears if linear.endswith(plain.removeprefix("blocks"))]
        if len(found) != 1:
            raise ValueError(
                f"{folder.path} has a packed layer {name}, but {type(model).__name__} has no such linear layer; its "
                "config.json is of another model, or transformers builds it otherwise today"
            )
        (module,) = found
        if module in layers:
            raise ValueError(f"{folder.path} has one layer as {layers[module].name} and as {name}; leave one of them")
        if f"{module}.weight" in tied:
            raise ValueError(
                f"{folder.path} has a packed layer {name}, whose weight {type(model).__name__} shares with "
                f"{tied[f'{module}.weight']}; set tie_word_embeddings to false in its config.json if they differ"
            )
        size = linears[module].out_features, linears[module].in_features
        layers[module] = ForeignLayer(folder, layout, name, tensors, size)
    return layers


def _check_settings(folder: Folder, layers: Mapping[str, ForeignLayer]) -> None:
    """Compare the layers with what the programs' own config files say of them; without these files, layers may differ.

    Raises:
        ValueError: naming a layer that has a path too few or too many, or no latent scale.
    """
    residual = checked_json(os.path.join(folder.path, "littlebit_config.json")).get("residual")
    mid = checked_json(os.path.join(folder.path, "nanoquant_config.json")).get("admm_type") == "dbf"
    for layer in layers.values():
        if isinstance(residual, bool) and layer.layout is LITTLEBIT and len(layer.paths) != 1 + residual:
            raise ValueError(
                f"{layer.name} has {len(layer.paths)} path(s), but littlebit_config.json says residual {residual}; the "
                "checkpoint is incomplete or mixed: download it again"
            )
        if mid and layer.layout is NANOQUANT and "scale_mid" not in layer.tensors:
            raise ValueError(
                f"{layer.name} has no scale_mid, but nanoquant_config.json says admm_type dbf, which has one; the checkpoint "
                "is incomplete: download it again"
            )


def _own_config(
    layers: Mapping[str, ForeignLayer], layout: Layout, scale_dtype: str | None, base_model: str | None
) -> LittleBitConfig:
    """The config of the packed model: its bits per weight are what its layers take."""
    chosen = scale_dtype or _exact_dtype(layers.values())
    own = LittleBitConfig(
        bpw=MAX_BPW, kv_factor=1.0, scale_dtype=chosen, base_model=base_model, converted_from=layout.name
    )
    for layer in layers.values() if scale_dtype else ():
        for _, values in _named_scales(layer):
            check_range(values.float(), getattr(torch, chosen), layer.name)
    plan = Plan([_planned(module, layer, own) for module, layer in layers.items()])
    own.bpw = min(float(f"{plan.bpw:.4g}"), MAX_BPW)
    return own


def _exact_dtype(layers: Iterable[ForeignLayer]) -> str:
    """The first of CONVERTED_DTYPES that holds every scale of every layer.

    Raises:
        ValueError: naming a layer whose scales none of them holds.
    """
    left = list(CONVERTED_DTYPES)
    for layer in layers:
        for what, values in _named_scales(layer):
            fitting = [name for name in CONVERTED_DTYPES if holds(getattr(torch, name), values)]
            if not fitting:
                raise ValueError(
                    f"{layer.name}: {what} has more digits than {CONVERTED_DTYPES[-1]}, the widest dtype of scales here, so that "
                    f"no layer of ours can hold it exactly; --scale-dtype {CONVERTED_DTYPES[-1]} rounds it"
                )
            left = [name for name in left if name in fitting]
    # float32 holds what bfloat16 and float16 hold, so that it is left wherever anything fits.
    return left[0]


def _named_scales(layer: ForeignLayer) -> Iterator[tuple[str, Tensor]]:
    """(the layout's name for it, fp64 values) of every scale of our paths."""
    for path, scales in zip(layer.paths, layer.scales(), strict=True):
        yield path.scale_out, scales.out
        yield " * ".join(path.scale_rank), scales.rank
        yield path.scale_in, scales.into


def _origin(folder: str, name: str | None) -> str | None:
    """The Hub id of the checkpoint itself, or that of the dense model where the checkpoint names one."""
    if name is not None and is_hub_id(name) and not os.path.exists(name):
        return name
    for file in ("base_model.json", "nanoquant_config.json"):
        found = read_json(os.path.join(folder, file)).get("model_id")
        if isinstance(found, str) and is_hub_id(found) and not os.path.isdir(found):
            return found
    return None


def _planned(module: str, layer: ForeignLayer, config: LittleBitConfig) -> WeightPlan:
    return WeightPlan(module, "weight", *layer.size, layer.ranks, config.for_module(module))


def _packed_header(plan: Plan, config: LittleBitConfig, file: str) -> Header:
    """What the packed layers will be stored in, as if it were in `file` already."""
    parts = {name: entry for weight in plan.weights for name, entry in part_shapes(weight, config).items()}
    return {name: (DTYPE_NAMES[dtype], shape, file) for name, (shape, dtype) in parts.items()}


def _place_rest(
    model: PreTrainedModel, folder: Folder, dense: Folder | None, layers: Mapping[str, ForeignLayer]
) -> dict[str, tuple[Folder, str]]:
    """{name in the model: (folder, name there)} of every tensor that is no part of a packed layer.

    Raises:
        ValueError: for tensors of `folder` that have no place in the model, or another shape or kind of dtype there.
    """
    taken = {tensor for layer in layers.values() for tensor in layer.tensors.values()}
    biases = {f"{module}.bias": layer.tensors["bias"] for module, layer in layers.items() if "bias" in layer.tensors}
    state = model.state_dict()
    parts = {f"{name}.{part}" for name, module in factor_modules(model).items() for part in module.part_dtypes}
    placed = {name: (folder, tensor) for name, tensor in biases.items()}
    homeless = [tensor for name, tensor in biases.items() if name not in state]
    for tensor in folder.header:
        if tensor in taken:
            continue
        name = _name_in(model, tensor, state)
        if name in state and name not in parts:
            placed[name] = (folder, tensor)
        elif not tensor.endswith(COMPUTED):
            homeless.append(tensor)
    if homeless:
        raise ValueError(
            f"{folder.path} holds {len(homeless)} tensor(s) that {type(model).__name__} with its packed layers has no place "
            f"for, e.g. {homeless[0]}; nothing is left out silently: remove them if they have no meaning"
        )
    for tensor in dense.header if dense else ():
        name = _name_in(model, tensor, state)
        if name in state and name not in parts and name not in placed:
            placed[name] = (dense, tensor)  # type: ignore[assignment]
    for name, (place, tensor) in placed.items():
        dtype, shape, file = place.header[tensor]
        if shape != tuple(state[name].shape) or (dtype in FLOATS) != state[name].is_floating_point():
            raise ValueError(
                f"{tensor} is {dtype} {list(shape)} in {file}, but the config implies {state[name].dtype} "
                f"{list(state[name].shape)}; config.json is of another model, or the checkpoint is damaged"
            )
    return placed


def _name_in(model: PreTrainedModel, tensor: str, state: Mapping[str, Tensor]) -> str:
    names = aliases(tensor.replace(COMPILED, ""), model.base_model_prefix)
    return next((name for name in names if name in state), "")


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    """Put `value` where `model` has a parameter or a buffer called `name`, of whatever dtype."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    parameter = leaf in dict(module.named_parameters(recurse=False))
    setattr(module, leaf, nn.Parameter(value, requires_grad=value.is_floating_point()) if parameter else value)


def _main_dtype(header: Header) -> torch.dtype:
    """The dtype of most dense numbers: the embeddings' in a language model. Norms may have another."""
    counts: Counter[str] = Counter()
    for dtype, shape, _ in header.values():
        counts[dtype] += math.prod(shape) * (dtype in FLOATS)
    return str_to_torch_dtype[counts.most_common(1)[0][0]]


def _take_generation_config(model: PreTrainedModel, folder: str) -> None:
    """Give `model` the generation config of `folder`; one that could not be saved is left out, with a warning."""
    if not model.can_generate() or not read_json(os.path.join(folder, "generation_config.json")):
        return
    try:
        found = GenerationConfig.from_pretrained(folder)
        found.validate(strict=True)
    except (ValueError, OSError, *UNFIT) as error:
        reason = " ".join(str(error).split())[:300]
        logger.warning("%s: generation_config.json is left out, since transformers refuses it: %s", folder, reason)
    else:
        model.generation_config = found
