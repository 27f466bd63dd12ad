"""PEFT adapters on packed models."""

import os

import pytest
import torch
from families import config, load, logits


def test_adapters_by_peft(family_dir, tmp_path):
    peft = pytest.importorskip("peft")
    model = load(family_dir("llama"), quantization_config=config())
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    tokens = torch.arange(3, 27).reshape(2, 12)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    before = adapted(tokens, labels=tokens).loss
    before.backward()
    grads = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    assert len(grads) == 14 and all(g.abs().sum() > 0 for g in grads)
    optimizer.step()
    after = adapted(tokens, labels=tokens).loss
    assert after < before
    adapted.save_pretrained(tmp_path / "adapter")
    assert os.path.getsize(tmp_path / "adapter" / "adapter_model.safetensors") > 0
    again = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(again(tokens, labels=tokens).loss, after, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"call model\.dequantize\(\) and merge then"):
        again.merge_adapter()
    torch.testing.assert_close(again(tokens, labels=tokens).loss, after, rtol=1e-6, atol=1e-6)  # nothing has changed


TARGETS = ["q_proj", "down_proj"]  # a square layer and one that is not
# Every kind of adapter that changes linear layers, with options that suit small ones.
ADAPTERS = {
    "LoraConfig": {"r": 4},
    "LoraConfig dora": {"r": 4, "use_dora": True},
    "LoraConfig orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
    "AdaLoraConfig": {"total_step": 10},
    "BOFTConfig": {"boft_block_size": 4},
    "C3AConfig": {"block_size": 8},
    "DeloraConfig": {},
    "FourierFTConfig": {"n_frequency": 50},
    "HiraConfig": {"r": 4},
    "HRAConfig": {"r": 4},
    "IA3Config": {"feedforward_modules": []},
    "IA3Config feedforward": {"feedforward_modules": ["down_proj"]},
    "LoHaConfig": {"r": 4},
    "LoKrConfig": {"r": 4},
    "MissConfig": {"r": 4},
    "MissConfig bat": {"r": 4, "init_weights": "bat"},
    "OFTConfig": {"oft_block_size": 8},
    "RandLoraConfig": {"r": 4},
    "RoadConfig": {"group_size": 8},
    "ShiraConfig": {"r": 4},
    "VBLoRAConfig": {"vector_length": 8, "num_vectors": 16},
    "VeraConfig": {"r": 4},
    "WaveFTConfig": {"n_frequency": 50},
}


def adapted(peft, folder, name, targets=TARGETS, **options):
    """A packed model with adapters whose numbers are not those of their beginning, which most choose to be nothing."""
    made = getattr(peft, name.split()[0], None)
    if made is None:
        pytest.skip(f"this peft has no {name}")
    torch.manual_seed(0)
    model = peft.get_peft_model(load(folder, quantization_config=config()), made(target_modules=targets, **options))
    for value in model.parameters():
        if value.requires_grad:
            value.data += 0.05 * torch.randn_like(value)
    return model.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_computes_with_the_weight_that_the_bits_stand_for(name, family_dir):
    """It trains, merging says what to do, and what it says gives the same model."""
    peft = pytest.importorskip("peft")
    model = adapted(peft, family_dir("llama"), name, **ADAPTERS[name])
    tokens = torch.arange(3, 27).reshape(2, 12)
    model(input_ids=tokens, labels=tokens).loss.backward()
    grads = [value.grad for value in model.parameters() if value.grad is not None]
    assert sum(float(grad.abs().sum()) for grad in grads) > 0
    before = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"call model\.dequantize\(\) and merge then"):
            merge()
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    model.dequantize()
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload()
    assert all(
        type(module) in (torch.nn.Linear, torch.nn.Module) or "proj" not in n for n, module in merged.named_modules()
    )
    torch.testing.assert_close(logits(merged), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_that_would_change_the_base_are_refused(init, family_dir):
    peft = pytest.importorskip("peft")
    model = load(family_dir("llama"), quantization_config=config())
    before = logits(model)
    options = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=init)
    with pytest.raises(ValueError, match=r"call model\.dequantize\(\)"):
        peft.get_peft_model(model, options)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


def test_dora_begins_as_the_model_itself(family_dir):
    """Its magnitudes are the norms of the dense weight, so that before training the adapters change nothing."""
    peft = pytest.importorskip("peft")
    model = load(family_dir("llama"), quantization_config=config())
    before = logits(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True)).eval()
    for layer in (model.model.model.layers[0].self_attn.q_proj, model.model.model.layers[1].mlp.down_proj):
        found = layer.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(found, layer.base_layer.dense().norm(dim=1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_adapters_on_latents_and_experts_are_refused(family_dir):
    peft = pytest.importorskip("peft")
    latent = load(family_dir("llama"), quantization_config=config(format="latent"))
    with pytest.raises(ValueError, match=r"call pack_model\(model\) first"):
        peft.get_peft_model(latent, peft.LoraConfig(target_modules=TARGETS))
    for options in (
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    ):
        packed = load(family_dir("mixtral"), quantization_config=config())
        with pytest.raises(ValueError, match="give target_modules a list of linear layers"):
            peft.get_peft_model(packed, peft.LoraConfig(**options))


def test_adapters_beside_packed_experts(family_dir):
    peft = pytest.importorskip("peft")
    model = load(family_dir("mixtral"), quantization_config=config())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    tokens = torch.arange(3, 27).reshape(2, 12)
    adapted(tokens, labels=tokens).loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in adapted.named_parameters() if "lora_B" in n)


def test_a_parameter_cast_does_not_reach_the_file(family_dir, tmp_path):
    peft = pytest.importorskip("peft")
    model = load(family_dir("llama"), quantization_config=config(), dtype=torch.bfloat16)
    before = logits(model)
    model.save_pretrained(tmp_path / "before")
    prepared = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    prepared.save_pretrained(tmp_path / "after")
    again = load(tmp_path / "after")
    assert again.model.layers[0].mlp.up_proj.scale_in.dtype == torch.bfloat16
    for name, value in load(tmp_path / "before").state_dict().items():
        if "proj" in name:
            assert torch.equal(again.state_dict()[name], value), name
    torch.testing.assert_close(logits(again).float(), before.float(), rtol=0.05, atol=0.02)
