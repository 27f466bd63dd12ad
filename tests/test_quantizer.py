"""From dense to packed and back, for every covered model family."""

import copy
import json
import warnings

import pytest
import torch
import transformers
from families import FAMILIES, build, config, equal_states, load, logits
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers.auto import AutoHfQuantizer

from hf_littlebit import LatentLittleBitLinear, LittleBitConfig, LittleBitLinear
from hf_littlebit.layers.experts import LittleBitExperts
from hf_littlebit.layers.output_head import OutputHead
from hf_littlebit.plan import plan_model


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_reload_is_bit_equal(family, family_dir, tmp_path):
    model = load(family_dir(family), quantization_config=config())
    plan = plan_model(model, model.config.quantization_config)
    linears = [m for m in model.modules() if isinstance(m, LittleBitLinear)]
    experts = [m for m in model.modules() if isinstance(m, LittleBitExperts)]
    assert len(linears) + 2 * len(experts) == len(plan.weights) > 0
    dense = build(family)
    count = sum(type(m) is nn.Linear for m in dense.modules())
    head = sum(type(m) in (nn.Linear, OutputHead) for m in model.modules())
    assert len(linears) + head == count and head <= 2  # the output head (BERT: its last module too)
    before = logits(model)
    assert torch.isfinite(before).all()
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    equal_states(model, again)
    assert torch.equal(before, logits(again))
    assert not any(p.is_meta for p in again.parameters())
    assert again.config.quantization_config.bpw == 2.5


