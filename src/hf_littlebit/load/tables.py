"""The embedding and the output head in 8 or 4 bits: which tables a model has, what is stored of them, and how they are packed.

    plan_tables      the tables of a dense model that a config asks for, or those of a packed model or its file
    place            packed modules in the place of the dense ones, empty or with their parts
    pack_tables      all of a dense model in memory;  unpack_tables makes them dense again

A table is an embedding, a head, or whatever a model ties together: one module owns it, the others read it
(layers/table.py). The file holds `codes` and `scale` under the owner's name, once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import LittleBitConfig
from ..internals.transformers import fp32_modules, tie_again, tied_weights, untie
from ..kernels import quantize_table, table_shapes
from ..layers.table import TABLE_PARTS, PackedTableModule, pack_module, refusal
from ..module_names import aliases, is_named, needs_fp32

__all__ = [
    "DENSE_BITS",
    "TablePlan",
    "Tables",
    "fitted_tables",
    "pack_tables",
    "place",
    "plan_tables",
    "quantized_parts",
    "table_modules",
    "unpack_tables",
]

logger = logging.getLogger("hf_littlebit")
DENSE_BITS = 16  # of a table that stays as it is
REMEDY = "give embedding_bits and head_bits the same value"


@dataclass(frozen=True)
class TablePlan:
    """One table of `rows` x `columns` in `bits` bits, and the modules that read it."""

    owner: str  # the module that holds the parts
    readers: tuple[str, ...]  # the other modules
    rows: int
    columns: int
    bits: int
    scale_dtype: torch.dtype

    @property
    def modules(self) -> tuple[str, ...]:
        return (self.owner, *self.readers)

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the dense weights that it takes the place of."""
        return tuple(f"{module}.weight" for module in self.modules)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """{name of a part in the model: (shape, dtype)}, as the file holds them."""
        found = table_shapes(self.rows, self.columns, self.bits, scale_dtype=self.scale_dtype)
        return {f"{self.owner}.{part}": entry for part, entry in found.items()}

    @property
    def stored_bits(self) -> int:
        """Bits that the file holds for it."""
        return sum(8 * dtype.itemsize * math.prod(shape) for shape, dtype in self.shapes().values())


@dataclass
class Tables:
    """The tables of a model, and why others stay as they are: reason -> (module, weights in it)."""

    tables: list[TablePlan] = field(default_factory=list)
    dense: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)  # options that the model has nothing for

    def by_weight(self) -> dict[str, TablePlan]:
        """{name of a dense weight: the table that takes its place}."""
        return {name: table for table in self.tables for name in table.weights}

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """{name of a part: (shape, dtype)} of all tables."""
        return {name: entry for table in self.tables for name, entry in table.shapes().items()}

    def warnings(self) -> list[str]:
        """What a user must know who asked for packed tables."""
        kept = [
            f"{kept[0][0]} with {sum(numel for _, numel in kept):,} weights stays dense: {reason}."
            for reason, kept in self.dense.items()
        ]
        return kept + [f"{option} has no effect: the model has no such module." for option in self.unused]


