"""The compiled CPU kernel against fp64, on every instruction set of this machine; loading it, and doing without it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_littlebit.kernels import cpu, pack_signs, reference

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


def sets():
    """The instruction sets that this machine can run."""
    if not cpu.LIBRARY.exists() or not cpu.load():
        return ["none"]
    found = []
    for isa in ("amx", "avx512", "avx2", "neon", "generic"):
        try:
            found.append(cpu.select(isa))
        except RuntimeError:
            continue
    cpu.select("auto")
    return found


@pytest.fixture(params=sets())
def isa(request):
    if request.param == "none":
        pytest.skip("the compiled CPU kernel is not built")
    assert cpu.select(request.param) == request.param
    yield request.param
    cpu.select("auto")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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
    y = cpu.littlebit_linear(x, *parts, bias, shape[2])
    assert y.dtype == torch.float32 and y.shape == (*tokens, shape[0])
    assert worst(y, x, dense.T, size.T, bias) < 1e-6
    grad = torch.randn_like(y)
    dx = cpu.littlebit_linear_grad(grad, *parts, shape[2])
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
    assert worst(cpu.littlebit_linear(x, *parts, None, ranks), x, dense.T, size.T) < 1e-6
    grad = torch.randn(below(40), shape[0], generator=draw)
    assert worst(cpu.littlebit_linear_grad(grad, *parts, ranks), grad, dense, size) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_half_precision_rounds_once(isa, dtype, tokens):
    shape = (333, 270, (40, 16))
    parts, dense, _ = layer(*shape)
    x = (0.05 * torch.randn(tokens, 270)).to(dtype)
    y = cpu.littlebit_linear(x, *parts, None, shape[2])
    exact = (x.double() @ dense.T).to(dtype)
    assert y.dtype == dtype and (y != exact).float().mean() < 0.01  # sums on a rounding edge may fall either way
    torch.testing.assert_close(y, exact)
    grad = (0.05 * torch.randn(tokens, 333)).to(dtype)
    torch.testing.assert_close(cpu.littlebit_linear_grad(grad, *parts, shape[2]), (grad.double() @ dense).to(dtype))


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
                    cpu.littlebit_linear(
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
        y = cpu.littlebit_linear(x, torch.zeros(0, count, dtype=torch.int32), u, None, plus[0], *scales, bias, [1])
        assert torch.equal(y[0], wide.to(dtype))


@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_strides(isa, tokens):
    shape = (129, 70, (40, 8))
    parts, dense, size = layer(*shape)
    backing = torch.randn(70, 3, 2 * tokens)
    views = [backing[:, 1, ::2].T, torch.randn(tokens, 99)[:, 20:90], torch.randn(2 * tokens, 70)[::2]]
    views += [torch.randn(1, 70).expand(tokens, 70), torch.randn(70, tokens, 2).permute(2, 1, 0)]
    for x in views:
        assert worst(cpu.littlebit_linear(x, *parts, None, shape[2]), x, dense.T, size.T) < 1e-6
    grad = torch.randn(129, tokens).T
    assert worst(cpu.littlebit_linear_grad(grad, *parts, shape[2]), grad, dense, size) < 1e-6
    scattered = [torch.stack([part, part], dim=-1)[..., 0] for part in parts]
    x = views[1]
    assert worst(cpu.littlebit_linear(x, *scattered, None, shape[2]), x, dense.T, size.T) < 1e-6


def test_parts_without_rows_may_be_none(isa):
    parts, dense, size = layer(33, 64, (32, 64))
    parts = [part if part.shape[0] else None for part in parts]
    assert parts[1] is None and parts[3] is None
    x = torch.randn(3, 64)
    assert worst(cpu.littlebit_linear(x, *parts, None, (32, 64)), x, dense.T, size.T) < 1e-6


def test_results_depend_on_the_number_of_threads_alone(isa, threads):
    shape = (1500, 1400, (1000, 500))  # above the size under which one thread computes
    parts, dense, size = layer(*shape)
    for tokens in (1, 5, 200):
        x = torch.randn(tokens, 1400)
        for count in (1, 2):
            threads(count)
            y = cpu.littlebit_linear(x, *parts, None, shape[2])
            dx = cpu.littlebit_linear_grad(y, *parts, shape[2])
            assert worst(y, x, dense.T, size.T) < 1e-6 and worst(dx, y, dense, size) < 1e-6
            for _ in range(3):
                assert torch.equal(y, cpu.littlebit_linear(x, *parts, None, shape[2]))
                assert torch.equal(dx, cpu.littlebit_linear_grad(y, *parts, shape[2]))


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
                cpu.littlebit_linear(x, *bad, None, (16, 40))
    for arguments in (
        (x[:, :-1], None, (16, 40)),
        (x, torch.ones(32), (16, 40)),
        (x, None, (16, 39)),
        (x, None, (-8, 64)),
    ):
        with pytest.raises(RuntimeError):
            cpu.littlebit_linear(arguments[0], *good, *arguments[1:])
    with pytest.raises(RuntimeError, match="Double"):
        cpu.littlebit_linear(x.double(), *good, None, (16, 40))
    with pytest.raises(RuntimeError, match="no instruction set 'sse'"):
        cpu.select("sse")


def python(code, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


PRODUCT = """
import pathlib, warnings, torch, hf_littlebit.kernels as k
k.cpu.LIBRARY = pathlib.Path({library!r})
byte, one = torch.zeros(1, 1, dtype=torch.uint8), torch.ones(1, 1)
parts = (torch.zeros(0, 1, dtype=torch.int32), byte, None, byte, one, one[0], one)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    assert not hasattr(torch.ops.hf_littlebit_cpu, "linear")
    print([k.littlebit_linear(one, *parts, None, [1]).item() for _ in range(2)])
    print([str(w.message) for w in seen], k._backend(one).__name__)
