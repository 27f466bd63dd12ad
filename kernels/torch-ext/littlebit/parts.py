"""A packed layer and its parts: their names, order, shapes and dtypes, and which of their rows and columns a path owns.

    W ~ sum_p diag(scale_out[p]) U_p diag(scale_rank of p) V_p^T diag(scale_in[p])      (LittleBit, arXiv 2506.13771, eq. 5)

For paths of ranks r_1 .. r_P whose sum is R, a layer of `out` outputs and `in` inputs has

    u           int32 [sum_p r_p // 32, out]                the paths' U_p^T (packing.py), path 1 first
    u_tail      uint8 [sum_p ceil(r_p % 32 / 8), out]       the signs of every path beyond its last whole word
    v           int32 [in // 32, R]                         [V_1 .. V_P] side by side
    v_tail      uint8 [ceil(in % 32 / 8), R]
    scale_out   16-bit floats [P, out]        scale_rank  [R]        scale_in  [P, in]

(32-bit floats where a model was converted from another program's, whose scales have more digits.)

This file is the only place that knows it. Whoever computes takes a `PackedLayer`; whoever needs the rows of one path asks
`places`; whoever declares, checks or predicts a layer asks `factor_shapes`. A part of no rows is not stored, except u.
"""

from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch

from .packing import factor_shape

__all__ = [
    "PARTS",
    "Operand",
    "PackedLayer",
    "Place",
    "factor_shapes",
    "few_tokens",
    "operands",
    "part_shapes",
    "places",
]


class PackedLayer(NamedTuple):
    """The parts of one layer in the order in which every product and registered operator takes them; None: no rows.

    The shapes are in the module's text. A product is y = x W^T + bias for x [..., in], and its gradient is grad W for grad
    [..., out], in which the bias has no part.
    """

    u: torch.Tensor
    u_tail: Optional[torch.Tensor]
    v: Optional[torch.Tensor]
    v_tail: Optional[torch.Tensor]
    scale_out: torch.Tensor
    scale_rank: torch.Tensor
    scale_in: torch.Tensor
    bias: Optional[torch.Tensor]
    ranks: Sequence[int]


PARTS = PackedLayer._fields[:7]  # what a file holds of a layer under names of its own; the bias is any layer's


class Place(NamedTuple):
    """Where the parts hold one path: `columns` of v, v_tail and scale_rank, `words` rows of u, `tail` rows of u_tail."""

    rank: int
    columns: slice
    words: slice
    tail: slice


def places(ranks: Sequence[int]) -> List[Place]:
    """The place of every path, in their order; the last column, word and tail byte end the parts."""
    found = []
    column = word = byte = 0
    for rank in ranks:
        words, tail = factor_shape(rank)
        found.append(
            Place(rank, slice(column, column + rank), slice(word, word + words), slice(byte, byte + tail)),
        )
        column, word, byte = column + rank, word + words, byte + tail
    return found


def part_shapes(
    in_features: int, out_features: int, ranks: Sequence[int], scale_dtype: torch.dtype = torch.bfloat16
) -> Dict[str, Tuple[Tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every part of a layer: {part: (shape, dtype)}, those of no rows too."""
    last = places(ranks)[-1]
    words, tail = factor_shape(in_features)
    paths, total = len(ranks), last.columns.stop
    return {
        "u": ((last.words.stop, out_features), torch.int32),
        "u_tail": ((last.tail.stop, out_features), torch.uint8),
        "v": ((words, total), torch.int32),
        "v_tail": ((tail, total), torch.uint8),
        "scale_out": ((paths, out_features), scale_dtype),
        "scale_rank": ((total,), scale_dtype),
        "scale_in": ((paths, in_features), scale_dtype),
    }


def factor_shapes(
    in_features: int, out_features: int, ranks: Sequence[int], scale_dtype: torch.dtype = torch.bfloat16
) -> Dict[str, Tuple[Tuple[int, ...], torch.dtype]]:
    """`part_shapes` of the parts that are stored: all that have rows, and u."""
    shapes = part_shapes(in_features, out_features, ranks, scale_dtype)
    return {part: entry for part, entry in shapes.items() if part == "u" or entry[0][0] > 0}


class Operand(NamedTuple):
    """One factor with the scales of its features, as one of the two products of a layer reads it."""

    words: Optional[torch.Tensor]
    tail: Optional[torch.Tensor]
    scale: torch.Tensor


def operands(layer: PackedLayer, transposed: bool) -> Tuple[Operand, Operand]:
    """The factor that x meets first and the one it meets last: V and U, or for the gradient (transposed) U and V."""
    of_v = Operand(layer.v, layer.v_tail, layer.scale_in)
    of_u = Operand(layer.u, layer.u_tail, layer.scale_out)
    return (of_u, of_v) if transposed else (of_v, of_u)


def few_tokens(
    layers: Sequence[PackedLayer], results: Sequence[torch.Tensor]
) -> Tuple[Tuple[tuple, ...], Tuple[tuple, ...]]:
    """What the two kernels for one to four tokens (decode.py, gemv.py) read of every layer, one tuple for each kernel.

    Args:
        results: [tokens, out_features] of each layer, which the second kernel writes.

    Returns:
        (v, v_tail, scale_in) of every layer, and (u, u_tail, scale_out, scale_rank, bias, result, out_features).
    """
    first = tuple([(layer.v, layer.v_tail, layer.scale_in) for layer in layers])
    second = tuple(
        [
            (layer.u, layer.u_tail, layer.scale_out, layer.scale_rank, layer.bias, y, y.shape[1])
            for layer, y in zip(layers, results)  # noqa: B905 Python 3.9
        ]
    )
    return first, second
