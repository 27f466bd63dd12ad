"""From dense to packed and back, for every covered model family and every way of loading."""

import copy
import gc
import json
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest
import torch
import transformers
from conftest import FAMILIES, SMALL, build, load, logits
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_littlebit import LatentLittleBitLinear, LittleBitConfig, LittleBitLinear, conversion
from hf_littlebit.experts import LittleBitExperts
from hf_littlebit.plan import plan_model


def config(**options):
    return LittleBitConfig(**{"bpw": 2.5, "init": "dual_svid", **options})


def equal_states(a, b):
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_reload_is_bit_equal(family, family_dir, tmp_path):
    model = load(family_dir(family), quantization_config=config())
    plan = plan_model(model, model.config.quantization_config)
    linears = [m for m in model.modules() if isinstance(m, LittleBitLinear)]
    experts = [m for m in model.modules() if isinstance(m, LittleBitExperts)]
    assert len(linears) + 2 * len(experts) == len(plan.weights) > 0
    dense = build(family)
    count = sum(type(m) is nn.Linear for m in dense.modules())
    head = sum(type(m) is nn.Linear for m in model.modules())
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


def test_sharded_and_shard_sizes(family_dir, tmp_path):
    model = load(family_dir("llama"), quantization_config=config())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    equal_states(model, load(tmp_path))


@pytest.mark.parametrize("family", ["llama_tied", "mixtral"])
@pytest.mark.parametrize("placement", ["cpu", "auto", "disk", "split"])
def test_device_maps(family, placement, family_dir, tmp_path):
    reference = load(family_dir(family), quantization_config=config())
    expected = logits(reference)
    reference.save_pretrained(tmp_path / "packed")
    if placement == "disk" and version("accelerate") < "1.15":
        pytest.skip("accelerate before 1.15 refuses to put a whole model on disk")
    if placement == "split":
        names = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
        device_map = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    else:
        device_map = {"": "disk"} if placement == "disk" else placement
    for folder, options in ((family_dir(family), {"quantization_config": config()}), (tmp_path / "packed", {})):
        offload = tmp_path / f"offload{len(options)}"
        model = load(folder, device_map=device_map, offload_folder=offload, **options)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
        model.save_pretrained(tmp_path / "again")
        equal_states(load(tmp_path / "again"), reference)


def test_workers_give_the_same_model(family_dir):
    equal_states(
        load(family_dir("mixtral"), quantization_config=config(init="admm", steps=5)),
        load(family_dir("mixtral"), quantization_config=config(init="admm", steps=5, workers=3)),
    )


def test_workers_leave_the_number_of_threads_alone(family_dir):
    def in_a_new_thread():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    torch.set_num_threads(4)
    try:
        load(family_dir("llama"), quantization_config=config(workers=2))
        assert torch.get_num_threads() == in_a_new_thread() == 4
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("place", ["disk", torch.device("cpu"), "cpu"])
def test_only_the_disk_takes_workers_away(place, family_dir, tmp_path, monkeypatch, caplog):
    threads = set()
    original = conversion.factor_weight
    monkeypatch.setattr(conversion, "factor_weight", lambda *a: threads.add(threading.get_ident()) or original(*a))
    names = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = {**dict.fromkeys(names, "cpu"), "model.layers.1": place}
    load(family_dir("llama"), quantization_config=config(workers=3), device_map=device_map, offload_folder=tmp_path)
    own = threading.get_ident() in threads
    assert (own, "workers=3 is reduced to 1" in caplog.text) == ((True, True) if place == "disk" else (False, False))


def test_no_dense_weights_are_made_on_reload(family_dir, tmp_path, monkeypatch):
    model = load(family_dir("llama"), quantization_config=config())
    model.save_pretrained(tmp_path)
    sizes = []
    monkeypatch.setattr("hf_littlebit.conversion.factor_weight", lambda *a: sizes.append(a))
    again = load(tmp_path)
    largest = max(p.numel() * p.element_size() for n, p in again.named_parameters() if "layers" in n)
    assert not sizes and largest < 96 * 64 * 2  # the smallest bf16 dense matrix of the mlp


def test_head_embeddings_and_named_modules_stay_dense(family_dir):
    options = config(modules_to_not_convert=["down_proj", r"model\.layers\.0\.self_attn\..*"])
    model = load(family_dir("llama"), quantization_config=options)
    kinds = {name: type(m) for name, m in model.named_modules()}
    assert kinds["lm_head"] is nn.Linear and isinstance(model.get_input_embeddings(), nn.Embedding)
    assert kinds["model.layers.1.mlp.down_proj"] is nn.Linear
    assert kinds["model.layers.0.self_attn.q_proj"] is nn.Linear
    assert kinds["model.layers.1.self_attn.q_proj"] is LittleBitLinear


