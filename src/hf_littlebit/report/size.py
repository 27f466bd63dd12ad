"""The size of a quantized model: what its file holds, layer by layer, or will hold when it is made.

For a saved or loaded model every number is read off its tensors; from a dense config it is predicted, on meta, without
loading anything. Bits per weight are bits in the file over weights replaced: those of the layers, and those of the whole
model, over all of its weights. What is not replaced (embeddings and output head, if they are not packed as tables; norms,
biases) is counted as stored, or at 16 bits in a prediction.

Units are decimal, 1 GB = 10^9 bytes, as in table 3 of the paper (LittleBit, arXiv 2506.13771). Its figures are 3 to
6 % above these, for two reasons: they add to the dense and the quantized model alike about 0.1 % of the dense one (13 MB
for Llama2-7B) that is in no parameter of the model, and they do not floor ranks to a multiple of 8 (up to 1 %).
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from ..config import LittleBitConfig
from ..internals.transformers import tied_weights
from ..load.conversion import part_shapes
from ..load.meta_model import class_names, empty_model
from ..load.source import Source, find_source, quantization_of
from ..load.tables import TablePlan, Tables, place, plan_tables
from ..load.verify import Header, verify
from ..model_parts import other_senses
from ..module_names import aliases
from ..plan import Plan, plan_model
from ..weight_plan import WeightPlan
from .size_report import LayerSize, SizeReport, TableSize

__all__ = ["size_report"]

DENSE_BYTES = 2
# Bytes of one element, by safetensors' names.
ELEMENT_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4}
ELEMENT_BYTES.update({"U64": 8, "I64": 8, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1})
FLOATS = ("F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64")
PREDICTION = (
    "a prediction: the parts of the replaced layers as they will be stored, and every other parameter at 16 bits. Table 3 of "
    "the LittleBit paper is 3 to 5 % above such figures, mostly because its dense and its quantized sizes alike hold about "
    "0.1 % of the dense size that is no parameter (13 MB of Llama2-7B's 13.49 GB)."
)
SENSES = "vision, audio and projectors"


def size_report(source: Any, config: LittleBitConfig | None = None) -> SizeReport:
    """The size of a quantized model, or of a dense one after quantization by `config`.

    Args:
        source: a quantized model; the folder or Hub id of a saved one (only headers are read); or, with `config`, a
            dense model, or its config, config.json, folder or Hub id (only the config is read).

    Raises:
        ValueError: for a dense source without `config`, a quantized one with it, or a file unlike its config.
    """
    if isinstance(source, nn.Module):
        return _model_report(source, config)
    if isinstance(source, PretrainedConfig):
        source = Source(source.name_or_path or source.model_type, source, quantization_of(source))
    elif not isinstance(source, Source):
        source = find_source(source)
    used = _choose(source.name, source.quantization, config)
    model = empty_model(source.config)
    plan, tables = plan_model(model, used, source.header), plan_tables(model, used, source.header)
    if source.header is None:
        return _report(model, plan, tables, used, _predicted(model, plan, tables, used), measured=False)
    for table in tables.tables:
        place(model, table)
    # The model's dense layers serve: U carries the dense weight's name, so they list the names that the quantized ones have.
    verify(model, plan, used, source.header, tables.shapes())
    return _report(model, plan, tables, used, source.header, measured=True, file_bytes=source.file_bytes)


def _model_report(model: Any, config: LittleBitConfig | None) -> SizeReport:
    quantized = quantization_of(model.config)
    used = _choose(type(model).__name__, quantized, config)
    header = None if quantized is None else _stored(model)
    plan, tables = plan_model(model, used, header), plan_tables(model, used, header)
    if header is None:
        return _report(model, plan, tables, used, _predicted(model, plan, tables, used), measured=False)
    return _report(model, plan, tables, used, header, measured=True)


def _choose(name: str, own: LittleBitConfig | None, given: LittleBitConfig | None) -> LittleBitConfig:
    if own is not None and given is not None:
        raise ValueError(
            f"{name} is quantized already, at {own.bpw:g} bits per weight; leave the options out to see its size"
        )
    if own is None and given is None:
        raise ValueError(f"{name} is a dense model; say how many bits per weight to keep, e.g. bpw=0.55 (--bpw 0.55)")
    return own or given  # type: ignore[return-value]


def _stored(model: Any) -> Header:
    """The tensors that saving `model` writes: each tied weight once."""
    tied = tied_weights(model)
    stored_names = {
        "float16": "F16",
        "bfloat16": "BF16",
        "float32": "F32",
        "float64": "F64",
        "uint8": "U8",
        "bool": "BOOL",
    }
    stored_names.update({f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)})
    return {
        name: (stored_names[str(value.dtype).removeprefix("torch.")], tuple(value.shape), "the model")
        for name, value in model.state_dict().items()
        if name not in tied
    }


def _predicted(model: Any, plan: Plan, tables: Tables, config: LittleBitConfig) -> Header:
    """The tensors that a dense `model` will be saved in, with 16 bits for what is kept."""
    replaced = {weight.name for weight in plan.weights} | tables.by_weight().keys()
    header = {
        name: ("BF16" if stored_dtype in FLOATS else stored_dtype, shape, file)
        for name, (stored_dtype, shape, file) in _stored(model).items()
        if name not in replaced
    }
    by_itemsize = {1: "U8", 2: "BF16", 4: "I32"} if config.format == "packed" else {4: "F32"}
    for weight in plan.weights:
        for name, (shape, dtype) in part_shapes(weight, config).items():
            header[name] = (by_itemsize[dtype.itemsize], shape, "")
    for name, (shape, dtype) in tables.shapes().items():
        header[name] = ({1: "I8", 2: "BF16", 4: "I32"}[dtype.itemsize], shape, "")
    return header


def _report(
    model: Any,
    plan: Plan,
    tables: Tables,
    config: LittleBitConfig,
    header: Header,
    measured: bool,
    file_bytes: int | None = None,
) -> SizeReport:
    parts = {weight.name: list(part_shapes(weight, config)) for weight in plan.weights}
    layers = [_layer(weight, config, header) for weight in plan.weights]
    packed = [_table(table, header, model.base_model_prefix) for table in tables.tables]
    quantized = {name for names in parts.values() for name in names}
    quantized |= {alias for name in tables.shapes() for alias in aliases(name, model.base_model_prefix)}
    rest = {name: entry for name, entry in header.items() if name not in quantized}
    total = sum(_bytes(entry) for entry in header.values())
    quantized_bytes = sum(layer.bytes for layer in layers)
    table_bytes = sum(table.bytes for table in packed)
    weights = sum(table.numel for table in tables.tables) + plan.numel
    weights += sum(math.prod(shape) for _, shape, _ in rest.values())
    warnings = [*plan.warnings(), *tables.warnings()]
    if not measured:
        warnings.append(PREDICTION)
    if config.format == "latent":
        warnings.append(f"the format is latent, for training: packed, the layers take {plan.bpw:.4g} bits per weight.")
    return SizeReport(
        architecture=(class_names(model.config.architectures) or [type(model).__name__])[0],
        format=config.format,
        measured=measured,
        bpw_asked=float(config.bpw or 0),
        bpw=8 * quantized_bytes / plan.numel,
        replaced_weights=plan.numel,
        quantized_bytes=quantized_bytes,
        dense_bytes=total - quantized_bytes - table_bytes,
        total_bytes=total,
        file_bytes=file_bytes,
        original_bytes=DENSE_BYTES * weights,
        dense_parts=_dense_parts(model, rest),
        kv_factor=max((weight.options.factor for weight in plan.weights if weight.options.factor != 1), default=1.0),
        layers=layers,
        tables=packed,
        whole_bpw=8 * total / weights,
        kept=[
            {"reason": reason, "modules": [name for name, _ in kept], "weights": sum(numel for _, numel in kept)}
            for reason, kept in plan.dense.items()
        ],
        warnings=warnings,
    )


def _layer(weight: WeightPlan, config: LittleBitConfig, header: Header) -> LayerSize:
    """One layer's row, measured on its parts in `header`.

    Raises:
        ValueError: if a part is missing or has another size than the plan says.
    """
    total = 0
    for name, (shape, dtype) in part_shapes(weight, config).items():
        if name not in header:
            raise ValueError(
                f"{name} is missing; the checkpoint is incomplete, or it is of another model than its config.json"
            )
        if _bytes(header[name]) != math.prod(shape) * dtype.itemsize:
            stored_dtype, found, file = header[name]
            raise ValueError(
                f"{name} is {stored_dtype} {list(found)} in {file}, but the config (bpw {config.bpw:g}, format "
                f"{config.format!r}) implies {dtype} {list(shape)}; the file is damaged or its config.json was changed"
            )
        total += _bytes(header[name])
    size = (weight.out_features, weight.in_features, weight.count)
    bpw = 8 * total / weight.numel
    return LayerSize(
        weight.module,
        weight.weight,
        *size,
        weight.ranks,
        weight.options.bpw,
        bpw,
        total,
        config.converted_from or weight.options.init,
    )


def _table(table: TablePlan, header: Header, prefix: str) -> TableSize:
    """One table, measured on its parts in `header`."""
    found = [next(header[alias] for alias in aliases(name, prefix) if alias in header) for name in table.shapes()]
    total = sum(map(_bytes, found))
    return TableSize(table.modules, table.rows, table.columns, table.bits, 8 * total / table.numel, total)


def _bytes(entry: tuple[str, tuple[int, ...], str]) -> int:
    return ELEMENT_BYTES[entry[0]] * math.prod(entry[1])


def _dense_parts(model: Any, rest: Header) -> dict[str, int]:
    """Bytes of what is not replaced, by its part in the model; parts without any are left out."""
    parts = dict.fromkeys(("embeddings", "output head", SENSES, "norms, biases and other vectors", "other layers"), 0)
    modules = dict(model.named_modules())
    others = tuple(f"{name}." for name in other_senses(model))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, entry in rest.items():
        owner = modules.get(name.rpartition(".")[0])
        if name.startswith(others):
            part = SENSES
        elif isinstance(owner, nn.Embedding):
            part = "embeddings"
        elif owner is not None and owner is head:
            part = "output head"
        else:
            part = "other layers" if len(entry[1]) > 1 else "norms, biases and other vectors"
        parts[part] += _bytes(entry)
    return {part: size for part, size in parts.items() if size}
