"""SizeReport: the sizes of a quantized model that were found, of all of it and layer by layer, and how they are told."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate

__all__ = ["LayerSize", "SizeReport", "TableSize", "format_bytes"]

INDEX = re.compile(r"\.\d+(?=\.)")


@dataclass(frozen=True)
class LayerSize:
    """One replaced weight: `count` matrices of `out_features x in_features`."""

    module: str
    weight: str
    out_features: int
    in_features: int
    count: int
    ranks: tuple[int, ...]  # one per path
    bpw_asked: float
    bpw: float
    bytes: int
    init: str  # the initialiser, or the layout of another program that the layer was converted from


@dataclass(frozen=True)
class TableSize:
    """One packed embedding, head, or both: a table of `rows` x `columns`, stored once for all `modules` that read it."""

    modules: tuple[str, ...]
    rows: int
    columns: int
    bits: int
    bpw: float  # with the scales
    bytes: int

    @property
    def described(self) -> str:
        """Its shape, bits and size, in words."""
        return f"{self.rows}x{self.columns}, {self.bpw:.4g} bits per weight, {format_bytes(self.bytes)}"


@dataclass(frozen=True)
class SizeReport:
    """What `size_report` found out about a model. Sizes are in bytes; `file_bytes` is None where there is no file."""

    architecture: str
    format: str
    measured: bool  # False for a prediction
    bpw_asked: float
    bpw: float  # over all replaced weights
    replaced_weights: int
    quantized_bytes: int
    dense_bytes: int
    total_bytes: int  # of all tensors
    file_bytes: int | None
    original_bytes: int  # of the whole model at 16 bits per weight
    kv_factor: float = 1.0  # of the ranks of k_proj and v_proj
    dense_parts: dict[str, int] = field(default_factory=dict)
    layers: list[LayerSize] = field(default_factory=list)
    tables: list[TableSize] = field(default_factory=list)  # packed embeddings and heads
    whole_bpw: float = 0.0  # bits of all tensors over all weights of the model, tied ones counted once
    kept: list[dict[str, Any]] = field(default_factory=list)  # layers left dense: reason, modules, weights
    warnings: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """How many times smaller than at 16 bits per weight."""
        return self.original_bytes / (self.file_bytes or self.total_bytes)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {
            **asdict(self),
            "ratio": self.ratio,
            "layers": [{**asdict(x), "ranks": list(x.ranks)} for x in self.layers],
            "tables": [{**asdict(x), "modules": list(x.modules)} for x in self.tables],
        }

    def rows(self) -> list[tuple[str, str]]:
        """The summary as (what, how much)."""
        size = "file size" if self.file_bytes is not None else "size" if self.measured else "predicted size"
        rows = [
            ("bits per weight asked", f"{self.bpw_asked:g}"),
            ("bits per weight, real", f"{self.bpw:.4g}"),
            ("bits per weight of the whole model", f"{self.whole_bpw:.4g}"),
            (size, format_bytes(self.file_bytes or self.total_bytes)),
            ("the same model at 16 bits", f"{format_bytes(self.original_bytes)} ({self.ratio:.1f} times larger)"),
            (
                "replaced layers",
                f"{len(self.layers)}, {self.replaced_weights:,} weights, {format_bytes(self.quantized_bytes)}",
            ),
        ]
        if self.kv_factor != 1:
            rows.insert(2, ("ranks of k_proj and v_proj", f"{self.kv_factor:g} times those of the bits asked"))
        rows += [(f"{table.bits} bits: {' and '.join(table.modules)}", table.described) for table in self.tables]
        return rows + [(f"dense: {part}", format_bytes(size)) for part, size in self.dense_parts.items()]

    def table(self, layers: bool = False, style: str = "plain") -> str:
        """The report as text: the summary, the layers (`layers`: each one, else alike ones together), and the warnings.

        `style` is one of tabulate's table formats, e.g. "plain" or "github".
        """
        head = ["layer", "number", "shape", "ranks", "bpw asked", "bpw real", "size", "init"]
        listing = tabulate(
            _layer_rows(self.layers, layers), head, style if style != "plain" else "simple", disable_numparse=True
        )
        blocks = [tabulate(self.rows(), tablefmt=style, disable_numparse=True), listing]
        return "\n\n".join(blocks + [f"note: {message}" for message in self.warnings])


def format_bytes(count: float) -> str:
    """A decimal size, e.g. "13.48 GB", "0.63 GB", "4.60 MB", "431.20 kB"."""
    for unit, scale, smallest in (("GB", 1e9, 1e8), ("MB", 1e6, 1e6), ("kB", 1e3, 1e3)):
        if count >= smallest:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} bytes"


def _layer_rows(layers: Iterable[LayerSize], each: bool) -> list[list[str]]:
    """Table rows for the layers: one each, or one for all that differ only in the numbers in their names."""
    groups: dict[Any, list[LayerSize]] = {}
    for layer in layers:
        name = layer.module if layer.weight == "weight" else f"{layer.module}.{layer.weight}"
        name = name if each else INDEX.sub(".*", name)
        alike = (name, layer.out_features, layer.in_features, layer.count, layer.ranks, layer.bpw_asked, layer.init)
        groups.setdefault(alike, []).append(layer)
    rows = []
    for (name, out_features, in_features, count, ranks, asked, init), members in groups.items():
        shape = f"{out_features}x{in_features}" + (f" x{count}" if count > 1 else "")
        total = format_bytes(sum(layer.bytes for layer in members))
        text = "+".join(map(str, ranks))
        rows.append([name, str(len(members)), shape, text, f"{asked:g}", f"{members[0].bpw:.4g}", total, init])
    return rows
