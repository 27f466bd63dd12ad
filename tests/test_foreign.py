"""Checkpoints of other programs: the weights are theirs to the last digit, and what is hostile or has no place here is refused.

The files are written by foreign_files.py from the layouts' descriptions, and the weights compared with its formulas in fp64.
"""

import json
import os
import shutil
import subprocess
import sys

import foreign_files
import numpy as np
import pytest
import torch
from families import FAMILIES, ROOT, SMALL, load, logits
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from hf_littlebit import LittleBitConfig, size_report
from hf_littlebit.command.cli import main
from hf_littlebit.load.foreign.convert import convert_foreign
from hf_littlebit.load.foreign.layouts import LAYOUTS

# Rows of signs that fill no word, and some that fill no byte: 56 and 92 inputs, ranks from 13.
ODD = {**SMALL, "hidden_size": 56, "intermediate_size": 92, "head_dim": 14}
Q = "model.layers.0.self_attn.q_proj"


def small(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**ODD, **options})).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    return small()


def convert(source, out, *options) -> LlamaForCausalLM:
    assert main(["--debug", "convert", str(source), "--out", str(out), *options]) == 0
    return load(str(out))


def weight(layer) -> np.ndarray:
    """The weight of a packed layer in fp64, from its stored parts alone."""
    total = np.zeros((layer.out_features, layer.in_features))
    for path in layer.paths():
        h, l, g = (scale.double().numpy() for scale in (path.scale_out, path.scale_rank, path.scale_in))  # noqa: E741
        u, v = torch.sign(path.u).double().numpy(), torch.sign(path.v).double().numpy()
        total += h[:, None] * (u * l @ v.T) * g
    return total


def equal_weights(model, weights) -> None:
    for name, expected in weights.items():
        found = weight(model.get_submodule(name))
        # Sums of fp64 products in another order; 16-bit scales would be off by 1e-3, fp32 ones that were rounded by 1e-8.
        assert np.abs(found - expected).max() <= 1e-14 * np.abs(expected).max(), name


# -- exact ----------------------------------------------------------------------------------------------------------------

CASES = [
    *((layout, dtype) for layout in LAYOUTS for dtype in ("bf16", "f16")),
    *((layout, "f32") for layout in LAYOUTS if layout != "littlebit"),
]


@pytest.mark.parametrize(("layout", "dtype"), CASES, ids=lambda value: value)
def test_every_weight_is_the_other_programs(dense, tmp_path, layout, dtype):
    weights = foreign_files.write(dense, tmp_path / "source", foreign_files.LAYOUTS[layout], dtype)
    model = convert(tmp_path / "source", tmp_path / "out")
    assert len(weights) == 14
    equal_weights(model, weights)
    config = model.config.quantization_config
    wide = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
    assert config.scale_dtype == ("float32" if layout == "littlebit" else wide[dtype])
    assert config.converted_from == layout
    layer = model.get_submodule(Q)
    assert {rank % 8 for rank in layer.ranks} == {0} and len(layer.ranks) == (2 if layout == "littlebit" else 1)
    assert (layer.scale_rank[13:16] == 0).all()  # what fills the rank up adds nothing, whatever its signs
    # All that is no packed layer came along as it was.
    ours, theirs = model.state_dict(), dense.state_dict()
    for name in theirs.keys() - {f"{name}.weight" for name in weights}:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("layout", ["littlebit", "dbf"])
def test_logits_are_those_of_the_dense_weights(tmp_path, layout):
    dense = small().float()
    weights = foreign_files.write(dense, tmp_path / "source", foreign_files.LAYOUTS[layout], "f16")
    packed = convert(tmp_path / "source", tmp_path / "out")
    for name, value in weights.items():
        dense.get_submodule(name).weight.data = torch.from_numpy(value).float()
    expected = logits(dense)
    assert (logits(packed) - expected).abs().max() < 1e-4 * expected.abs().max()
    tokens = torch.arange(3, 9)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert packed.generate(tokens, **options).tolist() == dense.generate(tokens, **options).tolist()


