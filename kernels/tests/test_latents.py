"""The compiled passes over latents against the formula in fp64, on every instruction set of this machine."""

import math

import pytest
import torch
from hf_littlebit.kernels import cpu

pytest_plugins = ["instruction_sets"]
built = pytest.mark.skipif(not cpu.LIBRARY.exists(), reason="the compiled CPU kernel is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, (1,)),
    (1, (40,)),
    (0, (16,)),
    (5, (0,)),
    (5, (3, 0, 5)),
    (33, (16, 8)),
    (64, (129,)),
    (70, (7, 300)),
    (1100, (90, 37)),  # above the size under which one thread computes
]


def factor(rows, ranks, scaled=True, seed=0):
    """latent, outer and inner of a random factor, the latents small enough for a steep slope to be felt."""
    draw = torch.Generator().manual_seed(seed)
    latent = 0.02 * torch.randn(rows, sum(ranks), generator=draw)
    latent[torch.rand(latent.shape, generator=draw) < 0.02] = -0.0
    outer, inner = torch.randn(len(ranks), rows, generator=draw), torch.randn(sum(ranks), generator=draw)
    return latent, outer, inner if scaled else None


def exact(latent, outer, inner, ranks):
    """sign(latent), and the scales of every element's row and column, in fp64."""
    signs = 1.0 - 2.0 * (latent < 0).double()
    rows = [outer[path].double()[:, None].expand(-1, rank) for path, rank in enumerate(ranks)]
    columns = torch.ones(latent.shape[1], dtype=torch.float64) if inner is None else inner.double()
    return signs, torch.cat(rows, dim=1), columns


def exact_slope(latent, alpha):
    size = latent.double().abs()
    if alpha is None:
        return (size < 1).double()
    e = torch.exp(-2 * abs(alpha) * size)
    return 4 * alpha * e / (1 + e).square()


