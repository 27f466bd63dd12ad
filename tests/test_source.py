"""What a folder, a config.json or a variant stands for, and the configs that stand for nothing."""

import json
import os
import shutil

import pytest
from families import load

from hf_littlebit import LittleBitConfig, size_report
from hf_littlebit.load.source import find_source


@pytest.mark.parametrize("shard", ["5GB", "30KB"])
def test_variant_is_found(family_dir, tmp_path, shard):
    model = load(family_dir("llama"), quantization_config=LittleBitConfig(bpw=4.0, init="dual_svid"))
    model.save_pretrained(tmp_path / "plain", max_shard_size=shard)
    model.save_pretrained(tmp_path / "variant", max_shard_size=shard, variant="fp16")
    expected, found = size_report(tmp_path / "plain"), find_source(tmp_path / "variant")
    report = size_report(found)
    assert report.layers == expected.layers and report.total_bytes == expected.total_bytes
    assert found.variant == "fp16" and bool(found.index) == (shard == "30KB")
    assert report.file_bytes == sum(map(os.path.getsize, found.files))
    assert load(tmp_path / "variant", variant=found.variant).config.quantization_config.bpw == 4.0
    # The plain names go first, and of two variants neither can be meant.
    model.save_pretrained(tmp_path / "variant", variant="bf16")
    with pytest.raises(ValueError, match=r"holds the variants bf16, fp16 and no model\.safetensors"):
        size_report(tmp_path / "variant")
    model.save_pretrained(tmp_path / "variant")
    assert find_source(tmp_path / "variant").variant is None


def with_config(folder, target, **changes):
    """`target`, holding a copy of the model in `folder` whose config.json has other values."""
    shutil.copytree(folder, target)
    path = os.path.join(target, "config.json")
    with open(path) as file:
        config = {**json.load(file), **changes}
    with open(path, "w") as file:
        json.dump(config, file)
    return target


ODD = [
    ({"quantization_config": ["littlebit"]}, r"quantization_config is \['littlebit'\]; it must be a dict"),
    ({"quantization_config": "littlebit"}, "quantization_config is 'littlebit'; it must be a dict"),
    ({"quantization_config": 4}, "quantization_config is 4; it must be a dict"),
    ({"quantization_config": {}}, "quantization_config is {}; it must be a dict with a quant_method"),
    ({"quantization_config": {"bits": 4}}, "it must be a dict with a quant_method"),
    ({"quantization_config": {"quant_method": ["a"]}}, "it must be a dict with a quant_method"),
    ({"quantization_config": {"load_in_4bit": True}}, "quantized with 'bitsandbytes' already"),
    ({"quantization_config": {"quant_method": "littlebit"}}, "bpw is missing"),
    ({"quantization_config": {"quant_method": "littlebit", "dequantize": True}}, "has no bpw; config.json is damaged"),
    ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'; it must be a list of class names"),
    ({"architectures": 5}, "architectures is 5; it must be a list"),
    ({"architectures": [5]}, r"architectures is \[5\]; it must be a list"),
    ({"architectures": {"a": 1}}, "architectures is {'a': 1}; it must be a list"),
    ({"model_type": None}, "model type `None`"),
    ({"model_type": "nope"}, "model type `nope`"),
    ({"model_type": ["llama"]}, "config.json that describes no model"),
    ({"hidden_size": "abc"}, "config.json that describes no model .*expected int, got str"),
    ({"num_attention_heads": 0}, "config.json that describes no model"),
    ({"dtype": "no_such_type"}, "config.json that describes no model"),
]


@pytest.mark.parametrize("changes, words", ODD)
def test_odd_config_is_refused(family_dir, tmp_path, changes, words):
    folder = with_config(family_dir("llama"), tmp_path / "odd", **changes)
    with pytest.raises(ValueError, match=words):
        size_report(folder, LittleBitConfig(bpw=4.0))


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": None},
        {"architectures": None},
        {"architectures": []},
        {"architectures": ["NoSuchModel"]},
        {"architectures": ["set_seed"]},
        {"architectures": ["AutoConfig"]},
        {"architectures": ["BertForMaskedLM"]},
    ],
)
def test_config_without_a_usable_class_stands_for_its_model_type(family_dir, tmp_path, changes):
    folder = with_config(family_dir("llama"), tmp_path / "odd", **changes)
    config = LittleBitConfig(bpw=4.0)
    assert size_report(folder, config).layers == size_report(family_dir("llama"), config).layers


def test_config_without_a_model_type(family_dir, tmp_path):
    path = with_config(family_dir("llama"), tmp_path / "odd") / "config.json"
    config = json.loads(path.read_text())
    del config["model_type"]
    for content, words in ((config, "model_type"), (None, "no model"), ([1], "no model"), ("text", "no model")):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=words):
            size_report(tmp_path / "odd", LittleBitConfig(bpw=4.0))
