"""The Triton kernels against fp64 and the reference: on a GPU, or on CPU tensors under TRITON_INTERPRET=1.

Run by test_triton.py in a process of its own, because triton reads TRITON_INTERPRET when it first sees a kernel; or by hand:

    TRITON_INTERPRET=1 LITTLEBIT_BACKEND=triton pytest kernels/tests/triton_cases.py         LITTLEBIT_BACKEND=triton pytest ...
"""

import os

import pytest
import torch
from calls import linear, linear_grad, linears
from hf_littlebit.kernels import PackedLayer, bound, candidates, gpu, launch, reference, trial, tuner, tuning
from hf_littlebit.kernels.device import abilities
from test_cpu import layer, worst
from wrong_layers import CASES, fields, good

from hf_littlebit import LittleBitLinear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else next((kind for kind in gpu.DEVICES if getattr(torch, kind).is_available()), "cpu")
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
SHAPES = [(33, 70, (16, 16)), (1, 5, (8,)), (129, 257, (40, 8)), (96, 31, (32, 32)), (100, 131, (33, 7, 64))]
TOKENS = [(), (0,), (1,), (4,), (2, 0), (2, 3), (5, 13)]
# The 16-bit results are rounded once; with one term (many tokens in bf16) every factor is rounded before it is multiplied.
# The interpreter cuts bf16 off where a GPU rounds, which is twice the error.
CUT = 2 if INTERPRETED else 1
ROUNDING = {torch.float32: 0.0, torch.bfloat16: CUT * 2**-8, torch.float16: 2**-11}


def put(*tensors):
    return [None if tensor is None else tensor.to(DEVICE) for tensor in tensors]


def check(y, x, matrix, size, bias=None):
    """y against x @ matrix in fp64: fp32's error relative to the magnitudes that are summed, plus one rounding."""
    y, x = y.cpu(), x.cpu()
    exact, scale = x.double() @ matrix, x.double().abs() @ size
    if bias is not None:
        exact, scale = exact + bias.double(), scale + bias.double().abs()
    limit = 1e-6 * scale + ROUNDING[y.dtype] * exact.abs()
    if tuning.terms(torch.device(DEVICE), y.dtype, tuning.bucket(max(1, x.numel() // x.shape[-1]))) == 1:
        limit += CUT * 2**-8 * scale
    elif y.dtype != torch.float32:
        limit += CUT * 2**-16 * scale
    assert y.shape == exact.shape and not y.isnan().any()
    assert ((y.double() - exact).abs() <= limit).all(), ((y.double() - exact).abs() / scale).max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_products_are_exact_in_fp32(shape, tokens):
    parts, dense, size = layer(*shape)
    x, bias, grad = torch.randn(*tokens, shape[1]), torch.randn(shape[0]), torch.randn(*tokens, shape[0])
    y = linear(gpu, *put(x, *parts, bias), shape[2])
    assert y.dtype == torch.float32 and y.shape == grad.shape
    assert worst(y.cpu(), x, dense.T, size.T, bias) < 1e-6
    dx = linear_grad(gpu, *put(grad, *parts), shape[2])
    assert dx.shape == x.shape and worst(dx.cpu(), grad, dense, size) < 1e-6
    # A bias has no part in it, and may be shorter than what is written.
    biased = PackedLayer(*put(*parts, bias), shape[2])
    assert torch.equal(gpu.products(*put(grad), [biased], True)[0], dx)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 6, 70])
def test_half_precision(dtype, scales, tokens):
    parts, dense, size = layer(45, 70, (40, 16), scale_dtype=scales)
    x, grad, bias = ((0.1 * torch.randn(*s)).to(dtype) for s in ((tokens, 70), (tokens, 45), (45,)))
    check(linear(gpu, *put(x, *parts, bias), (40, 16)), x, dense.T, size.T, bias)
    check(linear_grad(gpu, *put(grad, *parts), (40, 16)), grad, dense, size)


TILES = {
    "splits": tuning.Tiles(32, 16, 4, 2, 3, 64, 16, 4, 2, 2, 1, 1),
    "wide steps": tuning.Tiles(64, 32, 4, 2, 1, 32, 16, 4, 2, 1, 2, 1),
    "steps wider than ranks": tuning.Tiles(32, 16, 4, 2, 2, 128, 64, 4, 2, 4, 4, 1),
}
LIMITS = {0: 1e-6, 1: CUT * 2**-8, 2: CUT * 2**-16, 3: 1e-6}


@pytest.mark.parametrize("terms", [0, 1, 2, 3])
@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize(
    "shape", [(90, 170, (72, 40)), (97, 330, (33, 7, 64)), (64, 96, (40,)), (70, 129, (256, 9))], ids=str
)
def test_terms_and_tiles_of_other_sizes(monkeypatch, tiles, terms, shape):
    """Several blocks and splits along every axis, and the product without matrix units."""
    parts, dense, size = layer(*shape)
    monkeypatch.setattr(tuning, "tiles", lambda *_: tiles._replace(terms=terms))
    bias = torch.randn(shape[0])
    for tokens in (5, 33) if shape[0] == 90 else (20,):
        x, grad = torch.randn(tokens, shape[1]), torch.randn(tokens, shape[0])
        y = linear(gpu, *put(x, *parts, bias), shape[2])
        assert worst(y.cpu(), x, dense.T, size.T, bias) < LIMITS[terms]
        dx = linear_grad(gpu, *put(grad, *parts), shape[2])
        assert worst(dx.cpu(), grad, dense, size) < LIMITS[terms]
    again = linear(gpu, *put(x, *parts, bias), shape[2])
    assert torch.equal(y, again)


@pytest.mark.parametrize("shape", [(90, 170, (72, 40)), (97, 330, (33, 7, 64)), (64, 96, (40,))], ids=str)
@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float32], ids=str)
def test_signs_unpacked_slab_after_slab(monkeypatch, shape, scales):
    unpacked = pytest.importorskip("hf_littlebit.kernels.unpacked")
    monkeypatch.setattr(unpacked, "SLAB", 1)
    monkeypatch.setattr(unpacked, "_LEAST", 64)
    monkeypatch.setattr(tuning, "tiles", lambda *_: TILES["splits"]._replace(unpacked=1))
    monkeypatch.setattr(tuning, "terms", lambda *_: 1)
    parts, dense, size = layer(*shape, scale_dtype=scales)
    x, grad, bias = ((0.1 * torch.randn(*s)).bfloat16() for s in ((130, shape[1]), (130, shape[0]), (shape[0],)))
    check(linear(gpu, *put(x, *parts, bias), shape[2]), x, dense.T, size.T, bias)
    check(linear_grad(gpu, *put(grad, *parts), shape[2]), grad, dense, size)


