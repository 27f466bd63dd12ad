"""The decode step as a graph: the same tokens and logits as eager code, from steps that were recorded once."""

import pytest
import torch
import transformers
from families import config, load
from recorded_steps import (
    DEVICES,
    MODELS,
    cpu_compiles,  # noqa: F401
    dense,
    eager,
    generate,
    no_gpu,
    packed,
    prompt,
    recorder_of,
)
from transformers import StaticCache

from hf_littlebit import fast_generate, release_graphs, share_inputs, unshare_inputs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_the_tokens_are_those_of_eager_code(name, rows, device):
    model, recorder = packed(name, device)
    for seed, length in enumerate((7, 12, 5)):
        inputs = prompt(model, rows, length, seed)
        expected = eager(model, inputs)
        if device == "cpu":
            assert torch.equal(generate(model, inputs, cache_implementation="dynamic"), expected)
        before = recorder.replays
        assert torch.equal(generate(model, inputs), expected)
        assert recorder.replays > before, "no step was replayed"
    assert len({tuple(row.tolist()) for row in expected}) == rows


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_logits_are_those_of_eager_code(name, device):
    model, recorder = packed(name, device)
    inputs = prompt(model, 2, 6)
    limit = 0 if device == "cpu" else 1e-4
    options = {"return_dict_in_generate": True, "output_logits": True}
    a = generate(model, inputs, 20, cache_implementation="static", disable_compile=True, **options)
    for _ in range(2):
        b = generate(model, inputs, 20, cache_implementation="static", **options)
        assert recorder.replays
        torch.testing.assert_close(torch.stack(b.logits), torch.stack(a.logits), rtol=limit, atol=limit)
        for one, other in zip(a.past_key_values.layers, b.past_key_values.layers, strict=True):
            torch.testing.assert_close(other.keys, one.keys, rtol=limit, atol=limit)
            assert other.cumulative_length == one.cumulative_length
            assert other.get_seq_length() == one.get_seq_length()


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_is_recorded_once_for_prompts_of_all_lengths(device):
    model, recorder = packed("llama", device)
    generate(model, prompt(model, 1, 12), 20)
    for length in (3, 9, 12):
        generate(model, prompt(model, 1, length), 20)
    # One of the step and one of prompts: of three that are filled up to one length the last is replayed.
    assert recorder.recordings == 2
    assert recorder.replays == 17 + 3 * 19 + 1
    generate(model, prompt(model, 1, 12), 40)
    assert recorder.recordings == 3
    assert len(model.get_compiled_call.graphs._homes) == 1  # the shorter one has gone
    release_graphs(model)
    assert not model.get_compiled_call.graphs._homes


@pytest.mark.parametrize("device", DEVICES)
def test_a_window_that_fills_up_has_a_graph_of_its_own(device):
    model, recorder = packed("gemma3", device)
    inputs = prompt(model, 1, 3)
    expected = eager(model, inputs, 20)
    for _ in range(2):
        assert torch.equal(generate(model, inputs, 20), expected)
    assert recorder.recordings == 2


@pytest.mark.parametrize("device", DEVICES)
def test_sampling_draws_the_same(device):
    model, recorder = packed("llama", device)
    inputs = prompt(model, 1, 6)
    found = []
    for options in ({"cache_implementation": "static", "disable_compile": True}, {}, {}):
        torch.manual_seed(5)
        found.append(generate(model, inputs, do_sample=True, temperature=1.3, num_return_sequences=2, **options))
    assert recorder.replays
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("device", DEVICES)
def test_no_grad_and_inference_mode_take_turns(device):
    model, recorder = packed("gemma2", device)
    inputs = prompt(model, 1, 6)
    expected = eager(model, inputs)
    for index in range(4):
        before = recorder.replays
        with torch.inference_mode(index % 2 == 0):
            assert torch.equal(generate(model, inputs), expected)
        assert recorder.replays > before


@pytest.mark.parametrize("device", DEVICES)
def test_a_cache_that_the_user_holds_stays_the_users(device):
    model, recorder = packed("llama", device)
    name = (
        "cache"
        if "cache" in transformers.modeling_outputs.CausalLMOutputWithPast.__annotations__
        else "past_key_values"
    )
    inputs = prompt(model, 1, 6)
    first, second = (StaticCache(config=model.config, max_cache_len=40) for _ in range(2))
    a = generate(model, inputs, 8, **{name: first})
    content = [layer.keys.clone() for layer in first.layers]
    b = generate(model, prompt(model, 1, 9, seed=3), 8, **{name: second})
    assert recorder.recordings == 1 and recorder.replays == 5 + 7
    for layer, keys in zip(first.layers, content, strict=True):
        assert torch.equal(layer.keys, keys)
    # Both go on where they were, in turns.
    for cache, tokens in ((first, a), (second, b)):
        whole = eager(model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, 8)
        more = generate(model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, 8, **{name: cache})
        assert torch.equal(more, whole)


@pytest.mark.parametrize("device", DEVICES)
def test_a_streamer_gets_every_token(device):
    model, recorder = packed("llama", device)
    got = []

    class Streamer:
        def put(self, value):
            got.extend(value.flatten().tolist())

        def end(self):
            got.append("end")

    out = generate(model, prompt(model, 1, 6), streamer=Streamer())
    assert recorder.replays and got == [*out[0].tolist(), "end"]


def test_layers_of_one_input_are_recorded_together_and_apart():
    model, recorder = packed("llama")
    inputs = prompt(model, 1, 6)
    expected = eager(model, inputs)
    for count, switch in enumerate((lambda model: None, share_inputs, unshare_inputs, share_inputs), 1):
        switch(model)
        assert torch.equal(generate(model, inputs), expected)
        assert recorder.recordings == count


def test_a_dense_model_can_have_it_too():
    model = dense("llama")
    inputs = prompt(model, 1, 6)
    expected = eager(model, inputs)
    fast_generate(model)
    recorder = recorder_of(model)
    assert torch.equal(generate(model, inputs), expected) and recorder.replays


@no_gpu
def test_a_packed_model_on_a_gpu(tmp_path):
    dense("llama").save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=config(), device_map="cuda")
    recorder = recorder_of(model)
    inputs = prompt(model, 1, 6)
    expected = eager(model, inputs, 40)
    assert torch.equal(generate(model, inputs, 40), expected)
    assert recorder.recordings == 1 and recorder.replays == 37
