"""Perplexity against transformers' own loss, and size reports against files, plans and the paper's memory table."""

import json
import os

import pytest
import torch
from families import ROOT, build, load
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from hf_littlebit import LittleBitConfig, perplexity, size_report
from hf_littlebit.load.meta_model import empty_model
from hf_littlebit.load.source import Source, find_source

TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 12


@pytest.fixture(scope="module")
def story_model(stories):
    return AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)


# -- perplexity -----------------------------------------------------------------------------------------------------------


def test_blocks_equal_transformers_loss(story_model, capfd):
    model, tokenizer = story_model
    ids = torch.tensor(tokenizer(TEXT).input_ids)
    blocks = ids[: len(ids) // 64 * 64].view(-1, 64)
    with torch.no_grad():
        expected = torch.stack([model(input_ids=block[None], labels=block[None]).loss for block in blocks]).mean()
    capfd.readouterr()
    for batch_size in (1, 3):
        result = perplexity(model, tokenizer, TEXT, length=64, batch_size=batch_size, progress=False)
        assert result.loss == pytest.approx(expected.item(), rel=1e-5)
        assert result.perplexity == pytest.approx(expected.exp().item(), rel=1e-5)
        assert (result.blocks, result.tokens) == (len(blocks), 63 * len(blocks))
    assert capfd.readouterr() == ("", "")


def test_a_long_text_is_tokenized_as_far_as_it_is_read(story_model, monkeypatch):
    model, tokenizer = story_model
    long = TEXT * 200
    expected = perplexity(model, tokenizer, TEXT * 3, length=32, max_blocks=3, progress=False)
    read = []

    def tokenize(text, **options):
        read.append(len(text))
        return tokenizer(text, **options)

    found = perplexity(model, tokenize, long, length=32, max_blocks=3, progress=False)
    assert found == expected and sum(read) < 4000 < len(long)
    # Where a token has more characters than usual, more is read.
    monkeypatch.setattr("hf_littlebit.report.evaluate.CHARACTERS", 1)
    assert perplexity(model, tokenize, long, length=32, max_blocks=3, progress=False) == expected


def test_sliding_windows_count_their_last_tokens(story_model):
    model, tokenizer = story_model
    ids = torch.tensor(tokenizer(TEXT).input_ids)[:100]
    losses = {}
    with torch.no_grad():
        for start in (0, 16, 32, 48):
            window = ids[start : start + 48]
            each = torch.nn.functional.cross_entropy(
                model(input_ids=window[None]).logits[0, :-1], window[1:], reduction="none"
            )
            for position, loss in enumerate(each.tolist(), start + 1):
                losses.setdefault(position, loss)  # the first window that reaches a token counts it
    result = perplexity(model, tokenizer, TEXT, length=48, stride=16, max_blocks=4, progress=False)
    assert result.tokens == len(losses) == 47 + 3 * 16
    assert result.loss == pytest.approx(sum(losses.values()) / len(losses), rel=1e-5)


def test_default_length_is_the_context_and_mode_is_kept(story_model):
    model, tokenizer = story_model
    model.train()
    model.get_input_embeddings().eval()  # as who keeps a part at rest
    result = perplexity(model, tokenizer, TEXT * 3, max_blocks=1, progress=False)
    assert [name for name, module in model.named_modules() if not module.training] == ["model.embed_tokens"]
    assert result.tokens == model.config.max_position_embeddings - 1
    model.eval()


def test_logits_are_upcast_in_chunks(story_model, monkeypatch):
    model, tokenizer = story_model
    whole = perplexity(model, tokenizer, TEXT, length=64, progress=False)
    monkeypatch.setattr("hf_littlebit.report.evaluate.CHUNK", 512 * 5)
    assert perplexity(model, tokenizer, TEXT, length=64, progress=False).loss == pytest.approx(whole.loss, rel=1e-6)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"length": 1}, "length is 1; it must be from 2"),
        ({"length": 513}, "length is 513.*context of 512"),
        ({"stride": 0, "length": 8}, "stride is 0"),
        ({"stride": 9, "length": 8}, "stride is 9; it must be from 1 to the length, 8"),
        ({"max_blocks": 0}, "max_blocks is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"text": "short"}, r"tokens, fewer than one window of 512"),
        ({"text": ""}, "fewer than one window"),
    ],
)
def test_perplexity_refuses(story_model, options, words):
    with pytest.raises(ValueError, match=words):
        perplexity(*story_model, **{"text": TEXT, "progress": False, **options})