def test_module_config_and_kv_factor(family_dir, tmp_path):
    options = config(
        bpw=2.0, residual=False, kv_factor=2.0, module_config={"*.1.mlp.*": {"bpw": 3.5, "residual": True}}
    )
    model = load(family_dir("llama"), quantization_config=options)
    first, second = (layer.mlp.gate_proj.ranks for layer in model.model.layers)
    assert len(first) == 1 and len(second) == 2
    plain = load(family_dir("llama"), quantization_config=config(bpw=2.0, residual=False))
    attention, other = model.model.layers[0].self_attn, plain.model.layers[0].self_attn
    assert attention.k_proj.ranks[0] > other.k_proj.ranks[0] and attention.q_proj.ranks == other.q_proj.ranks
    model.save_pretrained(tmp_path)
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
    options = config(bpw=2.0, residual=False, module_config={"*.experts.down_proj": {"bpw": 3.0}})
    model = load(family_dir("mixtral"), quantization_config=options)
    ranks = model.model.layers[0].mlp.experts.path_ranks
    plain = load(family_dir("mixtral"), quantization_config=config(bpw=2.0, residual=False))
    assert ranks["gate_up_proj"] == plain.model.layers[0].mlp.experts.path_ranks["gate_up_proj"]
    assert ranks["down_proj"] > plain.model.layers[0].mlp.experts.path_ranks["down_proj"]
    model.save_pretrained(tmp_path)
    equal_states(model, load(tmp_path))
    options = config(modules_to_not_convert=["layers.0.mlp.experts.down_proj"])
    layers = load(family_dir("mixtral"), quantization_config=options).model.layers
    assert not isinstance(layers[0].mlp.experts, LittleBitExperts) and isinstance(
        layers[1].mlp.experts, LittleBitExperts
    )


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


def test_modules_that_must_stay_in_fp32_are_left_alone(tmp_path):
    """T5 keeps the second feed-forward matrix in fp32, and its code reads that matrix's dtype."""
    options = transformers.T5Config(
        d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, vocab_size=64, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(options).save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=config(), dtype=torch.float16)
    feed_forward = model.encoder.block[0].layer[1].DenseReluDense
    assert type(feed_forward.wo) is nn.Linear and feed_forward.wo.weight.dtype == torch.float32
    assert isinstance(feed_forward.wi, LittleBitLinear)
    tokens = torch.arange(3, 27).reshape(2, 12)
    before = model(input_ids=tokens, decoder_input_ids=tokens).logits
    assert before.isfinite().all()
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    equal_states(model, again)
    assert torch.equal(again(input_ids=tokens, decoder_input_ids=tokens).logits, before)


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


def test_dequantize_to_a_dtype(family_dir):
    model = load(family_dir("llama"), quantization_config=config())
    expected = logits(model)
    dense = model.dequantize(dtype=torch.bfloat16)
    assert {p.dtype for p in dense.parameters()} == {torch.bfloat16} and dense.config.dtype == torch.bfloat16
    torch.testing.assert_close(logits(dense).float(), expected, rtol=0.1, atol=0.05)


def test_an_offloaded_model_is_not_half_dequantized(family_dir, tmp_path):
    load(family_dir("llama"), quantization_config=config()).save_pretrained(tmp_path)
    names = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    model = load(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    with pytest.raises(ValueError, match=r"layers\.1.* is offloaded"):
        model.dequantize()
    assert isinstance(model.model.layers[0].mlp.up_proj, LittleBitLinear)


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
        modules_to_not_convert=["o_proj", "w2"],
        module_config={"*.up_proj": {"bpw": 3.0}, "*.mlp.down_proj": {"bpw": 3.0}},
    )
    with caplog.at_level("WARNING", "hf_littlebit"):
        load(family_dir("phi3"), quantization_config=options)
    for option in ("modules_to_not_convert entry 'w2'", "module_config entry '*.up_proj'", "kv_factor=4"):
        assert f"{option}" in caplog.text
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


def test_what_the_device_map_counts_with(family_dir):
    """While a dense model is read, sizes are those of the packed model to come, and a tenth of each device is left."""
    from accelerate.utils import compute_module_sizes
    from transformers.quantizers.auto import AutoHfQuantizer

    model = build("mixtral")
    quantizer = AutoHfQuantizer.from_config(config(bpw=3.0), pre_quantized=False)
    quantizer.preprocess_model(model.to("meta"), device_map=None)
    sizes = sum(
        p.numel() * quantizer.param_element_size(model, name, p)
        for name, p in model.named_parameters()
        if "self_attn" in name or "experts" in name
    )
    packed = load(family_dir("mixtral"), quantization_config=config(bpw=3.0))
    expected = sum(
        size for name, size in compute_module_sizes(packed).items() if name.endswith(("self_attn", "experts"))
    )
    assert sizes == expected
    assert quantizer.adjust_max_memory({0: 1000, "cpu": "1GB"}) == {0: 900, "cpu": "1GB"}
    quantizer.pre_quantized = True
    assert quantizer.adjust_max_memory({0: 1000}) == {0: 1000}


def test_mixtures_of_experts_are_not_compiled_by_generate(family_dir):
    assert load(family_dir("llama"), quantization_config=config()).hf_quantizer.is_compileable
    assert not load(family_dir("mixtral"), quantization_config=config()).hf_quantizer.is_compileable


def test_memory_grows_by_one_layer_at_a_time(tmp_path):
    """While a model is read, no more than one dense weight of it is alive beside the packed parts."""
    dense = build("llama")
    dense.save_pretrained(tmp_path)
    weights = {tuple(p.shape) for n, p in dense.named_parameters() if "proj" in n}
    del dense
    alive = []
    original = conversion.factor_weight

    def spy(weight, *rest):
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.device.type == "cpu"]
        found = {t.data_ptr() for t in tensors if t.is_floating_point() and tuple(t.shape) in weights}
        alive.append(len(found))
        return original(weight, *rest)

    conversion.factor_weight = spy
    try:
        load(tmp_path, quantization_config=config())
    finally:
        conversion.factor_weight = original
    assert len(alive) == 14 and max(alive) <= 1


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
