"""Truncated SVD of one weight matrix: `M ~ U diag(S) V^T` with the r largest singular values.

Two algorithms, chosen from the shape and the rank by timing both on a Gaussian matrix, whose flat spectrum is the
worst case; `examples/bench_factorize.py` prints the comparison.

- Block Krylov: the space spanned by Y, (MM^T)Y, ..., (MM^T)^5 Y for a random block Y of r + 16 columns, then an
  exact SVD inside it (Musco & Musco, arXiv 1504.05477). Error within 0.1 % of the exact one on the flat
  spectrum, within 0.01 % on a decaying one.
- Gram: eigenvectors of MM^T, of the smaller side. Exact at any rank; in fp64 when the rank reaches singular values
  that squaring would drown.

On 4096 x 11008 (two CPU cores) a full `torch.linalg.svd` takes 28 s, Gram 4 s at every rank, Krylov 1 s at rank 128
and 2 s at 256. Krylov wins while its basis is small beside the matrix: KRYLOV_SHARE is the measured crossing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers.precision import exact_fp32

KRYLOV_POWERS = 5  # products with MM^T; at 4 the flat spectrum misses the exact error by 0.2 %
OVERSAMPLE = 16  # extra columns in the random block
KRYLOV_SHARE = 0.6  # largest basis, as a share of min(m, n), at which Krylov is still the faster one
GRAM_FLOOR = 1e-5  # smallest eigenvalue, as a share of the first, that fp32 resolves well (its rounding is near 1e-7)
NEGLIGIBLE = 1e-6  # singular values under this share of the first are rounding noise in fp32, and become exact zeros


def random_normal(rows: int, cols: int, seed: int, device: torch.device) -> Tensor:
    """Standard normal [rows, cols] fp32, drawn on the CPU so that every device starts equal.

    The generator is its own: the global ones stay untouched.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(rows, cols, generator=generator, dtype=torch.float32, device="cpu").to(device)


def truncated_svd(matrix: Tensor, rank: int, *, seed: int = 0, method: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triplets of `matrix` [m, n] (finite, any float dtype).

    Args:
        rank: at least 1. Columns past min(m, n), and past the numerical rank, come back as zeros with S = 0.
        seed: of the Krylov method's random block; the Gram method draws nothing.
        method: "auto", "krylov" or "gram".

    Returns:
        U [m, rank], S [rank] descending, V [n, rank], contiguous fp32 on the matrix's device. The entry of largest
        magnitude in each column of U is positive, so equal input and seed give equal signs.

    Raises:
        ValueError: a matrix that is not 2-D, a rank below 1, or an unknown method.
    """
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"truncated_svd got shape {tuple(matrix.shape)}; it needs a non-empty matrix [m, n]")
    if rank < 1:
        raise ValueError(f"rank is {rank}; the smallest is 1: ask for more bits per weight or fewer paths")
    if method not in ("auto", "krylov", "gram"):
        raise ValueError(f"method is {method!r}; choose 'auto', 'krylov' or 'gram'")
    with exact_fp32(matrix.device):
        tall = matrix.detach().float()
        wide = tall.shape[0] > tall.shape[1]
        if wide:
            tall = tall.T  # from here on: rows are the smaller side
        keep = min(rank, tall.shape[0])
        if method == "auto":
            basis = (KRYLOV_POWERS + 1) * (keep + OVERSAMPLE)
            method = "krylov" if basis <= KRYLOV_SHARE * tall.shape[0] else "gram"
        left = _krylov(tall, keep, seed) if method == "krylov" else _gram(tall, keep)
        right = tall.T @ left
        s = right.norm(dim=0)
        s, order = s.sort(descending=True, stable=True)
        s = torch.where(s > NEGLIGIBLE * s[0], s, 0.0)
        live = (s > 0).to(s.dtype)
        left, right = left[:, order] * live, right[:, order] * (live / torch.where(s > 0, s, 1.0))
        u, v = (right, left) if wide else (left, right)
        pivot = u.gather(0, u.abs().argmax(0, keepdim=True))
        sign = torch.where(pivot < 0, -1.0, 1.0)
        pad = rank - keep
        u, v = (torch.nn.functional.pad(x * sign, (0, pad)).contiguous() for x in (u, v))
        return u, torch.nn.functional.pad(s, (0, pad)), v


def _gram(matrix: Tensor, rank: int) -> Tensor:
    """Leading left singular vectors [m, rank] of `matrix` [m, n], m <= n, from its m x m Gram matrix."""
    try:
        values, vectors = torch.linalg.eigh(matrix @ matrix.T)
        if values[-rank] > GRAM_FLOOR * values[-1]:
            return vectors[:, -rank:].flip(1)
    except torch.linalg.LinAlgError:
        pass  # fp32 did not converge; fp64 has the digits
    double = matrix.double()
    return torch.linalg.eigh(double @ double.T)[1][:, -rank:].flip(1).float()


def _krylov(matrix: Tensor, rank: int, seed: int) -> Tensor:
    """Approximate leading left singular vectors [m, rank] of `matrix` [m, n] from a block Krylov space of MM^T."""
    width = min(rank + OVERSAMPLE, matrix.shape[0])
    block = torch.linalg.qr(matrix @ random_normal(matrix.shape[1], width, seed, matrix.device))[0]
    blocks = [block]
    for _ in range(KRYLOV_POWERS):
        # Orthonormal blocks keep the powers from collapsing onto the first singular vector in fp32.
        block = torch.linalg.qr(matrix @ (matrix.T @ block))[0]
        blocks.append(block)
    basis = torch.linalg.qr(torch.cat(blocks, 1))[0]
    inside = basis.T @ matrix
    return basis @ torch.linalg.eigh((inside @ inside.T).double())[1][:, -rank:].flip(1).float()