def rows_of_bytes(tensors, weight):
    """Signs as [rows, columns / 8] where that is possible."""
    sizes = {
        "1.bp": tuple(weight.shape[1:]),
        "3.bp": next(tensors[name].shape for name in tensors if name.endswith("2.w")),
    }
    for name, value in tensors.items():
        (columns,) = sizes.get(name[-4:], (1,))
        if columns % 8 == 0:
            tensors[name] = value.view(-1, columns // 8)
    return tensors, weight


SPELLINGS = {
    "littlebit, one path": lambda *args: foreign_files.littlebit(*args, paths=1),
    "littlebit, _R behind": lambda *args: foreign_files.littlebit(*args, spelling="{0}_{2}{1}"),
    "nanoquant without scale_mid": lambda *args: foreign_files.nanoquant(*args, mid=False),
    "nanoquant without shapes": lambda *args: foreign_files.nanoquant(*args, shapes=False),
    "nanoquant, signs alone": lambda *args: foreign_files.nanoquant(*args, mid=False, shapes=False),
    "i32, names of sidecars": foreign_files.i32_sidecars,
    "dbf, rows of bytes": lambda *args: rows_of_bytes(*foreign_files.dbf(*args[:4], args[4] // 8 * 8 + 8)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_a_layout_may_lack_or_spell_otherwise(dense, tmp_path, spelling):
    weights = foreign_files.write(dense, tmp_path / "source", SPELLINGS[spelling])
    equal_weights(convert(tmp_path / "source", tmp_path / "out"), weights)


def test_padding_bits_mean_nothing(dense, tmp_path):
    weights = foreign_files.write(dense, tmp_path / "source", foreign_files.nanoquant)
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith("V_packed") and "down_proj" in name:
            tensors[name][:, -1] |= -1 << 28  # 92 inputs: bits 28 to 31 of the third word
    save_file(tensors, file)
    equal_weights(convert(tmp_path / "source", tmp_path / "out"), weights)


def test_paths_of_unequal_rank(dense, tmp_path):
    def unequal(make, name, out, into, rank):
        tensors, weight = foreign_files.littlebit(make, name, out, into, rank, paths=1)
        more, other = foreign_files.littlebit(make, name, out, into, rank + 9, paths=1)
        for key, value in more.items():
            role = key.rpartition(".")[2]
            side, _, what = role.partition("_")
            if role[0] != "_":
                tensors[f"{name}.{side}_R_{what}" if what in ("packed", "shape") else f"{key}_R"] = value
        return tensors, weight + other

    weights = foreign_files.write(dense, tmp_path / "source", unequal)
    model = convert(tmp_path / "source", tmp_path / "out")
    equal_weights(model, weights)
    assert model.get_submodule(Q).ranks == [24, 24]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tied_embeddings_biases_and_shards(tmp_path, layout):
    model = small(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    for name, value in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(value)
    source = tmp_path / "source"
    weights = foreign_files.write(model, source, foreign_files.LAYOUTS[layout])
    tensors = load_file(source / "model.safetensors")
    if layout == "llama.cpp-i32-lsb-v1":  # which has the bias among a layer's tensors
        space = "layouts.llama.cpp-i32-lsb-v1."
        for name in [name for name in tensors if name.endswith(".bias")]:
            tensors[space + name.replace("model.layers.", "blocks.")] = tensors.pop(name)
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    (source / "model.safetensors").unlink()
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, source / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    packed = convert(source, tmp_path / "out")
    equal_weights(packed, weights)
    assert packed.lm_head.weight is packed.model.embed_tokens.weight
    for name, value in model.named_parameters():
        if name.endswith(".bias"):
            assert torch.equal(packed.get_parameter(name), value), name


def test_names_of_a_compiled_model_and_layers_left_dense(dense, tmp_path):
    def compiled(make, name, *sizes):
        return foreign_files.dbf(make, name.replace("model.", "model._orig_mod."), *sizes)

    source = tmp_path / "source"
    weights = foreign_files.write(dense, source, compiled, skip=("lm_head", "v_proj"))
    tensors = load_file(source / "model.safetensors")
    renamed = {
        name.replace("model.", "model._orig_mod.") if "_orig_mod" not in name else name: x
        for name, x in tensors.items()
    }
    save_file(renamed, source / "model.safetensors")
    packed = convert(source, tmp_path / "out")
    assert len(weights) == 12
    equal_weights(packed, weights)
    name = "model.layers.1.self_attn.v_proj"
    assert torch.equal(packed.get_parameter(f"{name}.weight"), dense.get_parameter(f"{name}.weight"))


def test_a_packed_output_head(tmp_path):
    model = small()
    weights = foreign_files.write(model, tmp_path / "source", foreign_files.nanoquant, skip=("none",))
    packed = convert(tmp_path / "source", tmp_path / "out")
    assert "lm_head" in weights
    equal_weights(packed, weights)
    assert torch.isfinite(logits(packed)).all()
    tied = small(tie_word_embeddings=True)
    foreign_files.write(tied, tmp_path / "tied", foreign_files.nanoquant, skip=("none",))
    refused(
        tmp_path / "tied", "packed layer lm_head, whose weight LlamaForCausalLM shares with model.embed_tokens.weight"
    )


def test_other_architectures(tmp_path):
    import transformers

    for family in ("opt", "qwen3", "gemma3", "bert"):
        name, options = FAMILIES[family]
        model_class = getattr(transformers, name)
        model = model_class(model_class.config_class(**{**SMALL, **options})).eval()
        head = [n for n, m in model.named_modules() if m is model.get_output_embeddings()]
        weights = foreign_files.write(model, tmp_path / family, foreign_files.onecompression, "f16", skip=tuple(head))
        equal_weights(convert(tmp_path / family, tmp_path / f"{family}-out"), weights)


def test_a_base_model_completes_a_packed_artifact(dense, tmp_path):
    source, base = tmp_path / "source", tmp_path / "base"
    weights = foreign_files.write(dense, source, foreign_files.i32)
    dense.save_pretrained(base)
    tensors = load_file(source / "model.safetensors")
    for name in ("model.safetensors", "config.json"):
        (source / name).unlink()
    (source / "weights").mkdir()
    (source / "nanoquant-packed-model.json").write_text("{}")
    for block in range(2):
        part = {name: value for name, value in tensors.items() if f".blocks.{block}." in name}
        save_file(part, source / "weights" / f"block-{block:05d}.safetensors")
    with pytest.raises(ValueError, match=r"holds no config.json.*--base"):
        convert_foreign(str(source))
    packed = convert(source, tmp_path / "out", "--base", str(base))
    equal_weights(packed, weights)
    assert torch.equal(packed.model.embed_tokens.weight, dense.model.embed_tokens.weight)


# -- the folder that comes of it --------------------------------------------------------------------------------------------


def test_the_result_is_an_ordinary_packed_checkpoint(stories, tmp_path, capfd):
    source, out = tmp_path / "source", tmp_path / "out"
    foreign_files.write(load(stories), source, foreign_files.nanoquant)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if os.path.exists(os.path.join(stories, name)):
            shutil.copy(os.path.join(stories, name), source)
    GenerationConfig(max_length=77, eos_token_id=2, bos_token_id=1).save_pretrained(source)
    (source / "base_model.json").write_text(json.dumps({"model_id": "org/stories"}))
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Evil"}
    (source / "config.json").write_text(json.dumps(config))
    assert main(["convert", str(source), "--out", str(out)]) == 0
    shown = capfd.readouterr().out
    assert "35 layers converted from NanoQuant; scales in bfloat16, exact" in shown and f"saved to {out}" in shown
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(
        os.listdir(out)
    )
    saved = json.loads((out / "config.json").read_text())
    assert "auto_map" not in saved and saved["dtype"] == "float32"
    assert json.loads((out / "generation_config.json").read_text())["max_length"] == 77
    card = (out / "README.md").read_text()
    assert "from a NanoQuant checkpoint" in card and LAYOUTS["nanoquant"].formula in card
    assert "base_model: org/stories" in card and str(tmp_path) not in card and "Initialiser" not in card
    report = size_report(str(out))
    assert {layer.init for layer in report.layers} == {"nanoquant"} and report.warnings == []
    assert report.bpw == pytest.approx(report.bpw_asked, rel=1e-3)
    assert main(["info", str(out)]) == 0 and "nanoquant" in capfd.readouterr().out
    assert main(["generate", str(out), "--prompt", "Once", "--max-new-tokens", "2"]) == 0


def test_a_generation_config_that_cannot_be_saved_is_left_out(dense, tmp_path, caplog):
    foreign_files.write(dense, tmp_path / "source", foreign_files.dbf)
    (tmp_path / "source" / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": false}')
    model = convert(tmp_path / "source", tmp_path / "out")
    assert "generation_config.json is left out" in caplog.text
    assert model.generation_config.eos_token_id == 2 and model.generation_config.temperature is None


def test_a_repository_of_the_hub(dense, tmp_path, monkeypatch):
    from hf_littlebit.load.foreign import folder

    foreign_files.write(dense, tmp_path / "snapshot", foreign_files.dbf)
    asked = {}

    def download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(folder, "snapshot_download", download)
    model = convert("org/dbf-model", tmp_path / "out")
    assert asked["name"] == "org/dbf-model" and not any(
        pattern.endswith(("bin", "pt", "pth")) for pattern in asked["patterns"]
    )
    assert model.config.quantization_config.base_model == "org/dbf-model"
    assert "A version of [org/dbf-model]" in (tmp_path / "out" / "README.md").read_text()


def test_a_person_keeps_their_card(dense, tmp_path):
    foreign_files.write(dense, tmp_path / "source", foreign_files.dbf)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("Mine.\n")
    convert(tmp_path / "source", tmp_path / "out", "--overwrite")
    assert "Mine." in (tmp_path / "out" / "README.md").read_text()


def test_scales_are_rounded_on_request(dense, tmp_path, capfd):
    weights = foreign_files.write(dense, tmp_path / "source", foreign_files.littlebit)
    rounded = convert(tmp_path / "source", tmp_path / "out", "--scale-dtype", "bfloat16")
    assert "scales in bfloat16, rounded" in capfd.readouterr().out
    exact = convert(tmp_path / "source", tmp_path / "exact")
    name, expected = next(iter(weights.items()))
    layer = rounded.get_submodule(name)
    assert torch.equal(layer.scale_rank, exact.get_submodule(name).scale_rank.bfloat16())
    off = np.abs(weight(layer) - expected).max() / np.abs(expected).max()
    assert 1e-5 < off < 2**-8
    assert size_report(str(tmp_path / "out")).bpw < size_report(str(tmp_path / "exact")).bpw


def test_a_config_without_a_source_says_nothing_of_one():
    assert "converted_from" not in LittleBitConfig(bpw=1.0).to_dict()
    config = LittleBitConfig(bpw=1.0, converted_from="dbf")
    assert LittleBitConfig.from_dict(config.to_dict()).converted_from == "dbf"
    with pytest.raises(ValueError, match="converted_from is"):
        LittleBitConfig(bpw=1.0, converted_from="a\x1b[31m")


# -- what ours cannot hold --------------------------------------------------------------------------------------------------


def refused(source, match, **options) -> None:
    with pytest.raises(ValueError, match=match):
        convert_foreign(str(source), progress=False, **options)


def edited(source, change) -> None:
    """Let `change` edit the tensors of the checkpoint in `source`."""
    file = source / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)


@pytest.fixture
def nanoquant(dense, tmp_path):
    foreign_files.write(dense, tmp_path / "source", foreign_files.nanoquant)
    return tmp_path / "source"


def test_salient_columns_are_refused_by_name(dense, tmp_path, nanoquant):
    salient = {"salient_idx": torch.tensor([3], dtype=torch.int32), "salient_weight": torch.ones(56, 1)}
    edited(nanoquant, lambda tensors: tensors.update({f"{Q}.{role}": value for role, value in salient.items()}))
    refused(
        nanoquant,
        rf"{Q} has extra dense columns \('salient' ones\) in {Q}.salient_idx, which no layer of ours can hold",
    )
    foreign_files.write(dense, tmp_path / "i32", foreign_files.i32)
    name = "layouts.llama.cpp-i32-lsb-v1.blocks.1.mlp.up_proj.outlier_values"
    edited(tmp_path / "i32", lambda tensors: tensors.update({name: torch.ones(92, 1)}))
    refused(tmp_path / "i32", r"blocks.1.mlp.up_proj has extra dense columns")


def test_four_vectors_of_more_digits_than_fp32_are_refused_by_name(dense, tmp_path):
    foreign_files.write(dense, tmp_path / "source", foreign_files.littlebit, "f32")
    refused(
        tmp_path / "source", r"model.layers.0.\S+: u2 \* v1 has more digits than float32.*--scale-dtype float32 rounds"
    )
    model = convert_foreign(str(tmp_path / "source"), scale_dtype="float32", progress=False)
    assert not model.exact and "rounded" in model.summary


def test_envelopes_are_refused_by_name(dense, tmp_path):
    def mdbf(make, name, out, into, rank):
        tensors = {"A_sign_packed": foreign_files.bits(make.signs(out, rank)), "A_amp": torch.ones(out, 4)}
        return {f"{name}.paths.0.{role}": value for role, value in tensors.items()}, None

    foreign_files.write(dense, tmp_path / "source", mdbf)
    refused(
        tmp_path / "source", r"14 layer\(s\) of four scales of several vectors each, MDBF's envelopes.*model.layers.0"
    )


def test_layers_are_as_the_programs_own_config_says(dense, tmp_path):
    foreign_files.write(dense, tmp_path / "source", foreign_files.littlebit)
    settings = tmp_path / "source" / "littlebit_config.json"
    second = [
        f"{Q}.{name}" for name in ("U_R_packed", "V_R_packed", "U_R_shape", "V_R_shape", "u1_R", "u2_R", "v1_R", "v2_R")
    ]
    whole = load_file(tmp_path / "source" / "model.safetensors")
    edited(tmp_path / "source", lambda tensors: [tensors.pop(name) for name in second])
    refused(tmp_path / "source", rf"{Q} has 1 path\(s\), but littlebit_config.json says residual True")
    settings.unlink()  # then nothing says that the layer once had a second path
    assert convert_foreign(str(tmp_path / "source"), progress=False).layers == 14
    edited(tmp_path / "source", lambda tensors: tensors.update({name: whole[name] for name in second[:-1]}))
    refused(tmp_path / "source", f"{Q} has no v2_R")
    settings.write_text(json.dumps({"residual": False, "split_dim": 10**12}))
    refused(tmp_path / "source", f"{Q} has no v2_R")
    edited(tmp_path / "source", lambda tensors: tensors.update(whole))
    refused(tmp_path / "source", "littlebit_config.json has split_dim 1000000000000; numbers up to")
    settings.write_text(json.dumps({"residual": False}))
    refused(tmp_path / "source", r"has 2 path\(s\), but littlebit_config.json says residual False")
    foreign_files.write(dense, tmp_path / "nano", lambda *args: foreign_files.nanoquant(*args, mid=False))
    (tmp_path / "nano" / "nanoquant_config.json").write_text(json.dumps({"admm_type": "dbf"}))
    refused(tmp_path / "nano", "has no scale_mid, but nanoquant_config.json says admm_type dbf")


def test_a_rotated_model_is_refused(dense, tmp_path):
    foreign_files.write(dense, tmp_path / "source", foreign_files.onecompression)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "dbf", "rotated": True}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    refused(tmp_path / "source", "rotated model")
    config["quantization_config"]["rotated"] = False
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    assert convert_foreign(str(tmp_path / "source"), progress=False).layers == 14


def test_floats_that_leave_the_range_of_a_dtype(dense, tmp_path):
    foreign_files.write(dense, tmp_path / "source", foreign_files.dbf, "f32")
    edited(tmp_path / "source", lambda tensors: tensors[f"{Q}.4.w"].fill_(1e30))
    refused(tmp_path / "source", rf"{Q}: scales of magnitude 1e\+30 do not fit float16", scale_dtype="float16")
    refused(tmp_path / "source", "scale_dtype is 'float8'", scale_dtype="float8")


# -- hostile files ----------------------------------------------------------------------------------------------------------


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_a_pickle_is_never_opened(nanoquant, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (nanoquant / "model.safetensors").unlink()
    for name in ("model_state.pt", "pytorch_model.bin", "model.pth"):
        torch.save(Trap(), nanoquant / name)
        refused(nanoquant, f"{name}, a pickle, which can run code")
        refused(nanoquant / name, f"{name} is a pickle, which can run code")
        (nanoquant / name).unlink()
    refused(nanoquant, "holds no safetensors file")
    (nanoquant / "model.gguf").write_bytes(b"GGUF")
    refused(nanoquant, "GGUF files, which are not read")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(nanoquant, name):
    if (nanoquant / name).exists():
        (nanoquant / name).unlink()
    os.mkfifo(nanoquant / name)
    refused(nanoquant, f"{name} is no regular file")
    (nanoquant / name).unlink()
    if name in ("model.safetensors", "config.json"):
        (nanoquant / name).mkdir()
        refused(nanoquant, f"{name} is no regular file")


def test_links_of_the_hubs_cache_are_followed(nanoquant, tmp_path):
    (tmp_path / "blobs").mkdir()
    for file in list(nanoquant.iterdir()):
        os.replace(file, tmp_path / "blobs" / file.name)
        file.symlink_to(tmp_path / "blobs" / file.name)
    assert convert_foreign(str(nanoquant), progress=False).layers == 14
    (tmp_path / "blobs" / "model.safetensors").unlink()
    refused(nanoquant, "model.safetensors cannot be read")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_truncated_file_is_refused_wherever_it_ends(dense, tmp_path, layout):
    foreign_files.write(dense, tmp_path / "source", foreign_files.LAYOUTS[layout])
    file = tmp_path / "source" / "model.safetensors"
    whole = file.read_bytes()
    for end in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:end])
        refused(tmp_path / "source", "model.safetensors is damaged")
    file.write_bytes((2**62).to_bytes(8, "little") + whole[8:])
    refused(tmp_path / "source", "model.safetensors is damaged")


def broken(role, value):
    return lambda tensors: tensors.update({f"{Q}.{role}": value})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            broken("U_packed", torch.zeros(56, 2, dtype=torch.int32)),
            rf"{Q}.U_packed is I32 \[56, 2\], but 56 x 13 signs",
        ),
        (
            broken("V_packed", torch.zeros(13, 1, dtype=torch.int32)),
            rf"{Q}.V_packed is I32 \[13, 1\], but 13 x 56 signs",
        ),
        (broken("U_packed", torch.zeros(56, 1)), rf"{Q}.U_packed is F32 \[56, 1\]"),
        (broken("U_packed", torch.zeros(56, 1, dtype=torch.int64)), rf"{Q}.U_packed is I64"),
        (broken("scale_pre", torch.ones(57)), rf"{Q}.scale_pre is F32 \[57\], but 56 scales"),
        (broken("scale_post", torch.ones(56, dtype=torch.float64)), rf"{Q}.scale_post is F64"),
        (broken("scale_post", torch.ones(56, 2)), rf"{Q}.scale_post is F32 \[56, 2\]"),
        (broken("scale_mid", torch.ones(2, 7)), rf"{Q} has rank 0"),
        (broken("scale_mid", torch.ones(0)), rf"{Q} has rank 0"),
        (broken("scale_mid", torch.ones(1000)), rf"{Q} has rank 1000; a layer of 56 x 56 has one from 1 to 896"),
        (broken("scale_mid", torch.tensor([1.0] * 12 + [float("nan")])), rf"{Q}.scale_mid holds NaN or Inf"),
        (broken("U_shape", torch.tensor([2**62, 2**62])), rf"{Q}.U_shape says \[{2**62}, {2**62}\]"),
        (broken("U_shape", torch.tensor([56, 14])), rf"{Q}.U_shape says \[56, 14\]"),
        (broken("U_shape", torch.tensor([-56, -13])), rf"{Q}.U_shape says"),
        (broken("V_shape", torch.tensor(13)), rf"{Q}.V_shape is I64 \[\]"),
        (lambda tensors: tensors.pop(f"{Q}.V_packed"), f"{Q} has no V_packed"),
        (lambda tensors: tensors.pop(f"{Q}.scale_pre"), f"{Q} has no scale_pre"),
        (
            lambda tensors: tensors.pop("model.norm.weight"),
            "1 tensor.s. are missing from model.safetensors, e.g. model.norm.weight",
        ),
        (broken("lora_A", torch.ones(2, 2)), rf"holds 1 tensor\(s\) that .* has no place for, e.g. {Q}.lora_A"),
        (broken("weight", torch.ones(56, 56)), rf"has no place for, e.g. {Q}.weight"),
        (broken("\x1b[31mred", torch.ones(2)), r"a tensor called '.*\\x1b\[31mred'; names are printable"),
        (broken("bias", torch.ones(56)), rf"has no place for, e.g. {Q}.bias"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(57)}),
            r"model.norm.weight is F32 \[57\] in .*but the config implies",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(56, dtype=torch.int32)}),
            r"model.norm.weight is I32",
        ),
        (
            lambda tensors: tensors.update(
                {name.replace("layers.1", "layers.7"): value.clone() for name, value in list(tensors.items())}
            ),
            r"packed layer model.layers.7.*has no such linear layer",
        ),
        (
            lambda tensors: tensors.update(
                {name.replace("model.", "model._orig_mod."): value.clone() for name, value in list(tensors.items())}
            ),
            "one layer as .*; leave one of them",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(nanoquant, change, match):
    edited(nanoquant, change)
    refused(nanoquant, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_hidden_layers": 10**8}, "num_hidden_layers 100000000, but the files hold"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers 10{30}; numbers up to"),
        ({"num_hidden_layers": 3}, "tensor.s. are missing"),
        ({"num_hidden_layers": 1}, "has no such linear layer"),
        ({"hidden_size": 10**12}, "hidden_size 1000000000000; numbers up to"),
        ({"vocab_size": 2**31 - 1}, r"embed_tokens.weight is BF16 \[128, 56\]|lm_head.weight is BF16 \[128, 56\]"),
        ({"intermediate_size": 2**31 - 1}, "proj.* is I32 .* but .* signs|has rank"),
        ({"hidden_size": "many"}, "config.json"),
        ({"num_labels": 2**31 - 1}, "'num_labels' is 2,147,483,647; no model is that large"),
        ({"num_hidden_layers": 1e9}, "config.json"),
        ({"num_hidden_layers": -1}, "has no such linear layer"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"model_type": "unknown"}, "unknown"),
        ({"rope_parameters": [{"deep": [10**20]}]}, "deep 10{20}; numbers up to"),
        ({"quantization_config": {"quant_method": "littlebit", "bpw": 1.0}}, "a checkpoint of hf-littlebit already"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_before_anything_is_made(nanoquant, change, match):
    config = json.loads((nanoquant / "config.json").read_text())
    (nanoquant / "config.json").write_text(json.dumps({**config, **change}))
    refused(nanoquant, match)


@pytest.mark.parametrize("text", ["", "[]", "7", "{", "[" * 100_000, '{"a": ' * 3000 + "1" + "}" * 3000, "\x00"])
def test_json_that_is_none_is_refused(nanoquant, text):
    (nanoquant / "config.json").write_text(text)
    refused(nanoquant, "config.json|model_type|Unrecognized")


def test_an_index_names_files_of_its_folder_alone(nanoquant):
    index = nanoquant / "model.safetensors.index.json"
    for target in ("../source/model.safetensors", "/etc/passwd", "model.bin", "", 7, None):
        index.write_text(json.dumps({"weight_map": {"a": target}}))
        refused(nanoquant, "index that names files outside|index that names")
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    refused(nanoquant, "gone.safetensors cannot be read")
    index.unlink()
    shutil.copy(nanoquant / "model.safetensors", nanoquant / "other.safetensors")
    refused(nanoquant, "leave one checkpoint")


def test_other_folders_are_told_apart(dense, nanoquant, tmp_path):
    convert_foreign(str(nanoquant), progress=False).model.save_pretrained(tmp_path / "ours")
    refused(tmp_path / "ours", "a checkpoint of hf-littlebit already")
    dense.save_pretrained(tmp_path / "dense")
    refused(tmp_path / "dense", "packed layers of no layout that is known: LittleBit, NanoQuant, DBF")
    refused(tmp_path / "nothing", "no folder")
    edited(
        nanoquant, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.bp1": torch.zeros(3, dtype=torch.uint8)})
    )
    refused(nanoquant, "holds layers of NanoQuant and OneCompression DBF")
    latents = {f"{Q}.{name}": torch.ones(2, 2) for name in ("U", "V", "u1", "u2", "v1", "v2")}
    edited(tmp_path / "dense", lambda tensors: tensors.update(latents))
    refused(tmp_path / "dense", f"latents U and V as floats, e.g. of {Q}")


def test_random_bytes_in_a_header_end_in_words(nanoquant):
    """Whatever a header says, the answer is a ValueError or a model."""
    file = nanoquant / "model.safetensors"
    whole = bytearray(file.read_bytes())
    size = int.from_bytes(whole[:8], "little")
    random = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(int(random.integers(1, 4))):
            damaged[int(random.integers(8, 8 + size))] = int(random.integers(32, 127))
        file.write_bytes(damaged)
        try:
            convert_foreign(str(nanoquant), progress=False)
        except ValueError as error:
            assert str(error)


@pytest.mark.subprocess
def test_wild_sizes_take_no_memory(nanoquant):
    config = json.loads((nanoquant / "config.json").read_text())
    sizes = {"vocab_size": 2**31 - 1, "intermediate_size": 2**31 - 1, "max_position_embeddings": 2**31 - 1}
    (nanoquant / "config.json").write_text(json.dumps({**config, **sizes}))
    code = (
        "import resource, sys\n"
        "from hf_littlebit.load.foreign.convert import convert_foreign\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    convert_foreign(sys.argv[1], progress=False)\n"
        "except ValueError as error:\n    print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(nanoquant)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    message, megabytes = done.stdout.strip().splitlines()
    assert "implies" in message or "signs" in message
    assert int(megabytes) < 200


def test_errors_of_the_command_are_one_line(nanoquant, tmp_path, capfd):
    edited(nanoquant, broken("scale_pre", torch.ones(57)))
    capfd.readouterr()
    assert main(["convert", str(nanoquant), "--out", str(tmp_path / "out")]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"littlebit: error: {Q}.scale_pre is F32 [57]") and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert main(["convert", str(nanoquant), "--out", str(nanoquant), "--overwrite"]) == 2
    assert "is the checkpoint itself" in capfd.readouterr().err
