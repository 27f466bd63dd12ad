"""Prompts that are read as graphs: the same tokens and logits as in eager code, whatever their length."""

import pytest
import torch
from recorded_steps import (
    DEVICES,
    MODELS,
    cpu_compiles,  # noqa: F401
    dense,
    eager,
    generate,
    packed,
    prompt,
    recorder_of,
)
from transformers import StaticCache

from hf_littlebit import fast_generate
from hf_littlebit.generate.prompt_graph import filled_length

FULL = [name for name in MODELS if name not in ("gemma2", "gemma3", "mistral")]  # no sliding windows


def read_by_graph(model, recorder, inputs, new=8):
    """(tokens, how many prompts were replayed)."""
    before = recorder.replays
    tokens = generate(model, inputs, new)
    return tokens, recorder.replays - before - (new - 1)


def ready(model, length=56):
    """Generate twice with a cache of that length, so that the decode step is recorded."""
    for seed in range(2):
        generate(model, prompt(model, 1, length - 8, seed), 8)


def test_few_lengths_serve_all_prompts():
    found = [filled_length(length) for length in range(1, 1025)]
    assert all(filled >= length for length, filled in enumerate(found, 1))
    assert len(set(found)) == 16 and max(found) == 1024
    assert all(filled - length < max(32, length / 4) for length, filled in enumerate(found, 1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FULL)
def test_the_tokens_are_those_of_eager_code(name, device):
    model, recorder = packed(name, device)
    ready(model)
    replayed = 0
    for seed, length in enumerate((20, 31, 7, 32, 1, 25)):
        inputs = prompt(model, 1, length, seed)
        expected = eager(model, inputs, 8)
        tokens, prompts = read_by_graph(model, recorder, inputs)
        assert torch.equal(tokens, expected)
        replayed += prompts
    assert replayed == 4  # all but the first, which is watched, and the second, which is recorded


@pytest.mark.parametrize("device", DEVICES)
def test_logits_and_caches_are_those_of_eager_code(device):
    model, recorder = packed("llama", device)
    ready(model)
    options = {"return_dict_in_generate": True, "output_logits": True, "cache_implementation": "static"}
    for seed in range(4):
        inputs = prompt(model, 1, 17 + seed, seed)
        before = recorder.replays
        a = generate(model, inputs, 8, disable_compile=True, **options)
        b = generate(model, inputs, 8, **options)
        assert recorder.replays - before == 7 + (seed > 1)
        torch.testing.assert_close(torch.stack(b.logits), torch.stack(a.logits), rtol=1e-4, atol=1e-4)
        for one, other in zip(a.past_key_values.layers, b.past_key_values.layers, strict=True):
            seen = 17 + seed + 7
            assert one.cumulative_length == other.cumulative_length == seen and other.get_seq_length() == seen
            torch.testing.assert_close(other.keys[:, :, :seen], one.keys[:, :, :seen], rtol=1e-4, atol=1e-4)
            assert vars(other).keys() == vars(one).keys()
            for name in vars(one).keys() - {"keys", "values", "cumulative_length"}:
                assert getattr(one, name) == getattr(other, name), name


@pytest.mark.parametrize("device", DEVICES)
def test_several_sequences_with_padding(device):
    model, recorder = packed("llama", device)
    for seed in range(2):
        generate(model, prompt(model, 3, 48, seed), 8)
    replayed = 0
    for seed, length in enumerate((20, 31, 12, 9)):
        inputs = prompt(model, 3, length, seed)
        tokens, prompts = read_by_graph(model, recorder, inputs)
        assert torch.equal(tokens, eager(model, inputs, 8))
        replayed += prompts
    assert replayed == 2


@pytest.mark.parametrize("device", DEVICES)
def test_what_no_graph_reads(device):
    model, recorder = packed("llama", device)
    inputs = prompt(model, 1, 20)
    ready(model)
    for seed in range(3):
        read_by_graph(model, recorder, prompt(model, 1, 20, seed))
    assert read_by_graph(model, recorder, inputs)[1] == 1
    expected = eager(model, inputs, 8)
    # All logits are wanted; a prompt in chunks; a longer text.
    options = ({"logits_to_keep": 0}, {"prefill_chunk_size": 7}, {"cache_implementation": "dynamic"})
    for more in options:
        before = recorder.replays
        assert torch.equal(generate(model, inputs, 8, **more), expected)
        assert recorder.replays - before <= 7 + 1


@pytest.mark.parametrize("device", DEVICES)
def test_a_cache_that_is_held_keeps_its_text(device):
    model, _ = packed("llama", device)
    ready(model)
    for seed in range(2):
        generate(model, prompt(model, 1, 20, seed), 8)
    held = StaticCache(config=model.config, max_cache_len=55)
    name = "cache" if "cache" in dict(model(prompt(model, 1, 2)["input_ids"], use_cache=True)) else "past_key_values"
    inputs = prompt(model, 1, 20, 5)
    first = generate(model, inputs, 8, **{name: held})
    keys = [layer.keys.clone() for layer in held.layers]
    other = prompt(model, 1, 24, 6)
    assert torch.equal(generate(model, other, 8), eager(model, other, 8))
    for layer, kept in zip(held.layers, keys, strict=True):
        assert torch.equal(layer.keys[:, :, :27], kept[:, :, :27])
    going_on = {"input_ids": first, "attention_mask": torch.ones_like(first)}
    assert torch.equal(generate(model, going_on, 8, **{name: held}), eager(model, going_on, 8))


@pytest.mark.parametrize("device", DEVICES)
def test_a_recording_that_fails_leaves_an_empty_cache(device, monkeypatch, caplog):
    model, recorder = packed("llama", device)
    ready(model)
    inputs = prompt(model, 1, 20)
    expected = eager(model, inputs, 8)
    plain = recorder.record

    def fail(step, device):
        plain(step, device)
        raise RuntimeError("no memory for a graph")

    monkeypatch.setattr(recorder, "record", fail)
    with caplog.at_level("INFO", "hf_littlebit"):
        for _ in range(3):
            assert torch.equal(generate(model, inputs, 8), expected)
    assert "without a graph of the prompt: no memory for a graph" in caplog.text
    monkeypatch.setattr(recorder, "record", plain)
    before = recorder.replays
    assert torch.equal(generate(model, inputs, 8), expected)
    assert recorder.replays - before == 7  # decode steps go on as graphs


def test_a_dense_model_and_another_forward():
    model = dense("llama")
    fast_generate(model)
    recorder = recorder_of(model)
    ready(model)
    calls = []
    handle = model.register_forward_hook(lambda *args: calls.append(1))
    inputs = prompt(model, 1, 20)
    generate(model, inputs, 8)
    assert len(calls) == 8  # a hook sees the prompt as well
    handle.remove()
    for _ in range(3):
        assert torch.equal(read_by_graph(model, recorder, inputs)[0], eager(model, inputs, 8))
