"""How many signs moved: the one figure that tells training of binary factors from training of their scales alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["SignFlips"]

PIECE = 2**22  # signs compared at a time


class SignFlips:
    """The signs of some latents, one bit each, to compare later signs with.

    Latents that are sharded (FSDP2) are compared shard by shard, each process its own.
    """

    def __init__(self, latents: Iterable[Tensor]):
        self._latents = list(latents)
        self._start = [_bits(latent) for latent in self._latents]
        self._last = list(self._start)
        self._ones: Tensor | None = None  # set bits of every byte

    def mark(self) -> None:
        """Take the signs as they are now for those of the last log, e.g. after a checkpoint was loaded."""
        self._last = [_bits(latent) for latent in self._latents]

    def fractions(self) -> tuple[float, float]:
        """Share of signs that differ from the start's, and from those at the last call of this method."""
        now = [_bits(latent) for latent in self._latents]
        counts = [self._count(now, self._start), self._count(now, self._last)]
        self._last = now
        total = sum(_local(latent).numel() for latent in self._latents)
        sums = torch.tensor([*counts, total], dtype=torch.float64)
        if any(isinstance(latent, DTensor) for latent in self._latents):
            sums = sums.to(_local(self._latents[0]).device)
            dist.all_reduce(sums)
        start, last, total = sums.tolist()
        return start / max(total, 1), last / max(total, 1)

    def _count(self, now: list[Tensor], then: list[Tensor]) -> int:
        count = 0
        for a, b in zip(now, then, strict=True):
            if self._ones is None or self._ones.device != a.device:
                self._ones = torch.tensor([value.bit_count() for value in range(256)], device=a.device)
            changed = a ^ b.to(a.device)
            count += sum(int(self._ones[part.long()].sum()) for part in changed.split(PIECE))
        return count


def _local(latent: Any) -> Tensor:
    return latent.to_local() if isinstance(latent, DTensor) else latent


def _bits(latent: Tensor) -> Tensor:
    """The signs, bit 1 for negative, uint8 [ceil(numel / 8)]."""
    negative = (_local(latent.detach()) < 0).flatten()
    negative = torch.nn.functional.pad(negative, (0, -len(negative) % 8)).view(-1, 8)
    place = 2 ** torch.arange(8, device=negative.device)
    return (negative * place.to(torch.uint8)).sum(-1, dtype=torch.uint8)
