"""Embeddings and output heads in 8 and 4 bits: from dense to packed and back, tied and not, for models of several kinds."""

import copy
import json
import os
import pickle

import pytest
import torch
import transformers
from families import FAMILIES, SMALL, build, config, equal_states, load, logits
from hf_littlebit.kernels import quantize_table, unpack_table
from safetensors.torch import load_file, save_file
from torch import nn

from hf_littlebit import LittleBitConfig, latent_model, pack_model, size_report, unpack_model
from hf_littlebit.layers.table import PackedEmbedding, PackedHead, TableWeight
from hf_littlebit.load.convert import factor_modules
from hf_littlebit.load.tables import pack_tables, plan_tables, table_modules
from hf_littlebit.refinement.refinement import Recipe, refine

T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
# family -> (model class, options, the module that owns the embedding's table, the head, whether they are one table).
MODELS = {
    "llama": (*FAMILIES["llama"], "model.embed_tokens", "lm_head", False),
    "llama_tied": (*FAMILIES["llama_tied"], "model.embed_tokens", "lm_head", True),
    "gemma3": ("Gemma3ForCausalLM", {"tie_word_embeddings": True}, "model.embed_tokens", "lm_head", True),
    "opt": (*FAMILIES["opt"], "model.decoder.embed_tokens", "lm_head", True),
    "phi": ("PhiForCausalLM", {}, "model.embed_tokens", "lm_head", False),  # its head has a bias
    "gptneox": ("GPTNeoXForCausalLM", {}, "gpt_neox.embed_in", "lm_head", False),
    "bert": (*FAMILIES["bert"], "bert.embeddings.word_embeddings", "cls.predictions.decoder", True),
    "t5": ("T5ForConditionalGeneration", T5, "shared", "lm_head", True),
}
NARROW = {**SMALL, "vocab_size": 131}  # no multiple of anything


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """name of MODELS -> folder of a saved random dense model of it (made once)."""
    made: dict[str, str] = {}

    def make(name: str) -> str:
        if name not in made:
            kind, options, *_ = MODELS[name]
            model_class = getattr(transformers, kind)
            torch.manual_seed(0)
            model = model_class(model_class.config_class(**{**NARROW, **options})).eval()
            if name == "phi":
                nn.init.normal_(model.lm_head.bias)
            made[name] = str(tmp_path_factory.mktemp(name))
            model.save_pretrained(made[name])
        return made[name]

    return make


def packed(bits, **options):
    return config(embedding_bits=bits, head_bits=bits, **options)


