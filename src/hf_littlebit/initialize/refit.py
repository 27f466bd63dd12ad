"""Scales by least squares for signs that stay: what follows an initialiser, and what any change of signs can be followed by.

    W ~ diag(scale_out) sign(U) diag(scale_rank) sign(V)^T diag(scale_in)

With two of the three scales fixed the third is a linear least-squares problem with a closed solution, so they are solved in
turns. The error is that of the weight itself, or weighted by importances of its rows and columns, as in NanoQuant's diagonal
preconditioning (arXiv 2602.06694).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers.path import Path
from ..layers.precision import exact_fp32
from ..layers.sign import sign

__all__ = ["refit_scales", "root_importance", "squared_norm"]

IMPORTANCE_FLOOR = 1e-8  # of the largest importance: a dead input still keeps a scale


def refit_scales(
    weight: Tensor,
    path: Path,
    *,
    rounds: int = 4,
    row_importance: Tensor | None = None,
    col_importance: Tensor | None = None,
) -> Path:
    """Least-squares scales for the signs of `path`, given `weight` [out, in]; the signs and latents stay.

    Each round solves scale_out (one number per row), scale_rank, scale_in (one per column) and scale_rank again, each
    exactly for the others fixed. With A = diag(scale_out) U and B = diag(scale_in) V, scale_rank solves the r x r normal
    equations ((A^T A) * (B^T B)) scale_rank = diag(A^T W B). The (weighted) error never grows: where rounding or the ridge
    of the normal equations made it larger, `path` itself comes back. A round costs two products with the weight.
    """
    with exact_fp32(weight.device):
        w = weight.detach().float()
        rows = root_importance(row_importance, w.shape[0], "row_importance", "refit_scales", w.device)
        cols = root_importance(col_importance, w.shape[1], "col_importance", "refit_scales", w.device)
        w = w * rows[:, None] * cols
        u, v = sign(path.u), sign(path.v)
        scale_out, scale_rank, scale_in = path.scale_out * rows, path.scale_rank, path.scale_in * cols
        before = squared_norm(w - Path(u, v, scale_out, scale_rank, scale_in).dense())
        for _ in range(rounds):
            b = v * scale_in[:, None]
            wb, bb = w @ b, b.T @ b
            scale_out = _fit_side(u, wb, bb, scale_rank, scale_out)
            a = u * scale_out[:, None]
            aa = a.T @ a
            scale_rank = _fit_rank(aa * bb, (a * wb).sum(0), scale_rank)
            wa = w.T @ a
            scale_in = _fit_side(v, wa, aa, scale_rank, scale_in)
            b = v * scale_in[:, None]
            scale_rank = _fit_rank(aa * (b.T @ b), (b * wa).sum(0), scale_rank)
        after = squared_norm(w - Path(u, v, scale_out, scale_rank, scale_in).dense())
        # Written so that a NaN in `after` keeps the old scales too.
        return Path(path.u, path.v, scale_out / rows, scale_rank, scale_in / cols) if after < before else path


def root_importance(value: Tensor | None, size: int, what: str, name: str, device: torch.device) -> Tensor:
    """Square root of an importance [size] with mean square one and a floor; ones when there is none."""
    if value is None:
        return torch.ones(size, dtype=torch.float32, device=device)
    if tuple(value.shape) != (size,):
        raise ValueError(
            f"{name}: {what} has shape {tuple(value.shape)}; it needs ({size},), one per {what[:3]} of the weight"
        )
    value = value.detach().to(device=device, dtype=torch.float32)
    bad = int((~(torch.isfinite(value) & (value >= 0))).sum())
    if bad:
        raise ValueError(
            f"{name}: {bad} of {size} values of {what} are negative, NaN or Inf; a second moment is finite and >= 0."
            " Collect it in fp32, or pass None"
        )
    top = value.max()
    if not top > 0:
        return torch.ones_like(value)
    value = (value / top).clamp_min(IMPORTANCE_FLOOR)
    return (value / value.mean()).sqrt()


def squared_norm(x: Tensor) -> float:
    """Squared Frobenius norm, as a number."""
    return float(x.square().sum())


def _fit_side(binary: Tensor, product: Tensor, gram: Tensor, scale_rank: Tensor, old: Tensor) -> Tensor:
    """Best row scales [k] of `diag(.) binary diag(scale_rank) B^T`; `old` where any would do.

    Args:
        product: W B [k, r]. gram: B^T B [r, r].
    """
    numerator = (product * binary) @ scale_rank
    denominator = ((binary @ (gram * torch.outer(scale_rank, scale_rank))) * binary).sum(1)
    return torch.where(denominator > 1e-30, numerator / denominator.clamp_min(1e-30), old)


def _fit_rank(normal: Tensor, moments: Tensor, old: Tensor) -> Tensor:
    """scale_rank [r] from normal scale_rank = moments; in fp64, since repeated columns make these nearly singular."""
    normal, moments = normal.double(), moments.double()
    mean = normal.diagonal().mean()
    if not float(mean) > 0:
        return old
    normal.diagonal().add_(1e-7 * mean)
    factor, failed = torch.linalg.cholesky_ex(normal)
    return old if int(failed) else torch.cholesky_solve(moments[:, None], factor)[:, 0].float()