def test_perplexity_refuses_other_models_and_foreign_tokenizers(story_model):
    _, tokenizer = story_model
    with pytest.raises(ValueError, match="BertForMaskedLM does not predict the next token"):
        perplexity(build("bert"), tokenizer, TEXT, length=8)
    with pytest.raises(ValueError, match="the model has 128 embeddings"):
        perplexity(build("llama"), tokenizer, TEXT, length=8)


def test_perplexity_of_the_bundled_model(pycode):
    """Over all 64 blocks it is the README's 36.0; the first four are easier. Another shift or mask is off by far more."""
    model = AutoModelForCausalLM.from_pretrained(pycode, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(pycode)
    text = (ROOT / "examples" / "data" / "pycode_eval.txt").read_text(encoding="utf-8")[:16_000]
    result = perplexity(model, tokenizer, text, length=512, max_blocks=4, batch_size=2, progress=False)
    assert (result.blocks, result.tokens) == (4, 4 * 511)
    assert result.perplexity == pytest.approx(26.485, rel=1e-3)


# -- size -----------------------------------------------------------------------------------------------------------------


def llama2(hidden, intermediate, layers, heads, kv_heads):
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=32000,
        architectures=["LlamaForCausalLM"],
    )


# Paper, table 3: 16-bit GB, and GB by bits per weight.
TABLE = [
    (llama2(4096, 11008, 32, 32, 32), 13.49, {0.3: 0.79, 0.1: 0.63}),
    (llama2(5120, 13824, 40, 40, 40), 26.06, {0.1: 0.84}),
    (llama2(8192, 28672, 80, 64, 8), 138.04, {0.1: 138.04 / 69}),
]


@pytest.mark.parametrize("config, dense, packed", TABLE, ids=["7b", "13b", "70b"])
def test_memory_table_of_the_paper(config, dense, packed):
    for bpw, published in packed.items():
        report = size_report(config, LittleBitConfig(bpw=bpw, init="dual_svid", residual=True))
        assert not report.measured and report.file_bytes is None
        # The paper's dense figures are above the models' parameters at 16 bits, by 13, 28 and 87 MB.
        excess = dense * 1e9 - report.original_bytes
        assert 0 < excess < 0.0012 * report.original_bytes
        # The same excess explains its quantized figures, within 3 %. Without it ours are smaller, by 3 to 5 %.
        assert report.total_bytes + excess == pytest.approx(published * 1e9, rel=0.03)
        assert 0.94 * published * 1e9 < report.total_bytes < published * 1e9
        assert 0.95 * bpw < report.bpw <= bpw


def test_paper_ranks_of_one_layer():
    report = size_report(TABLE[0][0], LittleBitConfig(bpw=0.1, init="dual_svid", residual=True))
    ranks = {layer.module: layer.ranks for layer in report.layers}
    assert ranks["model.layers.0.mlp.down_proj"] == (128, 128)  # 133.1 exactly