def outputs(model):
    """Logits; an encoder and a decoder read the same tokens."""
    if not model.config.is_encoder_decoder:
        return logits(model)
    tokens = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        return model(input_ids=tokens, decoder_input_ids=tokens).logits


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, bits, folder, tmp_path):
    _, _, owner, head, tied = MODELS[name]
    source = folder(name)
    model = load(source, quantization_config=packed(bits))
    embedding, output = model.get_submodule(owner), model.get_submodule(head)
    assert isinstance(embedding, PackedEmbedding) and isinstance(output, PackedHead)
    assert embedding is model.get_input_embeddings() and output is model.get_output_embeddings()
    assert (output.owner == (embedding,)) is tied and model.dtype == torch.float32
    # The rows are those that the search finds for the dense weight: nothing else came between.
    dense = load(source)
    for module, other in ((embedding, dense.get_submodule(owner)), (output, dense.get_submodule(head))):
        expected = unpack_table(*quantize_table(other.weight.detach(), bits))
        torch.testing.assert_close(module.dense(), expected, rtol=0, atol=0)
    # A dense model with these rows computes the same.
    before = outputs(model)
    plain = load(source, quantization_config=config())
    plain.get_submodule(owner).weight.data = embedding.dense()
    plain.get_submodule(head).weight.data = output.dense()
    plain.tie_weights()
    torch.testing.assert_close(before, outputs(plain), rtol=1e-4, atol=2e-5)
    # The file holds one table where the weights are tied, and the model of the file is the same.
    model.save_pretrained(tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    names = {key.rpartition(".")[0] for key in stored if key.endswith(".codes")}
    assert names == ({owner} if tied else {owner, head}) and not {f"{owner}.weight", f"{head}.weight"} & stored.keys()
    assert stored[f"{owner}.codes"].dtype == (torch.int8 if bits == 8 else torch.int32)
    again = load(tmp_path / "packed")
    equal_states(model, again)
    assert torch.equal(before, outputs(again))
    assert not any(module.like.requires_grad for module in table_modules(again).values() if not module.owner)
    if tied:
        assert again.get_submodule(head).table()[0] is again.get_submodule(owner).codes
        again.tie_weights()
        assert torch.equal(before, outputs(again))
    twin = copy.deepcopy(again)
    assert torch.equal(before, outputs(twin))
    assert not tied or twin.get_submodule(head).owner == (twin.get_submodule(owner),)
    # Dense again: of the model's own classes, tied as before.
    was = type(dense.get_submodule(owner))
    again.dequantize()
    assert not table_modules(again) and type(again.get_submodule(owner)) is was
    assert (again.get_submodule(owner).weight is again.get_submodule(head).weight) is tied
    torch.testing.assert_close(outputs(again), before, rtol=1e-4, atol=2e-5)
    again.save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(outputs(load(tmp_path / "dense")), before, rtol=1e-4, atol=2e-5)


def test_what_is_not_asked_for_stays_as_it_was(folder, tmp_path):
    model = load(folder("llama"), quantization_config=config())
    assert not table_modules(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert not {"embedding_bits", "head_bits"} & saved.keys()  # earlier versions refuse options that they do not know


def test_each_its_own_bits(folder, tmp_path):
    model = load(folder("llama"), quantization_config=config(embedding_bits=4, head_bits=8))
    assert model.model.embed_tokens.table_bits == 4 and model.lm_head.table_bits == 8
    model.save_pretrained(tmp_path)
    equal_states(model, load(tmp_path))
    model = load(folder("llama"), quantization_config=config(head_bits=8))
    assert type(model.model.embed_tokens) is nn.Embedding and isinstance(model.lm_head, PackedHead)


@pytest.mark.parametrize("bits", [(8, 4), (8, 16), (16, 4)])
def test_one_table_has_one_number_of_bits(bits, folder):
    options = config(embedding_bits=bits[0], head_bits=bits[1])
    text = "one table, stored once; give embedding_bits and head_bits the same value"
    with pytest.raises(ValueError, match=text):
        load(folder("llama_tied"), quantization_config=options)
    with pytest.raises(ValueError, match=text):
        size_report(folder("llama_tied"), options)


@pytest.mark.parametrize("value", [2, 3, 32, 0, 8.0, True, "8", None])
def test_other_bits_are_refused(value):
    with pytest.raises(ValueError, match=r"head_bits is .*; it must be 16 \(not quantized\), 8 or 4"):
        LittleBitConfig(1.0, head_bits=value)


def test_positions_and_excluded_modules_stay_dense(folder):
    model = load(folder("opt"), quantization_config=packed(8))
    assert not isinstance(model.model.decoder.embed_positions, PackedEmbedding)
    model = load(folder("llama"), quantization_config=packed(8, modules_to_not_convert=["lm_head"]))
    assert type(model.model.embed_tokens) is PackedEmbedding and isinstance(model.lm_head, nn.Linear)
    assert not isinstance(model.lm_head, PackedHead)
    model = load(folder("llama_tied"), quantization_config=packed(8, modules_to_not_convert=["embed_tokens"]))
    assert not table_modules(model)


def test_an_embedding_with_a_forward_of_its_own_stays_dense(folder):
    class Shifted(nn.Embedding):
        def forward(self, input):
            return nn.functional.embedding(input, self.weight) + 1

    model = load(folder("llama"))
    model.model.embed_tokens.__class__ = Shifted
    plan = plan_tables(model, packed(8))
    assert [table.owner for table in plan.tables] == ["lm_head"]
    assert any("Shifted's forward is its own" in text for text in plan.warnings())
    model.model.embed_tokens.__class__ = nn.Embedding
    model.model.embed_tokens.max_norm = 1.0
    assert "max_norm" in plan_tables(model, packed(8)).warnings()[0]


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma3"])
def test_generate_gives_the_tokens_of_the_dense_model(name, folder):
    model = load(folder(name), quantization_config=packed(8))
    prompt = torch.arange(3, 12)[None]
    length = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    tokens = model.generate(prompt, **length)
    assert torch.equal(tokens, model.dequantize().generate(prompt, **length))


@pytest.mark.slow
def test_compiled_whole(folder):
    model = load(folder("llama_tied"), quantization_config=packed(4))
    before = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), before, rtol=1e-5, atol=1e-6)


