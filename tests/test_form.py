"""The ways to a LittleBit model end in the same place: equal classes, attributes and config records."""

from types import SimpleNamespace

import pytest
import torch
from families import build, config, equal_states, load, logits
from torch import nn

from hf_littlebit import calibrate, latent_model, pack_model, perplexity, sample_blocks, save_topk, unpack_model
from hf_littlebit.layers.output_head import OutputHead
from hf_littlebit.placement import input_device

FORM_FAMILIES = ["llama", "llama_tied", "llama_bias", "qwen2", "gemma2", "bert", "mixtral"]
PLACES = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]


def form(model) -> dict:
    """Everything that makes `model` what it is, but for the values of its tensors and the place that it was read from."""
    quantizer, options = model.hf_quantizer, model.config.quantization_config
    assert quantizer.quantization_config is options
    modules = {name: (type(module), module.training) for name, module in model.named_modules()}
    groups = {name: getattr(module, "group", None) is not None for name, module in model.named_modules()}
    tensors = {name: (value.shape, value.dtype, value.requires_grad) for name, value in model.named_parameters()}
    instance = {name: type(value) for name, value in vars(model).items() if name not in ("config", "generation_config")}
    configs = {
        name: vars(module.config).get("_is_quantized")
        for name, module in model.named_modules()
        if hasattr(module, "config")
    }
    return {
        "modules": modules, "groups": groups, "tensors": tensors, "instance": instance, "configs": configs,
        "conversions": model._weight_conversions, "upload": model._upload_modified_files.func,
        "upload_of": model._upload_modified_files.args[0] is model, "quantized": model.is_quantized,
        "method": model.quantization_method, "plan": quantizer.plan, "pre_quantized": quantizer.pre_quantized,
        "qat": quantizer.is_qat_trainable, "options": options.to_dict(),
        "saved": model.config.to_diff_dict()["quantization_config"],
    }  # fmt: skip


def assert_equal_forms(one, two) -> None:
    first, second = form(one), form(two)
    for key, value in first.items():
        assert value == second[key], key


@pytest.mark.parametrize("family", FORM_FAMILIES)
def test_every_way_gives_the_same_model(family, family_dir, tmp_path):
    folder = family_dir(family)
    latent = load(folder, quantization_config=config(format="latent"))
    packed = load(folder, quantization_config=config())

    made = latent_model(load(folder), config(), progress=False)
    equal_states(made, latent)
    assert_equal_forms(made, latent)
    made.save_pretrained(tmp_path / "latent")
    assert_equal_forms(load(tmp_path / "latent"), latent)

    made = pack_model(made)
    equal_states(made, packed)
    assert_equal_forms(made, packed)
    made.save_pretrained(tmp_path / "packed")
    assert_equal_forms(load(tmp_path / "packed"), packed)

    assert_equal_forms(unpack_model(made), latent)
    made.save_pretrained(tmp_path / "unpacked")
    assert_equal_forms(load(tmp_path / "unpacked"), latent)
    assert_equal_forms(pack_model(made), packed)
    equal_states(made, packed)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "mixtral"])
def test_dequantized_models_have_the_form_of_dense_ones(family, family_dir):
    dense = load(family_dir(family))
    for model in (
        load(family_dir(family), quantization_config=config()),
        latent_model(load(family_dir(family)), config(), progress=False),
        pack_model(latent_model(load(family_dir(family)), config(), progress=False)),
    ):
        model.dequantize()
        assert {name: type(each) for name, each in model.named_modules()} == {
            name: type(each) for name, each in dense.named_modules()
        }
        left = {name for name in vars(model) if name not in vars(dense)}
        assert not left - {"is_quantized"} and not model.is_quantized
        assert not hasattr(model.config, "quantization_config") and not hasattr(model.config, "_is_quantized")


def test_a_model_without_a_name_has_no_base_model(family_dir):
    """from_pretrained(None, ...) gives a model the name "None", which reads like the name of a repository on the Hub."""
    dense = load(family_dir("llama"))
    nameless = type(dense).from_pretrained(None, config=dense.config, state_dict=dense.state_dict())
    model = latent_model(nameless, config(), progress=False)
    assert model.config.quantization_config.base_model is None


