"""The output head of a packed model: the product of a plain linear layer, at any stride, and only while the model is packed."""

import copy

import pytest
import torch
from families import config, load, logits
from torch import nn

from hf_littlebit.layers.output_head import OutputHead, attach_head

SHAPES = [(1, 48), (48,), (1, 1, 48), (2, 5, 48), (0, 48), (1, 0, 48)]


def heads(dtype, bias):
    torch.manual_seed(0)
    plain = nn.Linear(48, 77, bias=bias).to(dtype)
    head = copy.deepcopy(plain)
    head.__class__ = OutputHead
    return plain, head


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_product_is_that_of_a_linear_layer(dtype, bias, frozen):
    plain, head = heads(dtype, bias)
    head.requires_grad_(not frozen)
    inputs = [torch.randn(shape).to(dtype) for shape in SHAPES]
    inputs += [torch.randn(3, 9, 48).to(dtype)[:, -1:], torch.randn(1, 9, 48).to(dtype)[:, -1:]]
    inputs += [torch.randn(48, 3).to(dtype).T, torch.randn(1, 96).to(dtype)[:, ::2]]
    for x in inputs:
        y, expected = head(x), plain(x)
        assert y.shape == expected.shape and y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass(dtype):
    plain, head = heads(dtype, True)
    for x in (torch.randn(1, 1, 48), torch.randn(2, 3, 48)):
        grads = []
        for layer in (plain, head):
            given = x.to(dtype).requires_grad_()
            layer.zero_grad()
            layer(given).square().sum().backward()
            grads.append((given.grad, layer.weight.grad, layer.bias.grad))
        torch.testing.assert_close(grads[0], grads[1], rtol=2e-2, atol=2e-2)


def test_autocast_meta_and_compile_go_the_plain_way():
    plain, head = heads(torch.float32, False)
    x = torch.randn(1, 1, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(x), plain(x)) and head(x).dtype == torch.bfloat16
    assert head.to("meta")(x.to("meta")).shape == (1, 1, 77)
    plain, head = heads(torch.bfloat16, False)
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x.bfloat16()), plain(x.bfloat16()))


def test_a_packed_model_has_it_and_a_dense_one_has_not(family_dir, tmp_path):
    for family in ("llama", "llama_tied"):
        model = load(family_dir(family), quantization_config=config(), dtype=torch.bfloat16)
        assert type(model.lm_head) is OutputHead
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (family == "llama_tied")
        expected = logits(model)
        model.save_pretrained(tmp_path / family)
        again = load(tmp_path / family)
        assert type(again.lm_head) is OutputHead and torch.equal(logits(again), expected)
        assert again.state_dict().keys() == model.state_dict().keys()
        assert type(again.dequantize().lm_head) is nn.Linear


def test_other_heads_are_left_alone(family_dir):
    class Own(nn.Linear):
        pass

    model = load(family_dir("llama"))
    model.lm_head.__class__ = Own
    attach_head(model)
    assert type(model.lm_head) is Own
    attach_head(model.model)  # without a head
    attach_head(nn.Linear(2, 2))
