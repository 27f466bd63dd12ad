"""What one process of a tensor-parallel group keeps of a stored weight: plain tensors, no engine.

An engine splits a linear layer along its outputs (column parallel) or its inputs (row parallel). The parts of a packed weight
[out, in] (kernels/parts.py) are split with it:

    u, u_tail, scale_out    a column each for every output: any outputs can be taken
    v, v_tail, scale_in     32 inputs to a word: inputs can be taken by whole words, and the last ones with their tail
    scale_rank              every process needs all of it, since the ranks are not split

The sum over processes of U diag(l) V_i^T (g_i * x_i), where process i has a range of inputs, is the whole product, so
that engines add up results of row-parallel layers as they do those of dense ones.

Engines also merge layers that read one tensor (q, k and v; gate and up) into one with several outputs. A weight that is stored
merged (Phi-3's qkv_proj) has one set of factors for all of them, of which each process takes a few outputs from every
member: `Partition.outputs` are ranges for that reason.

A packed embedding or head (kernels/table.py) is split along its rows, of which engines pad the last process's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import LittleBitConfig
from ..kernels import PARTS, table_shapes
from ..layers.parts import part_name, part_shapes, stored_ranks
from ..load.tables import DENSE_BITS

__all__ = ["WORD", "Partition", "checked_ranks", "checked_table", "member_range", "padded_rows", "refuse_mixed"]

WORD = 32  # inputs whose signs share an int32 word of v
REMEDY = "the checkpoint is damaged or incomplete: download or save it again"

Range = tuple[int, int]  # first, and one beyond the last


def member_range(name: str, total: int, size: int, rank: int, world: int) -> Range:
    """The outputs of one member of a layer that process `rank` of `world` keeps, counted within the member.

    Args:
        total: outputs of the stored member. size: those that a process keeps; fewer than total / world where processes outnumber
            the heads and each head is kept by several of them.

    Raises:
        ValueError: if the processes cannot share the outputs so.
    """
    pieces = total // size if size else 0
    if not pieces or total % size or world % pieces:
        raise ValueError(f"{name} has {total} outputs, of which each of {world} processes should keep {size}; {REMEDY}")
    first = rank // (world // pieces) * size
    return first, first + size


def refuse_mixed(layer: str, dense: Sequence[str], packed: Sequence[str]) -> None:
    """Refuse a merged layer of which some members, called by their names in the checkpoint, are dense and some packed.

    Raises:
        ValueError: naming them.
    """
    if dense and packed:
        raise ValueError(
            f"{', '.join(dense)} {'is' if len(dense) == 1 else 'are'} dense in the checkpoint and {', '.join(packed)} packed, but "
            f"the engine computes them as one layer, {layer.rpartition('.')[2]}; quantize the model with all of them in "
            "modules_to_not_convert, or none"
        )


@dataclass(frozen=True)
class Partition:
    """The part of one stored weight that a process keeps.

    Args:
        name: of the weight's module, for errors. outputs: ranges of stored outputs, kept in this order. inputs: of stored ones.
    """

    name: str
    outputs: Sequence[Range]
    inputs: Range

    @property
    def out_features(self) -> int:
        """How many outputs are kept."""
        return sum(stop - first for first, stop in self.outputs)

    def dense(self, weight: Tensor) -> Tensor:
        """The rows and columns of a dense weight [out, in], contiguous."""
        return _columns(weight.T, self.outputs).T[:, slice(*self.inputs)].contiguous()

    def packed(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts of a packed weight, checked before (`checked_ranks`), as those of a smaller one; copies, no views.

        Raises:
            ValueError: if the inputs do not begin and end at whole words, with the sizes.
        """
        first, stop = self.inputs
        in_features = parts["scale_in"].shape[1]
        last = stop == in_features
        if first % WORD or (stop % WORD and not last):
            count = in_features // (stop - first)
            raise ValueError(
                f"{self.name} has {in_features} inputs, of which each of {count} processes would keep {stop - first}; signs are "
                f"stored {WORD} to a word, so this must be a multiple of {WORD}. Use a smaller tensor_parallel_size"
            )
        words = slice(first // WORD, stop // WORD)
        kept = {
            "u": _columns(parts["u"], self.outputs),
            "scale_out": _columns(parts["scale_out"], self.outputs),
            "scale_rank": parts["scale_rank"],
            "scale_in": parts["scale_in"][:, first:stop],
        }
        if "u_tail" in parts:
            kept["u_tail"] = _columns(parts["u_tail"], self.outputs)
        if "v" in parts and words.stop > words.start:
            kept["v"] = parts["v"][words]
        if "v_tail" in parts and last:
            kept["v_tail"] = parts["v_tail"]
        return {part: value.clone(memory_format=torch.contiguous_format) for part, value in kept.items()}


def _columns(matrix: Tensor, ranges: Sequence[Range]) -> Tensor:
    """The columns of a matrix in some ranges, side by side."""
    taken = [matrix[:, first:stop] for first, stop in ranges]
    return taken[0] if len(taken) == 1 else torch.cat(taken, dim=1)


def checked_ranks(name: str, parts: Mapping[str, Tensor], config: LittleBitConfig) -> tuple[int, ...]:
    """The ranks of a packed weight's paths, after a look at all that a file may have wrong.

    Args:
        name: of its module, as the file calls it. parts: {part: tensor} as stored, those of no rows left out.

    Raises:
        ValueError: if a part is missing, has a wrong shape or dtype, or holds NaN or Inf where there are numbers.
    """
    shapes = {part: tuple(value.shape) for part, value in parts.items()}
    dims = [len(shapes.get(part, ())) for part in ("u", "scale_out", "scale_rank", "scale_in")]
    if dims != [2, 2, 1, 2]:
        lacking = [
            part for part, length in zip(("u", "scale_out", "scale_rank", "scale_in"), dims, strict=True) if not length
        ]
        what = (
            f"lacks {', '.join(part_name('weight', part) for part in lacking)}" if lacking else f"has parts of {shapes}"
        )
        raise ValueError(f"{name} is packed but {what}; {REMEDY}")
    size = shapes["scale_out"][1], shapes["scale_in"][1]
    ranks = stored_ranks(shapes, size, config.for_module(name).ranks(*size), latent=False)
    expected = part_shapes(*size, ranks, False, getattr(torch, config.scale_dtype))
    for part in PARTS:
        found = (shapes[part], parts[part].dtype) if part in parts else None
        if found != expected.get(part):
            raise ValueError(
                f"{name}.{part_name('weight', part)} is {_described(found)}, but a layer of ranks {list(ranks)} implies "
                f"{_described(expected.get(part))}; {REMEDY}"
            )
        if part in parts and parts[part].is_floating_point() and not bool(torch.isfinite(parts[part]).all()):
            raise ValueError(f"{name}.{part_name('weight', part)} holds NaN or Inf; {REMEDY}")
    return ranks


def checked_table(
    name: str,
    parts: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    size: tuple[int, int],
    bits: int,
    scale_dtype: torch.dtype,
) -> None:
    """Look at all that a file may have wrong about the shapes of a packed embedding or head.

    Args:
        name: of its module, as the file calls it. parts: {part: (shape, dtype)} as stored. size: rows and columns of the model.

    Raises:
        ValueError: if a part is missing, or is none of a table of so many `bits`, or has another shape or dtype.
    """
    expected = table_shapes(*size, bits, scale_dtype=scale_dtype) if bits != DENSE_BITS else {}
    for part in {**expected, **parts}:
        if parts.get(part) != expected.get(part):
            raise ValueError(
                f"{name}.{part} is {_described(parts.get(part))}, but a table of {size[0]} rows and {size[1]} columns in {bits} "
                f"bits implies {_described(expected.get(part))}; {REMEDY}"
            )


def padded_rows(rows: Tensor, count: int) -> Tensor:
    """`rows` [n, ...] followed by rows of zeros, [count, ...]: where those are scales, what they scale is 0."""
    return rows if len(rows) == count else torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])


def _described(entry: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    """A tensor as errors show it: "int32 [2, 64]"."""
    return "absent" if entry is None else f"{str(entry[1]).removeprefix('torch.')} {list(entry[0])}"
