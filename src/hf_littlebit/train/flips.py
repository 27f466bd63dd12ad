"""How many signs moved: the one figure that tells training of binary factors from training of their scales alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import is_sharded, local_part

__all__ = ["SignFlips"]

PIECE = 2**22  # signs compared at a time


class SignFlips:
    """The signs of some latents, one bit each, to compare later signs with.

    Latents that an engine shards are compared shard by shard, each process its own.
    """

    def __init__(self, latents: Iterable[Tensor]):
        self._latents = list(latents)
        self._start = [_bits(latent) for latent in self._latents]
        self._last = list(self._start)
        self._ones: Tensor | None = None  # set bits of every byte

    def rebase(self, latents: Iterable[Tensor]) -> None:
        """Compare `latents` from now on, which are the first ones in the same order: loaded from a checkpoint, or sharded since.

        The signs as they are now become those of the last log. Where the start's cannot be cut as the latents are, they
        become the start's too.
        """
        self._latents = list(latents)
        self._last = [_bits(latent) for latent in self._latents]
        cut = [_cut(then, latent) for latent, then in zip(self._latents, self._start, strict=True)]
        self._start = [now if then is None else then for then, now in zip(cut, self._last, strict=True)]

    def fractions(self) -> dict[str, float]:
        """The shares of signs that differ from the start's, `flipped_since_start`, and from those at the last call,
        `flipped_since_log`; nothing where all parts are on disk. Every process must call it where latents are sharded."""
        now = [_bits(latent) for latent in self._latents]
        counts = [self._count(now, self._start), self._count(now, self._last)]
        self._last = now
        total = sum(_local(latent).numel() for latent in self._latents)
        sums = torch.tensor([*counts, total], dtype=torch.float64)
        if is_sharded(self._latents):
            sums = sums.to(_local(self._latents[0]).device)
            dist.all_reduce(sums)
        start, last, total = sums.tolist()
        return {"flipped_since_start": start / total, "flipped_since_log": last / total} if total else {}

    def _count(self, now: list[Tensor], then: list[Tensor]) -> int:
        """How many bits of `now` differ from those of `then`, over all latents."""
        count = 0
        for a, b in zip(now, then, strict=True):
            if self._ones is None or self._ones.device != a.device:
                self._ones = torch.tensor([value.bit_count() for value in range(256)], device=a.device)
            changed = a ^ b.to(a.device)
            count += sum(int(self._ones[part.long()].sum()) for part in changed.split(PIECE))
        return count


def _local(latent: Tensor) -> Tensor:
    """What this process holds of a latent, flat."""
    return local_part(latent)[0]


def _cut(bits: Tensor, latent: Tensor) -> Tensor | None:
    """Of the `bits` of a whole latent, those of the part that this process holds; None if its place is unknown."""
    part, first = local_part(latent)
    if first is None or (first == 0 and len(bits) == -(-part.numel() // 8)):
        return None if first is None else bits
    window = bits[first // 8 : -(-(first + part.numel()) // 8)]
    signs = (window.unsqueeze(-1) >> torch.arange(8, device=bits.device) & 1).flatten()
    return _packed(signs[first % 8 :][: part.numel()].bool())


def _bits(latent: Tensor) -> Tensor:
    """The signs of what this process holds, bit 1 for negative, uint8 [ceil(numel / 8)]."""
    return _packed(_local(latent) < 0)


def _packed(negative: Tensor) -> Tensor:
    """Bools [n], eight in a byte from the lowest bit on, the last byte filled with zeros: uint8 [ceil(n / 8)]."""
    negative = torch.nn.functional.pad(negative, (0, -len(negative) % 8)).view(-1, 8)
    place = 2 ** torch.arange(8, device=negative.device)
    return (negative * place.to(torch.uint8)).sum(-1, dtype=torch.uint8)