@pytest.mark.parametrize("family", FAMILIES)
def test_dequantize_gives_a_dense_model(family, family_dir, tmp_path):
    model = load(family_dir(family), quantization_config=config())
    before = logits(model)
    dense = model.dequantize()
    assert not any(isinstance(m, LittleBitLinear | LittleBitExperts) for m in dense.modules())
    torch.testing.assert_close(logits(dense), before, rtol=1e-4, atol=1e-4)
    dense.save_pretrained(tmp_path)
    plain = load(tmp_path)
    assert not getattr(plain.config, "quantization_config", None)
    torch.testing.assert_close(logits(plain), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama_bias", "mixtral"])
def test_latent_round_trip_and_pack(family, family_dir, tmp_path):
    model = load(family_dir(family), quantization_config=config(format="latent"))
    assert model.hf_quantizer.is_qat_trainable
    before = logits(model)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.bfloat16)
    for name, value in again.named_parameters():
        if isinstance(again.get_submodule(name.rpartition(".")[0]), LatentLittleBitLinear | LittleBitExperts):
            assert name.endswith("bias") or (value.dtype == torch.float32 and value.requires_grad), name
    equal_states(model, load(tmp_path))
    for name, module in list(model.named_modules()):
        if isinstance(module, LatentLittleBitLinear | LittleBitExperts):
            packed = module.pack()
            model.set_submodule(name, packed)
            repacked = packed.unpack().pack()
            equal_states(packed, repacked)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_real_model_keeps_most_of_its_knowledge(stories):
    """64-wide layers are too small for few bits; at four the text is still far from the 6.2 nats of chance."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    labels = tokenizer(text, return_tensors="pt").input_ids
    losses = {}
    for init in ("dual_svid", "admm"):
        options = LittleBitConfig(bpw=4.0, init=init)
        model = AutoModelForCausalLM.from_pretrained(stories, quantization_config=options)
        losses[init] = model(labels, labels=labels).loss.item()
    assert losses["admm"] < losses["dual_svid"] and losses["admm"] < 3.0, losses
    out = model.generate(labels[:, :8], max_new_tokens=20, do_sample=False)
    assert out.shape[1] > 8 and tokenizer.decode(out[0], skip_special_tokens=True).startswith("Once upon")


@pytest.mark.slow
def test_generate_compiles_one_graph_for_every_length(family_dir):
    """With a static cache, as transformers compiles on a GPU: no graph break, no new graph as the sequence grows."""
    model = load(family_dir("llama"), quantization_config=config())
    prompt = torch.arange(3, 8)[None]
    length = {"max_new_tokens": 20, "do_sample": False}
    compile_config = transformers.CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    compile_config._compile_all_devices = True  # transformers leaves the CPU out, unless told so
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for tokens in (prompt, torch.arange(3, 16)[None]):
        out = model.generate(tokens, **length, cache_implementation="static", compile_config=compile_config)
        assert torch.equal(out, model.generate(tokens, **length))
        if tokens is prompt:
            assert counters["stats"]["unique_graphs"] == 1
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]  # two: the longer cache has a shape


def test_file_holds_what_the_formula_says(family_dir, tmp_path):
    model = load(family_dir("llama"), quantization_config=config(init="joint_itq", residual=True))
    model.save_pretrained(tmp_path)
    header = load_file(tmp_path / "model.safetensors")
    plan = plan_model(model, model.config.quantization_config)
    for weight in plan.weights:
        size = sum(v.numel() * v.element_size() for k, v in header.items() if k.startswith(weight.module + "."))
        m, n, ranks = weight.out_features, weight.in_features, weight.ranks
        assert 8 * size == weight.bits == sum(r * (m + n + 16) + 16 * (m + n) for r in ranks)
    assert {v.dtype for k, v in header.items() if "scale_" in k} == {torch.bfloat16}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["quant_method"] == "littlebit"


def test_casts_keep_scales_and_move_the_rest(family_dir):
    model = load(family_dir("llama_bias"), quantization_config=config())
    layer = model.model.layers[0].mlp.up_proj
    before = layer.scale_in.clone()
    model.to(torch.bfloat16)
    assert layer.scale_in.dtype == torch.bfloat16 and torch.equal(before, layer.scale_in)
    assert layer.bias.dtype == torch.bfloat16 and layer.weight.dtype == torch.int32
    model.to(torch.float16)
    assert layer.scale_in.dtype == torch.bfloat16 and layer.bias.dtype == torch.float16
    assert logits(model).dtype == torch.float16


def test_dtype_on_load(family_dir, tmp_path):
    model = load(family_dir("llama"), quantization_config=config(scale_dtype="float16"), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.model.layers[0].mlp.up_proj.scale_out.dtype == torch.float16
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    equal_states(model, again)
    assert again.config.dtype == torch.bfloat16


def test_config_as_a_plain_dict(family_dir):
    options = {"quant_method": "littlebit", "bpw": 2.5, "init": "dual_svid"}
    equal_states(
        load(family_dir("llama"), quantization_config=options), load(family_dir("llama"), quantization_config=config())
    )


def test_scales_that_do_not_fit_float16(tmp_path, family_dir):
    for size, name in ((1e8, "large"), (1e-9, "small")):
        model = build("llama")
        model.model.layers[1].mlp.up_proj.weight.data *= size
        model.save_pretrained(tmp_path / name)
        for form in ("packed", "latent"):
            with pytest.raises(
                ValueError, match=r'layers\.1\.mlp\.up_proj.*do not fit float16.*scale_dtype="bfloat16"'
            ):
                load(tmp_path / name, quantization_config=config(scale_dtype="float16", format=form))
        load(tmp_path / name, quantization_config=config())


def test_footprint_deepcopy_and_dtype(family_dir):
    dense = load(family_dir("llama"))
    model = load(family_dir("llama"), quantization_config=config(bpw=1.5))
    assert model.get_memory_footprint() < dense.get_memory_footprint()
    twin = copy.deepcopy(model)
    equal_states(model, twin)
    assert torch.equal(logits(model), logits(twin))
    assert twin._upload_modified_files.args[0] is twin


def test_loading_options_on_a_saved_model(family_dir, tmp_path):
    model = load(family_dir("llama"), quantization_config=config())
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense = load(tmp_path, quantization_config=LittleBitConfig(bpw=0.1, dequantize=True))
    assert not any(isinstance(m, LittleBitLinear) for m in dense.modules())
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-4, atol=1e-4)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "littlebit" and "svd_device" not in saved and "dequantize" not in saved


def test_a_base_model_and_a_headed_model_share_a_checkpoint(family_dir, tmp_path):
    model = load(family_dir("llama"), quantization_config=config())
    model.save_pretrained(tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    equal_states(base, model.model)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(classifier.score) is nn.Linear
    equal_states(classifier.model, model.model)


def test_modules_that_only_the_new_class_has_are_new(family_dir, tmp_path):
    """A masked-language BERT has no pooler; the classifier on top of it gets a new one, dense, beside its new head."""
    model = load(family_dir("bert"), quantization_config=config())
    model.save_pretrained(tmp_path)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(classifier.bert.pooler.dense) is nn.Linear and classifier.bert.pooler.dense.weight.isfinite().all()
    equal_states(classifier.bert.encoder, model.bert.encoder)


def test_a_dense_model_becomes_one_of_another_class(family_dir, tmp_path, caplog):
    """As without quantization: what only the new class has is new, and here stays dense until it is trained."""
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(family_dir("bert"), num_labels=3, quantization_config=config())
    assert type(model.bert.pooler.dense) is nn.Linear and "1 module(s) with 4,160 weights" in caplog.text
    equal_states(model.bert.encoder, load(family_dir("bert"), quantization_config=config()).bert.encoder)
    model.save_pretrained(tmp_path)
    equal_states(load(tmp_path), model)


def test_one_config_serves_two_models():
    options = config()
    for name in ("org/one", "org/two"):
        model = build("llama").to("meta")
        model.config.name_or_path = name
        quantizer = AutoHfQuantizer.from_config(options, pre_quantized=False)
        quantizer.preprocess_model(model, device_map=None)
        assert quantizer.quantization_config.base_model == name
    assert options.base_model is None


def test_a_state_dict_has_no_base_model(family_dir):
    dense = load(family_dir("llama"))
    model = type(dense).from_pretrained(
        None, config=dense.config, state_dict=dense.state_dict(), quantization_config=config()
    )
    assert model.config.quantization_config.base_model is None


def test_a_model_that_begins_with_a_linear_layer_keeps_its_dtype(tmp_path):
    """transformers reads a model's dtype off its first floating parameter, and saves that in the config."""
    options = transformers.PatchTSTConfig(
        num_input_channels=2, context_length=32, patch_length=8, patch_stride=8, d_model=64, num_attention_heads=4,
        ffn_dim=96, num_hidden_layers=1, prediction_length=4,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.PatchTSTForPrediction(options).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=config(bpw=4.0))
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "packed")
    equal_states(model, load(tmp_path / "packed"))


