"""bits.py: what `layer.weight` of a packed layer lets itself be used for."""

import copy
import gc
import weakref

import pytest
import torch
from test_linear import pair
from torch import nn

from hf_littlebit.layers.bits import WAY_OUT, Bits, DenseWeight

LEFT, FLOATS = torch.randn(48, 48), torch.randn(64)


@pytest.fixture
def layer():
    return pair(48, 64, (64,))[0]  # two rows of words, so that some shapes fit by chance


TAKEN_FOR_DENSE = {
    "merge": lambda layer: layer.weight.data.add_(torch.randn(48, 64)),
    "merge by broadcasting": lambda layer: layer.weight.data + torch.randn(48),
    "in place": lambda layer: layer.weight.data.__iadd__(torch.randn(2, 48)),
    "another one": lambda layer: setattr(layer.weight, "data", torch.randn(48, 64)),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(48, 64))),
    "rotated": lambda layer: torch.mm(layer.weight.data.to(torch.float32), LEFT),
    "rotated after a copy": lambda layer: torch.mm(layer.weight.data.clone().T.float().T, LEFT),
    "product": lambda layer: nn.functional.linear(torch.randn(3, 48), layer.weight),
    "norm": lambda layer: torch.linalg.norm(layer.weight, dim=1),
    "mean": lambda layer: layer.weight.double().mean(),
    "scaled": lambda layer: layer.weight * 0.5,
    "divided": lambda layer: layer.weight / 2,
    "like it": lambda layer: torch.zeros_like(layer.weight, dtype=torch.bfloat16),
    "copied over": lambda layer: layer.weight.copy_(torch.randn(2, 48)),
    "sizes": lambda layer: layer.weight.view(48, 64),
    "zeros": lambda layer: nn.init.zeros_(layer.weight),
    "zeros in the data": lambda layer: layer.weight.data.zero_(),
    "negated": lambda layer: layer.weight.data.neg_(),
    "clamped": lambda layer: layer.weight.data.clamp_(-1, 1),
    "doubled": lambda layer: layer.weight.data.mul_(2),
    "masked": lambda layer: layer.weight.data.__iand__(1),
    "a row set": lambda layer: layer.weight.data.__setitem__(0, 0),
    "into it": lambda layer: torch.neg(other_words(layer), out=layer.weight.data),
}


def other_words(layer):
    return layer._parameters["weight"].detach().clone()


@pytest.mark.parametrize("use", TAKEN_FOR_DENSE)
def test_bits_are_not_taken_for_a_dense_weight(layer, use):
    before = layer.state_dict()["weight"].clone()
    with pytest.raises(ValueError) as error:
        TAKEN_FOR_DENSE[use](layer)
    assert str(error.value).startswith(WAY_OUT)
    assert torch.equal(layer.state_dict()["weight"], before)


def test_bits_are_the_layers_own_words(layer):
    words = layer._parameters["weight"]
    assert type(layer.weight) is Bits and type(words) is nn.Parameter and isinstance(layer.weight, nn.Parameter)
    assert type(layer.get_parameter("weight")) is Bits
    assert {name: type(value) for name, value in layer.named_parameters()}["weight"] is nn.Parameter
    assert type(layer.state_dict()["weight"]) is torch.Tensor
    assert layer.weight.shape == (2, 48) and layer.weight.dtype == torch.int32 and layer.weight.device == words.device
    assert layer.weight.data_ptr() == words.data_ptr() and torch.equal(layer.weight, words)
    assert type(layer.weight.data) is type(layer.weight.clone()) is Bits
    assert type(layer.weight.to("cpu")) is not Bits  # hooks that move a layer make parameters of it
    words.note = "kept"
    assert layer.weight.note == "kept" and "Bits" in repr(layer.weight)
    assert torch.equal(copy.deepcopy(layer.weight), words) and layer.weight.tolist() == words.tolist()
    assert torch.equal(layer.weight ^ 1, words ^ 1)


def test_reading_a_weight_holds_nothing(layer):
    """Not the frames of who reads, and what these hold."""

    def read():
        held = torch.zeros(3)
        assert layer.weight.dtype == torch.int32
        return weakref.ref(held)

    gc.collect()
    gc.disable()
    try:
        assert read()() is None
    finally:
        gc.enable()


def test_words_can_be_replaced_by_words(layer):
    x = torch.randn(3, 64)
    other = pair(48, 64, (64,))[0]
    layer.weight = nn.Parameter(~layer._parameters["weight"], requires_grad=False)
    bias = layer.bias
    torch.testing.assert_close(layer(x) - bias, -(other(x) - other.bias), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.clone())
    layer.weight.requires_grad = False
    layer.weight.requires_grad_(False)
    layer.weight = layer.weight  # read, and put back
    assert type(layer._parameters["weight"]) is nn.Parameter
    layer.weight = other.weight
    assert type(layer._parameters["weight"]) is nn.Parameter
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


def test_a_dense_weight_is_read_as_what_the_bits_stand_for(layer):
    weight, dense = DenseWeight.of(layer), layer.dense()
    assert weight.shape == (48, 64) and weight.dtype == torch.float32 and weight.device == dense.device
    assert not weight.is_meta and not weight.requires_grad and isinstance(weight, nn.Parameter)
    weight.requires_grad = False
    assert torch.equal(weight.data.clone(), dense) and torch.equal(weight.T, dense.T)
    torch.testing.assert_close(weight @ FLOATS, dense @ FLOATS)
    torch.testing.assert_close(torch.linalg.norm(weight, dim=1), dense.norm(dim=1))
    torch.testing.assert_close(weight.data + 1, dense + 1)
    x = torch.randn(3, 64, requires_grad=True)
    nn.functional.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(3, 64))
    for write in (
        lambda: weight.data.add_(1),
        lambda: weight.data.__iadd__(dense),
        lambda: setattr(weight, "data", dense),
        lambda: setattr(weight, "requires_grad", True),
        lambda: weight.copy_(dense),
        lambda: weight.__setitem__(0, 1.0),
        lambda: torch.add(dense, 1, out=weight),
        lambda: nn.init.zeros_(weight),
    ):
        with pytest.raises(ValueError, match="call model"):
            write()
    assert torch.equal(layer.dense(), dense)


@pytest.mark.parametrize("latent", [False, True])
def test_tools_that_look_through_all_attributes(latent):
    layer = pair(48, 64, (64,))[latent]
    x = torch.randn(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(layer, x)(x), layer(x))
    assert copy.deepcopy(layer)(x).shape == (3, 48)
