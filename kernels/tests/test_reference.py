"""The packed layout and the reference product, at odd shapes, against plain matrix algebra in fp64."""

import pytest
import torch
from calls import linear, linear_grad
from hf_littlebit.kernels import factor_shapes, pack_signs, reference, stored_bits
from hf_littlebit.kernels import unpack_signs as unpack

SHAPES = [(64, 48, (8,)), (33, 70, (16, 16)), (1, 5, (8,)), (129, 257, (40, 8)), (96, 31, (32, 32)), (20, 320, (72,))]


def layer(out_features, in_features, ranks, seed=0):
    """Random factors as dense fp64 matrices and as packed parts."""
    g = torch.Generator().manual_seed(seed)
    paths = []
    for rank in ranks:
        u = torch.randn(out_features, rank, generator=g).sign()
        v = torch.randn(in_features, rank, generator=g).sign()
        scales = [torch.randn(size, generator=g).to(torch.bfloat16) for size in (out_features, rank, in_features)]
        paths.append((u, v, *scales))
    rows = [pack_signs(u.T) for u, *_ in paths]
    words, tail = pack_signs(torch.cat([v for _, v, *_ in paths], dim=1))
    parts = {
        "u": torch.cat([r[0] for r in rows]),
        "u_tail": torch.cat([r[1] for r in rows]),
        "v": words,
        "v_tail": tail,
        "scale_out": torch.stack([p[2] for p in paths]),
        "scale_rank": torch.cat([p[3] for p in paths]),
        "scale_in": torch.stack([p[4] for p in paths]),
    }
    dense = sum(
        (h.double()[:, None] * u.double() * ell.double()) @ (v.double() * g.double()[:, None]).T
        for u, v, h, ell, g in paths
    )
    return dense, parts


@pytest.mark.parametrize("length", [1, 7, 8, 31, 32, 33, 40, 64, 95, 257])
@pytest.mark.parametrize("columns", [1, 3, 16])
def test_round_trip_and_bit_order(length, columns):
    values = torch.randn(length, columns)
    values[0] = 0.0
    words, tail = pack_signs(values)
    assert words.dtype == torch.int32 and words.shape == (length // 32, columns)
    assert tail.dtype == torch.uint8 and tail.shape == (-(-(length % 32) // 8), columns)
    signs = torch.where(values < 0, -1.0, 1.0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(unpack(words, tail, length, dtype), signs.to(dtype))
    for k in range(length):
        part, bit = (words[k // 32], k % 32) if k < length // 32 * 32 else (tail[k % 32 // 8], k % 8)
        assert torch.equal((part.to(torch.int64) >> bit) & 1, (values[k] < 0).long())
    assert stored_bits(length) * columns == 8 * (4 * words.numel() + tail.numel())


def test_a_fixed_pattern_keeps_its_bytes():
    """The file format: these bytes may only change with FORMAT_VERSION."""
    values = torch.ones(40, 2)
    values[0, 0] = values[31, 0] = values[33, 1] = -1
    words, tail = pack_signs(values)
    assert words.tolist() == [[-(2**31) + 1, 0]] and tail.tolist() == [[0, 2]]


def test_stacks_are_packed_matrix_by_matrix():
    values = torch.randn(3, 45, 6)
    words, tail = pack_signs(values)
    for index in range(3):
        one = pack_signs(values[index])
        assert torch.equal(words[index], one[0]) and torch.equal(tail[index], one[1])
    assert torch.equal(unpack(words, tail, 45), torch.where(values < 0, -1.0, 1.0))


@pytest.mark.parametrize("size", [(1024, 1024), (4096, 11008), (1031, 1033), (1024, 1025), (3072, 768 * 2 + 1)])
@pytest.mark.parametrize("ranks", [(136,), (72, 72), (24, 24)])
def test_padding_is_below_one_percent(size, ranks):
    shapes = factor_shapes(size[1], size[0], ranks)
    stored = sum(torch.empty(s, dtype=d, device="meta").nbytes * 8 for s, d in shapes.values())
    needed = sum(r * (size[0] + size[1] + 16) + 16 * sum(size) for r in ranks)
    assert needed <= stored < 1.01 * needed


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [(), (1,), (0,), (2, 3)])
def test_product_in_fp32(shape, tokens):
    dense, parts = layer(*shape)
    x = torch.randn(*tokens, shape[1])
    bias = torch.randn(shape[0])
    y = linear(reference, x, *parts.values(), bias, shape[2])
    expected = x.double() @ dense.T + bias.double()
    assert y.dtype == torch.float32 and y.shape == (*tokens, shape[0])
    if y.numel():
        # Relative to the sum of magnitudes that fp32 adds up, as a dot product's error is.
        size = (x.double().abs() @ dense.abs().T).clamp_min(1e-30) + bias.abs()
        assert ((y - expected).abs() / size).max() < 2e-6
    grad = torch.randn_like(y)
    dx = linear_grad(reference, grad, *parts.values(), shape[2])
    assert dx.shape == x.shape
    torch.testing.assert_close(dx.double(), grad.double() @ dense, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_product_in_half_precision_rounds_once(dtype):
    dense, parts = layer(33, 70, (16, 16))
    x = (0.1 * torch.randn(5, 70)).to(dtype)
    y = linear(reference, x, *parts.values(), None, (16, 16))
    expected = (x.double() @ dense.T).to(dtype)
    assert y.dtype == dtype
    assert (y != expected).float().mean() < 0.02  # a sum that lies on a rounding edge may fall either way
    torch.testing.assert_close(y, expected)


def test_absent_parts_and_strides():
    dense, parts = layer(33, 64, (32, 64))
    parts = {name: value if value.shape[0] else None for name, value in parts.items()}
    assert parts["u_tail"] is None and parts["v_tail"] is None
    x = torch.randn(64, 7).T
    y = linear(reference, x, *parts.values(), None, (32, 64))
    torch.testing.assert_close(y.double(), x.double() @ dense.T, rtol=1e-4, atol=1e-3)


def test_only_a_slab_is_unpacked(monkeypatch):
    _, parts = layer(129, 257, (40, 8))
    x = torch.randn(3, 257)
    whole = linear(reference, x, *parts.values(), None, (40, 8))
    sizes = []
    original = reference.unpack_signs

    def spy(*args):
        signs = original(*args)
        sizes.append(signs.numel())
        return signs

    monkeypatch.setattr(reference, "unpack_signs", spy)
    monkeypatch.setattr(reference, "SLAB", 4096)
    torch.testing.assert_close(linear(reference, x, *parts.values(), None, (40, 8)), whole, rtol=1e-5, atol=1e-3)
    assert max(sizes) <= 32 * 129 and sum(sizes) == 257 * 48 + 129 * 48