def test_gradients_reach_adapters_through_the_head(folder):
    peft = pytest.importorskip("peft")
    model = load(folder("llama_tied"), quantization_config=packed(8))
    tokens = torch.arange(3, 27).reshape(2, 12)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    adapted(tokens, labels=tokens).loss.backward()
    found = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert found and all(grad.abs().sum() > 0 for grad in found)


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapters_on_a_table(name, target, folder):
    peft = pytest.importorskip("peft")
    model = load(folder(name), quantization_config=packed(8))
    twin = copy.deepcopy(model)
    with pytest.raises((ValueError, RuntimeError), match="a packed table cannot be trained"):
        peft.get_peft_model(twin, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[target]))(
            torch.arange(3, 9)[None]
        )
    before = logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[target]))
    torch.testing.assert_close(logits(adapted), before)
    tokens = torch.arange(3, 27).reshape(2, 12)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    first = adapted(tokens, labels=tokens).loss
    first.backward()
    optimizer.step()
    assert adapted(tokens, labels=tokens).loss < first


@pytest.mark.parametrize("name", ["llama", "llama_tied", "phi", "t5", "bert", "gemma3"])
@pytest.mark.parametrize("bits", [8, 4])
def test_resizing(name, bits, folder, tmp_path):
    model = load(folder(name), quantization_config=packed(bits))
    before, rows = outputs(model), model.get_input_embeddings().dense()
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    embedding = model.resize_token_embeddings(140, pad_to_multiple_of=16)
    assert embedding is model.get_input_embeddings() and embedding.num_embeddings == 144
    assert model.config.vocab_size == 144 and embedding.weight.shape == (144, 64)
    after = outputs(model)
    assert after.shape[-1] == 144 and torch.equal(after[..., :131], before)
    assert torch.equal(embedding.dense()[:131], rows)
    step = rows.abs().max() / (127 if bits == 8 else 7)
    assert (embedding.dense()[131:] - rows.mean(0)).abs().max() <= step
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(load(tmp_path)), after)
    model.resize_token_embeddings(131)
    assert torch.equal(outputs(model), before)
    with pytest.raises(ValueError, match="new_num_tokens is 0"):
        model.resize_token_embeddings(0)


