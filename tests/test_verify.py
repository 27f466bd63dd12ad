"""Damaged, foreign and changed checkpoints are refused, each with a message that says what is wrong."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from families import config, equal_states, load, logits
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_littlebit import LittleBitConfig, size_report, unpack_model
from hf_littlebit.layers.parts import latent_parts, pack_parts, part_name, part_shapes, stored_ranks
from hf_littlebit.layers.path import Path
from hf_littlebit.load import conversion


@pytest.fixture(scope="module")
def packed(family_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    load(family_dir("llama_bias"), quantization_config=LittleBitConfig(2.5, init="dual_svid")).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "copy")


def edit_config(folder, **changes):
    path = folder / "config.json"
    data = json.loads(path.read_text())
    data["quantization_config"].update(changes)
    path.write_text(json.dumps(data))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


NAME = "model.layers.1.mlp.down_proj"


def shorten(tensors, part, axis):
    """Half of a part, along an axis."""
    value = tensors[f"{NAME}.{part}"]
    tensors[f"{NAME}.{part}"] = value.narrow(axis, 0, value.shape[axis] // 2).clone()


def exchange(tensors, *ranks, format="packed"):
    """Put a layer of other ranks in the place of one; returns it."""
    bias = tensors[f"{NAME}.bias"]
    out_features, in_features = len(bias), tensors[f"{NAME}.scale_in"].shape[1]
    paths = [
        Path(
            torch.randn(out_features, rank),
            torch.randn(in_features, rank),
            *map(torch.rand, (out_features, rank, in_features)),
        )
        for rank in ranks
    ]
    parts = pack_parts(paths, torch.bfloat16) if format == "packed" else latent_parts(paths)
    for name in [name for name in tensors if name.startswith(f"{NAME}.") and not name.endswith("bias")]:
        del tensors[name]
    tensors.update({f"{NAME}.{part_name('weight', part)}": value for part, value in parts.items()})
    return paths


@pytest.mark.parametrize("keep", [0, 4, 100, 3000, -1])
def test_truncated_files(copy, keep):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load(copy)


def test_every_flipped_header_byte_is_noticed_or_harmless(copy):
    """Flip bits all over the header: the load raises, or the model is the same."""
    path = copy / "model.safetensors"
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    reference = load(copy).state_dict()
    raised = 0
    for position in range(0, size, size // 60):
        changed = bytearray(data)
        changed[position] ^= 1 << (position % 7)
        path.write_bytes(changed)
        try:
            state = load(copy).state_dict()
        except (ValueError, OSError):
            raised += 1
        else:
            assert all(torch.equal(value, state[name]) for name, value in reference.items()), position
    assert raised > 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}.v"), rf"1 tensor\(s\) are missing .*{NAME}\.v"),
        (lambda t: t.pop("model.norm.weight"), r"missing .*model\.norm\.weight"),
        (lambda t: t.pop(f"{NAME}.bias"), r"missing .*bias"),
        (lambda t: t.update({f"{NAME}.v": t[f"{NAME}.v"][:-1].clone()}), rf"{NAME}\.v is I32 .* implies I32"),
        (lambda t: shorten(t, "v", 1), rf"{NAME}\.v is I32 \[\d+, 24\] .* implies I32 \[\d+, 48\]"),
        (lambda t: shorten(t, "scale_rank", 0), rf"{NAME}\.scale_rank is BF16 \[24\] .* implies BF16 \[48\]"),
        (lambda t: shorten(t, "weight_tail", 0), rf"{NAME}\.weight_tail is U8 .* ranks \[24, 24\] .* implies U8"),
        (lambda t: t.update({f"{NAME}.v": t[f"{NAME}.v"].float()}), rf"{NAME}\.v is F32 .* implies I32"),
        (lambda t: t.update({f"{NAME}.scale_in": t[f"{NAME}.scale_in"].half()}), "is F16 .* implies BF16"),
        (lambda t: t[f"{NAME}.scale_in"].fill_(torch.nan), rf"{NAME}\.scale_in holds NaN or Inf"),
    ],
)
def test_changed_tensors(copy, change, message):
    edit_tensors(copy, change)
    with pytest.raises(ValueError, match=message):
        load(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "latent"}, "implies F32"),
        ({"format_version": 99}, "upgrade with: pip install -U hf-littlebit"),
        ({"bpw": None}, "bpw is missing"),
        ({"init": "magic"}, "init is 'magic'"),
        ({"surprise": 1}, "unknown LittleBitConfig option 'surprise'"),
    ],
)
def test_changed_configs(copy, changes, message):
    edit_config(copy, **changes)
    with pytest.raises(ValueError, match=message):
        load(copy)


@pytest.mark.parametrize("changes", [{"bpw": 1.5}, {"residual": False}])
def test_the_file_says_its_ranks(copy, changes):
    """The config's arithmetic says what a new layer gets; what a saved one has is in its shapes."""
    reference = load(copy)
    edit_config(copy, **changes)
    model = load(copy)
    equal_states(model, reference)
    assert model.get_submodule(NAME).ranks == reference.get_submodule(NAME).ranks
    assert [weight.ranks for weight in model.hf_quantizer.plan.weights] == [
        weight.ranks for weight in reference.hf_quantizer.plan.weights
    ]


