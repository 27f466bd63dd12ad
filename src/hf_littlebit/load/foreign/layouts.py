"""The layouts of other programs that hold what our layers hold: names of tensors, and how signs are packed.

Each layer of each of them stands for the sum over its paths of

    diag(scale_out) U diag(scale_rank) V diag(scale_in)          U [out, rank] and V [rank, in] of signs

with scale_rank a product of as many vectors as the layout has for it. Signs are packed along rows:

    words    int32 [rows, ceil(columns / 32)], the least significant bit first, +1 as 0 and -1 as 1
    bytes    uint8 [ceil(rows * columns / 8)], the matrix as one row, the most significant bit first, +1 as 1 and -1 as 0,
             or [rows, columns / 8], which is the same in memory

Padding bits have no meaning. The facts are those of the programs' public sources and documents: LittleBit (SamsungLabs,
arXiv 2506.13771 and 2603.00042), NanoQuant (SamsungLabs, arXiv 2602.06694), DBF (arXiv 2505.11076), OneCompression
(Fujitsu), and the description of llama.cpp-i32-lsb-v1 (arelath/NanoQuant). docs/sharing.md has a table of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["LAYOUTS", "LITTLEBIT", "NANOQUANT", "Layout", "PathNames", "SignRule", "find_layout", "layers_of"]

NAMESPACE = "layouts.llama.cpp-i32-lsb-v1."


@dataclass(frozen=True)
class SignRule:
    """How a matrix of signs [rows, columns] is packed; `negative` gives it as bool, True for -1."""

    dtype: str  # as safetensors calls it
    shapes: Callable[[int, int], list[tuple[int, ...]]]
    negative: Callable[[Tensor, int, int], Tensor]


def _bits(values: Tensor, least_first: bool) -> Tensor:
    """The bits of uint8 [..., k] as bool [..., 8 k]."""
    order = range(8) if least_first else range(7, -1, -1)
    shift = torch.tensor(list(order), dtype=torch.uint8)
    return ((values.unsqueeze(-1) >> shift) & 1).flatten(-2).bool()


def _of_words(packed: Tensor, rows: int, columns: int) -> Tensor:
    # Bytes of little-endian words follow each other as their bits do.
    return _bits(packed.contiguous().view(torch.uint8), True)[:, :columns]


def _of_bytes(packed: Tensor, rows: int, columns: int) -> Tensor:
    return ~_bits(packed.flatten(), False)[: rows * columns].view(rows, columns)


def _shapes_of_bytes(rows: int, columns: int) -> list[tuple[int, ...]]:
    flat = (-(-rows * columns // 8),)
    return [flat] if columns % 8 else [flat, (rows, columns // 8)]


WORDS = SignRule("I32", lambda rows, columns: [(rows, -(-columns // 32))], _of_words)
BYTES = SignRule("U8", _shapes_of_bytes, _of_bytes)


@dataclass(frozen=True)
class PathNames:
    """What the tensors of one path are called after their layer's name."""

    u: str
    v: str
    scale_out: str
    scale_rank: tuple[str, ...]
    scale_in: str
    shapes: tuple[str, str] | None = None  # int64 [2] tensors with the sizes of u and v, which may be missing
    rank_may_lack: bool = False  # without its vectors, scale_rank is 1

    @property
    def roles(self) -> tuple[str, ...]:
        """All of them."""
        return (self.u, self.v, self.scale_out, *self.scale_rank, self.scale_in, *(self.shapes or ()))


@dataclass(frozen=True)
class Layout:
    """One layout. Layers have the first of `paths`, and may have the others."""

    name: str  # in a converted model's config
    title: str
    formula: str  # of the weight, in the layout's own names
    signs: SignRule
    paths: tuple[PathNames, ...]
    prefix: str = ""  # which the names of all packed tensors of a file may have
    spellings: Mapping[str, str] = field(default_factory=dict)  # another name of a role -> the one in `paths`
    ignored: frozenset[str] = frozenset()  # tensors of a layer that change nothing
    refused: Mapping[str, str] = field(default_factory=dict)  # tensors of a layer -> what ours has no place for
    blocks: bool = False  # layers are called "blocks.3...", whatever the model calls its list of blocks

    @property
    def roles(self) -> set[str]:
        """Names of all tensors that a layer may have after its own name, under one spelling or another; no bias."""
        own = {role for path in self.paths for role in path.roles}
        return own | set(self.spellings) | self.ignored | set(self.refused)


def _littlebit_path(end: str) -> PathNames:
    return PathNames(
        f"U{end}_packed",
        f"V{end}_packed",
        f"u1{end}",
        (f"u2{end}", f"v1{end}"),
        f"v2{end}",
        (f"U{end}_shape", f"V{end}_shape"),
    )


