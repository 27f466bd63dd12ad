"""The layout of packed tables, how their codes and scales are chosen, and the product in plain torch."""

import pytest
import torch
from hf_littlebit.kernels import table, table_fit, table_reference
from tables import KINDS, RAGGED, dense, made, worst_row


@pytest.mark.parametrize("bits, least, most", [(8, -127, 127), (4, -8, 7)])
@pytest.mark.parametrize("columns", [1, 7, 64, 65, 200])
def test_codes_are_unpacked_as_they_were_packed(bits, least, most, columns):
    values = torch.randint(least, most + 1, (5, columns))
    codes = table.pack_codes(values, bits)
    assert (tuple(codes.shape), codes.dtype) == table.table_shapes(5, columns, bits)["codes"]
    assert table.bits_of(codes) == bits
    assert torch.equal(table.unpack_codes(codes, columns).long(), values)


def test_the_place_of_every_nibble():
    """As the module's text says it, computed one by one."""
    values = torch.randint(-8, 8, (3, 150))
    codes = table.pack_codes(values, 4)
    assert codes.shape == (3, 24)
    for row in range(3):
        for column in range(192):
            group, inside = divmod(column, 64)
            q, i = divmod(inside, 8)
            nibble = codes[row, 8 * group + i].item() >> 4 * q & 15
            assert nibble - 8 == (values[row, column].item() if column < 150 else 0)


@pytest.mark.parametrize("bits, grouped", KINDS)
@pytest.mark.parametrize("columns", [1, 63, 64, 130])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_no_group_is_worse_than_with_its_peak_as_the_scale(bits, grouped, columns, scale_dtype):
    """At most the error of a scale that reaches the peak, for every row or group, and what the scale's own rounding brings."""
    weight = torch.randn(9, columns)
    found = table_fit.quantize_table(weight, bits, grouped, scale_dtype)
    shapes = table.table_shapes(9, columns, bits, grouped, scale_dtype)
    assert {name: (tuple(getattr(found, name).shape), getattr(found, name).dtype) for name in shapes} == shapes
    unpacked = table.unpack_table(*found)
    assert unpacked.shape == weight.shape
    plain = dense(weight, bits, grouped)
    width = 64 if found.scale.shape[1] > 1 else columns
    for first in range(0, columns, width):
        block = slice(first, first + width)
        error, limit = ((each[:, block] - weight[:, block]).norm(dim=1) for each in (unpacked, plain))
        assert (error <= limit + 2**-8 * weight[:, block].abs().amax(1)).all()


def test_the_search_gains_what_it_promises():
    """Relative errors of Gaussian rows, against rounding to the scale of the largest magnitude."""
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))

    def error(rows):
        return ((rows - weight).norm() / weight.norm()).item()

    found = {kind: error(table.unpack_table(*table_fit.quantize_table(weight, *kind))) for kind in KINDS}
    assert found[8, False] < 0.0085 and found[8, True] < 0.0061 and found[4, None] < 0.091
    assert error(dense(weight, 4, None)) > 0.098


def test_rows_of_extremes():
    """Zeros stay zeros, tiny and large rows keep their size, one value alone is kept to the scale's rounding."""
    weight = torch.zeros(5, 128)
    weight[1] = 1e-30 * torch.randn(128)
    weight[2] = 1e30 * torch.randn(128)
    weight[3, 5] = -3.0
    weight[4, 70] = 3.0
    for kind in KINDS:
        rows = table.unpack_table(*table_fit.quantize_table(weight, *kind))
        assert rows[0].eq(0).all() and rows[3].count_nonzero() == 1 and rows[4].count_nonzero() == 1
        assert rows[3, 5].item() == pytest.approx(-3, rel=2**-7) and rows[4, 70].item() == pytest.approx(3, rel=2**-7)
        for row in (1, 2):
            assert (rows[row] - weight[row]).double().norm() < 0.12 * weight[row].double().norm()


def test_what_cannot_be_quantized_is_refused():
    weight = torch.randn(4, 64)
    with pytest.raises(ValueError, match="bits is 3"):
        table_fit.quantize_table(weight, 3)
    with pytest.raises(ValueError, match="scale for every 64"):
        table_fit.quantize_table(torch.randn(4, 128), 4, False)
    with pytest.raises(ValueError, match="0 columns"):
        table_fit.quantize_table(weight[:, :0], 8)
    with pytest.raises(ValueError, match="rows, columns"):
        table_fit.quantize_table(weight[0], 8)
    with pytest.raises(ValueError, match="not finite"):
        table_fit.quantize_table(weight / 0, 8)
    with pytest.raises(ValueError, match="cannot hold"):
        table_fit.quantize_table(1e9 * weight, 8, scale_dtype=torch.float16)


