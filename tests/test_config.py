"""The arithmetic from bits per weight to ranks, and what a config accepts."""

import json
import math

import pytest
import torch
from families import load, logits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_littlebit import LittleBitConfig, size_report
from hf_littlebit.config import FORMAT_VERSION, bits_of, bpw_of, exact_rank, layer_ranks


def test_published_ranks():
    """LittleBit, arXiv 2506.13771, appendix D: two paths."""
    assert exact_rank(4096, 4096, 0.55, 2) == pytest.approx(546.1, abs=0.05)
    assert exact_rank(4096, 11008, 0.1, 2) == pytest.approx(133.1, abs=0.05)
    assert layer_ranks(4096, 4096, 0.55, 2) == (544, 544)
    assert layer_ranks(4096, 11008, 0.1, 2) == (128, 128)


@given(
    out_features=st.integers(1, 9000),
    in_features=st.integers(1, 9000),
    bpw=st.floats(0.01, 16),
    paths=st.integers(1, 2),
)
@settings(max_examples=300, deadline=None)
def test_ranks_stay_within_the_bits_asked(out_features, in_features, bpw, paths):
    ranks = layer_ranks(out_features, in_features, bpw, paths)
    assert len(ranks) == paths and all(rank % 8 == 0 and rank >= 8 for rank in ranks)
    if ranks[0] > 8:
        assert bpw_of(out_features, in_features, ranks) <= bpw * (1 + 1e-12)
        assert ranks[0] <= min(out_features, in_features)
    more = tuple(rank + 8 for rank in ranks)
    if more[0] <= min(out_features, in_features) // 8 * 8:
        assert bpw_of(out_features, in_features, more) > bpw


def test_bits_formula_without_padding():
    for ranks in ((544, 544), (128,)):
        assert bits_of(4096, 11008, ranks) == sum(r * (4096 + 11008 + 16) + 16 * (4096 + 11008) for r in ranks)


def test_number_of_paths_follows_initialiser_and_size():
    def paths(init, bpw, size=(4096, 4096), **options):
        return len(LittleBitConfig(bpw, init=init, **options).for_module("a.q_proj").ranks(*size))

    assert paths("admm", 0.55) == 1 and paths("dual_svid", 0.55) == 2 and paths("joint_itq", 0.55) == 2
    assert paths("admm", 0.55, residual=True) == 2 and paths("dual_svid", 0.55, residual=False) == 1
    assert paths("admm", 3.0) == 2  # one path cannot take that many bits: its rank is at most 4096
    assert paths("dual_svid", 0.1, (64, 64)) == 1  # no room for two


def test_kv_factor_is_for_keys_and_values_only():
    config = LittleBitConfig(0.1, init="dual_svid", residual=True, kv_factor=4)
    assert config.for_module("model.layers.0.self_attn.k_proj").ranks(1024, 4096) == (96, 96)  # 4 x 24.9 floored
    assert config.for_module("model.layers.0.self_attn.o_proj").ranks(1024, 4096) == (24, 24)


def test_module_overrides_by_pattern():
    config = LittleBitConfig(
        0.3,
        module_config={
            "*.mlp.*": {"bpw": 0.5},
            "down_proj": {"bpw": 1.0, "init": "joint_itq"},
            "layers.0.mlp.up_proj": {},
        }
        | {"layers.0.mlp.up_proj": {"residual": True}},
    )
    assert config.for_module("model.layers.1.mlp.up_proj").bpw == 0.5
    last = config.for_module("model.layers.1.mlp.down_proj")
    assert last.bpw == 1.0 and last.init == "joint_itq"
    assert config.for_module("model.layers.0.mlp.up_proj").residual is True
    assert config.for_module("model.layers.10.mlp.up_proj").residual is None
    assert config.for_module("model.layers.1.self_attn.xdown_proj").bpw == 0.3


def test_json_round_trip():
    config = LittleBitConfig(
        0.1, init="joint_itq", residual=True, kv_factor=4, modules_to_not_convert=["score"], seed=7, workers=3,
        module_config={"*.down_proj": {"bpw": 0.5}}, format="latent", steps=20, svd_device="cuda", scale_dtype="float16",
    )  # fmt: skip
    data = json.loads(json.dumps(config.to_dict()))
    again = LittleBitConfig.from_dict(data)
    assert again.to_dict() == config.to_dict()
    assert data["format_version"] == FORMAT_VERSION and data["quant_method"] == "littlebit"
    # What belongs to the machine that quantized stays there.
    assert not {"svd_device", "workers", "dequantize", "share_inputs"} & set(data)
    assert "bpw" in repr(config) and json.loads(config.to_json_string(use_diff=False))["bpw"] == 0.1