def test_torch_save(family_dir, tmp_path):
    """Also where parts have no rows, whose addresses in the file are those of their neighbours."""
    load(family_dir("llama"), quantization_config=config()).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.model.layers[0].mlp.up_proj.weight.numel() == 0
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_dequantize_to_a_dtype(family_dir):
    model = load(family_dir("llama"), quantization_config=config())
    expected = logits(model)
    dense = model.dequantize(dtype=torch.bfloat16)
    assert {p.dtype for p in dense.parameters()} == {torch.bfloat16} and dense.config.dtype == torch.bfloat16
    torch.testing.assert_close(logits(dense).float(), expected, rtol=0.1, atol=0.05)


def test_errors_before_and_during_conversion(family_dir, tmp_path):
    dense = build("llama")
    dense.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    dense.save_pretrained(tmp_path / "nan")
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj"):
            load(tmp_path / "nan", quantization_config=config(workers=workers))
    state = build("llama").state_dict()
    del state["model.layers.0.self_attn.q_proj.weight"]
    build("llama").save_pretrained(tmp_path / "gap", state_dict=state)
    with pytest.raises(ValueError, match=r"no weights for 1 of .*layers\.0\.self_attn\.q_proj"):
        load(tmp_path / "gap", quantization_config=config())
    with pytest.raises(ValueError, match="svd_device is 'cuda:99'"):
        load(family_dir("llama"), quantization_config=config(svd_device="cuda:99"))
    with pytest.raises(ValueError, match="dequantize=True"):
        load(family_dir("llama"), quantization_config=config(dequantize=True))
    with pytest.raises(ValueError, match="no layer that LittleBit can replace"):
        load(family_dir("llama"), quantization_config=config(modules_to_not_convert=[".*"]))


def test_tokens_of_other_ranks_get_nothing_from_the_experts(family_dir):
    """With experts spread over devices, an index equal to their number marks a token that another device serves."""
    experts = load(family_dir("mixtral"), quantization_config=config()).model.layers[0].mlp.experts
    x, weights = torch.randn(3, 64), torch.rand(3, 2)
    chosen = torch.tensor([[0, 3], [4, 4], [2, 4]])
    out = experts(x, chosen, weights)
    assert torch.equal(out[1], torch.zeros(64)) and out[0].abs().sum() > 0
    alone = experts(x[2:], chosen[2:, :1], weights[2:, :1])
    torch.testing.assert_close(out[2:], alone)