def inputs_of_few_directions(columns):
    """[1000, columns], most of whose size is in a few directions, as of an output head."""
    mixed = torch.randn(columns, columns) * torch.logspace(0, -3, columns)[:, None]
    return torch.randn(1000, columns) @ mixed


@pytest.mark.parametrize("bits, grouped", KINDS)
@pytest.mark.parametrize("columns", [64, 130, 320])
def test_products_are_nearer_with_the_moment_of_the_inputs(bits, grouped, columns):
    torch.manual_seed(columns)
    weight, x = torch.randn(200, columns), inputs_of_few_directions(columns)
    kept = weight.clone()
    plain = table_fit.quantize_table(weight, bits, grouped)
    found = table_fit.quantize_table(weight, bits, grouped, moment=x.T @ x / len(x))
    assert torch.equal(weight, kept)
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(found[:2], plain[:2], strict=True))
    of_weights, of_products = (
        [(each(table.unpack_table(*packed) - weight)).norm().item() for packed in (found, plain)]
        for each in (lambda error: error, lambda error: x @ error.T)
    )
    assert of_products[0] < 0.55 * of_products[1]
    assert of_weights[0] < 1.6 * of_weights[1]


@pytest.mark.parametrize("largest", range(1, 9))
def test_what_is_on_a_grid_already_is_found_again(largest):
    """Also where no code is as large as it could be, which a moment leaves: a frozen table comes back as it was."""
    codes = torch.randint(-largest, largest, (50, 192))
    codes[:, ::64] = -largest
    rows = codes * torch.randn(50, 3).bfloat16().float().repeat_interleave(64, dim=1)
    for moment in (None, torch.eye(192) + 0.5):
        assert torch.equal(table.unpack_table(*table_fit.quantize_table(rows, 4, moment=moment)), rows)


@pytest.mark.parametrize("bits, grouped", KINDS)
def test_inputs_that_are_alike_in_all_directions_change_nothing(bits, grouped):
    weight = torch.randn(9, 130)
    plain = table_fit.quantize_table(weight, bits, grouped)
    found = table_fit.quantize_table(weight, bits, grouped, moment=3e5 * torch.eye(130))
    assert torch.equal(found.codes, plain.codes) and torch.equal(found.scale, plain.scale)


def test_moments_of_no_inputs_are_refused():
    weight = torch.randn(4, 64)
    with pytest.raises(ValueError, match=r"\[63, 64\], but must be \[64, 64\]"):
        table_fit.quantize_table(weight, 4, moment=torch.eye(64)[1:])
    for moment in (torch.zeros(64, 64), torch.full((64, 64), torch.nan)):
        with pytest.raises(ValueError, match="not finite, or nothing but zeros"):
            table_fit.quantize_table(weight, 4, moment=moment)
    with pytest.raises(ValueError, match="less than nothing"):
        table_fit.quantize_table(weight, 4, moment=5 - 4 * torch.eye(64))


def test_slabs_change_nothing(monkeypatch):
    weight, x = torch.randn(37, 130), torch.randn(3, 130)
    for kind in KINDS:
        whole = table_fit.quantize_table(weight, *kind)
        monkeypatch.setattr(table_fit, "SLAB", 1000)
        monkeypatch.setattr(table_reference, "SLAB", 1000)
        parts = table_fit.quantize_table(weight, *kind)
        assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.scale, parts.scale)
        cut = table_reference.head(x, *whole[:2])
        monkeypatch.undo()
        assert torch.allclose(cut, table_reference.head(x, *whole[:2]), atol=1e-5)


@pytest.mark.parametrize("bits, grouped", KINDS)
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_plain_torch_against_fp64(bits, grouped, shape):
    packed, exact = made(*shape, bits, grouped)
    for lead in ((), (0,), (5,), (2, 3)):
        x, grad, bias = torch.randn(*lead, shape[1]), torch.randn(*lead, shape[0]), torch.randn(shape[0])
        y = table_reference.head(x, *packed[:2], bias)
        assert y.shape == grad.shape and worst_row(y, x, exact.T, bias) < 1e-6
        dx = table_reference.head_grad(grad, *packed)
        assert dx.shape == x.shape and worst_row(dx, grad, exact) < 1e-6
    indices = torch.tensor([[0, shape[0] - 1, 0]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = table_reference.embedding(indices, *packed, dtype)
        assert torch.equal(rows, exact[indices].float().to(dtype))
    with pytest.raises(IndexError):
        table_reference.embedding(indices - 1, *packed, torch.float32)
