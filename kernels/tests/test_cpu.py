"""The compiled CPU kernel against fp64, on every instruction set of this machine."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from calls import linear, linear_grad
from hf_littlebit.kernels import cpu, pack_signs, reference

pytest_plugins = ["instruction_sets"]
SOURCE = Path(__file__).parents[1] / "littlebit_cpu"
built = pytest.mark.skipif(not cpu.LIBRARY.exists(), reason="the compiled CPU kernel is not built")
SHAPES = [
    (64, 48, (8,)),
    (33, 70, (16, 16)),
    (1, 5, (8,)),
    (129, 257, (40, 8)),
    (96, 31, (32, 32)),
    (20, 320, (72,)),
    (2500, 100, (33, 7, 64)),
    (100, 2051, (104, 40)),
]
TOKENS = [(), (0,), (1,), (2,), (3,), (17,), (2, 0), (64,), (5, 13)]


def layer(out_features, in_features, ranks, scale_dtype=torch.bfloat16, seed=0):
    """Packed parts, the fp64 matrix they stand for, and the magnitudes that are summed where it has an element."""
    g = torch.Generator().manual_seed(seed)
    u = [torch.randn(out_features, rank, generator=g).sign() for rank in ranks]
    v = [torch.randn(in_features, rank, generator=g).sign() for rank in ranks]
    h, ell, s = (
        torch.randn(*size, generator=g).to(scale_dtype)
        for size in ((len(ranks), out_features), (sum(ranks),), (len(ranks), in_features))
    )
    rows = [pack_signs(path.T) for path in u]
    words, tail = pack_signs(torch.cat(v, dim=1))
    parts = (torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows]), words, tail, h, ell, s)
    paths = list(zip(u, v, h.double(), ell.double().split(list(ranks)), s.double()))  # noqa: B905 Python 3.9
    dense = sum(
        (hp[:, None] * up * lp) @ (vp * sp[:, None]).T
        for up, vp, hp, lp, sp in ((a.double(), b.double(), *c) for a, b, *c in paths)
    )
    size = sum(torch.outer(hp.abs(), sp.abs()) * lp.abs().sum() for _, _, hp, lp, sp in paths)
    return parts, dense, size


def worst(result, x, matrix, size, bias=None):
    """The largest error relative to the sum of magnitudes, as a dot product's error is."""
    exact, scale = x.double() @ matrix, x.double().abs() @ size
    if bias is not None:
        exact, scale = exact + bias.double(), scale + bias.double().abs()
    return ((result - exact).abs() / scale.clamp_min(1e-30)).max().item() if result.numel() else 0.0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_products_are_exact_in_fp32(isa, shape, tokens):
    parts, dense, size = layer(*shape)
    x, bias = torch.randn(*tokens, shape[1]), torch.randn(shape[0])
    y = linear(cpu, x, *parts, bias, shape[2])
    assert y.dtype == torch.float32 and y.shape == (*tokens, shape[0])
    assert worst(y, x, dense.T, size.T, bias) < 1e-6
    grad = torch.randn_like(y)
    dx = linear_grad(cpu, grad, *parts, shape[2])
    assert dx.shape == x.shape and worst(dx, grad, dense, size) < 1e-6


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes(isa, seed):
    draw = torch.Generator().manual_seed(seed)

    def below(limit):
        return int(torch.randint(1, limit, (1,), generator=draw))

    ranks = [below(90) for _ in range(below(4))]
    shape = (below(700), below(700), ranks)
    parts, dense, size = layer(*shape, scale_dtype=(torch.bfloat16, torch.float16, torch.float32)[seed % 3], seed=seed)
    x = torch.randn(below(40), shape[1], generator=draw)
    assert worst(linear(cpu, x, *parts, None, ranks), x, dense.T, size.T) < 1e-6
    grad = torch.randn(below(40), shape[0], generator=draw)
    assert worst(linear_grad(cpu, grad, *parts, ranks), grad, dense, size) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_half_precision_rounds_once(isa, dtype, tokens):
    shape = (333, 270, (40, 16))
    parts, dense, _ = layer(*shape)
    x = (0.05 * torch.randn(tokens, 270)).to(dtype)
    y = linear(cpu, x, *parts, None, shape[2])
    exact = (x.double() @ dense.T).to(dtype)
    assert y.dtype == dtype and (y != exact).float().mean() < 0.01  # sums on a rounding edge may fall either way
    torch.testing.assert_close(y, exact)
    grad = (0.05 * torch.randn(tokens, 333)).to(dtype)
    torch.testing.assert_close(linear_grad(cpu, grad, *parts, shape[2]), (grad.double() @ dense).to(dtype))


