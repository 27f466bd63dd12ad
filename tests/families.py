"""Small random models of every covered family, and helpers that load models and compare them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import torch
import transformers
from transformers import AutoConfig

from hf_littlebit import LittleBitConfig

ROOT = Path(__file__).parent.parent

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

# family -> (model class, config options). Two layers each, wide enough for factors at a few bits per weight.
FAMILIES = {
    "llama": ("LlamaForCausalLM", {}),
    "llama_tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama_bias": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "phi3": ("Phi3ForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "gemma2": ("Gemma2ForCausalLM", {}),
    "gemma3": ("Gemma3ForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {}),
    "bert": ("BertForMaskedLM", {}),
    "mixtral": ("MixtralForCausalLM", MOE),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**MOE, "decoder_sparse_step": 1, "norm_topk_prob": True}),
}


def build(family: str) -> torch.nn.Module:
    """A random model of `family`, seeded."""
    name, options = FAMILIES[family]
    model_class = getattr(transformers, name)
    config = model_class.config_class(**{**SMALL, **options})
    torch.manual_seed(0)
    return model_class(config).eval()


def load(folder: str, **options):
    """The model in `folder`, of the class its config names."""
    config = AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, **options)


def logits(model, tokens=None) -> torch.Tensor:
    """The model's logits on a fixed batch of tokens."""
    tokens = torch.arange(3, 27).reshape(2, 12) if tokens is None else tokens
    with torch.no_grad():
        return model(input_ids=tokens).logits


def config(**options) -> LittleBitConfig:
    """Quick factors at enough bits for small layers."""
    return LittleBitConfig(**{"bpw": 2.5, "init": "dual_svid", **options})


def equal_states(a, b) -> None:
    """Assert that two models hold the same tensors, bit for bit."""
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name
