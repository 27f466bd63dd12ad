"""Layers that read the same tensor in one call: exact, only when it is really the same, and without a trace in what is saved."""

import copy
import gc
import json
import pickle
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from hf_littlebit import LittleBitConfig, LittleBitLinear, share_inputs, unshare_inputs
from hf_littlebit.layers import ops
from hf_littlebit.layers.shared_input import siblings

load = AutoModelForCausalLM.from_pretrained
IDS = torch.arange(12).reshape(2, 6)


def options(**more):
    return LittleBitConfig(2.0, init="dual_svid", **more)


def logits(model, **more):
    with torch.no_grad():
        return model(IDS, **more).logits


def layer(out_features=24, in_features=40, ranks=(8, 16), bias=True, seed=0):
    torch.manual_seed(seed)
    linear = LittleBitLinear(in_features, out_features, list(ranks), bias=bias).requires_grad_(False)
    for value in linear.parameters():
        if value.is_floating_point():
            value.normal_()
        else:
            info = torch.iinfo(value.dtype)
            value.data = torch.randint(info.min, info.max, value.shape).to(value.dtype)
    return linear


def same(x):
    return x, x, x


class Attention(nn.Module):
    """q, k and v of what `inputs` makes of x."""

    def __init__(self, inputs=same):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = layer(24), layer(16, ranks=(8,), bias=False, seed=1), layer(16, seed=2)
        self.inputs = inputs

    def forward(self, x):
        q, k, v = self.inputs(x)
        return self.q_proj(q), self.k_proj(k), self.v_proj(v)


@pytest.fixture
def calls(monkeypatch):
    """How many layers each call of the operator for several had."""
    found, linears = [], ops.linears
    monkeypatch.setattr(ops, "linears", lambda x, *layers: found.append(len(layers[-1])) or linears(x, *layers))
    return found


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(40,), (1, 40), (2, 3, 40), (0, 40)], ids=str)
def test_results_are_those_of_the_layers(dtype, shape, calls):
    model, x = Attention(), torch.randn(shape).to(dtype)
    alone = model(x)
    assert share_inputs(model) == 1
    for _ in range(2):
        together = model(x)
        assert all(map(torch.equal, alone, together)) and [y.dtype for y in together] == [dtype] * 3
        assert [y.shape for y in together] == [y.shape for y in alone] and all(y._base is None for y in together)
    assert calls == [3, 3]
    assert not model.q_proj.group._rounds, "results outlive their round"
    unshare_inputs(model)
    assert all(map(torch.equal, alone, model(x))) and calls == [3, 3]


@torch.no_grad()
def test_autocast_and_inference_mode():
    model, x = Attention(), torch.randn(2, 40)
    share_inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        together = model(x)
        unshare_inputs(model)
        assert all(map(torch.equal, together, model(x))) and together[0].dtype == torch.bfloat16
    share_inputs(model)
    alone = Attention()(x)
    with torch.inference_mode():
        assert all(map(torch.equal, model(x * 1), alone))


@torch.no_grad()
def test_an_x_that_was_changed_in_place_is_another_x(calls):
    model, plain, x = Attention(), Attention(), torch.randn(2, 40)
    share_inputs(model)
    found = []
    for each in (model, plain):
        own = x.clone()
        found += [each.q_proj(own), each.k_proj(own.add_(1)), each.v_proj(own)]
    assert all(map(torch.equal, found[:3], found[3:])) and calls == [3, 3]


@torch.no_grad()
def test_siblings_that_read_different_tensors_part(calls):
    """As in attention to another sequence."""
    other = torch.randn(2, 40)
    model, plain = (Attention(lambda x: (x, other, other)) for _ in range(2))
    share_inputs(model)
    for _ in range(5):
        x = torch.randn(2, 40)
        assert all(map(torch.equal, model(x), plain(x)))
    assert model.q_proj.group is None and len(calls) <= 3