FEW = [
    tuning.Few(16, 4, 2, 32, 4, 1),
    tuning.Few(32, 2, 1, 16, 4, 2),
    None,  # without matrix units
]


@pytest.mark.parametrize("few", FEW, ids=str)
@pytest.mark.parametrize(
    "shape, tokens", [((40, 300, (40, 8)), 2), ((70, 131, (200,)), 1), ((33, 64, (7, 33, 64)), 4), ((40, 96, (8,)), 3)]
)
def test_decode_with_tiles_of_other_sizes(monkeypatch, shape, tokens, few):
    """Several blocks, splits and rounds; paths that share the warps."""
    parts, dense, size = layer(*shape)
    monkeypatch.setattr(tuning, "few", lambda *_: few)
    monkeypatch.setattr(tuning, "decode_group", lambda *_: tuning.Decode(16, 2, 4, 3, 32, 1, 4))
    x, bias = torch.randn(tokens, shape[1]), torch.randn(shape[0])
    y = linear(gpu, *put(x, *parts, bias), shape[2])
    assert worst(y.cpu(), x, dense.T, size.T, bias) < 1e-6
    assert torch.equal(y, linear(gpu, *put(x, *parts, bias), shape[2]))
    half = linear(gpu, *put(x.bfloat16(), *parts, bias), shape[2])
    check(half, x.bfloat16(), dense.T, size.T, bias)


@pytest.mark.parametrize("traffic", [0, 7000])
def test_decode_with_fewer_splits(monkeypatch, traffic):
    """Where stage two would read too much, a program of stage one goes on to the next words instead."""
    from hf_littlebit.kernels import decode

    shape, tokens = (40, 300, (40, 8)), 3
    parts, dense, size = layer(*shape)
    monkeypatch.setattr(tuning, "few", lambda *_: tuning.Few(32, 2, 1, 32, 4, 1))
    monkeypatch.setattr(decode, "TRAFFIC", traffic)
    decode._plan.cache_clear()
    x = torch.randn(tokens, shape[1])
    y = linear(gpu, *put(x, *parts), None, shape[2])
    plan = decode._plan(shape[1], shape[:1], shape[2:], 4, 4, tuning.few(), abilities(torch.device(DEVICE)))
    decode._plan.cache_clear()
    assert plan.splits * plan.one["ROUNDS"] >= 5 and plan.splits == (1 if traffic == 0 else 2)
    assert worst(y.cpu(), x, dense.T, size.T) < 1e-6


