"""The product on latents against the same formula written out with autograd, forward and every gradient."""

import os
import subprocess
import sys

import pytest
import torch

from hf_littlebit.layers import latent_matmul
from hf_littlebit.layers.latent_matmul import factored_product
from hf_littlebit.layers.sign import SignGradient, sign

GRADIENTS = [SignGradient("smooth", 100.0), SignGradient("smooth", 7.0), SignGradient("ste")]
SIZES = [(1, 1, (1,)), (5, 7, (3,)), (33, 70, (16, 8)), (48, 17, (2, 5, 8))]


def operands(out, inp, ranks, dtype=torch.float64):
    torch.manual_seed(out)
    total = sum(ranks)
    sizes = [(2, 3, inp), (out, total), (inp, total), (len(ranks), out), (total,), (len(ranks), inp)]
    values = [torch.randn(size, dtype=dtype) for size in sizes]
    values[1:3] = [0.02 * value for value in values[1:3]]
    values[1][0, 0] = values[2][-1, -1] = -0.0
    values[3][0, 0] = 0.0  # a row that was zero when it was factorized still gets a gradient
    return [value.requires_grad_() for value in values]


class Signed(torch.autograd.Function):
    """The sign with the slope of its surrogate as a derivative, by the formulas of sign.py."""

    @staticmethod
    def forward(ctx, latent, gradient):
        ctx.save_for_backward(latent)
        ctx.gradient = gradient
        return sign(latent)

    @staticmethod
    def backward(ctx, grad):
        (latent,) = ctx.saved_tensors
        surrogate, alpha = ctx.gradient
        slope = (latent.abs() < 1).to(latent.dtype)
        if surrogate == "smooth":
            slope = alpha * (1 - torch.tanh(alpha * latent) ** 2)
        return grad * slope, None


def written_out(x, u, v, scale_out, scale_rank, scale_in, ranks, gradient):
    columns = zip(*(value.split(list(ranks), dim=-1) for value in (u, v, scale_rank)), strict=True)
    y = 0
    for path, (u_path, v_path, rank_path) in enumerate(columns):
        u_path, v_path = (Signed.apply(value, gradient) for value in (u_path, v_path))
        y = y + ((x * scale_in[path]) @ v_path * rank_path) @ u_path.T * scale_out[path]
    return y


@pytest.mark.parametrize("gradient", GRADIENTS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_product_and_gradients_are_the_formula(size, gradient):
    *_, ranks = size
    inputs = operands(*size)
    y = factored_product(*inputs, ranks, torch.float64, gradient)
    expected = written_out(*inputs, ranks, gradient)
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    found = torch.autograd.grad((y * weight).sum(), inputs)
    for one, two in zip(found, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(one, two)


def test_the_product_can_be_changed_in_place():
    """As the output of a linear layer can, and Llama 4's blocks do."""
    inputs = operands(33, 70, (16, 8))
    given = inputs[0].detach().unflatten(0, (1, -1)).requires_grad_()
    factored_product(given, *inputs[1:], (16, 8), torch.float64, GRADIENTS[0]).mul_(3).sum().backward()
    (expected,) = torch.autograd.grad(factored_product(*inputs, (16, 8), torch.float64, GRADIENTS[0]).sum(), inputs[:1])
    torch.testing.assert_close(given.grad.flatten(0, 1), 3 * expected)


@pytest.mark.parametrize("wanted", range(6))
def test_only_the_wanted_gradients_are_made(wanted):
    inputs = [value.requires_grad_(at == wanted) for at, value in enumerate(operands(33, 70, (16, 8)))]
    factored_product(*inputs, (16, 8), torch.float64, GRADIENTS[0]).sum().backward()
    assert [value.grad is not None for value in inputs] == [at == wanted for at in range(6)]


@pytest.mark.parametrize("gradient", GRADIENTS, ids=str)
def test_bf16_activations_have_fp32_gradients(gradient):
    """As under autocast: everything within bf16's rounding of the fp32 figures."""
    inputs = operands(48, 70, (16, 8), torch.float32)
    exact = factored_product(*inputs, (16, 8), torch.bfloat16, gradient)
    low = factored_product(inputs[0].bfloat16(), *inputs[1:], (16, 8), torch.bfloat16, gradient)
    assert low.dtype == torch.bfloat16
    weight = torch.randn_like(exact)
    full = torch.autograd.grad((exact * weight).sum(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # backward inside it must not round once more
        rounded = torch.autograd.grad((low * weight).sum(), inputs)
    for one, two in zip((low, *rounded), (exact, *full), strict=True):
        assert (one.float() - two).norm() < 0.02 * two.norm()
    assert all(value.dtype == torch.float32 for value in rounded)


def test_scales_are_rounded_and_their_gradients_are_not():
    inputs = operands(48, 70, (16, 8), torch.float32)
    rounded = [*inputs[:3], *(value.detach().bfloat16().float().requires_grad_() for value in inputs[3:])]
    ys = [factored_product(*values, (16, 8), torch.bfloat16, GRADIENTS[0]) for values in (inputs, rounded)]
    assert torch.equal(*ys)
    grads = [torch.autograd.grad(y.square().sum(), v) for y, v in zip(ys, (inputs, rounded), strict=True)]
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


def test_the_compiled_library_computes_what_torch_does(monkeypatch):
    """Bit for bit forward, and within fp32's rounding backward; without the library there is nothing to compare."""
    if not latent_matmul.compiled():
        pytest.skip("the compiled CPU kernel is not built, or LITTLEBIT_BACKEND asks for plain torch")
    for gradient in GRADIENTS:
        found = []
        for compiled in (True, False):
            monkeypatch.setattr(latent_matmul, "_compiled", lambda latent, compiled=compiled: compiled)
            inputs = operands(48, 70, (16, 8), torch.float32)
            y = factored_product(inputs[0].bfloat16(), *inputs[1:], (16, 8), torch.bfloat16, gradient)
            found.append((y, *torch.autograd.grad(y.float().square().sum(), inputs)))
        assert torch.equal(found[0][0], found[1][0])
        for one, two in zip(*found, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5 * two.float().abs().max().item())


@pytest.mark.subprocess
def test_reference_keeps_to_plain_torch():
    code = (
        "import torch; from hf_littlebit.layers import latent_matmul; from hf_littlebit.kernels import cpu\n"
        "print(latent_matmul.scaled_signs(torch.ones(1, 1), torch.ones(1, 1), None, (1,), torch.float32), cpu._operators)"
    )
    environment = {**os.environ, "LITTLEBIT_BACKEND": "reference"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip() == "tensor([[1.]]) None", done.stdout + done.stderr