SALIENT = "extra dense columns ('salient' ones)"
ENVELOPES = "four scales of several vectors each, MDBF's envelopes,"
LITTLEBIT = Layout(
    "littlebit",
    "LittleBit",
    "W = diag(u1) U diag(u2 * v1) V diag(v2) + the same of U_R, V_R, u1_R ...",
    WORDS,
    (_littlebit_path(""), _littlebit_path("_R")),
    spellings={f"{side}_{what}_R": f"{side}_R_{what}" for side in "UV" for what in ("packed", "shape")},
    ignored=frozenset({"_eff_bit_target", "_split_dim_final", "_eff_bit_actual", "_binarized"}),
)
NANOQUANT = Layout(
    "nanoquant",
    "NanoQuant",
    "W = diag(scale_post) U diag(scale_mid) V diag(scale_pre), scale_mid = 1 where it is missing",
    WORDS,
    (PathNames(*("U_packed", "V_packed", "scale_post"), ("scale_mid",), "scale_pre", ("U_shape", "V_shape"), True),),
    refused=dict.fromkeys(("salient_idx", "salient_weight", "salient_scale"), SALIENT),
)
DBF = Layout(
    "dbf",
    "DBF",
    "W = diag(4.w) B3 diag(2.w) B1 diag(0.w), B1 and B3 the signs in 1.bp and 3.bp",
    BYTES,
    (PathNames("3.bp", "1.bp", "4.w", ("2.w",), "0.w"),),
)
ONECOMPRESSION = Layout(
    "onecompression-dbf",
    "OneCompression DBF",
    "W = diag(scaling4) B3 diag(scaling2) B1 diag(scaling0), B1 and B3 the signs in bp1 and bp3",
    BYTES,
    (PathNames("bp3", "bp1", "scaling4", ("scaling2",), "scaling0"),),
)
I32 = Layout(
    "llama.cpp-i32-lsb-v1",
    "llama.cpp-i32-lsb-v1",
    "W = diag(scale_post) U diag(scale_mid) V diag(scale_pre), U and V the signs in factor_left_words and factor_right_words",
    WORDS,
    (PathNames("factor_left_words", "factor_right_words", "scale_post", ("scale_mid",), "scale_pre"),),
    prefix=NAMESPACE,
    spellings={
        "nq_u": "factor_left_words",
        "nq_v": "factor_right_words",
        **{f"nq_scale_{end}": f"scale_{end}" for end in ("pre", "mid", "post")},
    },
    refused=dict.fromkeys(
        (
            *("outlier_indices", "outlier_values", "outlier_scales"),
            *("nq_salient_idx", "nq_salient_weight", "nq_salient_scale"),
        ),
        SALIENT,
    ),
    blocks=True,
)
LAYOUTS = {layout.name: layout for layout in (LITTLEBIT, NANOQUANT, DBF, ONECOMPRESSION, I32)}
# Signs of layouts that are known and have no place here, and why.
UNREADABLE = {
    "A_sign_packed": f"{ENVELOPES} which no layer of ours can hold",
    "A_amp": f"{ENVELOPES} which no layer of ours can hold",
}


def _split(name: str, roles: Collection[str]) -> tuple[str, str]:
    """(layer, role) of a tensor called `name`; ("", "") if no role ends it. A role has one dot at most: "0.w"."""
    head, _, last = name.rpartition(".")
    front, _, before = head.rpartition(".")
    if front and f"{before}.{last}" in roles:
        return front, f"{before}.{last}"
    return (head, last) if head and last in roles else ("", "")


def layers_of(layout: Layout, names: Collection[str]) -> dict[str, dict[str, str]]:
    """{layer: {role: tensor}} of the packed layers among the tensors called `names`, in their order.

    Raises:
        ValueError: for one role in two spellings.
    """
    layers: dict[str, dict[str, str]] = {}
    spaced = bool(layout.prefix) and any(name.startswith(layout.prefix) for name in names)
    roles = layout.roles | ({"bias"} if spaced else set())  # elsewhere a bias is a tensor of the model like any other
    for name in names:
        if spaced and not name.startswith(layout.prefix):
            continue
        layer, role = _split(name.removeprefix(layout.prefix), roles)
        role = layout.spellings.get(role, role)
        if role and role in layers.setdefault(layer, {}):
            raise ValueError(f"{layer} has its {role} in {layers[layer][role]} and in {name}; leave one of them")
        if role:
            layers[layer][role] = name
    return layers


def find_layout(names: Collection[str], folder: str) -> Layout:
    """The layout of a checkpoint whose tensors are called `names`.

    Raises:
        ValueError: if none is recognised, or more than one, with what there is.
    """
    signs = {layout.name: {s for p in layout.paths for s in (p.u, p.v)} for layout in LAYOUTS.values()}
    for layout in LAYOUTS.values():
        signs[layout.name] |= {other for other, role in layout.spellings.items() if role in signs[layout.name]}
    lasts = {part for name in names for part in (name.rpartition(".")[2], ".".join(name.split(".")[-2:]))}
    found = [layout for layout in LAYOUTS.values() if signs[layout.name] & lasts]
    if found[:2] == [LITTLEBIT, NANOQUANT]:  # which call their signs alike
        found.remove(LITTLEBIT if lasts & {"scale_pre", "scale_post"} else NANOQUANT)
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{folder} holds layers of {' and '.join(layout.title for layout in found)}; give one of them")
    for sign, reason in UNREADABLE.items():
        layers = sorted(name.rpartition(".")[0] for name in names if name.endswith(f".{sign}"))
        if layers:
            raise ValueError(f"{folder} has {len(layers)} layer(s) of {reason}, e.g. {layers[0]}")
    if {"U", "V", "u1", "v2"} <= lasts:
        layer = next(name for name in names if name.endswith(".u1"))[:-3]
        raise ValueError(
            f"{folder} holds LittleBit's latents U and V as floats, e.g. of {layer}, as during its training; save it packed "
            "with its own program first"
        )
    raise ValueError(
        f"{folder} holds packed layers of no layout that is known: {', '.join(layout.title for layout in LAYOUTS.values())}"
    )