def test_gradients_are_those_of_the_layers(calls):
    model, plain = Attention(), Attention()
    share_inputs(model)
    x = torch.randn(2, 40)
    grads = []
    for each in (model, plain):
        leaf = x.clone().requires_grad_()
        sum(y.square().sum() for y in each(leaf)).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads) and not calls


def test_what_was_computed_without_gradients_is_not_used_with_them(calls):
    model, plain = Attention(), Attention()
    share_inputs(model)
    grads = []
    for each in (model, plain):
        leaf = torch.ones(2, 40, requires_grad=True)
        with torch.no_grad():
            each.q_proj(leaf)
        each.k_proj(leaf).square().sum().backward()
        y = checkpoint(each.q_proj, leaf, use_reentrant=True) + each.v_proj(leaf).sum() + each.k_proj(leaf).sum()
        y.square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads) and calls


@torch.no_grad()
def test_what_was_computed_in_another_mode_is_not_used(calls):
    model, x = Attention(), torch.randn(2, 40)
    share_inputs(model)
    model.q_proj(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.k_proj(x).dtype == torch.bfloat16
    with torch.inference_mode():
        model.q_proj(x)
    assert not model.v_proj(x).is_inference()


def test_threads_do_not_share(threads=4):
    """Each computes for its own x, many times at once, on one model."""
    model, plain = Attention(), Attention()
    share_inputs(model)
    wrong, interval = [], sys.getswitchinterval()

    def work(seed):
        x = torch.randn(1, 40, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            expected = plain(x)
            for _ in range(1500):
                if not all(map(torch.equal, model(x), expected)):
                    wrong.append(seed)

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
    finally:
        sys.setswitchinterval(interval)
    assert not wrong and model.q_proj.group is not None


@torch.no_grad()
def test_weights_that_are_elsewhere_are_left_alone(calls):
    x = torch.randn(2, 40)
    q = Attention().q_proj(x)
    for release in (
        lambda layer: layer.to("meta"),
        lambda layer: setattr(layer._parameters["weight"], "data", torch.empty(0)),
    ):
        model = Attention()
        share_inputs(model)
        release(model.k_proj)
        assert torch.equal(model.q_proj(x), q) and not calls


@torch.no_grad()
def test_under_vmap_and_after_a_copy(calls):
    model, x = Attention(), torch.randn(3, 2, 40)
    share_inputs(model)
    assert torch.equal(torch.vmap(model.q_proj)(x), Attention().q_proj(x)) and not calls
    model.q_proj(x)  # leaves a round open
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.q_proj.group is None and all(map(torch.equal, twin(x), Attention()(x)))


def test_a_model_is_freed_when_it_is_deleted():
    model = Attention()
    share_inputs(model)
    with torch.no_grad():
        model.q_proj(torch.randn(2, 40))
    layers = [weakref.ref(layer) for layer in model.children()]
    gc.disable()
    try:
        kept = model.q_proj
        del model
        assert [layer() is not None for layer in layers] == [True, False, False]
        with torch.no_grad():
            assert kept(torch.randn(2, 40)).shape == (2, 24)
    finally:
        gc.enable()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(backend):
    model = Attention()
    share_inputs(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for tokens in (1, 3, 3):
        x = torch.randn(tokens, 40)
        expected = Attention()(x)
        assert all(map(torch.equal, compiled(x), expected))
    explained = torch._dynamo.explain(model)(x)
    assert explained.graph_break_count == 0
    targets = [str(node.target) for graph in explained.graphs for node in graph.graph.nodes]
    assert targets.count("hf_littlebit.linears.default") == 1 and "hf_littlebit.linear.default" not in targets


@torch.no_grad()
def test_compiled_siblings_that_read_different_tensors_part():
    other = torch.randn(2, 40)
    model, plain = (Attention(lambda x: (x, other, other)) for _ in range(2))
    share_inputs(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(2, 40)
        assert all(map(torch.equal, compiled(x), plain(x)))
    assert model.q_proj.group is None


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("family", ["llama", "llama_bias", "opt", "bert", "mixtral"])
def test_a_loaded_model_saves_the_same_file(family, family_dir, tmp_path):
    from transformers import AutoConfig, AutoModel

    kind = (
        load
        if "CausalLM" in str(AutoConfig.from_pretrained(family_dir(family)).architectures)
        else AutoModel.from_pretrained
    )
    plain = kind(family_dir(family), quantization_config=options())
    plain.save_pretrained(tmp_path / "plain")
    shared = kind(tmp_path / "plain", quantization_config=LittleBitConfig(share_inputs=True))
    groups = {id(m.group) for m in shared.modules() if isinstance(m, LittleBitLinear) and m.group is not None}
    assert groups
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(shared(IDS)[0], plain(IDS)[0])
    assert {id(m.group) for m in shared.modules() if isinstance(m, LittleBitLinear) and m.group is not None} == groups
    shared.save_pretrained(tmp_path / "shared")
    saved = [load_file(tmp_path / folder / "model.safetensors") for folder in ("plain", "shared")]
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("plain", "shared")]
    ids = [each["quantization_config"].pop("save_id") for each in configs]  # each save has its own
    assert ids[0] != ids[1] and configs[0] == configs[1] and "share_inputs" not in configs[1]["quantization_config"]


def test_while_a_dense_model_is_loaded(family_dir, tmp_path):
    plain = load(family_dir("llama"), quantization_config=options())
    shared = load(family_dir("llama"), quantization_config=options(share_inputs=True))
    layers = len(plain.model.layers)
    groups = [m.group for m in shared.modules() if isinstance(m, LittleBitLinear) and m.group is not None]
    assert len(groups) == 5 * layers and len(set(map(id, groups))) == 2 * layers
    assert torch.equal(logits(plain), logits(shared))
    out = [each.generate(IDS[:1], max_new_tokens=8, do_sample=False) for each in (plain, shared)]
    assert torch.equal(*out)
    assert torch.equal(logits(copy.deepcopy(shared)), logits(plain))
    assert type(shared.dequantize().model.layers[0].mlp.up_proj) is nn.Linear


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_on_a_gpu_alone_by_default(family_dir, tmp_path):
    """A model packed in memory and a loaded one alike: groups are there, and are asked for x on a GPU only."""
    from hf_littlebit import pack_model, unpack_model

    def groups(model):
        found = [m.group for m in model.modules() if isinstance(m, LittleBitLinear) and m.group is not None]
        return {id(group): group.everywhere for group in found}.values()

    model = load(family_dir("llama"), quantization_config=options())
    layers = len(model.model.layers)
    assert list(groups(model)) == [False] * (2 * layers)
    asked = []
    for each in model.modules():
        if isinstance(each, LittleBitLinear) and each.group is not None:
            each.group.product = lambda *_: asked.append(1)
    with torch.no_grad():
        model(IDS)
    assert not asked
    model.save_pretrained(tmp_path)
    unpack_model(model)
    assert not groups(model)
    pack_model(model)
    assert list(groups(model)) == [False] * (2 * layers)
    apart = load(tmp_path, quantization_config=LittleBitConfig(share_inputs=False))
    assert not groups(apart) and torch.equal(logits(apart), logits(model))


def test_only_packed_models(family_dir):
    with pytest.raises(ValueError, match="share_inputs is for packed models, but format is 'latent'"):
        load(family_dir("llama"), quantization_config=options(share_inputs=True, format="latent"))
    with pytest.raises(ValueError, match="bpw is missing"):
        load(family_dir("llama"), quantization_config=LittleBitConfig(share_inputs=True))


def test_groups_are_of_packed_siblings_with_one_input_size():
    model = Attention()
    model.q_proj = nn.Linear(40, 24)
    assert share_inputs(model) == 1 and model.k_proj.group is model.v_proj.group is not None
    model.v_proj = layer(16, 48)
    unshare_inputs(model)
    assert share_inputs(model) == 0 and model.k_proj.group is None
    names = ["a.q_proj", "b.k_proj", "b.v_proj", "up_proj", "gate_proj", "b.up_proj"]
    assert siblings(names) == [["b.k_proj", "b.v_proj"], ["gate_proj", "up_proj"]]
