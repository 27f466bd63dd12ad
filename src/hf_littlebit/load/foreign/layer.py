"""One packed layer of another program: its tensors checked by their headers, and read as the paths of one of ours.

What is read is exact. Scales are widened to fp64, in which the product of two 24-bit numbers has all its digits, and
`holds` says which dtype keeps them all. Ranks are filled up to a multiple of 8, and to that of the layer's longest path, by
columns of scale 0, which add nothing whatever their signs are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...layers.path import Path
from ...option_rules import MAX_BPW
from ...ranks import RANK_MULTIPLE
from .folder import Folder
from .layouts import Layout, PathNames

__all__ = ["ForeignLayer", "Scales", "holds"]

FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Scales:
    """The scales of one path in fp64: of the outputs [out], of the rank [r] and of the inputs [in]."""

    out: Tensor
    rank: Tensor
    into: Tensor


def holds(dtype: torch.dtype, values: Tensor) -> bool:
    """Whether `dtype` has every one of the fp64 `values`."""
    return bool((values.to(dtype).double() == values).all())


class ForeignLayer:
    """A packed layer of `layout`, checked against the linear layer of the model that it is.

    Args:
        name: as the files call it. tensors: {role: name of the tensor}. size: (out, in) of the model's layer.

    Raises:
        ValueError: naming the layer, for what ours cannot hold, and for tensors that are missing, of another shape or dtype
            than the others and the model imply, or unknown.
    """

    def __init__(self, folder: Folder, layout: Layout, name: str, tensors: Mapping[str, str], size: tuple[int, int]):
        self.folder, self.layout, self.name, self.tensors, self.size = folder, layout, name, tensors, size
        for role, reason in layout.refused.items():
            if role in tensors:
                raise ValueError(
                    f"{name} has {reason} in {tensors[role]}, which no layer of ours can hold; dequantize the model with "
                    f"{layout.title}'s own program"
                )
        first, *others = layout.paths
        self.paths = [first, *(path for path in others if any(role in tensors for role in path.roles))]
        self.own_ranks = [self._rank(path) for path in self.paths]
        for path, rank in zip(self.paths, self.own_ranks, strict=True):
            self._check(path, rank)
        self.rank = -(-max(self.own_ranks) // RANK_MULTIPLE) * RANK_MULTIPLE

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of our paths."""
        return (self.rank,) * len(self.paths)

    def scales(self) -> list[Scales]:
        """The scales of every path.

        Raises:
            ValueError: for NaN or Inf.
        """
        found = []
        for path, rank in zip(self.paths, self.own_ranks, strict=True):
            product = torch.ones(rank, dtype=torch.float64)
            for role in path.scale_rank:
                if role in self.tensors:
                    product = product * self._vector(role)
            found.append(Scales(self._vector(path.scale_out), product, self._vector(path.scale_in)))
        return found

    def factors(self) -> list[Path]:
        """Every path with `self.rank` columns: latents of ±1 in int8, scales in fp64, both to be packed as they are."""
        out_features, in_features = self.size
        made = []
        for path, rank, scales in zip(self.paths, self.own_ranks, self.scales(), strict=True):
            u = self._signs(path.u, out_features, rank)
            v = self._signs(path.v, rank, in_features).T
            spare = self.rank - rank
            if spare:
                u = torch.cat([u, u.new_ones(out_features, spare)], dim=1)
                v = torch.cat([v, v.new_ones(in_features, spare)], dim=1)
            scale_rank = torch.cat([scales.rank, scales.rank.new_zeros(spare)])
            made.append(Path(u, v, scales.out, scale_rank, scales.into))
        return made

    def _signs(self, role: str, rows: int, columns: int) -> Tensor:
        packed = self.folder.read(self.tensors[role])
        return 1 - 2 * self.layout.signs.negative(packed, rows, columns).to(torch.int8)

    def _vector(self, role: str) -> Tensor:
        value = self.folder.read(self.tensors[role]).flatten().double()
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{self.tensors[role]} holds NaN or Inf; the checkpoint is damaged: download it again")
        return value

    def _entry(self, role: str) -> tuple[str, tuple[int, ...]]:
        """(dtype, shape) of a tensor of this layer that must be there."""
        if role not in self.tensors:
            held = ", ".join(sorted(self.tensors))
            raise ValueError(
                f"{self.name} has no {role}, which {self.layout.title} stores beside {held}; the checkpoint is incomplete: "
                "download it again"
            )
        dtype, shape, _ = self.folder.header[self.tensors[role]]
        return dtype, shape

    def _rank(self, path: PathNames) -> int:
        """The rank of a path: the length of a scale, or else what the shapes of the signs say."""
        lengths = [_length(self._entry(role)[1]) for role in path.scale_rank if role in self.tensors]
        missing = [role for role in path.scale_rank if role not in self.tensors]
        if missing and not path.rank_may_lack:
            self._entry(missing[0])
        rank = lengths[0] if lengths else next(iter(self._entry(path.v)[1]), 0)
        out_features, in_features = self.size
        limit = int(MAX_BPW * min(out_features, in_features))
        if not 1 <= rank <= limit:
            raise ValueError(
                f"{self.name} has rank {rank}; a layer of {out_features} x {in_features} has one from 1 to {limit}, which is "
                f"{MAX_BPW:g} bits per weight"
            )
        return rank

    def _check(self, path: PathNames, rank: int) -> None:
        """Compare the headers of a path's tensors with each other and with the model."""
        out_features, in_features = self.size
        rule = self.layout.signs
        for role, rows, columns in ((path.u, out_features, rank), (path.v, rank, in_features)):
            self._expect(role, (rule.dtype,), rule.shapes(rows, columns), f"{rows} x {columns} signs")
        lengths = {path.scale_out: out_features, path.scale_in: in_features}
        lengths.update({role: rank for role in path.scale_rank if role in self.tensors})
        for role, length in lengths.items():
            self._expect(role, FLOATS, [(length,), (1, length), (length, 1)], f"{length} scales")
        sizes = ((out_features, rank), (rank, in_features))
        for role, size in zip(path.shapes or (), sizes, strict=False):
            if role in self.tensors:
                self._expect(role, ("I64", "I32"), [(2,)], "the sizes of a matrix")
                said = self.folder.read(self.tensors[role]).tolist()
                if said != list(size):
                    raise ValueError(
                        f"{self.tensors[role]} says {said}, but the model and the other tensors of the layer imply "
                        f"{list(size)}; the checkpoint is damaged or its config.json is of another model"
                    )

    def _expect(self, role: str, dtypes: Sequence[str], shapes: Sequence[tuple[int, ...]], what: str) -> None:
        dtype, shape = self._entry(role)
        if dtype in dtypes and shape in shapes:
            return
        raise ValueError(
            f"{self.tensors[role]} is {dtype} {list(shape)}, but {what} are {' or '.join(dtypes)} {list(shapes[0])} in "
            f"{self.layout.title}; the checkpoint is damaged, or its config.json is of another model"
        )


def _length(shape: tuple[int, ...]) -> int:
    """The number of values of a vector; 0 for what is none."""
    return max(shape) if shape and sorted(shape)[:-1] == [1] * (len(shape) - 1) else 0