def test_conversions_agree_with_torch(isa):
    """One output per input: the kernel's 16-bit loads and stores at every value, subnormals and infinities included."""
    plus = [torch.zeros(1, 1, dtype=torch.uint8)] * 2
    one = torch.ones(1, 1)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = every.view(dtype)
        for tokens in (1, 64):
            some = x[: 1 << 12] if tokens == 1 else x
            y = torch.cat(
                [
                    linear(
                        cpu,
                        piece[:, None],
                        torch.zeros(0, 1, dtype=torch.int32),
                        plus[0],
                        None,
                        plus[1],
                        one,
                        one[0],
                        one,
                        None,
                        [1],
                    )
                    for piece in some.split(tokens)
                ]
            )
            # Tiles read subnormal bf16 numbers as 0, as every bf16 product of the hardware does.
            tiny = torch.finfo(dtype).tiny if dtype == torch.bfloat16 else 0.0
            expected = torch.where(some.abs() < tiny, y[:, 0], some)
            torch.testing.assert_close(y[:, 0], expected, rtol=0, atol=0, equal_nan=True)
    wide = torch.cat([torch.randn(4000) * 10.0**k for k in range(-8, 6)] + [torch.tensor([65519.0, 65520.0, 1e9])])
    for dtype in (torch.float16, torch.bfloat16):
        # bias + 0 * x: any fp32 number reaches the store through the bias.
        bias, count = wide, wide.numel()
        u = torch.zeros(1, count, dtype=torch.uint8)
        scales = (torch.ones(1, count), torch.zeros(1), torch.ones(1, 1))
        x = torch.ones(1, 1, dtype=dtype)
        y = linear(cpu, x, torch.zeros(0, count, dtype=torch.int32), u, None, plus[0], *scales, bias, [1])
        assert torch.equal(y[0], wide.to(dtype))


@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_strides(isa, tokens):
    shape = (129, 70, (40, 8))
    parts, dense, size = layer(*shape)
    backing = torch.randn(70, 3, 2 * tokens)
    views = [backing[:, 1, ::2].T, torch.randn(tokens, 99)[:, 20:90], torch.randn(2 * tokens, 70)[::2]]
    views += [torch.randn(1, 70).expand(tokens, 70), torch.randn(70, tokens, 2).permute(2, 1, 0)]
    for x in views:
        assert worst(linear(cpu, x, *parts, None, shape[2]), x, dense.T, size.T) < 1e-6
    grad = torch.randn(129, tokens).T
    assert worst(linear_grad(cpu, grad, *parts, shape[2]), grad, dense, size) < 1e-6
    scattered = [torch.stack([part, part], dim=-1)[..., 0] for part in parts]
    x = views[1]
    assert worst(linear(cpu, x, *scattered, None, shape[2]), x, dense.T, size.T) < 1e-6


def test_parts_without_rows_may_be_none(isa):
    parts, dense, size = layer(33, 64, (32, 64))
    parts = [part if part.shape[0] else None for part in parts]
    assert parts[1] is None and parts[3] is None
    x = torch.randn(3, 64)
    assert worst(linear(cpu, x, *parts, None, (32, 64)), x, dense.T, size.T) < 1e-6


def test_results_depend_on_the_number_of_threads_alone(isa, threads):
    shape = (1500, 1400, (1000, 500))  # above the size under which one thread computes
    parts, dense, size = layer(*shape)
    for tokens in (1, 5, 200):
        x = torch.randn(tokens, 1400)
        for count in (1, 2):
            threads(count)
            y = linear(cpu, x, *parts, None, shape[2])
            dx = linear_grad(cpu, y, *parts, shape[2])
            assert worst(y, x, dense.T, size.T) < 1e-6 and worst(dx, y, dense, size) < 1e-6
            for _ in range(3):
                assert torch.equal(y, linear(cpu, x, *parts, None, shape[2]))
                assert torch.equal(dx, linear_grad(cpu, y, *parts, shape[2]))


@built
def test_wrong_parts_are_errors():
    cpu.load()
    parts, *_ = layer(33, 70, (16, 40))
    x = torch.randn(2, 70)
    good = list(parts)
    for index, part in enumerate(good):
        for wrong in (part[..., :-1], part.to(torch.float64), part.to("meta"), None):
            if wrong is None and index > 3:
                continue
            bad = [*good[:index], wrong, *good[index + 1 :]]
            with pytest.raises((RuntimeError, NotImplementedError)):
                linear(cpu, x, *bad, None, (16, 40))
    for arguments in (
        (x[:, :-1], None, (16, 40)),
        (x, torch.ones(32), (16, 40)),
        (x, None, (16, 39)),
        (x, None, (-8, 64)),
        (x, None, (56,)),
        (x, None, ()),
        (x, None, (2**62, 2**62, 2**62, 2**62, 56)),
        (x[0, 0], None, (16, 40)),
        (x, torch.ones(33).to(torch.int32), (16, 40)),
        (x, torch.ones(1, 1, 33), (16, 40)),
    ):
        with pytest.raises(RuntimeError):
            linear(cpu, arguments[0], *good, *arguments[1:])
    for message, index, wrong in (
        (r"u is \[0, 33\], but must be \[1, 33\]", 0, good[0][:0]),
        (r"v_tail is missing: the layer needs \[1, 56\]", 3, None),
        ("scale_rank is int32, but must be float32, bfloat16 or float16", 5, good[5].to(torch.int32)),
        ("scale_out has 3 dimensions, but must have 2", 4, good[4][None]),
        ("scale_in has 1 dimensions, but must have 2", 6, good[6][0]),
    ):
        with pytest.raises(RuntimeError, match=message):
            linear(cpu, x, *good[:index], wrong, *good[index + 1 :], None, (16, 40))
    nothing = [torch.zeros(0, 33, dtype=torch.int32), None, torch.zeros(2, 0, dtype=torch.int32), good[3][:, :0]]
    with pytest.raises(RuntimeError, match="ranks is empty"):
        linear(cpu, x, *nothing, torch.ones(0, 33), torch.ones(0), torch.ones(0, 70), None, ())
    with pytest.raises(RuntimeError, match="float64"):
        linear(cpu, x.double(), *good, None, (16, 40))
    with pytest.raises(RuntimeError, match="no instruction set 'sse'"):
        cpu.select("sse")


