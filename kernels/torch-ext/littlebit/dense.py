"""Dense products between launches: what unpacked.py leaves to the vendor's library, as steps that launch.py can repeat.

A step of a Triton kernel is repeated with other addresses; a product of torch needs tensors. So what is kept of it are views:
of a result, or of the one allocation that serves all scratch. Making them takes the host a few microseconds, against the
hundreds that listing the steps anew would take.
"""

import weakref
from typing import Any, NamedTuple, Optional, Sequence, Tuple

import torch

__all__ = ["DENSE", "Dense", "Multiplied", "View"]


class Dense:
    """Takes the place of a kernel in a step: out = left @ right, plus some of the bias."""

    def __getitem__(self, grid: Tuple[int, ...]) -> "Dense":
        return self

    def __call__(
        self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, bias: Optional[torch.Tensor], first: int
    ) -> None:
        """Multiply.

        Args:
            left, right, out: [m, k], [k, n] and [m, n], all of one dtype.
            bias: of all outputs, in any dtype, or None; this product's begin at `first`.
        """
        if bias is None:
            torch.mm(left, right, out=out)
        else:
            torch.addmm(bias[first : first + out.shape[1]].to(out.dtype), left, right, out=out)


DENSE = Dense()


class View(NamedTuple):
    """A matrix in memory that will be another's: its place, in elements, from where that begins."""

    source: int  # of the results, or -1 for the scratch
    size: Tuple[int, ...]
    stride: Tuple[int, ...]
    offset: int

    def of(self, results: Sequence[torch.Tensor], scratch: Optional[torch.Tensor]) -> torch.Tensor:
        """The matrix, in the results or in the scratch, which has its dtype."""
        memory: Any = scratch if self.source < 0 else results[self.source]
        return memory.as_strided(self.size, self.stride, memory.storage_offset() + self.offset)


class Multiplied(NamedTuple):
    """A product that was computed once, ready for other results and scratch. The bias lives as long as its layer."""

    dtype: torch.dtype
    left: View
    right: View
    out: View
    bias: Optional["weakref.ref[torch.Tensor]"]
    first: int

    def __call__(self, results: Sequence[torch.Tensor], memory: Optional[torch.Tensor]) -> None:
        """Compute it again; `memory` is the scratch, in bytes."""
        scratch = None if memory is None else memory.view(self.dtype)
        left, right, out = (view.of(results, scratch) for view in (self.left, self.right, self.out))
        DENSE(left, right, out, None if self.bias is None else self.bias(), self.first)
