"""Ranks that take the bits a model may take: rounding down per layer leaves bits over, and small layers take too many.

A rank is a multiple of 8, so that a layer alone misses its bits by half a step on average, and small layers by 10 %. The bits
are a promise about the model, though. So ranks are moved by single steps until the sum is met: up where a layer has the least
of what it asked for, and down, where the smallest ranks of small layers are more than these may take, where one has the most.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

from .ranks import RANK_MULTIPLE, SCALE_BITS, bits_of, ceiling

__all__ = ["Share", "meet_budget"]


class Share(NamedTuple):
    """`copies` matrices of `out_features x in_features` that are given equal `ranks`, and the bits per weight they ask for."""

    out_features: int
    in_features: int
    copies: int
    ranks: tuple[int, ...]
    bpw: float
    scale_bits: int = SCALE_BITS  # of each stored scale

    @property
    def numel(self) -> int:
        return self.copies * self.out_features * self.in_features

    @property
    def bits(self) -> int:
        """Bits that the file holds for them."""
        return self.copies * bits_of(self.out_features, self.in_features, self.ranks, self.scale_bits)

    @property
    def fill(self) -> float:
        """Bits over bits asked."""
        return self.bits / (self.bpw * self.numel)

    def moved(self, steps: int) -> Share:
        """The same with every path's rank larger by `steps` times 8."""
        return self._replace(ranks=tuple(rank + steps * RANK_MULTIPLE for rank in self.ranks))


def meet_budget(shares: Sequence[Share], budget: float) -> list[tuple[int, ...]]:
    """The ranks of each of `shares`, whose bits together come as close to `budget`, in bits, as steps from below do.

    Where every rank is at its floor of 8 the sum may be larger, and where every one is at min(out, in) it is smaller.
    Of layers that are alike, earlier ones get more.
    """
    found = list(shares)
    left = budget - sum(share.bits for share in found)
    full = [(-share.fill, -index) for index, share in enumerate(found)]
    heapq.heapify(full)
    while left < 0 and full:
        index = -heapq.heappop(full)[1]
        if min(found[index].ranks) > RANK_MULTIPLE:
            lower = found[index].moved(-1)
            left += found[index].bits - lower.bits
            found[index] = lower
            heapq.heappush(full, (-lower.fill, -index))
    empty = [(share.fill, index) for index, share in enumerate(found)]
    heapq.heapify(empty)
    most = math.inf  # what a layer may be filled to: no more than one that was passed over would have been
    while empty:
        index = heapq.heappop(empty)[1]
        higher = found[index].moved(1)
        if max(higher.ranks) > ceiling(*higher[:2]) or higher.fill > most:
            continue
        if higher.bits - found[index].bits > left:  # and never will fit: what is left only shrinks
            most = min(most, higher.fill)
            continue
        left -= higher.bits - found[index].bits
        found[index] = higher
        heapq.heappush(empty, (higher.fill, index))
    return [share.ranks for share in found]
