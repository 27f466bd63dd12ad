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

from hf_littlebit.generate.compiled_step import compiled_step


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


COMPILED = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager", mode="reduce-overhead")}


def test_a_step_that_is_to_be_compiled_is_recorded_as_torch_compile_makes_it():
    model, recorder = packed("llama")
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed in range(2):
        inputs = prompt(model, 1, 6, seed)
        before = recorder.replays
        assert torch.equal(generate(model, inputs, 8, **COMPILED), eager(model, inputs, 8))
        # Of seven steps the first is watched, and two compile and run what the fourth records; a second text only replays.
        assert recorder.replays - before == (4, 7)[seed]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs and recorder.recordings == 1
    # The step that is not compiled has a recording of its own; so has the prompt, which is recorded now.
    assert torch.equal(generate(model, inputs, 8), eager(model, inputs, 8))
    assert recorder.recordings == 3


def test_what_is_compiled_but_not_recorded():
    options = CompileConfig(mode=None, options={"triton.cudagraphs": True})
    assert compiled_step(options) is None and compiled_step(CompileConfig(backend=lambda graph, _: graph)) is None
    assert (
        compiled_step(CompileConfig()) is compiled_step(CompileConfig()) is not compiled_step(CompileConfig(mode=None))
    )
    # A sliding-window layer counts in Python, which compiled code may do otherwise: as transformers has it.
    model, recorder = packed("gemma2")
    inputs = prompt(model, 1, 6)
    assert torch.equal(generate(model, inputs, 8, **COMPILED), eager(model, inputs, 8))
    assert not recorder.replays and hasattr(model, "_compiled_call")


def test_experts_stay_as_they_are(family_dir, monkeypatch):
    model = load(family_dir("mixtral"), quantization_config=config())
    recorder_of(model)
    made = caches(model, monkeypatch)
    generate(model, prompt(model, 1, 6), 4)
    assert made == ["DynamicCache"]