FAMILIES = ["llama", "llama_tied", "llama_bias", "bert", "mixtral", "gemma3", "opt"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", ["packed", "latent"])
def test_loaded_saved_and_predicted_agree(family, format, family_dir, tmp_path):
    config = LittleBitConfig(bpw=4.0, init="dual_svid", format=format, residual=True)
    predicted = size_report(family_dir(family), config)
    model = load(family_dir(family), quantization_config=config, dtype=torch.bfloat16)
    loaded = size_report(model)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    saved = size_report(tmp_path)
    assert len(find_source(tmp_path).files) > 1
    files = [os.path.join(tmp_path, name) for name in os.listdir(tmp_path) if name.endswith(".safetensors")]
    assert saved.file_bytes == sum(map(os.path.getsize, files)) > saved.total_bytes
    assert loaded.file_bytes is None and loaded.measured and saved.measured and not predicted.measured
    for report in (loaded, predicted):
        assert report.layers == saved.layers
        assert report.dense_parts == saved.dense_parts
        assert (report.total_bytes, report.original_bytes) == (saved.total_bytes, saved.original_bytes)
    plan = model.hf_quantizer.plan
    assert saved.replaced_weights == plan.numel
    if format == "packed":
        assert saved.bpw == plan.bpw and 8 * saved.quantized_bytes == plan.bits
    else:
        assert saved.bpw > plan.bpw and any("latent" in message for message in saved.warnings)
    assert saved.total_bytes == saved.quantized_bytes + sum(saved.dense_parts.values())
    assert saved.original_bytes == 2 * sum(p.numel() for p in build(family).parameters())


def test_report_of_a_folder_reads_no_weights(family_dir, tmp_path, monkeypatch):
    model = load(family_dir("llama"), quantization_config=LittleBitConfig(bpw=4.0, init="dual_svid"))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("safetensors.torch.load_file", None)
    assert all(value.is_meta for value in empty_model(find_source(tmp_path).config).state_dict().values())
    assert size_report(tmp_path).measured


def test_report_as_json_and_text(family_dir):
    config = LittleBitConfig(
        bpw=3.0, init="dual_svid", modules_to_not_convert=["down_proj"], module_config={"q_proj": {"bpw": 5.0}}
    )
    report = size_report(family_dir("llama"), config)
    again = json.loads(json.dumps(report.as_dict()))
    assert again["bpw"] == report.bpw and again["ratio"] == report.ratio
    assert again["layers"][0]["ranks"] == list(report.layers[0].ranks)
    grouped, listed = report.table(), report.table(layers=True)
    assert "model.layers.*.self_attn.q_proj" in grouped and "down_proj" not in grouped
    assert "model.layers.1.self_attn.q_proj" in listed and "*" not in listed
    assert "other layers" in grouped  # down_proj, left dense
    assert {layer.bpw_asked for layer in report.layers} == {3.0, 5.0}
    assert sum(layer.bytes for layer in report.layers) == report.quantized_bytes


def test_small_layers_are_warned_about_and_kept(family_dir):
    report = size_report(family_dir("llama"), LittleBitConfig(bpw=0.1, init="dual_svid"))
    assert report.bpw > 0.1 and "too small for the bits asked" in report.warnings[0]
    assert report.warnings[0] in report.table()


def test_report_refuses(family_dir, tmp_path):
    with pytest.raises(ValueError, match="is a dense model; say how many bits"):
        size_report(family_dir("llama"))
    with pytest.raises(ValueError, match=r"nowhere\.json does not exist"):
        size_report("nowhere.json", LittleBitConfig(bpw=1.0))
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        size_report(tmp_path, LittleBitConfig(bpw=1.0))
    model = load(family_dir("llama"), quantization_config=LittleBitConfig(bpw=4.0, init="dual_svid"))
    for source in (model, model.config):
        with pytest.raises(ValueError, match="is quantized already, at 4 bits"):
            size_report(source, LittleBitConfig(bpw=1.0))
    other = LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="quantized with 'gptq' already"):
        size_report(other, LittleBitConfig(bpw=1.0))


def test_file_unlike_its_config(family_dir, tmp_path):
    load(family_dir("llama"), quantization_config=LittleBitConfig(bpw=4.0, init="dual_svid")).save_pretrained(tmp_path)
    whole = find_source(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    # The file says its ranks, not the bits that were asked for; sizes of the model are the config's.
    config["intermediate_size"] += 32
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"a layer of ranks .*the file is damaged or its config.json was changed"):
        size_report(tmp_path)
    # From the Hub there are headers but no files.
    remote = Source("org/name", find_source(tmp_path).config, LittleBitConfig.from_dict(config["quantization_config"]))
    remote.header = whole.header
    with pytest.raises(ValueError, match=r"config\.json was changed"):
        size_report(remote)
    remote.header = {name: entry for name, entry in whole.header.items() if "layers.1" not in name}
    remote.config, remote.quantization = whole.config, whole.quantization
    with pytest.raises(
        ValueError, match=r"missing from model\.safetensors, e\.g\. model\.layers\.1\..*the checkpoint is incomplete"
    ):
        size_report(remote)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        size_report(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        size_report(tmp_path)
