"""The Triton kernels for layers that read the same x, as triton_cases.py, and run like it."""

import pytest
import torch
from calls import linear, linears
from hf_littlebit.kernels import gpu, tuning
from test_cpu import layer
from triton_cases import DEVICE, FEW, check, put

GROUPS = [
    [(129, (33, 7, 64)), (1, (8,))],
    [(96, (64, 32)), (40, (40, 8)), (33, (16, 16))],
]


def group(sizes, into=131):
    """Layers of one in_features, each the fields of a `PackedLayer`, and (matrix, magnitudes, bias) of each in fp64."""
    layers, oracles = [], []
    for index, (out, ranks) in enumerate(sizes):
        parts, dense, size = layer(out, into, ranks, scale_dtype=(torch.bfloat16, torch.float32)[index % 2], seed=index)
        bias = None if index % 2 else torch.randn(out)
        layers.append((*put(*parts, bias), ranks))
        oracles.append((dense.T, size.T, bias))
    return layers, oracles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", GROUPS, ids=str)
@pytest.mark.parametrize("tokens", [(), (0,), (1,), (2,), (2, 2), (5,)], ids=str)
def test_layers_that_read_the_same_x(sizes, tokens, dtype):
    layers, oracles = group(sizes)
    x = torch.randn(*tokens, 131).to(dtype)
    found = linears(gpu, *put(x), layers)
    assert [(y.dtype, y.shape) for y in found] == [(dtype, (*tokens, out)) for out, _ in sizes]
    for y, oracle in zip(found, oracles):  # noqa: B905 Python 3.9
        check(y, x, *oracle)


@pytest.mark.parametrize("few", FEW[1:], ids=str)
@pytest.mark.parametrize("sizes", [*GROUPS, [(129, (40, 8))] * 3], ids=str)
def test_a_layer_is_the_same_alone_and_in_a_group(monkeypatch, sizes, few):
    """With one choice of tiles; layers of equal sizes get one by themselves."""
    if few is None or len(set(sizes)) > 1:
        monkeypatch.setattr(tuning, "few", lambda *_: few)
        monkeypatch.setattr(tuning, "decode_group", lambda *_: tuning.Decode(32, 4, 4, 2, 64, 2, 4))
    layers, _ = group(sizes, 200)
    x = torch.randn(200, 2, device=DEVICE).bfloat16().T
    for y, one in zip(linears(gpu, x, layers), layers):  # noqa: B905 Python 3.9
        assert torch.equal(y, linear(gpu, x, *one))


def test_a_wrong_part_of_one_layer_is_an_error():
    (x,) = put(torch.randn(2, 131))
    layers, _ = group(GROUPS[1])
    assert linears(gpu, x, []) == []
    for index, part in enumerate(layers[1][:7]):
        for wrong in (part[..., :-1], part.to(torch.float64), part.to("meta")):
            one = (*layers[1][:index], wrong, *layers[1][index + 1 :])
            with pytest.raises(RuntimeError):
                linears(gpu, x, [layers[0], one, layers[2]])
    other, _ = group([(33, (16,))], 70)
    with pytest.raises(RuntimeError, match="last dimension must be 70"):
        linears(gpu, x, [*layers, *other])
    with pytest.raises(RuntimeError, match=r"bias is \[40\]"):
        linears(gpu, x, [*layers[:2], (*layers[2][:7], x.new_ones(40), layers[2][8])])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA GPU")
@pytest.mark.parametrize("sizes", [[(129, (40, 8))], *GROUPS], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 512])
def test_a_graph_replays_the_product(tokens, sizes):
    layers, _ = group(sizes, 257)
    x = torch.randn(tokens, 257, device=DEVICE)
    linears(gpu, x, layers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = linears(gpu, x, layers)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(map(torch.equal, found, linears(gpu, x, layers)))