def table_modules(model: nn.Module) -> dict[str, PackedTableModule]:
    """{name: module} of all packed embeddings and heads."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedTableModule)}


def plan_tables(
    model: nn.Module,
    config: LittleBitConfig,
    stored: Collection[str] | None = None,
    saved: Collection[str] | None = None,
) -> Tables:
    """The tables of a dense model that `config` asks for, or those that a packed model or its file has.

    A latent model has none until it is packed. What its config asks for then is looked at all the same, so that nothing is
    trained that cannot be packed.

    Args:
        stored: names of the tensors of a packed model or its file; a table is packed if its parts are among them.
        saved: names of the tensors of a dense checkpoint of another class; what it lacks is new and stays dense.

    Raises:
        ValueError: the model ties its embedding and head, and the config gives them different bits.
    """
    plan = Tables()
    held = table_modules(model)
    if held:
        plan.tables = list(_held_tables(held))
        return plan
    if config.embedding_bits == config.head_bits == DENSE_BITS:
        return plan
    prefix = str(getattr(model, "base_model_prefix", ""))
    asked: dict[str, dict[str, int]] = {}  # owner -> option -> bits
    for option, module in (("embedding_bits", _embedding(model)), ("head_bits", _head(model))):
        name = next((name for name, each in model.named_modules() if each is module), None)
        if module is None or name is None or not hasattr(module, "weight"):
            if getattr(config, option) != DENSE_BITS and stored is None:
                plan.unused.append(option)
            continue
        owner = tied_weights(model).get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
        asked.setdefault(owner, {})[option] = getattr(config, option)
    for owner, bits in asked.items():
        readers = tuple(
            target.removesuffix(".weight")
            for target, source in tied_weights(model).items()
            if source == f"{owner}.weight" and target != source
        )
        if stored is not None:
            if config.format == "packed" and any(
                f"{alias}.{TABLE_PARTS[0]}" in stored for alias in aliases(owner, prefix)
            ):
                plan.tables.append(_table(model, owner, readers, min(bits.values()), config))
            continue
        _decide(model, plan, (owner, readers), bits, config, saved)
    if config.format != "packed":
        plan.tables = []
    return plan


def _decide(
    model: nn.Module,
    plan: Tables,
    modules: tuple[str, tuple[str, ...]],
    bits: dict[str, int],
    config: LittleBitConfig,
    saved: Collection[str] | None,
) -> None:
    """Put a table of a dense model, with the options that are for it, into `plan`: packed, or dense with the reason."""
    owner, readers = modules
    names = (owner, *readers)
    if set(bits.values()) == {DENSE_BITS}:
        return
    prefix = str(getattr(model, "base_model_prefix", ""))
    known = [alias for name in names for alias in aliases(name, prefix)]
    if any(is_named(known, pattern) for pattern in config.modules_to_not_convert or ()):
        return
    if len(set(bits.values())) > 1:
        said = " and ".join(f"{option} is {value}" for option, value in bits.items())
        raise ValueError(
            f"{said}, but {type(model).__name__} ties them: {' and '.join(names)} are one table, stored once; {REMEDY}"
        )
    table = _table(model, owner, readers, next(iter(bits.values())), config)
    reason = next((why for name in names if (why := refusal(model.get_submodule(name)))), "")
    if any(needs_fp32(name, fp32_modules(model)) for name in names):
        reason = "the model's code needs it in floats (_keep_in_fp32_modules)"
    elif saved is not None and not any(f"{alias}.weight" in saved for alias in known):
        reason = "the checkpoint's class does not have it, so it is new"
    elif not reason and table.stored_bits >= DENSE_BITS * table.numel:
        reason = "too small to gain from fewer bits"
    if reason:
        plan.dense.setdefault(reason, []).append((owner, table.numel))
    else:
        plan.tables.append(table)


def _table(model: nn.Module, owner: str, readers: tuple[str, ...], bits: int, config: LittleBitConfig) -> TablePlan:
    module: Any = model.get_submodule(owner)
    if module.weight.dim() == 2:
        rows, columns = module.weight.shape
    elif isinstance(module, nn.Embedding):  # ZeRO-3 leaves empty weights behind
        rows, columns = module.num_embeddings, module.embedding_dim
    else:
        rows, columns = module.out_features, module.in_features
    return TablePlan(owner, readers, rows, columns, bits, getattr(torch, config.scale_dtype))


def _held_tables(held: dict[str, PackedTableModule]) -> Iterator[TablePlan]:
    for name, module in held.items():
        if not module.owner:
            readers = tuple(other for other, reader in held.items() if reader.owner and reader.owner[0] is module)
            yield TablePlan(name, readers, module.rows, module.columns, module.table_bits, module.table()[1].dtype)


def _embedding(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    except NotImplementedError:  # models of pictures and sounds have none
        return None


def _head(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


def quantized_parts(
    weight: Tensor, table: TablePlan, config: LittleBitConfig, moment: Tensor | None = None
) -> dict[str, Tensor]:
    """{part: tensor} of a dense weight [rows, columns], on its device.

    Args:
        moment: second moment [columns, columns] of what it is multiplied with (initialize/head_inputs.py), if known.

    Raises:
        ValueError: naming the weight, if it has another shape or values that cannot be quantized.
    """
    name = f"{table.owner}.weight"
    if tuple(weight.shape) != (table.rows, table.columns):
        raise ValueError(
            f"{name} has shape {list(weight.shape)} in the checkpoint, but the model's is {[table.rows, table.columns]}; "
            "the checkpoint belongs to another model"
        )
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(
            f"{name} is {weight.dtype} in the checkpoint; only 16-bit and 32-bit float weights can be quantized. Load the "
            "original checkpoint, not a quantized one"
        )
    source = weight.detach().to(config.svd_device or weight.device)
    try:
        found = quantize_table(source, table.bits, scale_dtype=table.scale_dtype, moment=moment)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return {"codes": found.codes.to(weight.device), "scale": found.scale.to(weight.device)}


def place(model: PreTrainedModel, table: TablePlan, parts: dict[str, Tensor] | None = None) -> None:
    """Put packed modules in the place of those that read `table`; empty ones on meta, or with its `parts`."""
    untie(model, table.weights)
    owner = pack_module(model.get_submodule(table.owner), table.bits, table.scale_dtype)
    for part, value in (parts or {}).items():
        owner.register_buffer(part, value)
        owner.like = nn.Parameter(torch.empty_like(owner.like, device=value.device), requires_grad=False)
    model.set_submodule(table.owner, owner)
    for name in table.readers:
        model.set_submodule(name, pack_module(model.get_submodule(name), table.bits, table.scale_dtype, owner))


def fitted_tables(model: PreTrainedModel, config: LittleBitConfig) -> list[TablePlan]:
    """The tables of a dense or latent `model` that text would help to round, for `config` (of the packed format).

    Those of 4 bits that the head reads: 8 bits lose nothing, and an embedding next to nothing.
    """
    return _fitted(model, plan_tables(model, config).tables)


def _fitted(model: PreTrainedModel, tables: list[TablePlan]) -> list[TablePlan]:
    head = _head(model)
    return [
        table
        for table in tables
        if table.bits == 4 and any(model.get_submodule(name) is head for name in table.modules)
    ]


def pack_tables(model: PreTrainedModel, config: LittleBitConfig, moment: Tensor | None = None) -> None:
    """Quantize the embedding and the head of a `model` in memory in place, as `config` (of the packed format) asks.

    Tables that are packed already stay as they are.

    Args:
        moment: second moment of what the head reads (initialize/head_inputs.py), for which `fitted_tables` are rounded. Without
            one they are for their weights alone, with a warning.

    Raises:
        ValueError: as `plan_tables` and `quantized_parts`, and for tables that are packed already in other bits. Then nothing has
            changed.
    """
    held = table_modules(model)
    if held:
        asked = {config.embedding_bits, config.head_bits}
        name, found = next(
            ((name, table.table_bits) for name, table in held.items() if table.table_bits not in asked), ("", 0)
        )
        if name:
            raise ValueError(
                f"{name} is packed in {found} bits already, but the config asks for embedding_bits={config.embedding_bits} and "
                f"head_bits={config.head_bits}; set these to what is packed, or call model.dequantize() first"
            )
        return
    tables = plan_tables(model, config).tables
    fitted = _fitted(model, tables)
    if fitted and moment is None:
        logger.warning(
            "%s is rounded to 4 bits for its weights alone, which loses several times what it does for text: "
            "pack_model(model, moment=head_moment(model, batches)), or littlebit pack CHECKPOINT --data TEXT",
            fitted[0].owner,
        )
    made = []
    for table in tables:
        weight = model.get_parameter(f"{table.owner}.weight")
        if weight.is_meta:
            raise ValueError(
                f"{table.owner} is offloaded, so it cannot be quantized in place; load the model with device_map='cpu'"
            )
        made.append((table, quantized_parts(weight, table, config, moment if table in fitted else None)))
    for table, parts in made:
        place(model, table, parts)


def unpack_tables(model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
    """Make the packed embedding and head of `model` dense again, in place, and tie them where they read one table.

    Args:
        dtype: of the weights; by default that which the model was cast to.
    """
    held = table_modules(model)
    weights: dict[int, nn.Parameter] = {}
    for name, module in held.items():
        owner = module.owner[0] if module.owner else module
        if id(owner) not in weights:
            weights[id(owner)] = nn.Parameter(owner.dense(dtype or owner.like.dtype))
        model.set_submodule(name, module.dense_module(weights[id(owner)]))
    if held:
        tie_again(model)
