"""NaN, Inf and values out of a dtype's range are refused by name: when a model is quantized, and before it is made dense."""

import pytest
import torch
from families import build, config, equal_states, load, logits

from hf_littlebit import latent_model
from hf_littlebit.layers.linear import FactorModule

NORM, EMBEDDINGS = "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"


def spoiled(name, value, family="llama"):
    """A dense model with one value changed."""
    model = build(family)
    model.get_parameter(name).data.view(-1)[3] = value
    return model


@pytest.mark.parametrize("name", [NORM, EMBEDDINGS, "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused_outside_of_the_packed_parts_too(name, value, tmp_path):
    model = spoiled(name, value)
    model.save_pretrained(tmp_path)
    for options in ({}, {"format": "latent"}):
        with pytest.raises(ValueError, match=f"{name} holds NaN or Inf in float32: the checkpoint is damaged"):
            load(tmp_path, quantization_config=config(**options))
    with pytest.raises(ValueError, match=f"{name} holds NaN or Inf"):
        latent_model(model, config(), progress=False)
    assert not any(isinstance(module, FactorModule) for module in model.modules())  # before any work


def test_a_checkpoint_that_does_not_fit_the_dtype_asked_is_refused(tmp_path):
    spoiled(NORM, 1e5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{NORM} holds NaN or Inf in float16.* at most 6.55e\+04.*torch.bfloat16"):
        load(tmp_path, quantization_config=config(), dtype=torch.float16)
    assert logits(load(tmp_path, quantization_config=config(), dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_dequantizing_out_of_range_is_refused_before_anything_changed(family, family_dir):
    model = load(family_dir(family), quantization_config=config())
    name, module = next(
        (name, each) for name, each in model.named_modules() if isinstance(each, FactorModule) and "mlp" in name
    )
    scale = next(value for part, value in module.named_parameters() if part.endswith("scale_rank"))
    scale.data *= 1e8
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=rf"{name}: values of magnitude .* do not fit float16, .* use bfloat16 or float32"
    ):
        model.dequantize(dtype=torch.float16)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    expected = logits(model)
    model.dequantize(dtype=torch.float32)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


def test_dequantizing_looks_at_what_is_cast_beside_the_layers(family_dir):
    model = load(family_dir("llama"), quantization_config=config())
    model.get_parameter(EMBEDDINGS).data[5, 5] = 7e4
    with pytest.raises(ValueError, match=r"model\.embed_tokens: values of magnitude 7e\+04 do not fit float16"):
        model.dequantize(dtype=torch.float16)
    twin = load(family_dir("llama"), quantization_config=config())
    twin.get_parameter(EMBEDDINGS).data[5, 5] = 7e4
    equal_states(model, twin)
    model.dequantize(dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.get_parameter(EMBEDDINGS)[5, 5].item() == 70144  # rounded to 8 bits


def test_a_layer_alone_refuses_a_dtype_that_it_does_not_fit(family_dir):
    layer = load(family_dir("llama"), quantization_config=config()).model.layers[0].mlp.up_proj
    assert torch.equal(layer.dense(torch.float16), layer.dense().half())
    layer.scale_rank.data *= 1e8
    with pytest.raises(ValueError, match="do not fit float16"):
        layer.dense(torch.float16)
    assert layer.dense(torch.bfloat16).isfinite().all()
