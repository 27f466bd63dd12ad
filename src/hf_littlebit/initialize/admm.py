"""ADMM initialiser: binary factors of a matrix by alternating ridge regressions, pulled towards sign matrices.

Minimise `||W - A B^T||^2` with A and B each a *scaled sign matrix* `Z = U * (rows columns^T)`, U in {+1, -1}: what one
LittleBit path can store. Each side keeps a free matrix F, its projection Z and a running sum D of the disagreement
F - Z. A step fixes the other side as X (its Z with unit columns) and solves

    F = (W X + rho (Z - D)) (X^T X + (rho + 0.03) I)^-1      rho grows from 0 to 1: fit first, then agree with Z
    Z = sign(F + D) * rank-one(|F + D|)
    D = D + F - Z

Sources: double binary factorization (arXiv 2505.11076); LB-ADMM of NanoQuant (arXiv 2602.06694).

What makes it cheap: unit columns turn X into U diag(rows / |rows|), so X^T X has a unit diagonal and `columns` never
enters it; Z and D are both functions of P = F + D, so three [m, r] buffers a side are kept; the rank-one fit moves so
little between steps that one power iteration from the last one is enough. A step costs two products with W and one
r x r Cholesky inverse a side.

What was measured (`models/pycode-13m`): the start (random, SVD or Joint-ITQ) changes nothing after 100 steps; the
schedule of rho does, and the straight line from 0 to 1 is at the optimum: ending at 0.5 or at 2 loses 2 to 18 %.
Doubling the steps lowers the error by 1 to 2 %. Flipping single signs afterwards finds under 0.1 % to gain.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.precision import exact_fp32
from ..layers.sign import sign
from .svd import random_normal

RIDGE = 0.03
LARGE = 2**18  # numbers in a matrix whose products gain from another layout
LATENT_SIZE = 0.02  # median |latent|: there SmoothSign (alpha = 100) passes 7 % of its peak gradient, at 0.1 none
LATENT_RANGE = (0.25, 2.0)  # latents stay within these multiples of it: able to flip, but not at the first step


def rank_one(magnitude: Tensor, iterations: int = 30) -> tuple[Tensor, Tensor]:
    """The best rank-one fit `outer(rows, columns)` of a non-negative matrix [m, r], by power iteration from its sums.

    Returns rows [m] and columns [r], both >= 0, of equal norm. All-zero input gives zeros. A positive matrix has one
    dominant singular pair (Perron-Frobenius), so few iterations converge.
    """
    rows, columns = magnitude.sum(1), magnitude.sum(0)
    for _ in range(iterations):
        rows = _unit(magnitude @ columns)
        columns = rows @ magnitude
    size = columns.norm()
    return rows * size.sqrt(), columns * torch.where(size > 0, size.clamp_min(1e-30).rsqrt(), 0.0)


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm().clamp_min(1e-30)


def _layout(target: Tensor) -> Callable[[Tensor], Tensor]:
    """How the matrices of a factorization of `target` are laid out for `_product`.

    On a CPU for oneDNN, in fp32 as everywhere: torch's own products of fp32 matrices are MKL's, which on AMD's processors take
    twice as long (Zen 5, one thread, 4096 x 11008 x 1637: 1.48 s and 0.64 s, 0.74 with the layout).
    """
    if target.is_cpu and target.numel() >= LARGE and torch.backends.mkldnn.is_available():
        return Tensor.to_mkldnn
    return lambda matrix: matrix


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T of two matrices that are laid out alike, in the usual layout."""
    out = F.linear(a, b)
    return out.to_dense() if out.is_mkldnn else out


class _Side:
    """One factor: P = F + D [k, r], its signs in unit columns X [k, r], and the fit |P| ~ outer(rows, columns)."""

    def __init__(self, start: Tensor) -> None:
        self.p = start
        self.buffer = torch.empty_like(start)
        self.x = torch.empty_like(start)
        self.columns = start.new_ones(start.shape[1])
        self.rows = start.new_ones(start.shape[0])
        self.project()

    def project(self) -> None:
        """rows, columns and X from P; `rows` has unit norm and `columns` carries the size."""
        torch.abs(self.p, out=self.buffer)
        self.rows = _unit(self.buffer @ self.columns)
        self.columns = self.rows @ self.buffer
        torch.copysign(self.rows[:, None], self.p, out=self.x)

    def step(self, target: Tensor, other: Tensor, rho: float, layout: Callable[[Tensor], Tensor]) -> None:
        """Move P to the regression of `target` [k, n], laid out, on `other` [n, r], then project."""
        z = torch.mul(self.x, self.columns, out=self.buffer)
        d = self.p.sub_(z)
        rows = layout(other.T)
        rhs = z.sub_(d).mul_(rho).add_(_product(target, rows))
        gram = _product(rows, rows)
        gram.diagonal().add_(rho + RIDGE)
        # Unit columns and a ridge of 0.03 bound the condition number by r / 0.03, so fp32 Cholesky does not fail on
        # finite input; not asking for its status saves a device synchronisation per step.
        inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(gram)[0])
        d.add_(_product(layout(rhs), layout(inverse)))  # which is symmetric
        self.project()

    def latent(self) -> Tensor:
        """P over its rank-one fit, so that rows and columns of every size flip equally easily, around LATENT_SIZE."""
        fit = torch.outer(self.rows, self.columns)
        ratio = torch.where(fit > 0, self.p.abs() / fit.clamp_min(1e-30), 1.0)
        ratio = (ratio / ratio.median().clamp_min(1e-30)).clamp_(*LATENT_RANGE)
        return (sign(self.p) * ratio).mul_(LATENT_SIZE)


def admm_factors(
    target: Tensor, rank: int, *, steps: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Factor `target` [m, n] (fp32, finite, of moderate size) as diag(scale_out) U diag(scale_rank) V^T diag(scale_in).

    Returns:
        latents u [m, rank] and v [n, rank], of median magnitude LATENT_SIZE and none of them zero; scale_out
        [m], scale_rank [rank] and scale_in [n], all >= 0; fp32.
    """
    with exact_fp32(target.device):
        m, n = target.shape
        start = random_normal(m + n, rank, seed, target.device)
        a, b = _Side(start[:m].clone()), _Side(start[m:].clone())
        layout = _layout(target)
        forward, backward = layout(target), layout(target.T)
        for t in range(1, steps + 1):
            a.step(forward, b.x, t / steps, layout)
            b.step(backward, a.x, t / steps, layout)
        # B was solved last, against A's unit columns: its `columns` are the size of the product.
        return a.latent(), b.latent(), a.rows, b.columns, b.rows
