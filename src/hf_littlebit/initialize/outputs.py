"""Factors for a layer's outputs, not for its weight alone: what the second moments of its inputs allow in closed form.

With inputs x [tokens, in] a change E of a weight changes the outputs by x E^T, whose mean square is trace(E H E^T), where
H = x^T x / tokens. Two things follow from H, and neither needs a gradient:

    compensated       a layer that gets other inputs than the dense one, because the layers before it are quantized already, and
                      shall give the dense one's outputs y: W' = W + (y^T x / tokens - W H) (H + ridge)^-1. That is ridge
                      regression of y on x, drawn towards W and not towards zero.
    refit_to_outputs  the three scales of a path are each a linear least-squares problem in trace(E H E^T) while signs and the
                      other scales stay, as in refit.py for trace(E E^T).

Sources: GPTQ (arXiv 2210.17323) for errors weighed by H and layers that are quantized in order; the regression on the inputs that
a layer really gets is that of its successors, e.g. GPTAQ (arXiv 2504.02692).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers.path import Path
from ..layers.precision import exact_fp32
from ..layers.sign import sign
from .refit import fit_rank

__all__ = ["compensated", "refit_to_outputs", "with_ridge"]

SCALE_RIDGE = 1e-4  # of the mean of the normal equations' diagonal: scale_in stays where the inputs say nothing


def with_ridge(gram: Tensor, ridge: float) -> Tensor:
    """`gram` [in, in] with `ridge` times its mean diagonal added to the diagonal; the identity where there were no inputs."""
    mean = float(gram.diagonal().mean())
    if not mean > 0:
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    ridged = gram.clone()
    ridged.diagonal().add_(ridge * mean)
    return ridged


def compensated(weight: Tensor, gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """The weight [out, in] that gives the dense outputs for the inputs that there are; `weight` itself where nothing is known.

    Args:
        weight: the dense one, fp32.
        gram: x^T x / tokens [in, in] of the inputs that there are, fp32.
        cross: y^T x / tokens [out, in], with y the outputs of the dense layer for the dense model's inputs, without bias.
        ridge: of `with_ridge`; larger keeps nearer to `weight`.
    """
    with exact_fp32(weight.device):
        factor, failed = torch.linalg.cholesky_ex(with_ridge(gram, ridge))
        found = weight + torch.cholesky_solve((cross - weight @ gram).T, factor).T
        return weight if int(failed) or not bool(torch.isfinite(found).all()) else found


def refit_to_outputs(weight: Tensor, path: Path, gram: Tensor, *, rounds: int = 2) -> Path:
    """Least-squares scales for the signs of `path`, given `weight` [out, in] and `gram` [in, in]; signs and latents stay.

    Minimises trace(E gram E^T) of the difference E. Each round solves scale_out, scale_rank, scale_in and scale_rank again,
    each exactly for the others fixed, in about 4 out * in^2 operations. What came out best comes back, at worst `path` itself.
    """
    with exact_fp32(weight.device):
        w, h = weight.detach().float(), gram.float()
        u, v = sign(path.u), sign(path.v)
        wh = w @ h
        whole = float((wh * w).sum())

        def error(a: Tensor, b: Tensor) -> float:
            # Of W - a b^T, from products that are needed anyway: W h W - 2 W h (a b^T) + (a b^T) h (a b^T)
            return whole - 2 * float(((wh @ b) * a).sum()) + float(((a.T @ a) * (b.T @ (h @ b))).sum())

        out, ranked, into = path.scale_out, path.scale_rank, path.scale_in
        best = (error(u * out[:, None] * ranked, v * into[:, None]), (out, ranked, into))
        for _ in range(rounds):
            b = v * into[:, None]
            hb = h @ b
            bhb = b.T @ hb
            weighted = u * ranked
            above, below = ((wh @ b) * weighted).sum(1), ((weighted @ bhb) * weighted).sum(1)
            out = torch.where(below > 1e-30, above / below.clamp_min(1e-30), out)
            a = u * out[:, None]
            ranked = fit_rank((a.T @ a) * bhb, (a * (wh @ b)).sum(0), ranked)
            c = (a * ranked) @ v.T
            normal = (c.T @ c).mul_(h)
            ridge = SCALE_RIDGE * normal.diagonal().mean()
            normal.diagonal().add_(ridge)
            factor, failed = torch.linalg.cholesky_ex(normal)
            if not int(failed):
                into = torch.cholesky_solve(((c * wh).sum(0) + ridge * into)[:, None], factor)[:, 0]
            b = v * into[:, None]
            ranked = fit_rank((a.T @ a) * (b.T @ (h @ b)), (a * (wh @ b)).sum(0), ranked)
            found = error(a * ranked, b)
            # Written so that a NaN keeps what there was.
            if found < best[0]:
                best = (found, (out, ranked, into))
        return Path(path.u, path.v, *best[1])
