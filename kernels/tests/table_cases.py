"""The Triton kernels of packed tables against fp64: on a GPU, or on CPU tensors under TRITON_INTERPRET=1.

Run by test_table_triton.py in a process of its own, or by hand: TRITON_INTERPRET=1 pytest kernels/tests/table_cases.py
"""

import os

import pytest
import torch
from hf_littlebit.kernels import gpu, table_gpu, table_reference
from tables import KINDS, RAGGED, made, worst_row

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else next((kind for kind in gpu.DEVICES if getattr(torch, kind).is_available()), "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A 16-bit result is rounded once. The interpreter cuts bf16 off where a GPU rounds, which is twice the error.
CUT = 2 if INTERPRETED else 1
ROUNDING = {torch.float32: 0.0, torch.bfloat16: CUT * 2**-8, torch.float16: 2**-11}


def put(*tensors):
    return [None if tensor is None else tensor.to(DEVICE) for tensor in tensors]


def check(result, x, matrix, bias=None, own=1e-6):
    """fp32's error relative to the magnitudes that are summed, plus one rounding of the result."""
    result, x = result.cpu(), x.cpu()
    exact, size = x.double() @ matrix, x.double().abs() @ matrix.abs()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    limit = own * size + ROUNDING[result.dtype] * exact.abs() + 1e-30
    assert result.shape == exact.shape and ((result.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("bits, grouped", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (37, 64), (70, 130), (40, 1100)], ids=str)
def test_heads_and_gradients_are_exact_in_fp32(bits, grouped, shape):
    packed, matrix = made(*shape, bits, grouped)
    parts, bias = put(*packed[:2]), torch.randn(shape[0])
    for lead in ((), (0,), (2, 3), (19,)):
        x, grad = torch.randn(*lead, shape[1]), torch.randn(*lead, shape[0])
        y = table_gpu.head(*put(x), *parts, *put(bias))
        assert y.shape == grad.shape and worst_row(y.cpu(), x, matrix.T, bias) < 1e-6
        dx = table_gpu.head_grad(*put(grad), *parts, shape[1])
        assert dx.shape == x.shape and worst_row(dx.cpu(), grad, matrix) < 1e-6


@pytest.mark.parametrize("bits, grouped", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
def test_half_precision(bits, grouped, dtype, scale_dtype):
    packed, matrix = made(70, 130, bits, grouped, scale_dtype)
    parts = put(*packed[:2])
    for tokens in (1, 5):
        x, grad = torch.randn(tokens, 130).to(dtype), torch.randn(tokens, 70).to(dtype)
        check(table_gpu.head(*put(x), *parts), x, matrix.T)
        # The scaled gradient is two bf16 terms.
        check(table_gpu.head_grad(*put(grad), *parts, 130), grad, matrix, own=CUT * 2**-16)


@pytest.mark.parametrize("bits, grouped", KINDS)
@pytest.mark.parametrize("terms", [0, 1, 2, 3])
def test_terms(monkeypatch, bits, grouped, terms):
    monkeypatch.setattr(table_gpu, "_terms", lambda *_: terms)
    packed, matrix = made(70, 130, bits, grouped)
    x, grad = torch.randn(5, 130), torch.randn(5, 70)
    own = {0: 1e-6, 1: 1e-6, 2: CUT * 2**-16, 3: 1e-6}[terms]  # one term is x as it is
    check(table_gpu.head(*put(x), *put(*packed[:2])), x, matrix.T, own=own)
    check(table_gpu.head_grad(*put(grad), *put(*packed[:2]), 130), grad, matrix, own=own)


@pytest.mark.parametrize("bits, grouped", KINDS)
def test_tiles_of_other_sizes(monkeypatch, bits, grouped):
    packed, matrix = made(70, 512, bits, grouped)
    parts = put(*packed[:2])
    x = torch.randn(21, 512)
    for one in (table_gpu.One(8, 1, 1), table_gpu.One(16, 4, 3)):
        monkeypatch.setattr(table_gpu, "one_tile", lambda *_, one=one: one)
        assert worst_row(table_gpu.head(*put(x[:1]), *parts).cpu(), x[:1], matrix.T) < 1e-6
    for tile in (table_gpu.Tile(64, 16, 64, 4, 2), table_gpu.Tile(32, 32, 64, 4, 4)):
        monkeypatch.setattr(table_gpu, "tile", lambda *_, tile=tile: tile)
        assert worst_row(table_gpu.head(*put(x), *parts).cpu(), x, matrix.T) < 1e-6


@pytest.mark.parametrize("bits, grouped", KINDS)
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_rows_are_gathered(bits, grouped, shape):
    packed, matrix = made(*shape, bits, grouped)
    for dtype, whole in ((torch.float32, torch.int64), (torch.bfloat16, torch.int32), (torch.float16, torch.int64)):
        indices = torch.randint(shape[0], (2, 3), dtype=whole)
        rows = table_gpu.embedding(*put(indices), *put(*packed[:2]), shape[1], dtype).cpu()
        limit = (ROUNDING[dtype] + 2**-23) * matrix[indices].abs() + 2**-24
        assert rows.shape == (2, 3, shape[1]) and ((rows.double() - matrix[indices]).abs() <= limit).all()
    wrong = torch.tensor([0, -1, shape[0], 0])
    rows = table_gpu.embedding(*put(wrong), *put(*packed[:2]), shape[1], torch.float32).cpu()
    assert rows[1:3].isnan().all() and not rows[0].isnan().any() and torch.equal(rows[0], rows[3])


def test_strides_and_views():
    packed, matrix = made(70, 130, 8, False)
    parts = put(*packed[:2])
    backing = torch.randn(130, 3, 14)
    for x in (
        backing[:, 1, ::2].T,
        torch.randn(7, 199)[:, 20:150],
        torch.randn(1, 130).expand(7, 130),
        backing[:, 0, :1].T,
    ):
        assert worst_row(table_gpu.head(*put(x), *parts).cpu(), x, matrix.T) < 1e-6
    scattered = [torch.stack([part, part], dim=-1)[..., 0] for part in parts]
    x = torch.randn(2, 130)
    assert torch.equal(table_gpu.head(*put(x), *scattered), table_gpu.head(*put(x), *parts))
    (held,) = put(x)
    lazy = torch.complex(torch.zeros_like(held), held).conj().imag
    assert lazy.is_neg() and worst_row(table_gpu.head(lazy, *parts).cpu(), -x, matrix.T) < 1e-6


def test_the_same_errors_as_plain_torch():
    packed, _ = made(70, 130, 4, None)
    codes, scale = put(*packed[:2])
    (x,) = put(torch.randn(2, 130))
    for wrong in (
        (x[:, :-3], codes[:, :-8], scale),
        (x, codes.long(), scale),
        (x, codes, scale[:, :1]),
        (x, codes, scale.double()),
        (x.double(), codes, scale),
        (x, codes, scale, x.new_ones(69)),
        (x, codes.to("meta"), scale),
    ):
        texts = []
        for module in (table_gpu, table_reference):
            with pytest.raises(RuntimeError) as error:
                module.head(*wrong)
            texts.append(str(error.value))
        assert texts[0] == texts[1]
