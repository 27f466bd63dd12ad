"""Layers that read the same x in one call of the compiled CPU kernel."""

import pytest
import torch
from calls import linear, linears
from hf_littlebit.kernels import cpu
from test_cpu import built, layer

pytest_plugins = ["instruction_sets"]


def test_layers_of_one_x_have_the_bits_that_each_has_alone(isa, threads):
    shapes = [(1500, 1400, (1000, 500)), (40, 1400, (24,)), (1200, 1400, (33, 7, 64)), (1, 1400, (8,))]
    layers = [
        (*layer(*shape, seed=seed)[0], torch.randn(shape[0]) if seed % 2 else None, list(shape[2]))
        for seed, shape in enumerate(shapes)
    ]
    for count in (1, 2, 3):
        threads(count)
        for x in (
            torch.randn(1, 1400),
            torch.randn(1400).bfloat16(),
            torch.randn(5, 2800)[:, ::2],
            torch.randn(3, 70, 1400),
        ):
            for some in (layers, layers[1:2], layers[1::2], layers[::-1]):
                found = linears(cpu, x, some)
                assert all(map(torch.equal, found, [linear(cpu, x, *each) for each in some]))
                assert len({y.data_ptr() for y in found}) == len(some) and all(y._base is None for y in found)
    assert linears(cpu, x, []) == [] and linears(cpu, x[:0], layers)[2].shape == (0, 70, 1200)


@built
def test_wrong_layers_are_errors():
    cpu.load()
    layers = [(*layer(33, 70, (16, 40))[0], None, [16, 40]), (*layer(20, 70, (8,))[0], None, [8])]
    x = torch.randn(2, 70)
    assert len(linears(cpu, x, layers)) == 2
    for wrong, text in (
        ((*layers[1][:5], layers[1][5][1:], *layers[1][6:]), r"layer 1: scale_rank is \[7\], but must be \[8\]"),
        ((None, *layers[1][1:]), "u, scale_out, scale_rank or scale_in of layer 1 is missing"),
        ((*layer(20, 71, (8,))[0], None, [8]), "layer 1 takes 71 values, but layer 0 70"),
        ((*layers[1][:8], [8, 8]), "but must be"),
    ):
        with pytest.raises(RuntimeError, match=text):
            linears(cpu, x, [layers[0], wrong])
    operator = torch.ops.hf_littlebit_cpu.linears
    parts = [part for each in layers for part in each[:8]]
    for arguments, text in (
        ((parts[1:], [16, 40, 8], [2, 1]), "15 parts were given, but 2 layers have 16"),
        ((parts, [16, 40], [2, 1]), "layer 1 has 1 paths, but 0 ranks are left"),
        ((parts, [16, 40, 8], [2, -1]), "layer 1 has -1 paths"),
    ):
        with pytest.raises(RuntimeError, match=text):
            operator(x, *arguments)
