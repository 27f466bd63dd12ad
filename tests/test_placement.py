"""Where a model goes while it is converted or read: shards, devices, disk, workers, memory."""

import gc
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest
import torch
from families import build, config, equal_states, load, logits
from torch import nn

from hf_littlebit import LittleBitLinear
from hf_littlebit.load import conversion
from hf_littlebit.placement import container_room, free_memory


def test_sharded_and_shard_sizes(family_dir, tmp_path):
    model = load(family_dir("llama"), quantization_config=config())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    equal_states(model, load(tmp_path))


def test_a_container_has_less_memory_than_its_machine(tmp_path, monkeypatch):
    free = free_memory(torch.device("cpu"))
    group = tmp_path / "memory"
    group.mkdir()
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 300\n")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900\n")
    assert container_room(str(tmp_path)) == math.inf
    (tmp_path / "memory.max").write_text("1000\n")
    assert container_room(str(tmp_path)) == 400
    (group / "memory.limit_in_bytes").write_text("600\n")
    (group / "memory.usage_in_bytes").write_text("500\n")
    (group / "memory.stat").write_text("cache 1\n")
    assert container_room(str(tmp_path)) == 100
    assert container_room(str(tmp_path / "none")) == math.inf
    monkeypatch.setattr("hf_littlebit.placement.container_room", lambda: 100.0)
    assert free_memory(torch.device("cpu")) == 100 < free


@pytest.mark.parametrize("family", ["llama_tied", "mixtral"])
@pytest.mark.parametrize("placement", ["cpu", "auto", "disk", "split"])
def test_device_maps(family, placement, family_dir, tmp_path):
    reference = load(family_dir(family), quantization_config=config())
    expected = logits(reference)
    reference.save_pretrained(tmp_path / "packed")
    if placement == "disk" and version("accelerate") < "1.15":
        pytest.skip("accelerate before 1.15 refuses to put a whole model on disk")
    if placement == "split":
        names = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
        device_map = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    else:
        device_map = {"": "disk"} if placement == "disk" else placement
    for folder, options in ((family_dir(family), {"quantization_config": config()}), (tmp_path / "packed", {})):
        offload = tmp_path / f"offload{len(options)}"
        model = load(folder, device_map=device_map, offload_folder=offload, **options)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
        model.save_pretrained(tmp_path / "again")
        equal_states(load(tmp_path / "again"), reference)


def test_what_the_device_map_counts_with(family_dir):
    """While a dense model is read, sizes are those of the packed model to come, and a tenth of each device is left."""
    from accelerate.utils import compute_module_sizes
    from transformers.quantizers.auto import AutoHfQuantizer

    model = build("mixtral")
    quantizer = AutoHfQuantizer.from_config(config(bpw=3.0), pre_quantized=False)
    quantizer.preprocess_model(model.to("meta"), device_map=None)
    sizes = sum(
        p.numel() * quantizer.param_element_size(model, name, p)
        for name, p in model.named_parameters()
        if "self_attn" in name or "experts" in name
    )
    packed = load(family_dir("mixtral"), quantization_config=config(bpw=3.0))
    expected = sum(
        size for name, size in compute_module_sizes(packed).items() if name.endswith(("self_attn", "experts"))
    )
    assert sizes == expected
    assert quantizer.adjust_max_memory({0: 1000, "cpu": "1GB"}) == {0: 900, "cpu": "1GB"}
    quantizer.pre_quantized = True
    assert quantizer.adjust_max_memory({0: 1000}) == {0: 1000}


def test_workers_give_the_same_model(family_dir):
    equal_states(
        load(family_dir("mixtral"), quantization_config=config(init="admm", steps=5)),
        load(family_dir("mixtral"), quantization_config=config(init="admm", steps=5, workers=3)),
    )


def test_workers_leave_the_number_of_threads_alone(family_dir):
    def in_a_new_thread():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    torch.set_num_threads(4)
    try:
        load(family_dir("llama"), quantization_config=config(workers=2))
        assert torch.get_num_threads() == in_a_new_thread() == 4
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("place", ["disk", torch.device("cpu"), "cpu"])
def test_only_the_disk_takes_workers_away(place, family_dir, tmp_path, monkeypatch, caplog):
    threads = set()
    original = conversion.factor_weight
    monkeypatch.setattr(conversion, "factor_weight", lambda *a: threads.add(threading.get_ident()) or original(*a))
    names = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = {**dict.fromkeys(names, "cpu"), "model.layers.1": place}
    load(family_dir("llama"), quantization_config=config(workers=3), device_map=device_map, offload_folder=tmp_path)
    own = threading.get_ident() in threads
    assert (own, "workers=3 is reduced to 1" in caplog.text) == ((True, True) if place == "disk" else (False, False))


def test_no_dense_weights_are_made_on_reload(family_dir, tmp_path, monkeypatch):
    model = load(family_dir("llama"), quantization_config=config())
    model.save_pretrained(tmp_path)
    sizes = []
    monkeypatch.setattr("hf_littlebit.load.conversion.factor_weight", lambda *a: sizes.append(a))
    again = load(tmp_path)
    largest = max(p.numel() * p.element_size() for n, p in again.named_parameters() if "layers" in n)
    assert not sizes and largest < 96 * 64 * 2  # the smallest bf16 dense matrix of the mlp


@pytest.mark.slow
def test_memory_grows_by_one_layer_at_a_time(tmp_path):
    """While a model is read, no more than one dense weight of it is alive beside the packed parts."""
    dense = build("llama")
    dense.save_pretrained(tmp_path)
    weights = {tuple(p.shape) for n, p in dense.named_parameters() if "proj" in n}
    del dense
    alive = []
    original = conversion.factor_weight

    def of_a_weight():
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.device.type == "cpu"]
        return [t for t in tensors if t.is_floating_point() and tuple(t.shape) in weights]

    earlier = of_a_weight()  # of other tests; held, so that no address of theirs is used again
    others = {t.data_ptr() for t in earlier}

    def spy(weight, *rest):
        alive.append(len({t.data_ptr() for t in of_a_weight()} - others))
        return original(weight, *rest)

    conversion.factor_weight = spy
    try:
        load(tmp_path, quantization_config=config())
    finally:
        conversion.factor_weight = original
    assert len(alive) == 14 and max(alive) <= 1


def test_an_offloaded_model_is_not_half_dequantized(family_dir, tmp_path):
    load(family_dir("llama"), quantization_config=config()).save_pretrained(tmp_path)
    names = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    model = load(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    with pytest.raises(ValueError, match=r"layers\.1.* is offloaded"):
        model.dequantize()
    assert isinstance(model.model.layers[0].mlp.up_proj, LittleBitLinear)