BAD = [
    ({"bpw": 0}, "bpw is 0"), ({"bpw": -1.0}, "bpw is -1.0"), ({"bpw": 16.5}, "at most 16"), ({"bpw": math.nan}, "bpw is nan"),
    ({"bpw": math.inf}, "bpw is inf"), ({"bpw": "0.1"}, "bpw is '0.1'"), ({"bpw": True}, "bpw is True"), ({}, "bpw is missing"),
    ({"bpw": [0.1]}, "bpw is"), ({"init": "svd"}, "dual_svid, joint_itq, admm"), ({"init": None}, "init is None"),
    ({"residual": 1}, "residual is 1"), ({"kv_factor": 0}, "kv_factor is 0"), ({"kv_factor": 100}, "at most 64"),
    ({"format": "gguf"}, "packed, latent"), ({"seed": -1}, "seed is -1"), ({"seed": 1.5}, "seed is 1.5"),
    ({"steps": 0}, "steps is 0"), ({"refit_rounds": -1}, "refit_rounds is -1"), ({"workers": 0}, "workers is 0"),
    ({"scale_dtype": "float32"}, "bfloat16, float16"), ({"svd_device": 0}, "svd_device is 0"), ({"dequantize": 1}, "dequantize"),
    ({"share_inputs": 1}, "share_inputs is 1"), ({"share_inputs": True, "dequantize": True}, "leave one of them out"),
    ({"modules_to_not_convert": "lm_head"}, "must be a list"), ({"modules_to_not_convert": {"lm_head"}}, "must be a list"),
    ({"modules_to_not_convert": [""]}, "holds ''"), ({"modules_to_not_convert": ["a", 1]}, "holds 1; every entry"),
    ({"modules_to_not_convert": ["["]}, r"holds '\[', which is no valid regular expression \(unterminated"),
    ({"modules_to_not_convert": ["ok", "*.down_proj"]}, r"write '\.\*' where"), ({"modules_to_not_convert": ["a)(b"]}, "no valid"),
    ({"modules_to_not_convert": ["(?i)a"]}, "global flags"), ({"modules_to_not_convert": ["a{99999999999}"]}, "too large"),
    ({"modules_to_not_convert": ["(" * 9999]}, "no valid regular expression"), ({"module_config": {"": {"bpw": 1}}}, "must map"),
    ({"module_config": {3: {"bpw": 1}}}, "must map"), ({"module_config": {"a": {3: 1}}}, "unknown option 3"),
    ({"init": ["admm"]}, "choose one of"),
    ({"module_config": ["a"]}, "must be a dict"), ({"module_config": {"a": 1}}, "must map"), ({"module_config": {"a": {}}}, "must"),
    ({"module_config": {"a": {"bpw": 99}}}, r"module_config\['a'\]: bpw is 99"),
    ({"module_config": {"a": {"rank": 9}}}, "unknown option 'rank'"), ({"rank": 64}, "unknown LittleBitConfig option 'rank'"),
    ({"self": 1}, "unknown LittleBitConfig option 'self'"),
    ({"format_version": FORMAT_VERSION + 1}, "upgrade"), ({"format_version": "1"}, "format_version is '1'"),
    ({"format_version": FORMAT_VERSION + 1, "new_option": 1}, "upgrade"), ({"format_version": 0}, "format_version is 0"),
    ({"quant_method": "gptq"}, "reads only 'littlebit'"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD)
def test_impossible_values_are_refused(options, message):
    given = options if "bpw" in options or not options else {"bpw": 0.3, **options}
    with pytest.raises(ValueError, match=message):
        LittleBitConfig(**given)
    with pytest.raises(ValueError, match=message):
        LittleBitConfig.from_dict(given)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2)
)
OPTIONS = sorted(set(LittleBitConfig(0.5).__dict__))


@given(st.dictionaries(st.sampled_from(OPTIONS), JUNK, max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_junk_is_refused_or_stands_for_a_config(options):
    try:
        config = LittleBitConfig.from_dict(options)
    except ValueError as error:
        assert str(error)
        return
    if config.bpw is None:
        assert config.dequantize or config.share_inputs is not None
        assert not (config.dequantize and config.share_inputs)
        return
    assert LittleBitConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert config.for_module("a.k_proj").ranks(64, 128)


@given(st.one_of(st.text(max_size=8), st.text("[](){}!*?+-^$,1ak._\\&~|", max_size=12)))
@settings(max_examples=400, deadline=None)
@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
def test_any_text_is_a_pattern_or_is_refused_when_it_is_given(name):
    """Nothing raw comes out later, when the names of modules are matched."""
    try:
        skipping = LittleBitConfig(0.5, modules_to_not_convert=[name])
    except ValueError as error:
        assert "modules_to_not_convert holds" in str(error)
    else:
        should_convert_module("model.layers.0.k_proj", skipping.modules_to_not_convert)
    if name:
        LittleBitConfig(0.5, module_config={name: {"bpw": 1.0}}).for_module("model.layers.0.k_proj")


def test_only_dequantize_excuses_bpw(family_dir):
    config = LittleBitConfig(dequantize=True)
    assert "LittleBitConfig" in repr(config) and config.get_loading_attributes()["dequantize"]
    for options in ({"dequantize": False}, {"svd_device": "cpu"}, {"workers": 2}):
        with pytest.raises(ValueError, match="bpw is missing"):
            LittleBitConfig(**options)
    with pytest.raises(ValueError, match="init is 'svd'"):
        LittleBitConfig(dequantize=True, init="svd")
    with pytest.raises(ValueError, match="bpw is missing; say how many"):
        config.for_module("a.k_proj")
    with pytest.raises(ValueError, match="this checkpoint is dense already"):
        load(family_dir("llama"), quantization_config=config)
    with pytest.raises(ValueError, match="bpw is missing"):
        size_report(family_dir("llama"), config)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_dequantize_alone_loads_a_saved_model_as_a_dense_one(family_dir, tmp_path):
    saved = load(family_dir("llama"), quantization_config=LittleBitConfig(4.0, init="dual_svid"))
    saved.save_pretrained(tmp_path)
    dense = load(tmp_path, quantization_config=LittleBitConfig(dequantize=True))
    assert {type(module) for module in dense.model.layers.modules() if hasattr(module, "in_features")} == {nn.Linear}
    torch.testing.assert_close(logits(dense), logits(saved), rtol=1e-3, atol=1e-3)
