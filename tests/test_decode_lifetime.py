"""Graphs live and die with their model: changed, moved, copied, pickled, saved and deleted models."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from families import load
from recorded_steps import (
    DEVICES,
    cpu_compiles,  # noqa: F401
    eager,
    generate,
    packed,
    prompt,
    recorder_of,
)

from hf_littlebit import fast_generate, plain_generate


@pytest.mark.parametrize("device", DEVICES)
def test_moved_and_changed_models_are_recorded_anew(device):
    model, recorder = packed("llama", device)
    inputs = prompt(model, 1, 6)
    generate(model, inputs)
    with torch.no_grad():
        model.model.norm.weight.mul_(torch.linspace(-2, 2, 64, device=device))
    assert (
        torch.equal(generate(model, inputs), eager(model, inputs)) and recorder.recordings == 1
    )  # in place: the same address
    kept = model.model.norm.weight  # noqa: F841 its address stays taken
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.flip(0).clone())
    assert torch.equal(generate(model, inputs), eager(model, inputs)) and recorder.recordings == 2
    model.to(torch.bfloat16)
    assert torch.equal(generate(model, inputs), eager(model, inputs)) and recorder.recordings == 3
    model.set_attn_implementation("eager")
    assert torch.equal(generate(model, inputs), eager(model, inputs)) and recorder.recordings == 4


@pytest.mark.parametrize("device", DEVICES)
def test_copies_and_pickles_have_graphs_of_their_own(device):
    model, recorder = packed("llama", device)
    inputs = prompt(model, 1, 6)
    expected = generate(model, inputs)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    others = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False))
    replays = recorder.replays
    for other in others:
        assert vars(other)["get_compiled_call"].model is other
        assert vars(other)["_prepare_cache_for_generation"].model is other
        own = recorder_of(other)
        assert torch.equal(generate(other, inputs), expected)
        assert own.replays
    assert recorder.replays == replays


@pytest.mark.parametrize("device", DEVICES)
def test_a_deleted_model_is_freed_at_once(device):
    model, recorder = packed("llama", device)
    for name in ("_upload_modified_files", "save_pretrained"):
        vars(model).pop(name, None)  # it refers to the model, so the collector would have to run
    generate(model, prompt(model, 1, 6))
    assert recorder.replays
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_nothing_is_saved_and_loading_brings_it_back(tmp_path):
    model, _ = packed("llama")
    inputs = prompt(model, 1, 6)
    expected = generate(model, inputs)
    model.save_pretrained(tmp_path)
    assert "static" not in "".join(path.read_text() for path in tmp_path.glob("*.json"))
    again = load(tmp_path)
    own = recorder_of(again)
    assert torch.equal(generate(again, inputs), expected) and own.replays
    plain_generate(again)
    own.replays = 0
    assert torch.equal(generate(again, inputs), expected) and not own.replays
    fast_generate(again)
    own = recorder_of(again)
    assert torch.equal(generate(again, inputs), expected) and own.replays
    again.dequantize()
    assert "get_compiled_call" not in vars(again) and "_prepare_cache_for_generation" not in vars(again)