@pytest.mark.parametrize("ranks", [(12,), (40,), (16, 16), (8, 8, 8)], ids=str)
def test_a_layer_of_other_ranks_than_the_config_gives(copy, tmp_path, ranks):
    paths = []
    edit_tensors(copy, lambda t: paths.extend(exchange(t, *ranks)))
    model = load(copy)
    layer = model.get_submodule(NAME)
    assert layer.ranks == list(ranks)
    expected = sum(replace(path, **rounded(path)).dense() for path in paths)
    torch.testing.assert_close(layer.dense(), expected, rtol=1e-5, atol=1e-5)
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(layer(x), x @ layer.dense().T + layer.bias, rtol=1e-4, atol=1e-4)
    assert next(row.ranks for row in size_report(str(copy)).layers if row.module == NAME) == ranks
    model.save_pretrained(tmp_path / "again")
    equal_states(load(tmp_path / "again"), model)
    latent = unpack_model(load(copy))
    assert latent.get_submodule(NAME).ranks == list(ranks)
    latent.save_pretrained(tmp_path / "latent")
    equal_states(load(tmp_path / "latent"), latent)


def rounded(path):
    """The scales as a packed layer stores them."""
    return {name: getattr(path, name).bfloat16().float() for name in ("scale_out", "scale_rank", "scale_in")}


def test_experts_of_other_ranks_than_the_config_gives(family_dir, tmp_path):
    model = load(family_dir("mixtral"), quantization_config=LittleBitConfig(2.5, init="dual_svid"))
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, bpw=1.0)
    equal_states(load(tmp_path), model)


def test_paths_of_unequal_ranks_are_what_the_config_says(copy):
    """Shapes say what the ranks add up to, not how paths share it; without the config's word, paths are equal."""
    size = (64, 96)
    shapes = {part: shape for part, (shape, _) in part_shapes(*size, (24, 8), False, torch.bfloat16).items()}
    assert stored_ranks(shapes, size, (24, 8), False) == (24, 8)
    assert stored_ranks(shapes, size, (32,), False) == (16, 16)
    shapes = {part: shape for part, (shape, _) in part_shapes(*size, (40, 8), False, torch.bfloat16).items()}
    assert stored_ranks(shapes, size, (40, 8), False) == (40, 8)
    edit_tensors(copy, lambda t: exchange(t, 40, 8))
    with pytest.raises(ValueError, match=rf"{NAME}\.weight is I32 \[1, \d+\] .* ranks \[24, 24\] .* implies I32 \[0, "):
        load(copy)


def test_the_file_says_what_is_packed(copy):
    """Which layers were replaced follows from the file, not from names that a later version may match otherwise."""
    reference = load(copy).state_dict()
    edit_config(copy, modules_to_not_convert=["down_proj"])
    state = load(copy).state_dict()
    assert state.keys() == reference.keys() and all(torch.equal(state[name], reference[name]) for name in state)


def test_layers_without_scales_are_not_taken_for_dense_ones(copy):
    edit_tensors(copy, lambda t: [t.pop(f"{NAME}.{part}") for part in ("scale_in", "scale_out", "scale_rank")])
    with pytest.raises(ValueError, match=rf"{NAME}\.weight is packed .* parts that belong to it are missing"):
        load(copy)