def test_resizing_one_packed_and_one_dense(folder, tmp_path):
    model = load(folder("llama"), quantization_config=config(head_bits=8))
    before = logits(model)
    model.resize_token_embeddings(140)
    assert model.model.embed_tokens.weight.shape[0] == 140 and model.lm_head.out_features == 140
    assert torch.equal(logits(model)[..., :131], before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_latent_models_are_trained_dense_and_packed_at_the_end(name, folder, tmp_path):
    model = latent_model(load(folder(name)), packed(8), progress=False)
    assert not table_modules(model) and model.get_input_embeddings().weight.requires_grad
    pack_model(model, torch.bfloat16)
    assert len(table_modules(model)) == 2 and model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    equal_states(model, again)
    assert torch.equal(logits(model), logits(again)) and logits(again).dtype == torch.bfloat16
    unpack_model(model)
    assert not table_modules(model) and model.hf_quantizer.is_qat_trainable
    tied = name == "llama_tied"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_a_file_and_its_plan_agree_on_sizes(folder, tmp_path):
    for name in ("llama", "llama_tied"):
        for bits in (8, 4):
            options = packed(bits)
            asked = size_report(folder(name), options)
            model = load(folder(name), quantization_config=options, dtype=torch.bfloat16)
            model.save_pretrained(tmp_path / f"{name}{bits}")
            found, held = size_report(tmp_path / f"{name}{bits}"), size_report(model)
            stored = load_file(tmp_path / f"{name}{bits}" / "model.safetensors")
            total = sum(value.nbytes for value in stored.values())
            assert asked.total_bytes == found.total_bytes == held.total_bytes == total
            assert asked.tables == found.tables == held.tables and len(found.tables) == (
                1 if name == "llama_tied" else 2
            )
            parts = sum(value.nbytes for key, value in stored.items() if key.endswith((".codes", ".scale")))
            assert sum(table.bytes for table in found.tables) == parts
            # 131 rows of 64 columns: 8 bits and a scale of 16 for a row, or 4 bits and one for 64 columns.
            assert parts == len(found.tables) * 131 * (64 * bits // 8 + 2)
            weights = sum(p.numel() for p in load(folder(name)).parameters())
            assert found.whole_bpw == pytest.approx(8 * total / weights) and found.original_bytes == 2 * weights
            assert f"{bits} bits: model.embed_tokens" in found.table()


def test_the_phone_sized_model(capsys):
    from hf_littlebit.command.cli import main

    config_file = "examples/configs/llama-3.2-1b.json"
    for bits, largest in ((8, 0.29e9), (4, 0.16e9)):
        options = ["--bpw", "0.1", "--embedding-bits", str(bits), "--head-bits", str(bits), "--json"]
        assert main(["info", str(transformers_root() / config_file), *options]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["total_bytes"] <= largest and report["tables"][0]["modules"] == ["model.embed_tokens", "lm_head"]
        assert report["whole_bpw"] == pytest.approx(8 * report["total_bytes"] / 1_235_814_400)


def transformers_root():
    from families import ROOT

    return ROOT


def test_damaged_and_incomplete_files(folder, tmp_path):
    load(folder("llama_tied"), quantization_config=packed(8)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    good = load_file(file)
    name = "model.embed_tokens"
    for change, text in (
        ({f"{name}.scale": None}, r"missing from model.safetensors, e.g. model.embed_tokens.scale"),
        ({f"{name}.codes": good[f"{name}.codes"].int()}, "embed_tokens.codes is I32 .*imply I8"),
        ({f"{name}.codes": good[f"{name}.codes"][:, :32].contiguous()}, r"embed_tokens.codes is I8 \[131, 32\]"),
        ({f"{name}.scale": torch.full_like(good[f"{name}.scale"], torch.nan)}, "scale holds NaN or Inf"),
    ):
        save_file(
            {key: value for key, value in {**good, **change}.items() if value is not None}, file, {"format": "pt"}
        )
        with pytest.raises(ValueError, match=text):
            load(tmp_path)


def test_a_checkpoint_that_holds_a_tied_weight_twice(folder, tmp_path):
    dense = load(folder("llama_tied"))
    dense.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    weight = state["model.embed_tokens.weight"]
    save_file({**state, "lm_head.weight": weight.clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    equal_states(
        load(tmp_path, quantization_config=packed(8)), load(folder("llama_tied"), quantization_config=packed(8))
    )
    save_file({**state, "lm_head.weight": weight + 1}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="with different values; set tie_word_embeddings to false"):
        load(tmp_path, quantization_config=packed(8))
    other = {key: value for key, value in state.items() if key != "model.embed_tokens.weight"}
    save_file({**other, "lm_head.weight": weight}, tmp_path / "model.safetensors", {"format": "pt"})
    equal_states(
        load(tmp_path, quantization_config=packed(8)), load(folder("llama_tied"), quantization_config=packed(8))
    )


def test_values_that_cannot_be_quantized(folder, tmp_path):
    dense = load(folder("llama"))
    dense.lm_head.weight.data[3, 3] = torch.nan
    dense.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lm_head\.weight: rows .* not finite"):
        load(tmp_path, quantization_config=packed(8))
    with pytest.raises(ValueError, match=r"lm_head\.weight: rows .* not finite"):
        pack_tables(dense, packed(8))


def test_a_checkpoint_without_the_embedding(folder, tmp_path):
    load(folder("llama")).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.embed_tokens.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight"):
        load(tmp_path, quantization_config=packed(8))


def test_other_classes_read_the_same_file(folder, tmp_path):
    model = load(folder("llama_tied"), quantization_config=packed(8))
    model.save_pretrained(tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    equal_states(base, model.model)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    equal_states(classifier.model, model.model)
    assert classifier(torch.arange(3, 9)[None]).logits.shape == (1, 3)


def test_the_weight_of_a_table_is_no_tensor(folder):
    model = load(folder("llama_tied"), quantization_config=packed(8), dtype=torch.bfloat16)
    weight = model.lm_head.weight
    assert isinstance(weight, TableWeight) and weight.dtype == torch.bfloat16 and weight.size(0) == 131
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    assert len(weight) == 131 and weight
    for use in (
        lambda: nn.functional.linear(x, weight),
        lambda: weight[0],
        lambda: 2 * weight,
        lambda: x @ weight,
        lambda: weight @ x,
        lambda: list(weight),
    ):
        with pytest.raises(ValueError, match=r"no weight to .*take its dense\(\)"):
            use()
    with pytest.raises(AttributeError, match=r"take its dense\(\)"):
        weight.t()


@pytest.mark.parametrize("name", ["llama_tied", "gemma3"])
def test_pickled_whole(name, folder):
    """Gemma's embedding is of a class that is made when it is packed, and not to be found by its name."""
    model = load(folder(name), quantization_config=packed(8))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again), logits(model)) and type(again.model.embed_tokens) is type(
        model.model.embed_tokens
    )


def test_a_table_that_no_file_would_hold_is_not_saved(folder, tmp_path):
    model = load(folder("llama_tied"), quantization_config=packed(8))
    model.set_input_embeddings(nn.Embedding(131, 64))
    with pytest.raises(
        ValueError, match=r"lm_head reads the table of an embedding that was replaced.*model.dequantize"
    ):
        model.save_pretrained(tmp_path)
    assert not os.path.exists(tmp_path / "config.json")


def test_nothing_is_packed_where_a_table_cannot_be(folder):
    model = latent_model(load(folder("llama_tied")), packed(4), progress=False)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="moment"):
        pack_model(model, moment=torch.eye(3))
    equal_states(model, before)
    model.model.embed_tokens.weight.data[5, 5] = torch.nan
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight holds NaN or Inf"):
        pack_model(model)
    assert all(module.latent for module in factor_modules(model).values())
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 5] = 0
    assert not any(module.latent for module in factor_modules(pack_model(model)).values())


def test_casts_and_devices(folder):
    model = load(folder("llama_tied"), quantization_config=packed(8))
    codes, scale = model.lm_head.table()
    model.to(torch.bfloat16)
    embedding = model.model.embed_tokens
    assert embedding.scale.dtype == torch.bfloat16 and embedding.codes.dtype == torch.int8
    assert torch.equal(embedding.codes, codes) and torch.equal(embedding.scale, scale)
    assert embedding(torch.tensor([[1]])).dtype == torch.bfloat16 and logits(model).dtype == torch.bfloat16


def test_device_maps(folder, tmp_path):
    """Parts that are offloaded, or spread, are refused or right; tables stay in memory."""
    load(folder("llama_tied"), quantization_config=packed(8)).save_pretrained(tmp_path / "packed")
    before = logits(load(tmp_path / "packed"))
    for place in ({"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}, "auto"):
        assert torch.equal(logits(load(tmp_path / "packed", device_map=place)), before)
    place = {"model.embed_tokens": "disk", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    place["lm_head"] = "cpu"
    model = load(tmp_path / "packed", device_map=place, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="cannot be used while parts of the model go to disk"):
        load(folder("llama_tied"), quantization_config=packed(8), device_map=place, offload_folder=tmp_path / "offload")


def test_the_card_says_what_became_of_the_tables(folder, tmp_path):
    from hf_littlebit.report.card import model_card

    load(folder("llama_tied"), quantization_config=packed(4)).save_pretrained(tmp_path)
    text = model_card(str(tmp_path)).text
    assert "`model.embed_tokens` and `lm_head`: 4 bits" in text and "bits per weight of the whole model" in text
    assert "not quantized." not in text.split("## Size")[0]


def test_families_without_tables_are_as_they_were():
    assert plan_tables(build("llama"), config()).tables == []


def test_models_that_saw_text_have_tables_too(tmp_path):
    tokens = torch.randint(0, 128, (8, 32), generator=torch.Generator().manual_seed(0))
    asked = LittleBitConfig(bpw=2.5, init="admm", steps=5, embedding_bits=8, head_bits=8)
    recipe = Recipe(block_tokens=128, length=32, epochs=1.0, importance_rows=2, distillation=None)
    model = refine(build("llama"), asked, tokens, recipe=recipe, progress=False)
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert any(name.endswith("embed_tokens.codes") for name in names) and "model.embed_tokens.weight" not in names
    again = load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens[:1]).logits, model(tokens[:1]).logits)