@built
def test_threads_of_python_may_call_at_once(threads):
    threads(2)
    cpu.load()
    shape = (1500, 1400, (1000, 500))
    parts, *_ = layer(*shape)
    inputs = [torch.randn(tokens, 1400) for tokens in (1, 5, 64, 130)]
    expected = [linear(cpu, x, *parts, None, shape[2]) for x in inputs]

    def work(_):
        return all(
            torch.equal(linear(cpu, x, *parts, None, shape[2]), y)
            for _ in range(5)
            for x, y in zip(inputs, expected)  # noqa: B905 Python 3.9
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.subprocess
@built
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_computes_with_one_thread():
    code = (
        "import torch, hf_littlebit.kernels as k; torch.set_num_threads(2)\n"
        "u, v = torch.zeros(30, 1500, dtype=torch.int32), torch.zeros(40, 960, dtype=torch.int32)\n"
        "parts = (u, None, v, None, torch.ones(1, 1500), torch.ones(960), torch.ones(1, 1280))\n"
        "y = k.littlebit_linear(torch.ones(70, 1280), *parts, None, [960])\n"
        "import os; child = os.fork()\n"
        "if not child:\n"
        "    torch.set_num_threads(1)\n"
        "    os._exit(not torch.equal(y, k.littlebit_linear(torch.ones(70, 1280), *parts, None, [960])))\n"
        "print(os.waitpid(child, 0)[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.strip() == "0", done.stdout + done.stderr


def test_numbers_that_are_none_stay_with_their_token(isa):
    """An infinity or a NaN in one token makes that token's result what torch makes of it, and no other's."""
    shape = (130, 75, (40, 8))
    parts, dense, size = layer(*shape)
    for tokens in (3, 20):
        for bad in (float("inf"), float("-inf"), float("nan")):
            x = torch.randn(tokens, 75)
            x[1, 70] = bad
            y, dx = linear(cpu, x, *parts, None, shape[2]), torch.randn(tokens, 130)
            assert not y[1].isfinite().any()
            rest = torch.arange(tokens) != 1
            assert worst(y[rest], x[rest], dense.T, size.T) < 1e-6
            dx[1, 129] = bad
            grad = linear_grad(cpu, dx, *parts, shape[2])
            assert not grad[1].isfinite().any() and worst(grad[rest], dx[rest], dense, size) < 1e-6


def test_large_and_small_scales(isa):
    """The latent vector is fp32: scales may lie far apart as long as products do not overflow."""
    shape = (70, 90, (40, 8))
    parts, dense, size = layer(*shape, scale_dtype=torch.float32)
    for factors in ((1e30, 1e-12, 1e-18), (1e-30, 1e17, 1e17), (1e-12, 1e-12, 1e30)):
        scaled = [part * factor for part, factor in zip(parts[4:], factors)]  # noqa: B905 Python 3.9
        times = factors[0] * factors[1] * factors[2]
        for tokens in (1, 9):
            x = torch.randn(tokens, 90)
            y = linear(cpu, x, *parts[:4], *scaled, None, shape[2])
            assert worst(y.double() / times, x, dense.T, size.T) < 1e-6


@built
def test_half_precision_is_read_where_subnormal_floats_are_flushed():
    cpu.load()
    byte, one = torch.zeros(1, 1, dtype=torch.uint8), torch.ones(1, 1)
    x = torch.tensor([[2.0**-24], [-(2.0**-15)]], dtype=torch.float16)
    if not torch.set_flush_denormal(True):
        pytest.skip("the machine does not flush subnormal numbers")
    try:
        parts = (torch.zeros(0, 1, dtype=torch.int32), byte, None, byte, one, one[0], one)
        assert torch.equal(linear(cpu, x, *parts, None, [1]), x)
    finally:
        torch.set_flush_denormal(False)


@built
@pytest.mark.parametrize("module", [cpu, reference])
def test_results_are_no_views(module):
    """autograd forbids to modify a view that an operator has made, and residual sums are written in place."""
    parts, *_ = layer(33, 70, (16, 40))
    for shape in ((70,), (3, 70), (2, 3, 70), (0, 70)):
        y = linear(module, torch.randn(*shape), *parts, None, (16, 40))
        dx = linear_grad(module, y, *parts, (16, 40))
        assert y._base is None and dx._base is None and y.is_contiguous() and dx.shape == shape