def test_strides_and_absent_parts():
    parts, dense, size = layer(33, 64, (32, 64))
    parts = [part if part.shape[0] else None for part in parts]
    assert parts[1] is None and parts[3] is None
    backing = torch.randn(64, 3, 14)
    for x in (
        backing[:, 1, ::2].T,
        torch.randn(7, 99)[:, 20:84],
        torch.randn(1, 64).expand(7, 64),
        backing[:, 0, :2].T,
    ):
        assert worst(linear(gpu, *put(x, *parts), None, (32, 64)).cpu(), x, dense.T, size.T) < 1e-6
    scattered = [None if part is None else torch.stack([part, part], dim=-1)[..., 0] for part in parts]
    assert worst(linear(gpu, *put(x, *scattered), None, (32, 64)).cpu(), x, dense.T, size.T) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_refused_by_name(case):
    """As plain torch and the compiled library refuse it (test_wrong_layers.py)."""
    name, change, message = CASES[case]
    arguments = dict(zip(good(), put(*list(good().values())[:-1])))  # noqa: B905 Python 3.9
    arguments["ranks"] = good()["ranks"]
    assert linear(gpu, *fields(arguments)).shape == (2, 33)
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=message):
        linear(gpu, *fields(arguments))


def test_a_part_elsewhere_is_refused():
    for name, part in good().items():
        if isinstance(part, torch.Tensor) and name != "x":
            with pytest.raises(RuntimeError, match="move both to one device"):
                linear(gpu, *fields({**good(), "x": put(good()["x"])[0], name: part.to("meta")}))


def test_other_memory_is_checked_and_launched_anew():
    """Recorded launches hold addresses: parts that are replaced, moved or resized, and tensors that die, are seen."""
    parts, dense, size = layer(129, 257, (40, 8))
    x = torch.randn(3, 257)
    for tokens in (3, 2, 1):
        held = [part.clone() for part in put(*parts)]
        for _ in range(2):
            y = linear(gpu, *put(x[:tokens]), *held, None, (40, 8))
            assert worst(y.cpu(), x[:tokens], dense.T, size.T) < 1e-6
        held[4].data = 2 * held[4]
        y = linear(gpu, *put(x[:tokens]), *held, None, (40, 8))
        assert worst(y.cpu(), x[:tokens], 2 * dense.T, 2 * size.T) < 1e-6
        held[4] = held[4][:, :-1]
        with pytest.raises(RuntimeError, match="must be"):
            linear(gpu, *put(x[:tokens]), *held, None, (40, 8))
    known = bound.known()
    del held, y
    assert bound.known() < known


def test_a_view_that_is_negated_lazily():
    parts, dense, size = layer(129, 257, (40, 8))
    for tokens in (1, 9):
        x = torch.randn(tokens, 257)
        (held,) = put(x)
        lazy = torch.complex(torch.zeros_like(held), held).conj().imag
        assert lazy.is_neg()
        held = put(*parts)
        for _ in range(2):  # the second call repeats what the first one launched
            y = linear(gpu, lazy, *held, None, (40, 8))
            assert worst(y.cpu(), -x, dense.T, size.T) < 1e-6
        held[5] = torch._neg_view(held[5])  # and a scale
        for _ in range(3):
            assert worst(linear(gpu, lazy, *held, None, (40, 8)).cpu(), x, dense.T, size.T) < 1e-6


def module(out_features, in_features, ranks, dtype=torch.float32, bias=True):
    linear = LittleBitLinear(in_features, out_features, list(ranks), bias=bias).requires_grad_(False)
    parts, dense, size = layer(out_features, in_features, ranks)
    names = ("u", "u_tail", "v", "v_tail", "scale_out", "scale_rank", "scale_in")
    held = linear.parts("weight", names)
    for name, part in zip(names, parts):  # noqa: B905 Python 3.9
        if held[name] is not None:
            held[name].data.copy_(part)
    if bias:
        linear.bias.data.copy_(torch.randn(out_features))
    return linear.to(DEVICE), dense, size