def test_the_name_on_the_hub_is_recorded_and_a_folder_is_not(family_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, recorded in (("org/model", "org/model"), ("gpt2", "gpt2"), (family_dir("llama"), None), ("", None)):
        dense = build("llama")
        dense.config.name_or_path = name
        assert latent_model(dense, config(), progress=False).config.quantization_config.base_model == recorded
    (tmp_path / "gpt2").mkdir()
    dense = build("llama")
    dense.config.name_or_path = "gpt2"
    assert latent_model(dense, config(), progress=False).config.quantization_config.base_model is None


def test_a_packed_model_has_the_head_of_one_that_was_loaded(family_dir):
    model = pack_model(latent_model(load(family_dir("llama")), config(), progress=False))
    assert type(model.lm_head) is OutputHead


class Words:
    """A tokenizer: a word is the number of its letters."""

    bos_token_id, eos_token_id, pad_token_id, unk_token_id = 1, 2, None, None

    def __len__(self):
        return 128

    def __call__(self, text, **options):
        return {"input_ids": [3 + len(word) for word in text.split()]}


@pytest.fixture(params=["cpu", "disk", "split"])
def offloaded(request, family_dir, tmp_path):
    """A dense tied model whose embeddings, or layers, or both, accelerate keeps elsewhere than they compute."""
    import accelerate

    model = load(family_dir("llama_tied"))
    if request.param == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if request.param == "disk":
        return accelerate.disk_offload(model, tmp_path / "offload", execution_device="cpu")
    places = {**dict.fromkeys(PLACES, "cpu"), "model.layers.1": "disk"}
    return load(family_dir("llama_tied"), device_map=places, offload_folder=tmp_path / "offload")


def test_an_offloaded_model_serves_wherever_a_whole_one_does(offloaded, family_dir, tmp_path):
    whole = load(family_dir("llama_tied"))
    assert any(value.is_meta for value in offloaded.parameters())
    assert input_device(offloaded) == input_device(whole) == torch.device("cpu")
    torch.testing.assert_close(logits(offloaded), logits(whole), rtol=0, atol=0)
    batches = [{"input_ids": torch.arange(3, 27).reshape(2, 12)}]
    tokenizer = Words()
    text = "a bb ccc dddd " * 10
    results = []
    for place, model in (("offloaded", offloaded), ("whole", whole)):
        trainable = {name: value.requires_grad for name, value in model.named_parameters()}
        importance = calibrate(model, batches)
        assert {name: value.requires_grad for name, value in model.named_parameters()} == trainable
        teacher = save_topk(model, batches, tmp_path / place, k=4)
        blocks = sample_blocks(model, tokenizer, 2, 6, cache=tmp_path / "cache", progress=False)
        plain = sample_blocks(model, tokenizer, 2, 6, progress=False)
        loss = perplexity(model, tokenizer, text, length=8, progress=False).loss
        results.append(
            (importance, teacher(**batches[0], attention_mask=None, logits=torch.empty(1, 128)), blocks, plain, loss)
        )
    (cost, top, blocks, plain, loss), (cost_, top_, blocks_, plain_, loss_) = results
    assert cost.keys() == cost_.keys() and loss == loss_
    for name, value in cost.items():
        assert torch.equal(value.rows, cost_[name].rows) and torch.equal(value.cols, cost_[name].cols), name
    assert torch.equal(top.tokens, top_.tokens) and torch.equal(top.logprobs, top_.logprobs)
    for one, two in ((blocks, blocks_), (plain, plain_), (blocks, plain)):
        assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, two, strict=True))
    assert len(list((tmp_path / "cache").iterdir())) == 1  # found again: the same teacher, wherever its weights are


def test_where_a_model_takes_its_tokens():
    class Model(nn.Module):
        def __init__(self, embeddings):
            super().__init__()
            self.embeddings = embeddings

        def get_input_embeddings(self):
            return self.embeddings

    assert input_device(Model(nn.Embedding(2, 2))) == torch.device("cpu")
    assert input_device(Model(nn.Identity())) == torch.device("cpu")
    empty = nn.Embedding(2, 2, device="meta")
    assert input_device(Model(empty)) == torch.device("cpu")
    assert input_device(Model(empty), torch.device("cuda", 1)) == torch.device("cuda", 1)
    empty._hf_hook = SimpleNamespace(execution_device="cuda:2")
    assert input_device(Model(empty)) == torch.device("cuda", 2)


def test_pack_and_unpack_keep_what_was_frozen(family_dir):
    model = latent_model(load(family_dir("llama_bias")), config(), progress=False)
    model.model.layers[0].mlp.up_proj.bias.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    before = {name: value.requires_grad for name, value in model.named_parameters()}
    for step in (pack_model, unpack_model):
        step(model)
        after = {name: value.requires_grad for name, value in model.named_parameters()}
        assert not after["model.layers.0.mlp.up_proj.bias"] and not after["model.embed_tokens.weight"]
        assert after["model.layers.1.mlp.up_proj.bias"]
    assert after == before
