"""Whose weights a model's code reads itself: found in its source, without a list of classes."""

import pytest
import torch
from torch import nn

from hf_littlebit.weight_reads import read_weights


class Reader(nn.Module):
    """Reads some of its layers' weights in all ways that the source can show, and others in ways that do not count."""

    def __init__(self, parallel=1):
        super().__init__()
        self.parallel = parallel
        names = ("product", "dtype", "chosen", "split", "device", "called", "training_only", "sizes")
        self.layers = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})
        self.product, self.dtype, self.split, self.device = (
            self.layers[n] for n in ("product", "dtype", "split", "device")
        )
        self.called, self.training_only, self.sizes = (
            self.layers[name] for name in ("called", "training_only", "sizes")
        )
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"inner": nn.Linear(8, 8), "other": nn.Linear(8, 8)}) for _ in range(3)]
        )
        self.picked = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.gotten = nn.Linear(8, 8)
        nn.init.zeros_(self.called.weight)
        del self.layers

    def resize_layers(self):
        return self.called.weight.shape

    def forward(self, x):
        x = x @ self.product.weight + self.called(x).to(self.device.weight.device)
        x = x.to(self.dtype.weight.dtype)
        for block in self.blocks:
            x = x * block.inner.weight.abs().mean()
        if self.parallel > 1:
            x = x @ self.split.weight
        if self.training and x.dim() == 2:
            x = x @ self.training_only.weight
        return x @ self.picked[1].weight @ getattr(self.gotten, "weight")  # noqa: B009 one of the ways

    def size(self):
        return self.sizes.weight.shape


class Heir(Reader):
    """Inherits the reads of what it does not write anew."""

    def forward(self, x):
        return self.called(x)


def test_reads_are_found_in_the_source():
    always = {
        "product",
        "dtype",
        "training_only",
        "sizes",
        "gotten",
        "picked.1",
        *(f"blocks.{i}.inner" for i in range(3)),
    }
    assert read_weights(Reader()) == always
    assert read_weights(Reader(parallel=2)) == {*always, "split"}
    assert read_weights(Heir()) == {"sizes"}
    assert read_weights(nn.Sequential(nn.Linear(4, 4), Reader())) == {f"1.{name}" for name in always}


def test_a_class_without_source_says_nothing():
    code = "class Written(nn.Module):\n    def forward(self, x):\n        return x @ self.own.weight\n"
    space = {"nn": nn, "__name__": "nowhere"}
    exec(code, space)
    module = space["Written"]()
    module.own = nn.Linear(4, 4)
    assert read_weights(module) == set()


@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [
        ("Mamba", {"num_hidden_layers": 1}, {"dt_proj", "x_proj", "out_proj", "lm_head"}),  # two while it trains
        ("Rwkv", {"num_hidden_layers": 1}, {"output", "value"}),  # block.attention.output, block.feed_forward.value
        ("Llama", {"num_hidden_layers": 1}, set()),
        ("Bloom", {"n_layer": 1}, set()),  # only where config.pretraining_tp is above 1
    ],
)
def test_what_models_read(name, sizes, expected):
    import transformers

    model_class = getattr(transformers, f"{name}ForCausalLM")
    with torch.device("meta"):
        model = model_class(model_class.config_class(**sizes))
    assert {each.rpartition(".")[2] for each in read_weights(model)} == expected
