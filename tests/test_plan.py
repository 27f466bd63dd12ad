"""Which modules are replaced, with which options, and what is said about the others."""

import json

import pytest
import torch
import transformers
from families import SMALL, config, equal_states, load
from torch import nn

from hf_littlebit import LittleBitConfig, LittleBitLinear
from hf_littlebit.layers.experts import LittleBitExperts
from hf_littlebit.layers.output_head import OutputHead
from hf_littlebit.load.meta_model import empty_model
from hf_littlebit.plan import plan_model


def test_head_embeddings_and_named_modules_stay_dense(family_dir):
    options = config(modules_to_not_convert=["down_proj", r"model\.layers\.0\.self_attn\..*"])
    model = load(family_dir("llama"), quantization_config=options)
    kinds = {name: type(m) for name, m in model.named_modules()}
    assert kinds["lm_head"] is OutputHead and isinstance(model.get_input_embeddings(), nn.Embedding)
    assert kinds["model.layers.1.mlp.down_proj"] is nn.Linear
    assert kinds["model.layers.0.self_attn.q_proj"] is nn.Linear
    assert kinds["model.layers.1.self_attn.q_proj"] is LittleBitLinear


def test_excluding_a_module_excludes_what_it_holds(family_dir):
    for name in ("mlp", "layers.1", r"model\.layers\.[0-9]+\.mlp"):
        model = load(family_dir("llama"), quantization_config=config(modules_to_not_convert=[name]))
        layers = model.model.layers
        assert type(layers[1].mlp.up_proj) is nn.Linear and isinstance(layers[0].self_attn.q_proj, LittleBitLinear)
        assert (type(layers[0].mlp.up_proj) is nn.Linear) == (name != "layers.1")
    model = load(family_dir("mixtral"), quantization_config=config(modules_to_not_convert=["mlp"]))
    assert not any(isinstance(module, LittleBitExperts) for module in model.modules())


def test_module_config_and_kv_factor(family_dir, tmp_path):
    options = config(
        bpw=2.0, residual=False, kv_factor=2.0, module_config={"*.1.mlp.*": {"bpw": 3.5, "residual": True}}
    )
    model = load(family_dir("llama"), quantization_config=options)
    first, second = (layer.mlp.gate_proj.ranks for layer in model.model.layers)
    assert len(first) == 1 and len(second) == 2
    plain = load(family_dir("llama"), quantization_config=config(bpw=2.0, residual=False, kv_factor=1.0))
    attention, other = model.model.layers[0].self_attn, plain.model.layers[0].self_attn
    assert attention.k_proj.ranks[0] > other.k_proj.ranks[0]
    model.save_pretrained(tmp_path)
    equal_states(model, load(tmp_path))


@pytest.mark.parametrize(("bpw", "factor", "rank"), [(0.3, 3.875, 48), (0.55, 1.75, 64), (1.0, 1.25, 104)])
def test_keys_and_values_get_the_bits_that_are_left_over(pycode, bpw, factor, rank):
    """The next larger factor would take more than was asked; what is left then is every layer's."""
    model = empty_model(transformers.AutoConfig.from_pretrained(pycode))
    plan = plan_model(model, LittleBitConfig(bpw=bpw))
    ranks = {weight.module.rpartition(".")[2]: weight.ranks for weight in plan.weights}
    assert plan.kv_factor == factor and rank <= min(ranks["k_proj"] + ranks["v_proj"]) <= rank + 8
    assert 0.99 * bpw < plan.bpw <= bpw < plan_model(model, LittleBitConfig(bpw=bpw, kv_factor=factor + 0.125)).bpw
    own = plan_model(model, LittleBitConfig(bpw=bpw, module_config={"k_proj": {"bpw": bpw}}))
    ranks = {weight.module.rpartition(".")[2]: weight.ranks for weight in own.weights}
    assert ranks["k_proj"] < ranks["v_proj"]  # whose bits were not asked for by name


def test_the_found_kv_factor_is_saved(pycode, tmp_path):
    options = LittleBitConfig(bpw=0.3, init="dual_svid", module_config={"*.0.self_attn.k_proj": {"kv_factor": 1.0}})
    model = load(pycode, quantization_config=options)
    found = model.config.quantization_config.kv_factor
    assert options.kv_factor is None and found == 4.0
    ranks = [[layer.self_attn.k_proj.ranks, layer.self_attn.v_proj.ranks] for layer in model.model.layers]
    assert ranks[0] == [[8], [56]] and ranks[1] == [[56], [56]]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["kv_factor"] == found
    equal_states(model, load(tmp_path))


def test_options_know_a_module_by_its_name_in_any_class(family_dir, tmp_path):
    """A pattern is written for the model with a head; the base model calls the same layer by another name."""
    options = config(bpw=2.0, residual=False, module_config={"model.layers.1.mlp.*": {"bpw": 3.5}})
    model = load(family_dir("llama"), quantization_config=options)
    model.save_pretrained(tmp_path)
    equal_states(transformers.AutoModel.from_pretrained(tmp_path), model.model)
    base = transformers.AutoModel.from_pretrained(family_dir("llama"), quantization_config=options)
    assert base.layers[1].mlp.up_proj.ranks == model.model.layers[1].mlp.up_proj.ranks
    assert base.layers[0].mlp.up_proj.ranks != base.layers[1].mlp.up_proj.ranks


