"""The two layers: forward, gradients, pack and unpack, compile; and the operator that they share."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from hf_littlebit import LatentLittleBitLinear, LittleBitLinear
from hf_littlebit.initialize.factorize import factorize
from hf_littlebit.layers.parts import latent_parts, pack_parts
from hf_littlebit.layers.sign import ALPHA, SignGradient, sign, times_slope

SIZES = [(48, 64, (16,)), (33, 70, (16, 8)), (96, 40, (40, 40))]


def pair(out_features, in_features, ranks, bias=True):
    """A packed layer and its latent twin from the same random weight."""
    torch.manual_seed(out_features)
    paths = factorize(torch.randn(out_features, in_features), ranks, "dual_svid")
    packed = LittleBitLinear(in_features, out_features, ranks, bias, device="meta")
    packed.fill("weight", pack_parts(paths, torch.bfloat16))
    latent = LatentLittleBitLinear(in_features, out_features, ranks, bias, device="meta")
    latent.fill("weight", latent_parts(paths))
    if bias:
        packed.bias = latent.bias = nn.Parameter(torch.randn(out_features))
    return packed, latent


@pytest.mark.parametrize("size", SIZES)
def test_forward_equals_the_dense_weight_it_stands_for(size):
    packed, latent = pair(*size)
    x = torch.randn(5, size[1])
    expected = nn.functional.linear(x, packed.dense(), packed.bias)
    torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latent(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latent.dense(), packed.dense(), rtol=0, atol=0)
    assert isinstance(packed, nn.Linear) and packed.weight.dtype == torch.int32 and not packed.weight.requires_grad


@pytest.mark.parametrize("size", SIZES)
def test_pack_and_unpack_are_exact(size):
    packed, latent = pair(*size)
    for other in (latent.pack(), packed.unpack().pack(), packed.unpack().pack().unpack().pack()):
        assert other.state_dict().keys() == packed.state_dict().keys()
        for name, value in packed.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]) and value.dtype == other.state_dict()[name].dtype, name
    twin = packed.unpack()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in twin.parameters())
    assert torch.equal(twin(torch.eye(size[1])), latent(torch.eye(size[1])))


@pytest.mark.parametrize("ranks", [(12,), (33, 7, 20)], ids=str)
def test_ranks_that_fill_no_whole_byte(ranks):
    packed, latent = pair(48, 64, ranks)
    torch.testing.assert_close(packed.dense(), latent.dense(), rtol=0, atol=0)
    x = torch.randn(3, 64)
    torch.testing.assert_close(packed(x), nn.functional.linear(x, packed.dense(), packed.bias), rtol=1e-4, atol=1e-4)
    again = packed.unpack().pack()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in packed.state_dict().items())


def test_zero_latents_count_as_plus_one():
    _, latent = pair(48, 64, (16,))
    with torch.no_grad():
        latent.weight.zero_()
        latent.v.fill_(-0.0)
    assert torch.equal(latent.pack().weight_tail, torch.zeros(2, 48, dtype=torch.uint8))
    assert torch.equal(latent.pack().v, torch.zeros(2, 16, dtype=torch.int32))


@pytest.mark.parametrize("size", SIZES)
def test_gradient_of_x_and_bias(size):
    packed, _ = pair(*size)
    x = torch.randn(2, 3, size[1], requires_grad=True)
    packed(x).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    bias = packed.bias.detach().clone().requires_grad_()
    nn.functional.linear(y, packed.dense(), bias).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(packed.bias.grad, bias.grad, rtol=1e-4, atol=1e-3)
    assert packed.scale_in.grad is None


def test_scales_of_a_packed_layer_refuse_a_gradient():
    packed, _ = pair(48, 64, (16,))
    packed.scale_in.requires_grad_(True)
    with pytest.raises(RuntimeError, match="format='latent'"):
        packed(torch.randn(2, 64)).sum().backward()


def test_latent_gradients_reach_every_part():
    _, latent = pair(33, 70, (16, 8))
    latent(torch.randn(4, 70)).square().sum().backward()
    for name, value in latent.named_parameters():
        assert value.grad is not None and value.grad.abs().sum() > 0, name


def test_sign_gradients_follow_their_formulas():
    x = torch.tensor([-2.0, -0.01, -0.0, 0.0, 0.003, 0.7, 1.5])
    assert sign(x).tolist() == [-1, -1, 1, 1, 1, 1, 1]
    weight = torch.arange(1.0, 8.0)
    for gradient, expected in (
        ("smooth", ALPHA * (1 - torch.tanh(ALPHA * x) ** 2)),
        ("ste", (x.abs() < 1).float()),
    ):
        torch.testing.assert_close(times_slope(weight, x, SignGradient(gradient)), expected * weight)


@pytest.mark.parametrize("tokens", [(0, 64), (64,), (1, 1, 64)])
def test_shapes_of_x(tokens):
    packed, latent = pair(48, 64, (16,))
    x = torch.randn(*tokens)
    assert packed(x).shape == latent(x).shape == (*tokens[:-1], 48)


def test_autocast_gives_the_autocast_dtype():
    packed, latent = pair(48, 64, (16,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed(torch.randn(2, 64)).dtype == latent(torch.randn(2, 64)).dtype == torch.bfloat16


def test_operator_contract():
    packed, _ = pair(33, 70, (16, 8))
    parts = [
        packed._parameters[name]
        for name in ("weight", "weight_tail", "v", "v_tail", "scale_out", "scale_rank", "scale_in")
    ]
    x = torch.randn(3, 70, requires_grad=True)
    arguments = (x, *parts, packed.bias.detach(), [16, 8])
    torch.library.opcheck(torch.ops.hf_littlebit.linear, arguments)
    torch.library.opcheck(torch.ops.hf_littlebit.linear, (x.detach(), *arguments[1:]))
    torch.library.opcheck(torch.ops.hf_littlebit.linear_grad, (torch.randn(3, 33), *parts, [16, 8]))


@pytest.mark.parametrize("shape", [(70,), (3, 70), (2, 3, 70), (0, 70)])
def test_outputs_can_be_changed_in_place(shape):
    """As those of nn.Linear can (Llama 4 does): autograd refuses that for a view that an operator returned."""
    packed, _ = pair(33, 70, (16, 8))
    for with_bias in (False, True):
        packed.bias.requires_grad_(with_bias).grad = None
        x = torch.randn(*shape, requires_grad=True)
        packed(x).add_(1).sum().backward()
        ones = torch.ones(*shape[:-1], 33)
        torch.testing.assert_close(x.grad, ones @ packed.dense(), rtol=1e-4, atol=1e-4)
        if with_bias:
            torch.testing.assert_close(packed.bias.grad, ones.reshape(-1, 33).sum(0))


@pytest.mark.slow
@pytest.mark.subprocess
def test_the_fall_back_passes_the_tests_of_the_operator():
    tests = "in_place or contract or compile or gradient_of_x"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", tests],
        env={**os.environ, "LITTLEBIT_BACKEND": "reference"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr


def test_nothing_is_recorded_where_no_gradient_is_asked_for():
    packed, _ = pair(33, 70, (16, 8))
    packed.requires_grad_(False)
    x = torch.randn(2, 70)
    expected = packed(x.clone().requires_grad_())
    assert expected.requires_grad and not packed(x).requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = packed(x.clone().requires_grad_())
            assert not y.requires_grad and torch.equal(y, expected)
    # a view of the result, and the result itself, are ordinary tensors to what comes after
    y = packed(x)
    y[:, 0].mul_(torch.ones(2, requires_grad=True)).sum().backward()
    packed.scale_out.requires_grad_(True)
    with pytest.raises(RuntimeError, match="they are constants"):
        packed(x)


def test_parts_kept_elsewhere_than_in_the_parameters_are_found():
    """As sharding wrappers do, which put tensors in their place."""
    packed, _ = pair(33, 70, (16, 8))
    x, expected = torch.randn(2, 70), packed(torch.zeros(2, 70))
    for name in ("weight", "scale_in", "bias"):
        value = getattr(packed, name).detach()
        delattr(packed, name)
        setattr(packed, name, value)
    assert torch.equal(packed(torch.zeros_like(x)), expected)


def test_weights_on_another_device_are_an_error():
    packed, _ = pair(33, 70, (16, 8))
    for name in [*packed.state_dict(), None]:  # one part, then all
        elsewhere = copy.deepcopy(packed)
        if name is None:
            elsewhere.to("meta")
        else:
            setattr(elsewhere, name, nn.Parameter(getattr(elsewhere, name).detach().to("meta"), requires_grad=False))
        for grad in (False, True):
            with pytest.raises(RuntimeError, match="x is on cpu, but the packed weight is on meta"):
                elsewhere(torch.randn(2, 70, requires_grad=grad))


def test_compile_without_graph_breaks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = pair(48, 64, (16,))[0], pair(64, 48, (16, 8))[0]

        def forward(self, x):
            return x + self.two(torch.relu(self.one(x)))

    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (2, 5):
        x = torch.randn(tokens, 64, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        out, expected = compiled(x), block(y)
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(x.grad, y.grad)


def test_compile_without_a_gradient():
    packed, _ = pair(33, 70, (16, 8))
    packed.requires_grad_(False)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager", dynamic=True)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            for shape in ((2, 70), (5, 70), (2, 3, 70)):
                x = torch.randn(*shape)
                assert torch.equal(compiled(x), packed(x))
    exported = torch.export.export(packed, (torch.randn(2, 70),))
    assert "hf_littlebit.linear" in str(exported.graph)


def test_an_export_to_onnx_is_refused_in_words(monkeypatch):
    packed, _ = pair(33, 70, (16, 8))
    packed.requires_grad_(False)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    for strict in (False, True):  # the exporter tries both ways
        with pytest.raises(Exception, match=r"call model\.dequantize\(\) first, and export the dense model"):
            torch.export.export(packed, (torch.randn(2, 70),), strict=strict)
