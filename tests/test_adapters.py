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
    with pytest.raises(Exception):  # noqa: B017  (peft's own type varies)
        again.merge_adapter()


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