def test_expert_weights_answer_to_their_own_names(family_dir, tmp_path):
    options = config(bpw=1.5, residual=False, module_config={"*.experts.down_proj": {"bpw": 3.0}})
    model = load(family_dir("mixtral"), quantization_config=options)
    ranks = model.model.layers[0].mlp.experts.path_ranks
    plain = load(family_dir("mixtral"), quantization_config=config(bpw=1.5, residual=False))
    assert ranks["gate_up_proj"] == plain.model.layers[0].mlp.experts.path_ranks["gate_up_proj"]
    assert ranks["down_proj"] > plain.model.layers[0].mlp.experts.path_ranks["down_proj"]
    model.save_pretrained(tmp_path)
    equal_states(model, load(tmp_path))
    options = config(modules_to_not_convert=["layers.0.mlp.experts.down_proj"])
    layers = load(family_dir("mixtral"), quantization_config=options).model.layers
    assert not isinstance(layers[0].mlp.experts, LittleBitExperts) and isinstance(
        layers[1].mlp.experts, LittleBitExperts
    )


def test_modules_that_must_stay_in_fp32_are_left_alone(tmp_path, caplog):
    """T5 keeps the second feed-forward matrix in fp32, and its code reads that matrix's dtype."""
    options = transformers.T5Config(
        d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, vocab_size=64, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(options).save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=config(), dtype=torch.float16)
    feed_forward = model.encoder.block[0].layer[1].DenseReluDense
    assert type(feed_forward.wo) is nn.Linear and feed_forward.wo.weight.dtype == torch.float32
    assert "2 module(s)" in caplog.text and "_keep_in_fp32_modules" in caplog.text
    assert isinstance(feed_forward.wi, LittleBitLinear)
    tokens = torch.arange(3, 27).reshape(2, 12)
    before = model(input_ids=tokens, decoder_input_ids=tokens).logits
    assert before.isfinite().all()
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    equal_states(model, again)
    assert torch.equal(again(input_ids=tokens, decoder_input_ids=tokens).logits, before)


def test_warnings_name_the_layers(family_dir, caplog):
    with caplog.at_level("WARNING", "hf_littlebit"):
        load(family_dir("llama"), quantization_config=config(bpw=0.5, residual=True))
    assert "too small for the bits asked" in caplog.text and "residual=False" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", "hf_littlebit"):
        load(family_dir("llama"), quantization_config=config(bpw=8.0, residual=False))
    assert "stop below the bits asked" in caplog.text and "residual=True" in caplog.text


def test_options_without_effect_are_reported(family_dir, caplog):
    options = config(
        kv_factor=4.0,
        modules_to_not_convert=["o_proj", "norm"],
        module_config={"*.up_proj": {"bpw": 3.0}, "*.mlp.down_proj": {"bpw": 3.0}, "*.qkv_proj": {"kv_factor": 2.0}},
    )
    with caplog.at_level("WARNING", "hf_littlebit"):
        load(family_dir("phi3"), quantization_config=options)
    for option in ("entry 'norm'", "entry '*.up_proj'", "entry '*.qkv_proj'", "kv_factor=4"):
        assert option in caplog.text
    assert "o_proj" not in caplog.text and "down_proj" not in caplog.text


def test_uncovered_experts_stay_dense_and_are_counted(tmp_path, caplog):
    options = transformers.GptOssConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=64, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GptOssForCausalLM(options).save_pretrained(tmp_path)
    with caplog.at_level("WARNING", "hf_littlebit"):
        model = load(tmp_path, quantization_config=config())
    assert "1 module(s)" in caplog.text and "transposed experts" in caplog.text
    assert isinstance(model.model.layers[0].self_attn.q_proj, LittleBitLinear)
    assert model.model.layers[0].mlp.experts.down_proj.ndim == 3


@pytest.mark.parametrize("kind", ["JetMoe", "Falcon"])
def test_matrices_of_uncovered_modules_are_counted(kind, tmp_path, caplog):
    """3-D experts under other names, and linear layers with a forward of their own."""
    options = {"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2} if kind == "JetMoe" else {}
    torch.manual_seed(0)
    sizes = {key: value for key, value in SMALL.items() if key != "head_dim"}
    options = getattr(transformers, f"{kind}Config")(**{**sizes, **options})
    getattr(transformers, f"{kind}ForCausalLM")(options).save_pretrained(tmp_path)
    with caplog.at_level("WARNING", "hf_littlebit"):
        if kind == "JetMoe":
            load(tmp_path, quantization_config=config())
        else:
            with pytest.raises(
                ValueError, match=r"no layer that LittleBit can replace.*FalconLinear's forward is its own"
            ):
                load(tmp_path, quantization_config=config())
    assert kind == "Falcon" or "JetMoeParallelExperts is not covered" in caplog.text


def test_mixtures_of_experts_are_not_compiled_by_generate(family_dir):
    assert load(family_dir("llama"), quantization_config=config()).hf_quantizer.is_compileable
    assert not load(family_dir("mixtral"), quantization_config=config()).hf_quantizer.is_compileable
