"""Derivatives of every kind and order of packed and latent layers, against those of the dense layer that they stand for."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from test_linear import pair
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.functional import hessian

from hf_littlebit.layers.latent_matmul import factored_product, plain_product
from hf_littlebit.layers.shared_input import SharedInput
from hf_littlebit.layers.sign import SignGradient, surrogate, times_slope

F = torch.func
SIZE = (33, 70, (16, 8))


def cube(layer):
    """A function of x whose second and third derivatives are not zero."""
    return lambda x: layer(x).pow(3).sum()


def forward_mode(layer, x, t):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, t))).tangent


def without_gradients(layer, x, t):
    with torch.no_grad():
        return forward_mode(layer, x, t)


def gradient_penalty(layer, x, t):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(cube(layer)(x), x, create_graph=True)
    grad.square().sum().backward()
    return x.grad


def compiled(function):
    return lambda layer, x, t: torch.compile(lambda x, t: function(layer, x, t), backend="aot_eager")(x, t)


def batched(layer, x, t):
    return F.vmap(layer, in_dims=1, out_dims=1)(torch.stack([x, t, x - t], dim=1))


def jvp(layer, x, t):
    return F.jvp(layer, (x,), (t,))[1]


KINDS = {
    "jvp": jvp,
    "jvp of a batch": lambda layer, x, t: jvp(layer, torch.stack([x, t]), torch.stack([t, x])),
    "forward mode": forward_mode,
    "forward mode without gradients": without_gradients,
    "vjp": lambda layer, x, t: F.vjp(layer, x)[1](torch.ones(33))[0],
    "grad": lambda layer, x, t: F.grad(cube(layer))(x),
    "jacfwd": lambda layer, x, t: F.jacfwd(layer)(x),
    "jacrev": lambda layer, x, t: F.jacrev(layer)(x),
    "hessian": lambda layer, x, t: F.hessian(cube(layer))(x),
    "jacrev of jacrev": lambda layer, x, t: F.jacrev(F.jacrev(cube(layer)))(x),
    "jacfwd of jacfwd": lambda layer, x, t: F.jacfwd(F.jacfwd(cube(layer)))(x),
    "third derivative along t": lambda layer, x, t: jvp(F.hessian(cube(layer)), x, t),
    "autograd's hessian": lambda layer, x, t: hessian(cube(layer), x),
    "gradient penalty": gradient_penalty,
    "vmap": batched,
    "vmap of grad": lambda layer, x, t: F.vmap(F.grad(cube(layer)))(torch.stack([x, t])),
    "vmap of jvp": lambda layer, x, t: F.vmap(lambda x, t: jvp(layer, x, t))(torch.stack([x, t]), torch.stack([t, x])),
}
COMPILED = {
    "jvp": compiled(jvp),
    "grad": compiled(lambda layer, x, t: F.grad(cube(layer))(x)),
    "hessian": compiled(lambda layer, x, t: F.hessian(cube(layer))(x)),
    "vmap": compiled(batched),
}


def three():
    """A packed layer, its latent twin, and the dense layer that both stand for; with x and a direction."""
    packed, latent = pair(*SIZE)
    dense = nn.Linear(70, 33)
    dense.weight.data, dense.bias.data = packed.dense(), packed.bias.detach().clone()
    for layer in (packed, dense):
        layer.requires_grad_(False)
    return packed, latent, dense, torch.randn(70), torch.randn(70)


def close(found, expected):
    size = float(expected.abs().max())
    assert size > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * size)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_a_packed_layer(kind):
    packed, _, dense, x, t = three()
    close(KINDS[kind](packed, x, t), KINDS[kind](dense, x, t))


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_a_latent_layer(kind):
    _, latent, dense, x, t = three()
    close(KINDS[kind](latent, x, t).detach(), KINDS[kind](dense, x, t))


@pytest.mark.parametrize("kind", COMPILED)
def test_derivatives_in_compiled_code(kind):
    packed, _, dense, x, t = three()
    close(COMPILED[kind](packed, x, t), KINDS[kind](dense, x, t))


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("backend", "kinds"),
    [("reference", "of_a_packed_layer or bias"), ("triton", "of_a_packed_layer and (vmap or penalty)")],
)
def test_derivatives_of_the_other_backends(backend, kinds):
    if backend == "triton" and find_spec("triton") is None:
        pytest.skip("triton is not installed")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            __file__,
            "-k",
            f"({kinds}) and not other_backends",
        ],
        timeout=300,
        env={**os.environ, "LITTLEBIT_BACKEND": backend, "TRITON_INTERPRET": "1" if backend == "triton" else "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr


def test_derivatives_of_the_bias():
    packed, _, dense, x, t = three()
    tangent = torch.randn(33)

    def of_bias(layer):
        return lambda bias: F.functional_call(layer, {"bias": bias}, (x,))

    def of_both(layer):
        return lambda x, bias: F.functional_call(layer, {"bias": bias}, (x,))

    torch.testing.assert_close(F.jvp(of_bias(packed), (packed.bias,), (tangent,))[1], tangent)
    found, expected = (F.jvp(of_both(layer), (x, layer.bias), (t, tangent))[1] for layer in (packed, dense))
    close(found, expected)
    biases = torch.randn(4, 33)
    close(F.vmap(of_bias(packed))(biases), F.vmap(of_bias(dense))(biases))
    xs = torch.randn(4, 70)
    close(F.vmap(of_both(packed))(xs, biases), F.vmap(of_both(dense))(xs, biases))


def test_an_ensemble_of_packed_layers():
    layers = [pair(*SIZE)[0].requires_grad_(False) for _ in range(3)]
    for scale, layer in enumerate(layers):
        layer.scale_in.mul_(2.0**scale)
    parts, _ = F.stack_module_state(layers)
    parts = {name: value.detach() for name, value in parts.items()}
    x = torch.randn(5, 70)
    found = F.vmap(lambda own: F.functional_call(layers[0], own, (x,)))(parts)
    close(found, torch.stack([layer(x) for layer in layers]))


@pytest.mark.parametrize("kind", ["forward mode without gradients", "jvp", "vmap"])
def test_layers_that_share_their_input(kind):
    first, _, dense, x, t = three()
    second = pair(33, 70, (8,))[0].requires_grad_(False)
    SharedInput([first, second])
    with torch.no_grad():
        close(KINDS[kind](lambda x: [first(x), second(x)][0], x, t), KINDS[kind](dense, x, t))


def test_a_compiled_group_has_derivatives():
    first, _, dense, x, t = three()
    second = pair(33, 70, (8,))[0].requires_grad_(False)
    SharedInput([first, second])

    def both(x):
        return torch.cat([first(x), second(x)])

    with torch.no_grad():
        found = torch.compile(lambda x, t: F.jvp(both, (x,), (t,))[1], backend="aot_eager")(x, t)
        batch = torch.compile(F.vmap(both), backend="aot_eager")(torch.stack([x, t]))
        close(batch[0], both(x))
    close(found[:33], dense.weight @ t)


@pytest.mark.parametrize("part", ["scale_out", "scale_rank", "scale_in"])
def test_scales_of_a_packed_layer_refuse_every_derivative(part):
    packed, *_ = three()
    value = getattr(packed, part).detach()

    def of_scale(scale):
        return F.functional_call(packed, {part: scale}, (torch.ones(70),))

    for derivative in (lambda: F.jvp(of_scale, (value,), (value,)), lambda: F.jacrev(of_scale)(value)):
        with pytest.raises(RuntimeError, match="they are constants"):
            derivative()


@pytest.mark.parametrize("name", ["smooth", "ste"])
def test_second_derivatives_of_latents_are_those_of_the_surrogate(name):
    """The product's first derivatives, its second ones, and those of the definition written out."""
    gradient = SignGradient(name, 3.0)
    torch.manual_seed(0)
    shapes = (4, 6), (5, 7), (6, 7), (2, 5), (7,), (2, 6)
    inputs = [(0.5 * torch.randn(shape)).requires_grad_() for shape in shapes]
    ranks, direction = (4, 3), [torch.randn(shape) for shape in shapes]

    def twice(product):
        first = torch.autograd.grad(product().pow(3).sum(), inputs, create_graph=True)
        along = sum((one * other).sum() for one, other in zip(first, direction, strict=True))
        return [*first, *torch.autograd.grad(along, inputs)]

    def by_definition():
        x, u, v, out, rank, features = inputs
        if name == "smooth":
            u, v = (torch.where(z < 0, -1.0, 1.0) + torch.tanh(3 * z) - torch.tanh(3 * z).detach() for z in (u, v))
        else:
            u, v = (torch.where(z < 0, -1.0, 1.0) + (z - z.detach()) * (z.abs() < 1) for z in (u, v))
        weight = sum(
            out[path][:, None] * ((u[:, own] * rank[own]) @ v[:, own].T) * features[path]
            for path, own in enumerate((slice(0, 4), slice(4, 7)))
        )
        return x @ weight.T

    expected = twice(by_definition)
    for function in (factored_product, plain_product):
        found = twice(lambda function=function: function(*inputs, ranks, torch.float32, gradient))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.detach().abs().max()))


def test_scales_are_rounded_before_any_derivative():
    _, latent, *_ = three()
    x = torch.randn(5, 70)
    args = [latent.weight, latent.v, latent.scale_out + 1e-4, latent.scale_rank, latent.scale_in, (16, 8)]
    gradient = SignGradient()
    torch.testing.assert_close(
        plain_product(x, *args, torch.bfloat16, gradient), factored_product(x, *args, torch.bfloat16, gradient)
    )


@pytest.mark.parametrize("gradient", [SignGradient("smooth", 5.0), SignGradient("ste")])
def test_the_surrogate_has_the_slope_of_training(gradient):
    x = torch.tensor([-2.0, -1.0, -0.1, 0.0, 0.3, 1.5], requires_grad=True)
    y = surrogate(x, gradient)
    assert y.tolist() == [-1, -1, -1, 1, 1, 1]
    y.sum().backward()
    torch.testing.assert_close(x.grad, times_slope(torch.ones(6), x.detach(), gradient))


def test_a_layer_on_meta_gives_shapes():
    packed, latent, *_ = three()
    for layer in (packed, latent):
        with torch.no_grad():
            assert layer.to("meta")(torch.empty(5, 70, device="meta")).shape == (5, 33)
