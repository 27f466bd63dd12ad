"""Dense weight to LittleBit factors: `W ~ sum_p diag(scale_out_p) U_p diag(scale_rank_p) V_p^T diag(scale_in_p)`, signs U and V.

Three initialisers. Each runs on the weight's device in fp32 and repeats exactly for the same seed; path p + 1 factors
what the first p left over.

- dual_svid: LittleBit (arXiv 2506.13771, "Dual-SVID"). Signs of a truncated SVD, scales from a rank-one fit of its
  magnitudes.
- joint_itq: LittleBit-2 (arXiv 2603.00042). The same after a rotation of the rank space that brings both factors near
  their signs.
- admm: double binary factorization (arXiv 2505.11076, arXiv 2602.06694); see `admm.py`.

`refit_scales` then solves the scales for those signs in closed form. It is on for joint_itq and admm; dual_svid stays
as published, because it is the baseline that others are compared to.

Mean squared error over squared norm, all 28 linear layers of `models/pycode-13m`, and seconds for the 28 on one CPU
core, at equal bits per weight:

    init        paths   1.0 bpw       0.55 bpw
    dual_svid     2     .470    1 s   .580    1 s
    joint_itq     2     .324   12 s   .498    5 s
    admm          1     .198   50 s   .351   20 s     (400 steps .195, .348; two paths .231, .431)

One path of ADMM beats two of anything: a second path repairs a weak initialiser, and pays for scales of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.path import Path
from ..layers.precision import exact_fp32
from ..layers.sign import sign
from .admm import LATENT_SIZE, admm_factors, rank_one
from .refit import refit_scales, root_importance, squared_norm
from .svd import random_normal, truncated_svd

__all__ = [
    "INITIALISERS",
    "INITS",
    "Initialiser",
    "admm",
    "dual_svid",
    "factorize",
    "joint_itq",
    "refit_scales",
    "relative_error",
]

SIZE_CARRIED = 100  # `scale_rank` carries sizes in 2 ** (-100 .. 100), `scale_out` the rest: no bf16 scale overflows


def factorize(
    weight: Tensor,
    ranks: Sequence[int],
    init: str,
    *,
    seed: int = 0,
    steps: int | None = None,
    refit_rounds: int | None = None,
    row_importance: Tensor | None = None,
    col_importance: Tensor | None = None,
    name: str = "weight",
) -> list[Path]:
    """Factor `weight` [out, in] (any float dtype and device) into one path per rank.

    Args:
        ranks: rank of each path, at least 1. May exceed min(out, in): the SVD initialisers then leave zero scales.
        init: one of INITS.
        steps: iterations of Joint-ITQ or ADMM; None for those of INITIALISERS. Dual-SVID has none.
        refit_rounds: rounds of `refit_scales`; None for those of INITIALISERS, 0 for the initialiser alone.
        row_importance: o [out], mean squared gradient of each output; with it and `col_importance` the error minimised
            is sum_jk o_j i_k (W - W_hat)_jk^2 (NanoQuant's diagonal preconditioning), refit included.
        col_importance: i [in], mean squared input.
        name: of the layer, for the errors.

    Returns:
        A list of `Path` on the weight's device. mean|scale_out| = mean|scale_in| = 1 and `scale_rank` carries the
        size, except at magnitudes past 2 ** +-100, which `scale_out` helps to carry. dual_svid and joint_itq keep the
        factors of the SVD as latents; those of admm have median magnitude LATENT_SIZE.

    Raises:
        ValueError: NaN or Inf in the weight or an importance, a wrong shape, an unknown `init`, a rank, `steps` or
            `refit_rounds` below its limit.
    """
    steps, refit_rounds = _checked(weight, ranks, init, steps, refit_rounds, name)
    with exact_fp32(weight.device):
        target = weight.detach().float()
        bad = int((~torch.isfinite(target)).sum())
        if bad:
            raise ValueError(
                f"{name}: {bad} of {target.numel()} values are NaN or Inf (in fp32); only finite weights can be"
                " factored. Check the checkpoint, or leave this layer out of the quantization"
            )
        rows = root_importance(row_importance, target.shape[0], "row_importance", name, weight.device)
        cols = root_importance(col_importance, target.shape[1], "col_importance", name, weight.device)
        # Dividing by a power of two is exact, and near one no square under- or overflows.
        exponent = _exponent(target)
        rest = (target / 2.0**exponent).mul_(rows[:, None]).mul_(cols)
        paths: list[Path] = []
        for index, rank in enumerate(ranks):
            # The residual of an exact path is tiny; each path sees numbers near one.
            shift = _exponent(rest)
            scaled = rest / 2.0**shift
            path = _initialise(scaled, rank, init, steps, seed + index)
            if refit_rounds:
                path = refit_scales(scaled, path, rounds=refit_rounds)
            if INITIALISERS[init].keeps_size and path.scale_rank.any():
                # The published latents are those of the weight itself, not of its normalised copy.
                size = 2.0 ** ((exponent + shift) / 2)
                path = replace(path, u=path.u * size, v=path.v * size)
            paths.append(_balanced(path, rows, cols, exponent + shift))
            if index + 1 < len(ranks):
                rest = rest - path.dense().mul_(2.0**shift)
        return paths


def dual_svid(weight: Tensor, rank: int, *, seed: int = 0) -> Path:
    """Dual-SVID of `weight` [out, in]: latents U S^1/2 and V S^1/2, scales from rank-one fits of their magnitudes.

    Like the other two initialisers it takes the weight as it is: finite, and of a size whose square fp32 can hold.
    """
    with exact_fp32(weight.device):
        u, s, v = truncated_svd(weight, rank, seed=seed)
        return _from_latents(u * s.sqrt(), v * s.sqrt())


def joint_itq(weight: Tensor, rank: int, *, steps: int = 50, seed: int = 0) -> Path:
    """Joint-ITQ of `weight` [out, in]: SVD latents A, B turned by the rotation R that brings [A; B] R near its signs.

    R starts random and alternates with the signs: S = sign([A; B] R), then the orthogonal Procrustes solution for S.
    A B^T is unchanged by R, so the rotation costs nothing at inference.
    """
    with exact_fp32(weight.device):
        u, s, v = truncated_svd(weight, rank, seed=seed)
        stacked = torch.cat([u, v]).mul_(s.sqrt())
        rotation = torch.linalg.qr(random_normal(rank, rank, seed, weight.device))[0]
        for _ in range(steps):
            rotation = _polar(stacked.T @ sign(stacked @ rotation))
        stacked = stacked @ rotation
        return _from_latents(stacked[: len(u)], stacked[len(u) :])


def admm(weight: Tensor, rank: int, *, steps: int = 200, seed: int = 0) -> Path:
    """ADMM factors of `weight` [out, in]; the latents have median magnitude LATENT_SIZE."""
    with exact_fp32(weight.device):
        return Path(*admm_factors(weight.detach().float(), rank, steps=steps, seed=seed))


class Initialiser(NamedTuple):
    """A way from a matrix [out, in] to one path of a rank, and how `factorize` uses it.

    Attributes:
        title: its name in a model card.
        function: of (matrix, rank, steps, seed).
        steps: by default; 0 for one that has none. refit_rounds: of `refit_scales` afterwards, by default.
        keeps_size: its latents grow with the weight, as the published ones do; those of the others have a size of their own.
    """

    title: str
    function: Callable[[Tensor, int, int, int], Path]
    steps: int
    refit_rounds: int
    keeps_size: bool


INITIALISERS = {
    "dual_svid": Initialiser(
        "Dual-SVID", lambda matrix, rank, steps, seed: dual_svid(matrix, rank, seed=seed), 0, 0, keeps_size=True
    ),
    "joint_itq": Initialiser(
        "Joint-ITQ",
        lambda matrix, rank, steps, seed: joint_itq(matrix, rank, steps=steps, seed=seed),
        50,
        4,
        keeps_size=True,
    ),
    "admm": Initialiser(
        "ADMM", lambda matrix, rank, steps, seed: admm(matrix, rank, steps=steps, seed=seed), 200, 4, keeps_size=False
    ),
}
INITS = tuple(INITIALISERS)


def relative_error(weight: Tensor, paths: Sequence[Path]) -> float:
    """Squared Frobenius norm of `weight` minus its paths, over that of `weight`; 0.0 for zeros met exactly."""
    with exact_fp32(weight.device):
        target = weight.detach().float()
        exponent = _exponent(target)
        rest = target / 2.0**exponent
        norm = squared_norm(rest)
        for path in paths:
            rest -= path.dense() / 2.0**exponent
        error = squared_norm(rest)
        return error / norm if norm else (0.0 if not error else math.inf)


def _checked(
    weight: Tensor, ranks: Sequence[int], init: str, steps: int | None, refit_rounds: int | None, name: str
) -> tuple[int, int]:
    """Validate the arguments of `factorize` and fill its defaults."""
    if init not in INITIALISERS:
        raise ValueError(f"{name}: init is {init!r}; choose one of {', '.join(map(repr, INITIALISERS))}")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"{name}: shape is {tuple(weight.shape)}; only a non-empty matrix [out, in] can be factored."
            " Reshape it, or leave this layer out of the quantization"
        )
    if not weight.is_floating_point() or weight.device.type == "meta":
        raise ValueError(
            f"{name}: a {weight.dtype} tensor on {weight.device} has no real values to factor;"
            " load it as floating point on a real device"
        )
    if not ranks:
        raise ValueError(f"{name}: ranks is empty; give one rank per path, at least one path")
    for rank in ranks:
        if rank < 1:
            raise ValueError(f"{name}: rank is {rank}; the smallest is 1: ask for more bits per weight or fewer paths")
    method = INITIALISERS[init]
    steps = method.steps if steps is None else steps
    if steps < 1 and method.steps:
        raise ValueError(f"{name}: steps is {steps}; {init} needs at least 1 (None gives {method.steps})")
    refit_rounds = method.refit_rounds if refit_rounds is None else refit_rounds
    if refit_rounds < 0:
        raise ValueError(f"{name}: refit_rounds is {refit_rounds}; the smallest is 0, which keeps the first scales")
    return steps, refit_rounds


def _exponent(matrix: Tensor) -> int:
    """e with max|matrix| in [2^e, 2^(e+1)), held to -120 .. 127 so that 2^e is a normal fp32 number; 0 for zeros."""
    top = float(matrix.abs().max())
    return min(max(math.frexp(top)[1] - 1, -120), 127) if top else 0


def _initialise(target: Tensor, rank: int, init: str, steps: int, seed: int) -> Path:
    if not target.any():
        # Nothing to fit. Random latents, not constant ones: training can only tell columns apart that differ.
        u, v = (sign(random_normal(k, rank, seed, target.device)) * LATENT_SIZE for k in target.shape)
        return Path(u, v, target.new_ones(len(u)), target.new_zeros(rank), target.new_ones(len(v)))
    return INITIALISERS[init].function(target, rank, steps, seed)


def _from_latents(a: Tensor, b: Tensor) -> Path:
    """Scales by rank-one fits of both magnitudes, |a| ~ scale_out of_a^T and |b| ~ scale_in of_b^T: scale_rank = of_a * of_b."""
    scale_out, of_a = rank_one(a.abs())
    scale_in, of_b = rank_one(b.abs())
    return Path(a.contiguous(), b.contiguous(), scale_out, of_a * of_b, scale_in)


def _polar(matrix: Tensor) -> Tensor:
    """Nearest orthogonal matrix Q P^T of a square `matrix` = Q S P^T.

    Newton's iteration Y <- (c Y + Y^-T / c) / 2 with Higham's norm scaling converges in under ten inverses, together
    cheaper than one SVD. A singular matrix has no inverse, so what does not converge falls back to the SVD.
    """
    y = matrix
    for _ in range(10):
        inverse = torch.linalg.inv_ex(y)[0].T
        scale = (inverse.norm() / y.norm()).sqrt()
        y = (y * scale + inverse / scale) / 2
    eye = torch.eye(len(y), dtype=y.dtype, device=y.device)
    if float((y.T @ y - eye).abs().max()) < 1e-4:
        return y
    q, _, p = torch.linalg.svd(matrix)
    return q @ p


def _balanced(path: Path, rows: Tensor, cols: Tensor, exponent: int) -> Path:
    """Undo the importance weighting and the division by 2 ** exponent, and share the size between the scales."""
    scale_out, scale_in = path.scale_out / rows, path.scale_in / cols
    mean_out, mean_in = (torch.where(x.any(), x.abs().mean(), 1.0) for x in (scale_out, scale_in))
    carried = min(max(exponent, -SIZE_CARRIED), SIZE_CARRIED)
    scale_rank = path.scale_rank * mean_out * mean_in * 2.0**carried
    scale_out = scale_out / mean_out * 2.0 ** (exponent - carried)
    scale_in = scale_in / mean_in
    return Path(*(part.contiguous() for part in (path.u, path.v, scale_out, scale_rank, scale_in)))