"""
ABSENT = str(cpu.LIBRARY.with_name("absent.so"))


def test_without_the_library_one_warning_and_the_reference():
    done = python(PRODUCT.format(library=ABSENT), LITTLEBIT_BACKEND="")
    assert done.stdout.startswith("[1.0, 1.0]"), done.stderr
    assert done.stdout.count("absent.so is missing") == 1 and "LITTLEBIT_BACKEND=reference" in done.stdout
    assert done.stdout.rstrip().endswith(reference.__name__)
    done = python(PRODUCT.format(library=ABSENT), LITTLEBIT_BACKEND="reference")
    assert "missing" not in done.stdout and done.stdout.rstrip().endswith(reference.__name__), done.stderr
    for backend, text in (("cpu", "LITTLEBIT_BACKEND=cpu, but there is no"), ("quick", "reference, cpu")):
        done = python(PRODUCT.format(library=ABSENT), LITTLEBIT_BACKEND=backend)
        assert done.returncode != 0 and text in done.stderr, done.stderr


def test_a_library_that_does_not_load_is_named(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    done = python(PRODUCT.format(library=str(broken)), LITTLEBIT_BACKEND="")
    assert f"{broken} does not load" in done.stdout, done.stdout + done.stderr


@built
def test_it_is_loaded_at_the_first_product_and_then_called_by_the_dispatcher():
    done = python(PRODUCT.format(library=str(cpu.LIBRARY)), LITTLEBIT_BACKEND="")
    assert done.stdout.rstrip().endswith(f"[] {cpu.__name__}"), done.stdout + done.stderr
    code = (
        "import torch, hf_littlebit\nfrom hf_littlebit import LittleBitLinear\n"
        "m = LittleBitLinear(40, 33, [8, 16]).requires_grad_(False)\nfor p in m.parameters(): p.zero_()\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print(has('hf_littlebit::linear', 'CPU')); m(torch.ones(1, 40)); print(has('hf_littlebit::linear', 'CPU'))\n"
        "y = torch.compile(m, fullgraph=True, backend='aot_eager')(torch.ones(3, 40)); print(tuple(y.shape))\n"
    )
    done = python(code, LITTLEBIT_BACKEND="cpu")
    assert done.stdout.split("\n")[:3] == ["False", "True", "(3, 33)"], done.stdout + done.stderr


@built
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_the_library_needs_no_python():
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(cpu.LIBRARY)], capture_output=True, text=True, check=True
    )
    assert " aoti_torch_library_init_impl" in symbols.stdout
    assert not [
        line for line in symbols.stdout.splitlines() if line.split()[-1].startswith(("Py", "_Py", "_ZN2at", "_ZN3c10"))
    ]


@pytest.mark.skipif(shutil.which("g++") is None or not SOURCE.exists(), reason="needs g++ and the C++ source")
def test_nothing_is_touched_past_the_end(tmp_path):
    """Address and undefined-behaviour sanitizers over odd shapes (a short run of `make asan`)."""
    sources = [str(path) for path in SOURCE.glob("*.cpp") if path.name != "binding.cpp"]
    flags = ["-std=c++17", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread", "-w"]
    build = subprocess.run(
        ["g++", *flags, *sources, "-o", str(tmp_path / "check")], capture_output=True, text=True, check=False
    )
    if "cannot find" in build.stderr:
        pytest.skip("the compiler has no sanitizer libraries")
    assert build.returncode == 0, build.stderr
    done = subprocess.run([str(tmp_path / "check"), "8"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "generic" in done.stdout, done.stdout + done.stderr
