"""Several threads that generate with one model: each gets its own text, whoever records and whoever replays."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import transformers
from recorded_steps import (
    DEVICES,
    cpu_compiles,  # noqa: F401
    eager,
    generate,
    packed,
    prompt,
)
from transformers import StaticCache

from hf_littlebit.generate.decode_graph import HOMES


@pytest.mark.parametrize("device", DEVICES)
def test_two_threads_share_a_model(device):
    model, _ = packed("llama", device)
    jobs = [prompt(model, 1, 6, seed) for seed in range(4)]
    expected = [eager(model, job, 24) for job in jobs]
    found = [None] * len(jobs)

    def work(index):
        found[index] = generate(model, jobs[index], 24)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def together(*works):
    """Run each function in a thread of its own, and raise the first error of them."""
    with ThreadPoolExecutor(len(works)) as pool:
        for job in [pool.submit(work) for work in works]:
            job.result(timeout=120)


class At(transformers.LogitsProcessor):
    """Calls a function once, when a text has so many tokens: between two steps of `generate`."""

    def __init__(self, length, function):
        self.length, self.function = length, function

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == self.length:
            self.function()
        return scores


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_of_a_cache_at_work_are_not_given_to_another_thread(device):
    """What a thread has read of its cache before a step, the count of tokens say, is that of its own text still in the step."""
    model, recorder = packed("llama", device)
    first, second = prompt(model, 1, 6, 0), prompt(model, 1, 9, 1)
    expected = [eager(model, job, 24) for job in (first, second)]
    cache, other = (StaticCache(config=model.config, max_cache_len=40) for _ in range(2))  # alike, so of one home
    name = (
        "cache"
        if "cache" in transformers.modeling_outputs.CausalLMOutputWithPast.__annotations__
        else "past_key_values"
    )
    found = {}

    def meanwhile():
        held = [tensor for layer in cache.layers for tensor in (layer.cumulative_length, layer.keys)]
        before, replays = [tensor.clone() for tensor in held], recorder.replays
        assert replays, "the first text is not in its replays yet"
        together(lambda: found.update(second=generate(model, second, 24, **{name: other})))
        assert recorder.replays > replays, "the second text was to be replayed too"
        assert all(map(torch.equal, held, before))

    processor = transformers.LogitsProcessorList([At(20, meanwhile)])
    together(lambda: found.update(first=generate(model, first, 24, logits_processor=processor, **{name: cache})))
    assert torch.equal(found["first"], expected[0]) and torch.equal(found["second"], expected[1])


@pytest.mark.parametrize("device", DEVICES)
def test_more_threads_than_homes_generate_all_the_same(device, caplog):
    model, _ = packed("llama", device)
    jobs = [prompt(model, 1, 6, seed) for seed in range(HOMES + 2)]
    expected, found = [eager(model, job, 24) for job in jobs], {}
    # All are in the middle of their text at one time.
    processor = transformers.LogitsProcessorList([At(20, threading.Barrier(len(jobs), timeout=60).wait)])

    def work(index):
        found[index] = generate(model, jobs[index], 24, logits_processor=processor)

    with caplog.at_level("INFO", "hf_littlebit"):
        together(*(partial(work, index) for index in range(len(jobs))))
    assert all(torch.equal(found[index], tokens) for index, tokens in enumerate(expected))
    assert f"{HOMES} other threads generate" in caplog.text
    graphs = model.get_compiled_call.graphs
    assert len(graphs._homes) == HOMES and not graphs.broken
