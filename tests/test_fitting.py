"""Layers fitted to the inputs that they really get: the closed forms, and whole models of many families."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from families import FAMILIES, build, config, equal_states, load

from hf_littlebit import LittleBitConfig
from hf_littlebit.initialize.factorize import factorize
from hf_littlebit.initialize.outputs import compensated, refit_to_outputs, with_ridge
from hf_littlebit.layers.linear import LittleBitLinear
from hf_littlebit.load.convert import latent_model
from hf_littlebit.refinement.fitting import NotFittable, fit_model

OPTIONS = {"bpw": 2.5, "init": "admm", "steps": 10}


def skewed(rows, size, seed=0):
    """Inputs like a model's: a few directions carry most of them."""
    torch.manual_seed(seed)
    return torch.randn(rows, size) @ (torch.randn(size, size) * torch.logspace(0, -2, size)[:, None]) + torch.randn(
        size
    )


def test_compensation_gives_the_dense_outputs_for_other_inputs():
    weight, x = torch.randn(12, 24), skewed(400, 24)
    other = x @ (torch.eye(24) + 0.3 * torch.randn(24, 24))
    gram, cross = other.T @ other / 400, (x @ weight.T).T @ other / 400
    found = compensated(weight, gram, cross, 1e-7)
    wanted = x @ weight.T
    assert (other @ found.T - wanted).norm() < 0.02 * wanted.norm() < 0.2 * (other @ weight.T - wanted).norm()
    # With a large ridge the weight stays, and with no inputs it is the weight itself.
    assert (compensated(weight, gram, cross, 1e6) - weight).norm() < 1e-3 * weight.norm()
    zero = torch.zeros(24, 24)
    assert torch.equal(compensated(weight, zero, torch.zeros(12, 24), 0.1), weight)


def output_error(weight, path, gram):
    difference = weight - path.dense()
    return float((difference @ gram * difference).sum())


@pytest.mark.parametrize("size", [(40, 24), (24, 40)])
def test_scales_are_refitted_for_the_outputs(size):
    torch.manual_seed(1)
    weight, x = torch.randn(*size), skewed(300, size[1])
    gram = with_ridge(x.T @ x / 300, 0.01)
    (path,) = factorize(weight, [16], "admm", steps=20)
    found = refit_to_outputs(weight, path, gram)
    assert output_error(weight, found, gram) < 0.9 * output_error(weight, path, gram)
    assert torch.equal(found.u, path.u) and torch.equal(found.v, path.v)
    # scale_out is the least-squares one for the other two: moving any entry makes it worse.
    once = refit_to_outputs(weight, found, gram, rounds=20)
    for part in ("scale_out", "scale_rank", "scale_in"):
        for step in (1e-2, -1e-2):
            scale = getattr(once, part).clone()
            scale[3] += step * scale.abs().mean()
            assert output_error(weight, replace(once, **{part: scale}), gram) > 0.9999 * output_error(
                weight, once, gram
            )


def test_a_refit_that_cannot_help_changes_nothing():
    (path,) = factorize(torch.randn(16, 16), [8], "admm", steps=5)
    assert refit_to_outputs(path.dense(), path, torch.eye(16), rounds=1).dense().allclose(path.dense(), atol=1e-5)
    bad = torch.full((16, 16), float("nan"))
    assert refit_to_outputs(path.dense(), path, bad) == path


def outputs(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits.float()


@pytest.mark.parametrize("family", ["llama_bias", "opt", "gemma3", "phi3", "qwen3_moe"])
def test_a_fitted_model_is_nearer_than_one_of_its_weights_alone(family, tmp_path):
    tokens = torch.randint(3, 128, (72, 32), generator=torch.Generator().manual_seed(0))
    fitting, judging = tokens[:64], tokens[64:]
    dense = build(family).to(torch.bfloat16)
    wanted = outputs(dense, judging)
    alone = outputs(latent_model(copy.deepcopy(dense), LittleBitConfig(**OPTIONS), progress=False), judging)
    fitted = fit_model(copy.deepcopy(dense), LittleBitConfig(**OPTIONS), fitting, progress=False)
    assert (outputs(fitted, judging) - wanted).norm() < 0.9 * (alone - wanted).norm()
    # What stays dense keeps its dtype, and the options that are saved are the user's.
    kept = {name: value.dtype for name, value in fitted.named_parameters() if name in dict(dense.named_parameters())}
    assert {dtype for name, dtype in kept.items() if not name.endswith("_proj.weight") and "fc" not in name} <= {
        torch.bfloat16,
        torch.int32,
    }
    assert fitted.config.quantization_config.steps == 10 and fitted.config.quantization_config.format == "packed"
    fitted.save_pretrained(tmp_path)
    equal_states(fitted, load(tmp_path))


def test_the_result_repeats_and_may_be_latent():
    tokens = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(0))
    first, second = (
        fit_model(build("llama"), LittleBitConfig(**OPTIONS, format="latent"), tokens, progress=False) for _ in range(2)
    )
    equal_states(first, second)
    assert first.model.layers[0].mlp.up_proj.latent and first.is_quantized
    packed = fit_model(build("llama"), LittleBitConfig(**OPTIONS), tokens, progress=False)
    assert isinstance(packed.model.layers[1].self_attn.o_proj, LittleBitLinear)
    difference = outputs(packed, tokens) - outputs(first, tokens)
    assert difference.norm() < 0.02 * outputs(first, tokens).norm()


def test_one_huge_token_is_not_all_that_is_fitted():
    """A massive activation: the first token of every text has a hidden state a thousand times larger than the others."""
    tokens = torch.randint(4, 128, (72, 32), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 3
    dense = build("llama")
    dense.get_input_embeddings().weight.data[3] *= 1000
    wanted = outputs(dense, tokens[64:])[:, 1:]
    alone = latent_model(copy.deepcopy(dense), LittleBitConfig(**OPTIONS), progress=False)
    fitted = fit_model(copy.deepcopy(dense), LittleBitConfig(**OPTIONS), tokens[:64], progress=False)
    errors = [(outputs(model, tokens[64:])[:, 1:] - wanted).norm() for model in (fitted, alone)]
    assert errors[0] < 0.85 * errors[1]


def test_blocks_that_are_no_chain_are_refused_and_nothing_changes():
    """ALBERT calls its one block many times."""
    options = {"embedding_size": 32, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 64}
    torch.manual_seed(0)
    model = transformers.AlbertForMaskedLM(
        transformers.AlbertConfig(**options, num_attention_heads=4, num_hidden_layers=3, inner_group_num=1)
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NotFittable, match="one after the other"):
        fit_model(model, config(), torch.randint(3, 64, (2, 8)), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    packed = fit_model(build("llama"), LittleBitConfig(**OPTIONS), torch.randint(3, 64, (2, 8)), progress=False)
    with pytest.raises(ValueError, match="only a dense model"):
        fit_model(packed, config(), torch.randint(3, 64, (2, 8)), progress=False)


def test_all_families_can_be_fitted():
    """The plumbing alone, in the form in which each of them is loaded."""
    tokens = torch.randint(3, 128, (2, 8), generator=torch.Generator().manual_seed(0))
    for family in FAMILIES:
        options = LittleBitConfig(bpw=2.5, init="dual_svid")
        model = fit_model(build(family), options, tokens, progress=False)
        assert outputs(model, tokens).isfinite().all(), family
