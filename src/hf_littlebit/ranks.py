"""The arithmetic between bits per weight and ranks.

A layer of `out_features x in_features` (m x n) with P paths of rank r is stored in

    bits = P * [ r * (m + n' + 16) + 16 * (m + n) ]        bits per weight = bits / (m * n)

where n' is n rounded up to a multiple of 8 (kernels/packing.py), so n' = n in practice. Solved for r and floored to a
multiple of 8, at least 8 and at most min(m, n) (LittleBit, arXiv 2506.13771, appendix D). That is what a new layer starts
from; the model's leftover bits are then shared out (budget.py). The ranks of a saved one are read off the shapes of its parts
(layers/parts.py), which say how many paths there are and what their ranks add up to, but not how they share it: paths of one
layer have equal ranks, unless the arithmetic here says otherwise.
"""

from __future__ import annotations

from .kernels.packing import stored_bits

__all__ = ["RANK_MULTIPLE", "SCALE_BITS", "bits_of", "bpw_of", "ceiling", "exact_rank", "layer_ranks", "path_ranks"]

SCALE_BITS = 16
RANK_MULTIPLE = 8


def bits_of(out_features: int, in_features: int, ranks: tuple[int, ...], scale_bits: int = SCALE_BITS) -> int:
    """Bits that the file holds for one layer: signs with their padding, and three scale vectors per path."""
    signs = sum(stored_bits(rank) * out_features + stored_bits(in_features) * rank for rank in ranks)
    scales = scale_bits * (len(ranks) * (out_features + in_features) + sum(ranks))
    return signs + scales


def bpw_of(out_features: int, in_features: int, ranks: tuple[int, ...]) -> float:
    """Bits per replaced weight of one layer, as the file holds it."""
    return bits_of(out_features, in_features, ranks) / (out_features * in_features)


def exact_rank(out_features: int, in_features: int, bpw: float, paths: int) -> float:
    """The rank per path that meets `bpw` exactly, before it is floored (may be negative for small layers)."""
    columns = stored_bits(in_features)
    scales = SCALE_BITS * paths * (out_features + in_features)
    return (bpw * out_features * in_features - scales) / (paths * (out_features + columns + SCALE_BITS))


def ceiling(out_features: int, in_features: int) -> int:
    """The largest rank of a path: min(out, in), floored to a multiple of 8, but at least 8."""
    return max(RANK_MULTIPLE, min(out_features, in_features) // RANK_MULTIPLE * RANK_MULTIPLE)


def layer_ranks(out_features: int, in_features: int, bpw: float, paths: int, factor: float = 1.0) -> tuple[int, ...]:
    """The rank of each path: `factor` times `exact_rank`, floored to a multiple of 8 and held within 8 .. min(out, in)."""
    asked = int(factor * exact_rank(out_features, in_features, bpw, paths) // RANK_MULTIPLE) * RANK_MULTIPLE
    return (max(RANK_MULTIPLE, min(asked, ceiling(out_features, in_features))),) * paths


def path_ranks(
    out_features: int, in_features: int, bpw: float, init: str, residual: bool | None = None, factor: float = 1.0
) -> tuple[int, ...]:
    """`layer_ranks` of two paths (`residual` True), of one (False), or of as many as are better with the initialiser `init`."""
    if residual is not None:
        return layer_ranks(out_features, in_features, bpw, 2 if residual else 1, factor)
    one = layer_ranks(out_features, in_features, bpw, 1, factor)
    two = layer_ranks(out_features, in_features, bpw, 2, factor)
    fits = exact_rank(out_features, in_features, bpw, 2) >= RANK_MULTIPLE
    # ADMM's single path beats two at equal bits (docs/results.md); a second one pays only for bits that a full-rank
    # first path cannot take. The SVD initialisers need the second path wherever the layer has room for it.
    if init == "admm":
        full = exact_rank(out_features, in_features, bpw, 1) >= min(out_features, in_features)
        return two if fits and full and sum(two) > sum(one) else one
    return two if fits else one