def test_the_operator_and_its_gradient():
    linear, dense, size = module(33, 70, (16, 40))
    bias = linear.bias.detach().cpu()
    for tokens in (1, 9):
        x = torch.randn(tokens, 70, device=DEVICE, requires_grad=True)
        y = linear(x)
        grad = torch.randn_like(y)
        y.backward(grad)
        assert worst(y.detach().cpu(), x.detach().cpu(), dense.T, size.T, bias) < 1e-6
        assert worst(x.grad.cpu(), grad.cpu(), dense, size) < 1e-6


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("bpw", [0.1, 0.55, 1.0])
@pytest.mark.parametrize(
    "size", [(4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096), (8192, 28672), (28672, 8192)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_grid(size, bpw, dtype):
    out, into = size
    rank = max(8, int((bpw * out * into - 32 * (out + into)) / (2 * (out + into + 16))) // 8 * 8)
    layer = trial.random_layer(out, into, (rank, rank), torch.device(DEVICE))
    for tokens in (1, 2, 4, 16, 64, 512):
        x, grad = torch.randn(tokens, into, device=DEVICE).to(dtype), torch.randn(tokens, out, device=DEVICE).to(dtype)
        for transposed, argument in ((False, x), (True, grad)):
            (exact,) = reference.products(argument.float(), [layer], transposed)
            (found,) = gpu.products(argument, [layer], transposed)
            error = (found.float() - exact).norm() / exact.norm()
            assert error < (1e-5 if dtype == torch.float32 else 5e-3), (tokens, transposed, error)


TRIALS = [
    ((64,), ((40, 8),), 2, False),
    ((64, 33), ((40, 8), (16,)), 1, False),
    ((64,), ((40, 8),), 16, False),
    ((64,), ((40, 8),), 16, True),
]


@pytest.mark.parametrize("outs, ranks, tokens, transposed", TRIALS, ids=str)
def test_the_tuner_sees_what_is_right_and_wrong(monkeypatch, outs, ranks, tokens, transposed):
    monkeypatch.setattr(trial, "current_device", lambda: torch.device(DEVICE))
    case = candidates.Case("", outs, 96, ranks, tokens, torch.bfloat16, transposed)
    start = candidates.start(torch.device(DEVICE), case)
    found = trial.Trial(case)
    tried = [start, *candidates.changes(start, case, 1)[:2], *candidates.changes(start, case, 2)[:2]]
    for config in tried:
        assert found.error(config) < CUT * tuner.LIMITS[torch.bfloat16]
    # The second product alone reads sums of nothing; the first alone leaves the results as they were.
    monkeypatch.setattr(trial, "run", lambda steps: launch.run(list(steps)[:-1]))
    assert found.error(start) == float("inf")
    monkeypatch.setattr(trial, "run", launch.run)
    found._exact = [1.02 * exact for exact in found._exact]
    assert 0.01 < found.error(start) < 0.05


@pytest.mark.gpu
@on_a_gpu
def test_nothing_is_compiled_again_as_tokens_grow():
    import triton

    parts, *_ = layer(129, 257, (40, 8))
    parts, seen = put(*parts), []
    pair = [(*parts, None, (40, 8))] * 2
    # Up to four tokens are rounded up to a power of two, and each of those is a kernel of its own.
    for tokens in (1, 2, 4, 16, 32, 64, 128, 4096):
        linear(gpu, torch.randn(tokens, 257, device=DEVICE), *parts, None, (40, 8))
        linears(gpu, torch.randn(tokens, 257, device=DEVICE), pair)
    triton.knobs.runtime.jit_post_compile_hook = lambda **about: seen.append(about)
    try:
        for tokens in (1, 2, 3, 4, 5, 15, 17, 33, 48, 100, 1000, 3000):
            linear(gpu, torch.randn(tokens, 257, device=DEVICE), *parts, None, (40, 8))
            linears(gpu, torch.randn(tokens, 257, device=DEVICE), pair)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    assert not seen


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_modules(mode):
    linear, dense, size = module(129, 257, (40, 8))
    compiled = torch.compile(linear, fullgraph=True, mode=mode)
    for tokens in (1, 1, 1, 7, 9):
        x = torch.randn(tokens, 257, device=DEVICE)
        with torch.inference_mode():
            y = compiled(x).clone()
        assert worst(y.cpu(), x.cpu(), dense.T, size.T, linear.bias.detach().cpu()) < 1e-6
