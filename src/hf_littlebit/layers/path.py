"""One path of a layer as plain tensors: what initialisers make, and what packed and latent layers are made from.

    W ~ sum_p diag(scale_out_p) U_p diag(scale_rank_p) V_p^T diag(scale_in_p)          (LittleBit, arXiv 2506.13771, eq. 5)

A `Path` holds one term of the sum in fp32, whole, so that who makes factors need not know how a layer stores them
(linear.py), nor a layer how they were found. It takes 32 times the memory of the packed bits: one weight at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .precision import exact_fp32
from .sign import sign

__all__ = ["Path", "cast", "dense_weight", "is_finite"]


@dataclass(frozen=True)
class Path:
    """One term of the sum; U and V are the signs of the latents, a zero counts as +1. All fp32 and contiguous."""

    u: Tensor  # latent [out, r]
    v: Tensor  # latent [in, r]
    scale_out: Tensor  # [out]
    scale_rank: Tensor  # [r]
    scale_in: Tensor  # [in]

    def dense(self) -> Tensor:
        """The weight this path stands for, [out, in] fp32, held within fp32's range."""
        with exact_fp32(self.u.device):
            product = (sign(self.u) * self.scale_rank) @ (sign(self.v) * self.scale_in[:, None]).T
            limit = torch.finfo(torch.float32).max
            return product.mul_(self.scale_out[:, None]).clamp_(-limit, limit)


def dense_weight(paths: Sequence[Path]) -> Tensor:
    """The weight that the paths stand for together, [out, in] fp32."""
    total = paths[0].dense()
    for path in paths[1:]:
        total += path.dense()
    return total


def is_finite(value: Tensor) -> bool:
    """Whether a tensor of floats holds neither NaN nor Inf."""
    if type(value) not in (Tensor, torch.nn.Parameter):  # a sharded one has no aminmax
        return bool(torch.isfinite(value).all())
    # Unlike isfinite it makes no mask of the tensor's size, and NaN comes out of it.
    return value.numel() == 0 or all(bool(end.isfinite()) for end in torch.aminmax(value.detach()))


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in `dtype`.

    Raises:
        ValueError: if it leaves the range of `dtype`, where torch would give Inf without a word.
    """
    found = value.to(dtype)
    if found.dtype != value.dtype and not is_finite(found) and is_finite(value):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"values of magnitude {float(value.abs().max()):.3g} do not fit {name}, which holds at most "
            f"{torch.finfo(dtype).max:.3g}; use bfloat16 or float32"
        )
    return found
