"""eager.py on a CPU: which calls may go past the dispatcher, and what of a layer is looked at before one is repeated."""

import copy
import pickle

import pytest
import torch
from hf_littlebit.kernels import gpu
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from hf_littlebit import LittleBitLinear
from hf_littlebit.layers import eager
from hf_littlebit.layers.shared_input import SharedInput


@pytest.fixture(autouse=True)
def cpu_is_an_accelerator(monkeypatch):
    """CPU tensors count as those of a GPU, so that only the other conditions are left."""
    monkeypatch.setattr(gpu, "DEVICES", ("cpu",))


class Bound:
    """In place of what the kernels keep of layers: it counts, and answers with what it was given."""

    def __init__(self):
        self.asked = []

    def again(self, x):
        self.asked.append(x)
        return [x]


def made(bias=True):
    layer = LittleBitLinear(64, 32, [8, 8], bias=bias).requires_grad_(False)
    for value in layer.parameters():
        value.data.zero_()
    return layer


@pytest.fixture
def pair():
    """Two layers, what repeats their product, and the Bound behind it."""
    layers = made(), made(bias=False)
    bound = Bound()
    return layers, eager.Repeated([layer._parameters for layer in layers], bound), bound


def call(layers, repeated, x):
    return repeated(x, [layer._parameters for layer in layers])


def test_a_call_like_the_one_before(pair):
    layers, repeated, bound = pair
    x = torch.ones(1, 64)
    with torch.no_grad():
        assert call(layers, repeated, x) == [x] and call(layers, repeated, x) == [x]
    assert len(bound.asked) == 2


@pytest.mark.parametrize("name", ["weight", "weight_tail", "scale_out", "bias"])
def test_another_parameter(pair, name):
    layers, repeated, bound = pair
    old = layers[0]._parameters[name]
    setattr(layers[0], name, nn.Parameter(old.clone(), requires_grad=False))
    assert call(layers, repeated, torch.ones(1, 64)) is None
    setattr(layers[0], name, None)
    assert call(layers, repeated, torch.ones(1, 64)) is None
    setattr(layers[0], name, old)
    assert call(layers, repeated, torch.ones(1, 64)) is not None and len(bound.asked) == 1


def test_a_parameter_that_was_not_there(pair):
    layers, repeated, bound = pair
    layers[1].bias = nn.Parameter(torch.zeros(32), requires_grad=False)
    assert call(layers, repeated, torch.ones(1, 64)) is None and not bound.asked


def test_a_parameter_with_other_memory(pair):
    layers, repeated, bound = pair
    layers[1].scale_in.data = layers[1].scale_in.data.clone()
    assert call(layers, repeated, torch.ones(1, 64)) is None
    layers[1].half()  # as .to() does it for the whole module
    assert call(layers, repeated, torch.ones(1, 64)) is None and not bound.asked


def test_other_layers(pair):
    layers, repeated, bound = pair
    for others in (layers[::-1], (layers[0], made(bias=False)), layers[:1], (*layers, made())):
        assert call(others, repeated, torch.ones(1, 64)) is None
    assert not bound.asked


class Sub(torch.Tensor):
    """A tensor that may do anything with its operations."""


class Mode(TorchDispatchMode):
    """A mode that counts operations, for example."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


def test_plain_tensors_are_unseen(pair):
    layers, repeated, _ = pair
    for x in (torch.ones(64), torch.ones(2, 64), nn.Parameter(torch.ones(64)), torch.ones(64).bfloat16()):
        assert eager.unseen(x)
        assert call(layers, repeated, x) is not None
    with torch.inference_mode():
        assert eager.unseen(torch.ones(64))


def test_what_wants_to_see_the_call(pair):
    layers, repeated, bound = pair
    x = torch.ones(2, 64)

    def refused(tensor):
        assert not eager.unseen(tensor)
        assert call(layers, repeated, tensor) is None
        return tensor

    refused(x.as_subclass(Sub))
    refused(x.to("meta"))  # another device
    torch.func.vmap(refused)(x)
    torch.func.grad(lambda y: refused(y).sum())(x)
    torch.func.jvp(refused, (x,), (x,))
    with forward_ad.dual_level():
        refused(x)
    with Mode():
        refused(x)
    with FakeTensorMode() as mode:
        refused(mode.from_tensor(x))
    torch.jit.trace(lambda y: refused(y) + 1, x, check_trace=False)
    assert not bound.asked
    assert eager.unseen(x)  # none of it is left behind


def test_a_layer_compiles_into_one_graph(pair):
    """torch.compile cannot follow the question whether a call is unseen, and is not asked to."""
    layers, _, bound = pair
    layers[0]._repeated = eager.Repeated([layers[0]._parameters], bound)
    x = torch.randn(2, 64)
    with torch.no_grad():
        found = torch.compile(layers[0], backend="eager", fullgraph=True)(x)
        layers[0]._repeated = None
        assert torch.equal(found, layers[0](x)) and not bound.asked


def test_a_group_compiles_into_one_graph(pair):
    layers, *_ = pair
    SharedInput(layers)

    def both(x):
        return [layer(x) for layer in layers]

    x = torch.randn(2, 64)
    with torch.no_grad():
        found = torch.compile(both, backend="eager", fullgraph=True)(x)
        assert all(map(torch.equal, found, both(x)))


def test_without_the_kernels_nothing_is_kept(monkeypatch):
    layer = made()
    x = torch.ones(1, 64)
    factors = layer.packed()
    assert eager.repeated(x, [factors], [layer._parameters]) is None  # a CPU tensor
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(gpu, "load", lambda: False)
    assert eager.repeated(x, [factors], [layer._parameters]) is None


def test_what_is_kept_after_a_product(monkeypatch):
    layer, bound = made(), Bound()
    x = torch.ones(1, 64)
    factors = layer.packed()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(gpu, "load", lambda: True)
    monkeypatch.setattr(gpu, "bound", lambda x, layers: bound)
    kept = eager.repeated(x, [factors], [layer._parameters])
    assert kept is not None and kept(x, [layer._parameters]) == [x]
    # A wrapper that makes the parts anew for every call: their identities mean nothing.
    wrapped = [factors[0].clone(), *factors[1:]]
    assert eager.repeated(x, [wrapped], [layer._parameters]) is None
    monkeypatch.setattr(gpu, "bound", lambda x, layers: None)  # nothing was recorded
    assert eager.repeated(x, [factors], [layer._parameters]) is None


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copied_layer_keeps_nothing(pair, way):
    layers, repeated, bound = pair
    group = SharedInput(layers)
    group._repeated = layers[0]._repeated = repeated
    twin = copy.deepcopy(layers[0]) if way == "deepcopy" else pickle.loads(pickle.dumps(layers[0]))
    assert twin._repeated is None and twin.group is None
    assert layers[0]._repeated is repeated and layers[0].group is group
    assert torch.equal(twin.weight, layers[0].weight) and twin.weight is not layers[0].weight
    x = torch.randn(2, 64)
    with torch.no_grad():
        assert twin(x).shape == (2, 32) and not bound.asked


def test_a_layer_asks_what_it_keeps(pair):
    layers, _, bound = pair
    layer, x = layers[0], torch.ones(1, 64)
    layer._repeated = eager.Repeated([layer._parameters], bound)
    with torch.no_grad():
        assert layer(x) is x
        assert layer(x.as_subclass(Sub)) is not x
    # With gradients on, the product is recorded by autograd.
    y = layer(x.clone().requires_grad_())
    assert y.requires_grad and len(bound.asked) == 1
