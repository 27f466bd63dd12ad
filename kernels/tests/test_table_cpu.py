"""Packed tables by the compiled CPU kernel against fp64, on every instruction set of this machine."""

import pytest
import torch
from hf_littlebit.kernels import cpu, table_cpu, table_reference
from tables import KINDS, RAGGED, made, worst_row

pytest_plugins = ["instruction_sets"]
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
TOKENS = [(), (0,), (1,), (2,), (3,), (7,), (2, 8), (70,)]
built = pytest.mark.skipif(not cpu.LIBRARY.exists(), reason="the compiled CPU kernel is not built")


def check(result, x, matrix, bias=None):
    """fp32's error relative to the magnitudes that are summed, plus one rounding of the result."""
    exact, size = x.double() @ matrix, x.double().abs() @ matrix.abs()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    limit = 1e-6 * size + ROUNDING[result.dtype] * exact.abs() + 2**-25 * (result.dtype == torch.float16) + 1e-30
    assert result.shape == exact.shape and ((result.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("bits, grouped", KINDS)
@pytest.mark.parametrize("shape", [*RAGGED, (41, 1100), (3, 4096)], ids=str)
def test_heads_and_gradients_are_exact(isa, bits, grouped, shape):
    packed, matrix = made(*shape, bits, grouped)
    for lead in TOKENS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x, grad = torch.randn(*lead, shape[1]).to(dtype), torch.randn(*lead, shape[0]).to(dtype)
            bias = torch.randn(shape[0]).to(dtype)
            y = table_cpu.head(x, *packed[:2], bias)
            assert y.dtype == dtype
            check(y, x, matrix.T, bias)
            check(table_cpu.head_grad(grad, *packed), grad, matrix)


@pytest.mark.parametrize("bits, grouped", KINDS)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32], ids=str)
def test_scales_of_other_types(isa, bits, grouped, scale_dtype):
    packed, matrix = made(37, 200, bits, grouped, scale_dtype)
    for x in (torch.randn(1, 200), torch.randn(9, 200), torch.randn(1, 200).bfloat16(), torch.randn(9, 200).bfloat16()):
        check(table_cpu.head(x, *packed[:2]), x, matrix.T)


@pytest.mark.parametrize("bits, grouped", KINDS)
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_rows_are_gathered(isa, bits, grouped, shape):
    packed, _ = made(*shape, bits, grouped)
    indices = torch.randint(shape[0], (3, 2))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for given in (indices, indices.int(), indices.T.contiguous().T, indices[:0]):
            rows = table_cpu.embedding(given, *packed, dtype)
            assert torch.equal(rows, table_reference.embedding(given, *packed, dtype))
    for wrong in (-1, shape[0]):
        with pytest.raises(RuntimeError, match=f"index {wrong} is out of range: the table has {shape[0]} rows"):
            table_cpu.embedding(torch.tensor([0, wrong]), *packed, torch.float32)


@pytest.mark.parametrize("bits, grouped", KINDS)
def test_threads_change_no_bit_of_a_head(isa, threads, bits, grouped):
    packed, matrix = made(3000, 700, bits, grouped)
    x, grad = torch.randn(5, 700).bfloat16(), torch.randn(5, 3000)
    results = []
    for count in (1, 3):
        threads(count)
        results.append(table_cpu.head(x, *packed[:2]))
        assert worst_row(table_cpu.head_grad(grad, *packed), grad, matrix) < 1e-6
    assert torch.equal(*results)


@built
def test_strides_and_views():
    packed, matrix = made(70, 130, 8, False)
    backing = torch.randn(130, 3, 14)
    for x in (backing[:, 1, ::2].T, torch.randn(7, 199)[:, 20:150], torch.randn(1, 130).expand(7, 130)):
        assert worst_row(table_cpu.head(x, *packed[:2]), x, matrix.T) < 1e-6
    scattered = [torch.stack([part, part], dim=-1)[..., 0] for part in packed[:2]]
    x = torch.randn(2, 130)
    assert torch.equal(table_cpu.head(x, *scattered), table_cpu.head(x, *packed[:2]))


@built
def test_wrong_parts_are_the_same_errors_as_in_plain_torch():
    packed, _ = made(70, 130, 4, None)
    eight, _ = made(70, 130, 8, None)
    codes, scale = packed[:2]
    x = torch.randn(2, 130)
    for wrong in (
        (x, codes[:, :-8], scale),
        (x, codes.long(), scale),
        (x, codes, scale[:, :1]),
        (x, eight.codes, scale[:, :2]),
        (x, codes, scale.double()),
        (x, codes, scale[0]),
    ):
        texts = []
        for module in (table_cpu, table_reference):
            with pytest.raises(RuntimeError) as error:
                module.head(*wrong)
            texts.append(str(error.value).splitlines()[0])
        assert texts[0] == texts[1]
    for arguments in ((x, codes, scale, x.new_ones(69)), (x.double(), codes, scale), (x, codes.to("meta"), scale)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            table_cpu.head(*arguments)
    with pytest.raises(RuntimeError, match="indices is float32"):
        table_cpu.embedding(torch.ones(3), *packed, torch.float32)
    with pytest.raises(RuntimeError, match="float64"):
        table_cpu.embedding(torch.ones(3, dtype=torch.int64), *packed, torch.float64)
