"""Steps that cannot be recorded or replayed are run eagerly, with the same tokens, and the log says why."""

import pytest
import torch
from recorded_steps import (
    DEVICES,
    cpu_compiles,  # noqa: F401
    eager,
    generate,
    no_gpu,
    packed,
    prompt,
    unfit,
)
from torch.utils._python_dispatch import TorchDispatchMode

from hf_littlebit.generate.decode_graph import DecodeGraphs
from hf_littlebit.generate.obstacle import obstacle
from hf_littlebit.generate.recorder import Constants, Unfit, Watch


class Looks(TorchDispatchMode):
    """A mode that looks at every operator, as profilers do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
def test_hooks_and_wrappers_are_run_in_every_step(device):
    model, recorder = packed("llama", device)
    inputs = prompt(model, 1, 6)
    generate(model, inputs, 8)
    calls = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *args: calls.append(1))
    unfit(model, recorder, inputs)
    assert len(calls) == 16
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    unfit(model, recorder, inputs)
    handle.remove()
    layer = model.model.layers[1]
    layer.forward = layer.forward
    unfit(model, recorder, inputs)
    del layer.forward
    assert obstacle(model) is None
    generate(model, inputs, 8, output_hidden_states=True, return_dict_in_generate=True)
    assert obstacle(model) is None  # what transformers leaves on the modules does nothing
    recorder.replays = 0
    generate(model, inputs, 8)
    assert recorder.replays


def test_states_in_which_nothing_is_replayed():
    model, recorder = packed("llama")
    inputs = prompt(model, 1, 6)
    generate(model, inputs, 8)
    model.train()
    unfit(model, recorder, inputs)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        recorder.replays = 0
        # Not with a static cache: transformers 5.17 cannot write bf16 values beside fp32 keys.
        assert torch.equal(generate(model, inputs, 8), generate(model, inputs, 8, cache_implementation="dynamic"))
        assert recorder.replays == 0
    with Looks():
        unfit(model, recorder, inputs)
    options = {"output_attentions": True, "output_hidden_states": True, "return_dict_in_generate": True}
    recorder.replays = 0
    assert len(generate(model, inputs, 8, cache_implementation="static", **options).hidden_states) == 8
    assert recorder.replays == 0
    generate(model, inputs, 8)
    assert recorder.replays


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_waits_for_the_device_is_refused(device, caplog):
    model, recorder = packed(
        "llama", device, rope_scaling={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    )
    with caplog.at_level("INFO", "hf_littlebit"):
        unfit(model, recorder, prompt(model, 1, 6))
    assert "waits for the device" in caplog.text
    assert model.get_compiled_call.graphs.broken


@pytest.mark.parametrize("device", DEVICES)
def test_a_recording_that_fails_is_given_up(device, caplog, monkeypatch):
    model, recorder = packed("gemma3", device)
    plain = recorder.record

    def fail(step, device):
        plain(step, device)
        raise RuntimeError("no memory for a graph")

    monkeypatch.setattr(recorder, "record", fail)
    unfit(model, recorder, prompt(model, 1, 3))
    assert "no memory for a graph" in caplog.text


def test_constants_are_made_where_nobody_watches():
    # On a GPU making one copies from the host; the meta device stands in for it.
    with Constants(known := {}, recording=False) as constants, Watch(constants) as watch:
        torch.tensor([-1], device="meta")
        assert watch.reason is None and len(known) == 1
        torch.zeros(1).to("meta")
        assert "between devices" in watch.reason
    with Constants(known, recording=True), pytest.raises(Unfit, match="numbers that change, 5"):
        assert torch.tensor([-1], device="meta").is_meta
        torch.tensor(5)


def test_numbers_of_one_step_are_found():
    model, recorder = packed("mistral")
    inputs = prompt(model, 1, 3)
    attention = type(model.model.layers[0].self_attn)
    plain = attention.forward

    def asks(self, hidden_states, *args, **kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        return plain(self, hidden_states + 0 * cache.get_seq_length(), *args, **kwargs)

    def makes(self, hidden_states, *args, **kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        return plain(self, hidden_states + torch.tensor(cache.layers[0].cumulative_length_int), *args, **kwargs)

    for forward in (asks, makes):
        attention.forward = forward
        try:
            model.get_compiled_call.graphs = DecodeGraphs(recorder)
            unfit(model, recorder, inputs)
        finally:
            attention.forward = plain


@no_gpu
def test_cuda_itself_refuses_and_the_next_recording_works(caplog):
    """What no operator shows: the forward waits for its stream, and CUDA spoils the recording."""
    model, recorder = packed("llama", "cuda")
    norm = type(model.model.norm)
    plain = norm.forward

    def waits(self, hidden_states):
        torch.cuda.current_stream().synchronize()
        return plain(self, hidden_states)

    norm.forward = waits
    try:
        unfit(model, recorder, prompt(model, 1, 6))
    finally:
        norm.forward = plain
    assert "without a graph" in caplog.text
    other, own = packed("llama", "cuda")
    inputs = prompt(other, 1, 6)
    assert torch.equal(generate(other, inputs), eager(other, inputs)) and own.replays