@pytest.mark.parametrize("missing", ["model.norm.weight", "model.embed_tokens.weight", f"{NAME}.scale_rank"])
def test_missing_tensors_are_noticed_by_every_class(copy, missing):
    edit_tensors(copy, lambda t: t.pop(missing))
    for kind in (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(ValueError, match=r"missing"):
            kind.from_pretrained(copy)
    data = json.loads((copy / "config.json").read_text())
    del data["architectures"]
    (copy / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"missing"):
        AutoModelForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize("missing", ["model.norm.weight", f"{NAME}.weight", f"{NAME}.scale_rank"])
def test_missing_tensors_are_noticed_in_a_state_dict(family_dir, tmp_path, missing):
    packed = tmp_path
    load(family_dir("llama"), quantization_config=config(bpw=4.0, residual=False)).save_pretrained(packed)
    model = load(packed)
    assert model.get_parameter(missing).numel() > 0
    state = model.state_dict()
    again = type(model).from_pretrained(None, config=AutoConfig.from_pretrained(packed), state_dict=state)
    assert torch.equal(logits(again), logits(model))
    del state[missing]
    with pytest.raises(ValueError, match=rf"1 tensor\(s\) are missing .*{missing}"):
        type(model).from_pretrained(None, config=AutoConfig.from_pretrained(packed), state_dict=state)


@pytest.mark.parametrize("other_names", [False, True])
def test_missing_tensors_of_a_dense_checkpoint(other_names, family_dir, tmp_path, monkeypatch):
    """Before any work where the file's names are the model's; after it where they may turn into others."""
    folder = shutil.copytree(family_dir("llama"), tmp_path / "dense")
    edit_tensors(folder, lambda t: t.pop("model.norm.weight"))
    if other_names:
        edit_tensors(folder, lambda t: t.update({"model.unknown": torch.zeros(3)}))
    done = []
    original = conversion.factor_weight
    monkeypatch.setattr(conversion, "factor_weight", lambda *a: done.append(a) or original(*a))
    with pytest.raises(ValueError, match=r"missing .*model\.norm\.weight.*quantize that"):
        load(folder, quantization_config=config())
    assert bool(done) == other_names


def test_a_tied_embedding_may_be_stored_by_either_name(family_dir, tmp_path):
    folder = shutil.copytree(family_dir("llama_tied"), tmp_path / "dense")
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    model = load(folder, quantization_config=config())
    equal_states(model, load(family_dir("llama_tied"), quantization_config=config()))
    model.save_pretrained(tmp_path / "packed")
    edit_tensors(tmp_path / "packed", lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    equal_states(model, load(tmp_path / "packed"))


def test_integer_buffers_of_older_checkpoints(family_dir, tmp_path):
    """Positions and masks were once stored; they say nothing about how the weights are."""
    folder = shutil.copytree(family_dir("bert"), tmp_path / "dense")
    positions = {"bert.embeddings.position_ids": torch.arange(64)[None], "bert.attention.bias": torch.ones(1, 4) > 0}
    edit_tensors(folder, lambda t: t.update(positions))
    equal_states(load(folder, quantization_config=config()), load(family_dir("bert"), quantization_config=config()))


def test_without_architectures_a_task_head_is_new(family_dir, tmp_path):
    load(family_dir("llama"), quantization_config=config()).save_pretrained(tmp_path / "packed")
    for folder, options in ((family_dir("llama"), {"quantization_config": config()}), (tmp_path / "packed", {})):
        copy = shutil.copytree(folder, tmp_path / f"anonymous{len(options)}")
        data = json.loads((copy / "config.json").read_text())
        del data["architectures"]
        (copy / "config.json").write_text(json.dumps(data))
        classifier = AutoModelForSequenceClassification.from_pretrained(copy, num_labels=3, **options)
        assert classifier.score.weight.isfinite().all()
        edit_tensors(copy, lambda t: t.pop("lm_head.weight"))
        with pytest.raises(ValueError, match=r"missing .*lm_head"):
            AutoModelForCausalLM.from_pretrained(copy, **options)


def test_foreign_checkpoints(family_dir, tmp_path):
    folder = shutil.copytree(family_dir("llama"), tmp_path / "foreign")
    data = json.loads((folder / "config.json").read_text())
    for quantization in ({"quant_method": "littlebit", "bpw": 2.5}, {"quant_method": "littlebit", "eff_bit": 0.1}):
        (folder / "config.json").write_text(json.dumps({**data, "quantization_config": quantization}))
        with pytest.raises(ValueError, match=r"another program wrote it|unknown LittleBitConfig option 'eff_bit'"):
            load(folder)
    tensors = {f"{n}.U_packed": torch.zeros(3, 3, dtype=torch.int32) for n in ("model.layers.0.mlp.up_proj", "b")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps({**data, "quantization_config": {"quant_method": "littlebit", "bpw": 2.5}})
    )
    with pytest.raises(ValueError, match="another program wrote it"):
        load(folder)


def test_an_already_quantized_checkpoint_is_not_quantized_again(family_dir, tmp_path):
    folder = shutil.copytree(family_dir("llama"), tmp_path / "foreign")
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if "mlp" in name:
            tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"mlp.* is I8 .* quantized already"):
        load(folder, quantization_config=LittleBitConfig(2.5, init="dual_svid"))


def test_a_missing_shard(packed, tmp_path):
    load(packed).save_pretrained(tmp_path, max_shard_size="20KB")
    next(iter(sorted(tmp_path.glob("*-00002-*.safetensors")))).unlink()
    with pytest.raises((ValueError, OSError), match=r"00002"):
        load(tmp_path)


@pytest.mark.subprocess
def test_without_the_plugin_transformers_refuses(packed):
    """In a fresh interpreter that never imports hf_littlebit."""
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        f"try: AutoModelForCausalLM.from_pretrained({str(packed)!r})\n"
        "except RuntimeError as error: print('REFUSED', error)\n"
        "print('hf_littlebit' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "REFUSED" in done.stdout and "False" in done.stdout, done.stdout + done.stderr