def off(found, expected, size):
    """The error relative to `size`, a sum's to that of its magnitudes."""
    return ((found - expected).norm() / size.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_signs_are_rounded_once(isa, shape, scaled):
    rows, ranks = shape
    latent, outer, inner = factor(rows, ranks, scaled)
    signs, of_row, of_column = exact(latent, outer, inner, ranks)
    # The product of two fp32 scales is fp32, as torch computes it.
    expected = signs.float() * of_row.float() * of_column.float()
    for dtype in DTYPES:
        y = cpu.scaled_signs(latent, outer, inner, ranks, dtype)
        assert y.dtype == dtype and y._base is None and torch.equal(y, expected.to(dtype))


@pytest.mark.parametrize("alpha", [100.0, 7.0, None])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_exact_in_fp32(isa, shape, scaled, alpha):
    rows, ranks = shape
    latent, outer, inner = factor(rows, ranks, scaled)
    if alpha is None:
        latent *= 50.0  # on both sides of 1
    signs, of_row, of_column = exact(latent, outer, inner, ranks)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    for dtype in DTYPES:
        grad = noise.to(dtype)
        of_latent, of_outer, of_inner = cpu.scaled_signs_grad(grad, latent, outer, inner, ranks, alpha)
        assert of_latent.dtype == of_outer.dtype == torch.float32 and of_latent.is_contiguous()
        expected = grad.double() * of_row * of_column * exact_slope(latent, alpha)
        assert off(of_latent, expected, expected) < 1e-6
        paths = (grad.double() * signs * of_column).split(list(ranks), dim=1)
        sums, sizes = (torch.stack([path.sum(1) for path in each]) for each in (paths, [path.abs() for path in paths]))
        assert off(of_outer, sums, sizes) < 1e-6
        assert (of_inner is None) == (inner is None)
        if of_inner is not None:
            columns = grad.double() * signs * of_row
            assert off(of_inner, columns.sum(0), columns.abs().sum(0)) < 1e-6


@pytest.mark.parametrize("alpha", [100.0, 1.0, -3.0, 1e-30, 1e30, 0.0, None])
def test_slope_at_every_size(isa, alpha):
    """Relative to its peak, from subnormal numbers to the largest."""
    sizes = torch.cat([torch.logspace(-44, 38, 4000), torch.logspace(-6, 2, 4000), torch.tensor([0.0, 1.0, 3.4e38])])
    latent = torch.cat([sizes, -sizes])[:, None]
    one = torch.ones(latent.shape)
    of_latent, _, _ = cpu.scaled_signs_grad(one, latent, one.T.contiguous(), None, [1], alpha)
    peak = 1.0 if alpha is None else abs(alpha)
    assert (of_latent - exact_slope(latent, alpha)).abs().max() <= 3e-7 * peak


@pytest.mark.parametrize("columns", [1, 40])
def test_numbers_that_are_none(isa, columns):
    infinity, nan = math.inf, math.nan
    latent = torch.tensor([infinity, -infinity, nan, 1e-45, -1e-45, -0.0])[:, None].repeat(1, columns)
    one, outer = torch.ones(latent.shape), torch.ones(1, 6)
    signs = cpu.scaled_signs(latent, outer, None, [columns], torch.float32)
    assert signs[:, -1].tolist()[:4] == [1.0, -1.0, 1.0, 1.0] and signs[-1, -1] == 1.0
    smooth, of_outer, _ = cpu.scaled_signs_grad(one, latent, outer, None, [columns], 100.0)
    expected = torch.tensor([0.0, 0.0, nan, 100.0, 100.0, 100.0])
    torch.testing.assert_close(smooth[:, -1], expected, equal_nan=True)
    assert torch.equal(of_outer[0, :3], torch.tensor([1.0, -1.0, 1.0]) * columns)
    straight, *_ = cpu.scaled_signs_grad(one, latent, outer, None, [columns], None)
    assert straight[:, 0].tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    # In the gradient they stay in their row and column.
    for bad in (infinity, nan):
        grad, inner = torch.ones(3, 40), torch.ones(40)
        grad[1, 20] = bad
        results = cpu.scaled_signs_grad(grad, torch.full((3, 40), 0.01), torch.ones(1, 3), inner, [40], 100.0)
        rest = [(~value.isfinite()).nonzero().tolist() for value in results]
        assert rest == [[[1, 20]], [[0, 1]], [[20]]]


@pytest.mark.parametrize("rows", [31, 2500])
def test_results_do_not_depend_on_the_threads(isa, threads, rows):
    ranks = (104, 37)
    latent, outer, inner = factor(rows, ranks)
    grad = torch.randn(latent.shape).bfloat16()
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        signs = cpu.scaled_signs(latent, outer, inner, ranks, torch.bfloat16)
        results.append((signs, *cpu.scaled_signs_grad(grad, latent, outer, inner, ranks, 100.0)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_strides(isa):
    ranks = (16, 9)
    latent, outer, inner = factor(33, ranks)
    grad = torch.randn(latent.shape)

    def scattered(value):
        return torch.stack([value, value], dim=-1)[..., 0]

    apart = [latent.T.contiguous().T, scattered(outer), scattered(inner)]
    for kind in DTYPES:
        assert torch.equal(cpu.scaled_signs(*apart, ranks, kind), cpu.scaled_signs(latent, outer, inner, ranks, kind))
    found = cpu.scaled_signs_grad(scattered(grad), *apart, ranks, 100.0)
    assert all(map(torch.equal, found, cpu.scaled_signs_grad(grad, latent, outer, inner, ranks, 100.0)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wider_rows(isa, dtype):
    """Zeros follow in the result, and what follows in the gradient is not looked at."""
    ranks = (16, 9)
    latent, outer, inner = factor(33, ranks)
    wide = cpu.scaled_signs(latent, outer, inner, ranks, dtype, 32)
    assert torch.equal(wide[:, :25], cpu.scaled_signs(latent, outer, inner, ranks, dtype)) and not wide[:, 25:].any()
    grad = torch.randn(33, 32).to(dtype)
    grad[:, 25:] = math.nan
    found = cpu.scaled_signs_grad(grad, latent, outer, inner, ranks, 100.0)
    assert all(map(torch.equal, found, cpu.scaled_signs_grad(grad[:, :25], latent, outer, inner, ranks, 100.0)))
    with pytest.raises(RuntimeError, match="width is 24, but must be from 25"):
        cpu.scaled_signs(latent, outer, inner, ranks, dtype, 24)


@built
def test_wrong_shapes_are_errors():
    ranks = (16, 9)
    latent, outer, inner = factor(33, ranks)
    grad = torch.randn(latent.shape)
    signs = (
        ((latent, outer, inner, (16, 8)), r"latent is \[33, 25\], but must be \[33, 24\]"),
        ((latent[0], outer, inner, ranks), "latent has 1 dimensions"),
        ((latent, outer[:, 1:], inner, ranks), r"scale_feature is \[2, 32\], but must be \[2, 33\]"),
        ((latent, outer[0], inner, ranks), r"scale_feature is \[33\], but must be \[2, 33\]"),
        ((latent, outer, inner[1:], ranks), r"scale_rank is \[24\], but must be \[25\]"),
        ((latent, outer, inner, (-1, 26)), "a rank is -1"),
        ((latent.double(), outer, inner, ranks), "latent is float64, but must be float32"),
        ((latent, outer.bfloat16(), inner, ranks), "scale_feature is bfloat16, but must be float32"),
    )
    for arguments, text in signs:
        with pytest.raises(RuntimeError, match=text):
            cpu.scaled_signs(*arguments, torch.float32)
        with pytest.raises(RuntimeError, match=text):
            cpu.scaled_signs_grad(grad, *arguments, 100.0)
    with pytest.raises(RuntimeError, match="the result is float64, but must be"):
        cpu.scaled_signs(latent, outer, inner, ranks, torch.float64)
    for wrong, text in (
        (grad[1:], r"grad is \[32, 25\]"),
        (grad[:, 1:], r"grad is \[33, 24\], but must be \[33, 25\]"),
        (grad[0], r"grad is \[25\]"),
        (grad.long(), "grad is int64"),
    ):
        with pytest.raises(RuntimeError, match=text):
            cpu.scaled_signs_grad(wrong, latent, outer, inner, ranks, 100.0)


@built
def test_fake_tensors_have_the_same_shapes():
    cpu.load()
    ranks = (16, 9)
    for scaled in (True, False):
        latent, outer, inner = factor(33, ranks, scaled)
        operators, checks = torch.ops.hf_littlebit_cpu, ("test_schema", "test_faketensor")
        made = (latent, outer, inner, ranks, torch.bfloat16, 32)
        torch.library.opcheck(operators.scaled_signs, made, test_utils=checks)
        back = (torch.randn(latent.shape), latent, outer, inner, ranks, 100.0)
        torch.library.opcheck(operators.scaled_signs_grad, back, test_utils=checks)
