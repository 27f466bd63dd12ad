"""Dense weight to factors: accuracy against exact SVD, order of the initialisers, determinism, edge inputs, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hf_littlebit.initialize import admm as admm_module
from hf_littlebit.initialize.factorize import (
    INITS,
    admm,
    dual_svid,
    factorize,
    joint_itq,
    refit_scales,
    relative_error,
)
from hf_littlebit.initialize.svd import truncated_svd
from hf_littlebit.layers.path import Path


def gaussian(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def decaying(rows: int, cols: int, decay: float = 0.6, seed: int = 0) -> Tensor:
    """A matrix whose k-th singular value is k ** -decay: the spectrum of a trained layer."""
    k = min(rows, cols)
    u = torch.linalg.qr(gaussian(rows, k, seed))[0]
    v = torch.linalg.qr(gaussian(cols, k, seed + 1))[0]
    return (u * torch.arange(1, k + 1).float() ** -decay) @ v.T


def tail(matrix: Tensor, rank: int) -> float:
    """Squared error of the exact truncated SVD, relative, in fp64."""
    s = torch.linalg.svdvals(matrix.double()).square()
    return float(s[rank:].sum() / s.sum())


def tensors(path: Path) -> list[Tensor]:
    return [path.u, path.v, path.scale_out, path.scale_rank, path.scale_in]


def assert_sound(path: Path, rows: int, cols: int, rank: int) -> None:
    shapes = [(rows, rank), (cols, rank), (rows,), (rank,), (cols,)]
    for value, shape in zip(tensors(path), shapes, strict=True):
        assert value.shape == shape
        assert value.dtype == torch.float32
        assert value.is_contiguous()
        assert torch.isfinite(value).all()
    assert torch.isfinite(path.dense()).all()


# Truncated SVD


@pytest.mark.parametrize("method", ["krylov", "gram"])
@pytest.mark.parametrize(
    ("matrix", "rank"),
    [(gaussian(300, 700), 16), (gaussian(512, 384), 32), (decaying(700, 300), 24), (decaying(384, 512, 1.0), 32)],
)
def test_truncated_svd_meets_the_exact_error(matrix: Tensor, rank: int, method: str) -> None:
    u, s, v = truncated_svd(matrix, rank, method=method)
    error = float((matrix - (u * s) @ v.T).double().square().sum() / matrix.double().square().sum())
    assert error == pytest.approx(tail(matrix, rank), rel=2e-3)
    eye = torch.eye(rank)
    torch.testing.assert_close(u.T @ u, eye, atol=1e-4, rtol=0)
    torch.testing.assert_close(v.T @ v, eye, atol=0.1 if method == "krylov" else 1e-4, rtol=0)
    assert (s.diff() <= 0).all()
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


def test_truncated_svd_chooses_krylov_only_at_low_rank() -> None:
    matrix = gaussian(400, 500)
    for rank, method in ((8, "krylov"), (200, "gram")):
        for got, want in zip(truncated_svd(matrix, rank), truncated_svd(matrix, rank, method=method), strict=True):
            assert torch.equal(got, want)


def test_truncated_svd_keeps_small_singular_values() -> None:
    matrix = decaying(96, 128, decay=2.5)  # the last singular value is 1e-5 of the first: lost by an fp32 Gram matrix
    _, s, _ = truncated_svd(matrix, 96)
    torch.testing.assert_close(s, torch.arange(1, 97).float() ** -2.5, rtol=0.02, atol=0)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_truncated_svd_pads_past_the_rank(shape: tuple[int, int]) -> None:
    matrix = torch.ones(shape)
    u, s, v = truncated_svd(matrix, 12)
    assert u.shape == (shape[0], 12)
    assert v.shape == (shape[1], 12)
    assert (s[1:] == 0).all()
    torch.testing.assert_close((u * s) @ v.T, matrix)


# The initialisers


@pytest.mark.parametrize(
    ("one", "two", "marks"), [(192, 88, (0.437, 0.253, 0.158)), (48, 16, (0.556, 0.481, 0.360))], ids=["1.0", "0.3"]
)
def test_order_of_the_initialisers_at_equal_bits(one: int, two: int, marks: tuple[float, float, float]) -> None:
    weight = decaying(512, 384)
    errors = [
        relative_error(weight, factorize(weight, [two, two], "dual_svid")),
        relative_error(weight, factorize(weight, [two, two], "joint_itq")),
        relative_error(weight, factorize(weight, [one], "admm", steps=100)),
    ]
    assert errors[2] < 0.9 * errors[1] < 0.9 * errors[0]
    for error, mark in zip(errors, marks, strict=True):
        assert error < 1.03 * mark


def test_more_admm_steps_are_better() -> None:
    weight = decaying(160, 128)
    errors = [relative_error(weight, [admm(weight, 48, steps=steps)]) for steps in (5, 25, 100)]
    assert errors[0] > errors[1] > errors[2]


def test_dual_svid_is_the_published_formula() -> None:
    weight = decaying(60, 40)
    u, s, vt = torch.linalg.svd(weight)
    a, b = u[:, :8] * s[:8].sqrt(), vt[:8].T * s[:8].sqrt()
    pu, ps, pv = torch.linalg.svd(a.abs())
    qu, qs, qv = torch.linalg.svd(b.abs())
    expected = (torch.sign(a) * (ps[0] * torch.outer(pu[:, 0], pv[0]))) @ (
        torch.sign(b) * (qs[0] * torch.outer(qu[:, 0], qv[0]))
    ).T
    for path in (dual_svid(weight, 8), factorize(weight, [8], "dual_svid")[0]):
        torch.testing.assert_close(path.dense(), expected, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(path.u @ path.v.T, a @ b.T, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(path.u.abs(), a.abs(), atol=1e-3, rtol=1e-2)


def test_joint_itq_only_rotates_the_latents() -> None:
    weight = decaying(60, 40)
    plain, rotated = dual_svid(weight, 12), joint_itq(weight, 12)
    torch.testing.assert_close(rotated.u @ rotated.v.T, plain.u @ plain.v.T, atol=1e-4, rtol=1e-3)
    assert relative_error(weight, [rotated]) < relative_error(weight, [plain])


@pytest.mark.parametrize("init", INITS)
def test_a_second_path_factors_the_residual(init: str) -> None:
    weight = decaying(96, 64)
    paths = factorize(weight, [16, 8], init, steps=30)
    assert [p.u.shape[1] for p in paths] == [16, 8]
    assert relative_error(weight, paths) < relative_error(weight, paths[:1])
    residual = weight - paths[0].dense()
    assert relative_error(residual, paths[1:]) < 1


def test_admm_latents_stay_where_smooth_sign_has_a_gradient() -> None:
    (path,) = factorize(decaying(96, 64) * 1e4, [24], "admm", steps=30)
    for latent in (path.u, path.v):
        assert latent.abs().median() == pytest.approx(0.02, rel=0.01)
        assert latent.abs().min() >= 0.004
        assert latent.abs().max() <= 0.041


def test_scales_are_balanced() -> None:
    for init in INITS:
        (path,) = factorize(decaying(96, 64) * 1e4, [24], init, steps=20)
        assert path.scale_out.abs().mean() == pytest.approx(1, rel=1e-3)
        assert path.scale_in.abs().mean() == pytest.approx(1, rel=1e-3)


def test_scales_survive_bfloat16() -> None:
    weight = decaying(96, 64)
    (path,) = factorize(weight, [48], "admm", steps=50)
    stored = Path(path.u, path.v, *(x.bfloat16().float() for x in tensors(path)[2:]))
    assert relative_error(weight, [stored]) < relative_error(weight, [path]) + 1e-3


# Refit and importance


@pytest.mark.parametrize("init", INITS)
def test_refit_never_grows_the_error(init: str) -> None:
    weight = decaying(96, 64)
    (path,) = factorize(weight, [16], init, steps=20, refit_rounds=0)
    errors = [relative_error(weight, [path])]
    for rounds in (1, 2, 4, 8):
        better = refit_scales(weight, path, rounds=rounds)
        assert torch.equal(better.u, path.u)
        errors.append(relative_error(weight, [better]))
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_refit_recovers_the_scales_of_an_exact_product() -> None:
    truth = Path(gaussian(80, 6, 1), gaussian(70, 6, 2), *(gaussian(1, k, k)[0].exp() for k in (80, 6, 70)))
    start = Path(truth.u, truth.v, torch.ones(80), torch.ones(6), torch.ones(70))
    assert relative_error(truth.dense(), [refit_scales(truth.dense(), start, rounds=60)]) < 1e-4


def test_refit_of_perfect_scales_keeps_them() -> None:
    truth = Path(gaussian(20, 3, 1), gaussian(30, 3, 2), torch.ones(20), torch.tensor([1.0, 2.0, 4.0]), torch.ones(30))
    assert relative_error(truth.dense(), [refit_scales(truth.dense(), truth)]) < 1e-10


def weighted_error(weight: Tensor, path: Path, rows: Tensor, cols: Tensor) -> float:
    return relative_error(weight * rows[:, None].sqrt() * cols.sqrt(), [_weighted(path, rows, cols)])


def _weighted(path: Path, rows: Tensor, cols: Tensor) -> Path:
    return Path(path.u, path.v, path.scale_out * rows.sqrt(), path.scale_rank, path.scale_in * cols.sqrt())


@pytest.mark.parametrize("init", INITS)
def test_importance_lowers_the_weighted_error(init: str) -> None:
    weight = decaying(96, 64)
    rows, cols = gaussian(1, 96, 5)[0].mul(1.5).exp(), gaussian(1, 64, 6)[0].mul(1.5).exp()
    (plain,) = factorize(weight, [24], init, steps=40)
    (aware,) = factorize(weight, [24], init, steps=40, row_importance=rows, col_importance=cols)
    assert weighted_error(weight, aware, rows, cols) < 0.9 * weighted_error(weight, plain, rows, cols)
    refit = refit_scales(weight, plain, row_importance=rows, col_importance=cols)
    assert weighted_error(weight, refit, rows, cols) <= weighted_error(weight, plain, rows, cols)


def test_importance_of_any_size_and_with_dead_inputs_is_finite() -> None:
    weight = decaying(40, 48)
    cols = gaussian(1, 48)[0].abs() * 1e-20
    cols[:5] = 0
    (path,) = factorize(weight, [16], "admm", steps=20, row_importance=torch.full((40,), 1e20), col_importance=cols)
    assert_sound(path, 40, 48, 16)
    (none,) = factorize(weight, [16], "admm", steps=20, col_importance=torch.zeros(48))
    (ones,) = factorize(weight, [16], "admm", steps=20)
    assert torch.equal(none.dense(), ones.dense())


# Determinism and isolation


@pytest.mark.parametrize("init", INITS)
def test_equal_seeds_repeat_and_the_global_generator_is_untouched(init: str) -> None:
    weight = decaying(96, 64)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = factorize(weight, [16, 8], init, steps=10, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    second = factorize(weight, [16, 8], init, steps=10, seed=3)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))
    if init != "dual_svid":
        assert not torch.equal(first[0].u, factorize(weight, [16], init, steps=10, seed=4)[0].u)


@pytest.mark.parametrize("init", INITS)
def test_the_callers_precision_and_defaults_do_not_matter(init: str) -> None:
    weight = decaying(64, 48).requires_grad_()
    plain = factorize(weight.detach(), [16], init, steps=10)[0]
    default = torch.get_default_dtype()
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        torch.set_default_dtype(torch.bfloat16)
        matmul.fp32_precision = "bf16"
        with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            (path,) = factorize(weight, [16], init, steps=10)
            dense = path.dense()
        assert matmul.fp32_precision == "bf16"
    finally:
        torch.set_default_dtype(default)
        matmul.fp32_precision = before
    assert all(torch.equal(x, y) and not x.requires_grad for x, y in zip(tensors(path), tensors(plain), strict=True))
    assert torch.equal(dense, plain.dense())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_float_dtype_gives_fp32(dtype: torch.dtype) -> None:
    weight = decaying(40, 32).to(dtype)
    for init in INITS:
        (path,) = factorize(weight, [8], init, steps=10)
        assert_sound(path, 40, 32, 8)
        assert torch.equal(path.u, factorize(weight.float(), [8], init, steps=10)[0].u)


def test_non_contiguous_weight() -> None:
    weight = decaying(48, 40)
    for init in INITS:
        (path,) = factorize(weight.T.contiguous().T, [8], init, steps=10)
        torch.testing.assert_close(
            path.dense(), factorize(weight, [8], init, steps=10)[0].dense(), atol=1e-3, rtol=1e-3
        )


# Edge inputs

EDGES = {
    "zero": torch.zeros(24, 40),
    "constant": torch.full((24, 40), -0.3),
    "one_row": gaussian(1, 40),
    "one_column": gaussian(40, 1),
    "one_value": torch.tensor([[2.0]]),
    "rank_one": torch.outer(gaussian(1, 24)[0], gaussian(1, 40, 1)[0]),
    "zero_rows_and_columns": gaussian(24, 40) * (torch.arange(24)[:, None] % 3 > 0) * (torch.arange(40) % 4 > 0),
    "one_hot": torch.zeros(24, 40).index_put_((torch.tensor(3), torch.tensor(5)), torch.tensor(1.0)),
    "outlier": gaussian(24, 40).index_put_((torch.tensor(3), torch.tensor(5)), torch.tensor(1e6)),
    "tiny": gaussian(24, 40) * 1e-30,
    "huge": gaussian(24, 40) * 1e30,
    "subnormal": gaussian(24, 40) * 1e-40,
    "largest": gaussian(24, 40).sign() * torch.finfo(torch.bfloat16).max,
}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("edge", EDGES)
def test_edge_inputs_stay_finite(edge: str, init: str) -> None:
    weight = EDGES[edge]
    rows, cols = weight.shape
    for rank in (1, 8, 48):  # 48 is past min(out, in) of all of them
        paths = factorize(weight, [rank, rank], init, steps=12)
        for path in paths:
            assert_sound(path, rows, cols, rank)
            stored = [x.bfloat16() for x in tensors(path)[2:]]
            assert all(torch.isfinite(x).all() for x in stored)
        error = relative_error(weight, paths)
        assert error <= 1.001 or init != "admm"
    if edge == "zero":
        assert relative_error(weight, paths) == 0


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_the_error_does_not_depend_on_the_size(size: float) -> None:
    weight = decaying(48, 40)
    for init in INITS:
        plain = relative_error(weight, factorize(weight, [16, 8], init, steps=20))
        assert relative_error(weight * size, factorize(weight * size, [16, 8], init, steps=20)) == pytest.approx(
            plain, rel=0.05
        )


def test_svd_initialisers_pad_with_zero_scales() -> None:
    (path,) = factorize(gaussian(6, 10), [9], "dual_svid")
    assert (path.scale_rank[6:] == 0).all()
    assert (path.scale_rank[:6] > 0).all()


def test_zero_latents_count_as_plus_one() -> None:
    path = Path(torch.zeros(2, 1), torch.tensor([[-0.0], [-1.0]]), torch.ones(2), torch.ones(1), torch.ones(2))
    assert torch.equal(path.dense(), torch.tensor([[1.0, -1.0], [1.0, -1.0]]))


# Errors


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_bad_values_are_counted_and_named(value: float) -> None:
    weight = gaussian(8, 8)
    weight[1, 2] = weight[3, 4] = value
    with pytest.raises(ValueError, match=r"model\.layers\.0\.q_proj: 2 of 64 values are NaN or Inf"):
        factorize(weight, [4], "admm", name="model.layers.0.q_proj")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"init": "svd"}, "init is 'svd'; choose one of 'dual_svid', 'joint_itq', 'admm'"),
        ({"ranks": [8, 0]}, "rank is 0; the smallest is 1"),
        ({"ranks": []}, "ranks is empty"),
        ({"weight": torch.ones(3)}, r"shape is \(3,\); only a non-empty matrix"),
        ({"weight": torch.ones(2, 3, 4)}, r"shape is \(2, 3, 4\)"),
        ({"weight": torch.ones(0, 4)}, r"shape is \(0, 4\)"),
        ({"weight": torch.ones(4, 4, dtype=torch.int8)}, "torch.int8"),
        ({"weight": torch.ones(4, 4, device="meta")}, "meta"),
        ({"steps": 0}, "steps is 0; admm needs at least 1"),
        ({"refit_rounds": -1}, "refit_rounds is -1; the smallest is 0"),
        ({"row_importance": torch.ones(5)}, r"row_importance has shape \(5,\); it needs \(4,\)"),
        ({"col_importance": torch.tensor([1.0, -1.0, float("nan"), 1.0])}, "2 of 4 values of col_importance"),
    ],
)
def test_bad_arguments_say_value_and_limit(kwargs: dict, message: str) -> None:
    arguments = {"weight": torch.ones(4, 4), "ranks": [2], "init": "admm", "name": "layer7", **kwargs}
    with pytest.raises(ValueError, match=message) as raised:
        factorize(**arguments)
    assert str(raised.value).startswith("layer7: ")


def test_large_matrices_are_multiplied_in_full_fp32_however_they_are_laid_out():
    generator = torch.Generator().manual_seed(0)
    target, other = torch.randn(700, 600, generator=generator), torch.randn(90, 600, generator=generator)
    layout = admm_module._layout(target)
    assert layout(target).is_mkldnn == torch.backends.mkldnn.is_available()
    assert not admm_module._layout(target[:8, :8])(target).is_mkldnn
    found, exact = admm_module._product(layout(target), layout(other)), target.double() @ other.double().T
    assert not found.is_mkldnn and (found - exact).norm() < 2e-6 * exact.norm()


def test_a_layout_changes_no_factorization(monkeypatch):
    target = torch.randn(520, 520, generator=torch.Generator().manual_seed(0))
    errors = []
    for large in (admm_module.LARGE, 2**40):
        monkeypatch.setattr(admm_module, "LARGE", large)
        u, v, out, rank, inner = admm_module.admm_factors(target, 60, steps=10)
        product = (u.sign() * out[:, None] * rank) @ (v.sign() * inner[:, None]).T
        errors.append(float((target - product).norm() / target.norm()))
    assert errors[0] == pytest.approx(errors[1], rel=2e-3) and errors[0] < 0.95
