"""What stays dense by a model's structure: what its code reads, routers, and the other senses of composite models."""

import json

import pytest
import torch
import transformers
from families import SMALL, config, equal_states, load
from torch import nn

from hf_littlebit import LittleBitConfig, plan, size_report
from hf_littlebit.layers.linear import FactorModule
from hf_littlebit.model_parts import other_senses, routers

WIDE = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4, "vocab_size": 128}
SEAMLESS = {
    "vocab_size": 128, "hidden_size": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "speech_encoder_layers": 1,
    "speech_encoder_attention_heads": 4, "speech_encoder_intermediate_size": 96, "pad_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": 128, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0,
}  # fmt: skip
# class -> (config options, ends of the names of layers that its code reads, and of its routers)
MODELS = {
    "LongT5ForConditionalGeneration": ({**WIDE, "decoder_start_token_id": 0}, {"wo"}, set()),
    "SwitchTransformersForConditionalGeneration": (
        {**WIDE, "num_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4,
         "decoder_start_token_id": 0},
        {"wo"}, {"classifier"},
    ),
    "NllbMoeForConditionalGeneration": (
        {**BART, "num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2}, {"fc2"}, {"classifier"},
    ),
    "SeamlessM4TForTextToText": (SEAMLESS, {"fc2"}, set()),
    "SeamlessM4Tv2ForTextToText": (SEAMLESS, {"fc2"}, set()),
    "MambaForCausalLM": (
        {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        {"dt_proj", "x_proj", "out_proj", "lm_head"}, set(),
    ),
    "RwkvForCausalLM": (
        {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 4, "rescale_every": 2, "bos_token_id": 1, "eos_token_id": 2},
        {"attention.output", "feed_forward.value"}, set(),
    ),
    "AfmoeForCausalLM": ({**SMALL, "num_experts": 4, "num_experts_per_tok": 2, "num_dense_layers": 1,
                          "moe_intermediate_size": 48}, set(), {"gate"}),
    "HunYuanMoEV1ForCausalLM": ({**SMALL, "num_experts": 4, "moe_topk": 2}, set(), {"wg"}),
    "JetMoeForCausalLM": (
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 16,
         "vocab_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0},
        set(), {"layer"},
    ),
}  # fmt: skip


def saved(name, options, folder):
    """A random model of the class called `name`, saved in `folder`."""
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model_class(model_class.config_class(**options)).save_pretrained(folder)
    return folder


def outputs(model):
    tokens = torch.arange(3, 27).reshape(2, 12)
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=tokens, **more).logits


def ends(names):
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize("name", MODELS)
def test_what_the_code_reads_and_routers_stay_dense(name, tmp_path, caplog):
    """They run, say what they left dense, equal the dense model that they stand for, and come back as they were saved."""
    options, read, routing = MODELS[name]
    folder = saved(name, options, tmp_path / "dense")
    with caplog.at_level("WARNING", "hf_littlebit"):
        model = load(folder, quantization_config=config(bpw=4.0))
    assert ("the model's code reads their weight" in caplog.text) is bool(read)
    assert ("they choose experts" in caplog.text) is bool(routing)
    packed = {each for each, module in model.named_modules() if isinstance(module, FactorModule)}
    assert packed and not packed & routers(model) and not any(each.endswith(tuple(read)) for each in packed if read)
    assert ends(routers(model)) == routing
    model.save_pretrained(tmp_path / "packed")  # before the first forward, in which RWKV rescales its weights in place
    again = load(tmp_path / "packed")
    equal_states(model, again)
    before = outputs(model)
    assert torch.equal(outputs(again), before) and before.isfinite().all()
    model.dequantize()
    torch.testing.assert_close(outputs(model), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["AfmoeForCausalLM", "MambaForCausalLM"])
def test_files_decide_what_is_packed_in_them(name, tmp_path, monkeypatch):
    """A model whose router (or projection) an earlier version packed loads as it was saved."""
    folder = saved(name, MODELS[name][0], tmp_path / "dense")
    with monkeypatch.context() as earlier:
        earlier.setattr(plan, "dense_parts", lambda model, text_only: {})
        model = load(folder, quantization_config=config(bpw=8.0))
    wanted = "gate" if name == "AfmoeForCausalLM" else "out_proj"
    packed = {each for each, module in model.named_modules() if isinstance(module, FactorModule)}
    assert wanted in ends(packed)
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    equal_states(model, again)
    assert {each for each, module in again.named_modules() if isinstance(module, FactorModule)} == packed
    assert {layer.module for layer in size_report(tmp_path / "packed").layers} == packed


TEXT = {**SMALL, "model_type": "llama"}
VISION = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "model_type": "clip_vision_model", "projection_dim": 64,
}  # fmt: skip

OTHER = ("model.vision_tower.", "model.multi_modal_projector.")


