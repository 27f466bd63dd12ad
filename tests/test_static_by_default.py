"""When plain `generate` makes a static cache, and when it leaves that to whoever asked for another or to transformers."""

import pytest
import torch
import transformers
from families import config, load
from recorded_steps import (
    DEVICES,
    caches,
    cpu_compiles,  # noqa: F401
    dense,
    eager,
    generate,
    packed,
    prompt,
    recorder_of,
)
from transformers import CompileConfig, DynamicCache


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_user_asks_for_wins(device, monkeypatch):
    model, recorder = packed("llama", device)
    inputs, made = prompt(model, 1, 6), caches(model, monkeypatch)
    expected = eager(model, inputs, 8)
    made.clear()
    asked = (
        {"cache_implementation": "dynamic"},
        {"use_cache": False},
        {"disable_compile": True},
        {"prompt_lookup_num_tokens": 2},
        {"past_key_values": DynamicCache(config=model.config)},
        {"num_beams": 2},
        {"return_dict_in_generate": True},
    )
    for options in asked:
        out = generate(model, inputs, 8, **options)
        if "num_beams" not in options and device == "cpu":
            assert torch.equal(out if torch.is_tensor(out) else out.sequences, expected), options
    assert made == ["DynamicCache", "NoneType", *["DynamicCache"] * 5]
    model.generation_config.cache_implementation = "dynamic"
    generate(model, inputs, 8)
    model.generation_config.cache_implementation = None
    generate(model, inputs, 8)
    generate(model, inputs, generation_config=transformers.GenerationConfig(max_new_tokens=4, do_sample=False))
    assert made[-3:] == ["DynamicCache", "StaticCache", "StaticCache"]
    assert recorder.replays


def test_long_and_large_caches_stay_dynamic(monkeypatch):
    model, _ = packed("llama", max_position_embeddings=100000)
    inputs, made = prompt(model, 1, 6), caches(model, monkeypatch)
    stop = transformers.StoppingCriteriaList([lambda tokens, scores: torch.ones(1, dtype=torch.bool)])
    model.generate(**inputs, max_length=8193, stopping_criteria=stop)
    model.generate(**inputs, max_length=8194, stopping_criteria=stop)
    assert made == ["StaticCache", "DynamicCache"]
    del model._previous_max_cache_length
    token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, head size, bytes
    monkeypatch.setattr("hf_littlebit.generate.generation._free_memory", lambda device: 4 * token * 25)
    generate(model, inputs, 20)
    del model._previous_max_cache_length
    generate(model, inputs, 21)
    assert made[2:] == ["StaticCache", "DynamicCache"]
    monkeypatch.setattr("hf_littlebit.generate.generation._all_memory", lambda device: 200 * token * 26)
    generate(model, inputs, 21)
    assert made[4:] == ["StaticCache"], "a small cache is made without asking for the free memory"


def test_the_real_recorder_leaves_cpus_alone(monkeypatch, tmp_path):
    dense("llama").save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=config())
    made = caches(model, monkeypatch)
    generate(model, prompt(model, 1, 6), 4)
    assert made == ["DynamicCache"]


def test_a_compile_config_is_left_to_transformers():
    model, recorder = packed("llama")
    out = generate(
        model,
        prompt(model, 1, 6),
        5,
        cache_implementation="static",
        compile_config=CompileConfig(backend="eager", mode=None),
    )
    assert torch.equal(out, eager(model, prompt(model, 1, 6), 5)) and not recorder.replays
    assert hasattr(model, "_compiled_call")


def test_experts_stay_as_they_are(family_dir, monkeypatch):
    model = load(family_dir("mixtral"), quantization_config=config())
    recorder_of(model)
    made = caches(model, monkeypatch)
    generate(model, prompt(model, 1, 6), 4)
    assert made == ["DynamicCache"]