@pytest.fixture
def llava(tmp_path):
    options = {"text_config": TEXT, "vision_config": VISION, "image_token_index": 127}
    return saved("LlavaForConditionalGeneration", options, tmp_path / "llava")


def test_other_senses_stay_dense_unless_asked(llava, tmp_path, caplog):
    with caplog.at_level("WARNING", "hf_littlebit"):
        model = load(llava, quantization_config=config(bpw=4.0))
    assert "vision tower, an audio encoder or a projector (text_only=False" in caplog.text
    assert not any(isinstance(module, FactorModule) for module in model.model.vision_tower.modules())
    assert type(model.model.multi_modal_projector.linear_1) is nn.Linear
    text = model.model.language_model
    assert all(isinstance(layer.mlp.up_proj, FactorModule) for layer in text.layers)
    model.save_pretrained(tmp_path / "text")
    whole = load(llava, quantization_config=config(bpw=4.0, text_only=False))
    packed = {name for name, module in whole.named_modules() if isinstance(module, FactorModule)}
    assert {"q_proj", "fc1", "fc2", "linear_1", "linear_2", "up_proj"} <= ends(packed)
    whole.save_pretrained(tmp_path / "whole")
    for folder, made in ((tmp_path / "text", model), (tmp_path / "whole", whole)):
        assert "text_only" not in json.loads((folder / "config.json").read_text())["quantization_config"]
        equal_states(made, load(folder))
        report, predicted = size_report(folder), size_report(llava, config(bpw=4.0, text_only=made is model))
        assert report.quantized_bytes == predicted.quantized_bytes
        # What is dense there: all of it, or what is left beside the packed parts.
        parts = {
            f"{name}.{part}"
            for name, each in made.named_modules()
            if isinstance(each, FactorModule)
            for part in each.part_dtypes
        }
        rest = {
            name: value for name, value in made.state_dict().items() if name.startswith(OTHER) and name not in parts
        }
        assert report.dense_parts["vision, audio and projectors"] == sum(value.nbytes for value in rest.values()) > 0


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("CLIPModel", {"projection_dim": 64}, {"vision_model", "visual_projection", "text_projection"}),
        ("ViTForImageClassification", {"num_hidden_layers": 1}, set()),
        ("WhisperForConditionalGeneration", {"encoder_layers": 1, "decoder_layers": 1}, set()),
        ("T5ForConditionalGeneration", {"num_layers": 1}, set()),
        ("BarkModel", {}, {"codec_model"}),
        ("FuyuForCausalLM", {}, {"model.vision_embed_tokens"}),
        ("Qwen2VLForConditionalGeneration", {}, {"model.visual"}),
        ("MusicgenForConditionalGeneration", None, {"audio_encoder", "enc_to_dec_proj"}),
    ],
)  # fmt: skip
def test_senses_are_told_by_the_configs_of_parts(name, options, expected):
    model_class = getattr(transformers, name)
    if options is None:
        small = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32}
        decoder = transformers.MusicgenDecoderConfig(**small)
        encoder = transformers.T5Config(d_model=64, num_layers=1, d_ff=32)
        made = model_class.config_class(
            text_encoder=encoder, audio_encoder=transformers.EncodecConfig(), decoder=decoder
        )
    else:
        made = model_class.config_class(**options)
    with torch.device("meta"):
        model = model_class(made)
    assert set(other_senses(model)) == expected


def test_names_of_nothing_are_refused_when_they_are_written(family_dir, tmp_path):
    for wrong in ("w2", "layers.7", "re:.*expert", r"model\.blocks"):
        with pytest.raises(ValueError, match=r"names no module of this model.*named_modules"):
            load(family_dir("llama"), quantization_config=config(modules_to_not_convert=["o_proj", wrong]))
        with pytest.raises(ValueError, match="names no module"):
            size_report(family_dir("llama"), config(modules_to_not_convert=[wrong]))
    model = load(family_dir("llama"), quantization_config=config(modules_to_not_convert=["o_proj"]))
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    written["quantization_config"]["modules_to_not_convert"] = ["w2"]  # a saved model's tensors say what is packed
    file.write_text(json.dumps(written))
    equal_states(load(tmp_path), model)


@pytest.mark.parametrize("pattern", ["re:.*down_proj", "re:.*down", r"re:model\.layers\.\d+\.mlp\.down_proj$"])
def test_expressions_as_other_tools_write_them(family_dir, pattern):
    """ "re:" and an expression that is matched from the start of a name, as in llm-compressor's `ignore`."""
    model = load(family_dir("llama"), quantization_config=config(modules_to_not_convert=["lm_head", pattern]))
    mlp = model.model.layers[1].mlp
    assert type(mlp.down_proj) is nn.Linear and isinstance(mlp.up_proj, FactorModule)
    with pytest.raises(ValueError, match="no valid regular expression"):
        LittleBitConfig(0.5, modules_to_not_convert=["re:("])
