"""The decode step as a graph: the same tokens as eager code, from every way of calling `generate`.

On a CPU a stand-in records. Like CUDA it takes down operators and addresses, not Python: a replay executes the recorded torch
operators on the recorded tensors, so a number of one step that was baked in gives wrong tokens here too. And like CUDA it
computes nothing while it records, and refuses what waits for the device. The same cases run on a GPU where there is one.
"""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
import transformers
from families import FAMILIES, SMALL, config, load
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.generation.utils import GenerationMixin

from hf_littlebit import fast_generate, plain_generate, release_graphs, share_inputs, unshare_inputs
from hf_littlebit.generate import generation
from hf_littlebit.generate.decode_graph import DecodeGraphs, obstacle
from hf_littlebit.generate.recorder import Constants, Unfit, Watch
from hf_littlebit.load.convert import latent_model, pack_model

ATEN = torch.ops.aten
GPU = torch.cuda.is_available()
no_gpu = pytest.mark.skipif(not GPU, reason="no CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[no_gpu, pytest.mark.gpu])]
WINDOW = {"sliding_window": 8}
MODELS = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "opt": ("opt", {}),
    "phi3": ("phi3", {}),
    "gemma2": ("gemma2", WINDOW),
    "gemma3": ("gemma3", {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
    "mistral": ("mistral", WINDOW),
}


class Recorded(TorchDispatchMode):
    """Takes operators down as they are executed, and undoes what they wrote to tensors that were there before."""

    def __init__(self):
        super().__init__()
        self.steps, self.made, self.before = [], {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.equal.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        if func is ATEN.lift_fresh.default:
            raise RuntimeError("a tensor is made from numbers of the host while capturing")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage.data_ptr() not in self.made and storage.data_ptr() not in self.before:
                    self.before[storage.data_ptr()] = (storage, storage.clone())
        result = func(*args, **kwargs)
        outputs = result if isinstance(result, tuple | list) else (result,)
        for value in outputs:
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in self.before:
                given = {v.untyped_storage().data_ptr() for v in args if isinstance(v, torch.Tensor)}
                if value.untyped_storage().data_ptr() not in given:
                    self.made[value.untyped_storage().data_ptr()] = value  # kept: its address is not used again
        self.steps.append((func, args, kwargs, result))
        return result

    def undo(self):
        for storage, content in self.before.values():
            storage.copy_(content)

    def replay(self, result):
        """Execute all steps again; results replace those of the recording, wherever these were used, and fill `result`."""
        values = {}

        def now(value):
            return values.get(id(value), value) if isinstance(value, torch.Tensor) else value

        with torch.no_grad():
            for func, args, kwargs, old in self.steps:
                new = func(*tree_map(now, args), **tree_map(now, kwargs))
                pairs = zip(old, new, strict=True) if isinstance(old, tuple | list) else [(old, new)]
                for a, b in pairs:
                    if isinstance(a, torch.Tensor):
                        values[id(a)] = b
            result.copy_(values[id(result)])


class Looks(TorchDispatchMode):
    """A mode that looks at every operator, as profilers do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class CpuRecorder:
    """See the module's text."""

    device_types = ("cpu",)

    def __init__(self):
        self.replays = self.recordings = 0

    def busy(self):
        return False

    def stream(self, device):
        return 0

    def warm_up(self, step, device):
        return step()

    def record(self, step, device):
        recorded = Recorded()
        try:
            with recorded:
                output = step()
        finally:
            recorded.undo()
        self.recordings += 1
        logits = output["logits"]

        def replay():
            self.replays += 1
            recorded.replay(logits)

        return replay, output


def counted(recorder):
    """A CudaRecorder that counts like the CPU's."""
    recorder.replays = recorder.recordings = 0
    record = recorder.record

    def counting(step, device):
        replay, output = record(step, device)
        recorder.recordings += 1

        def replays():
            recorder.replays += 1
            replay()

        return replays, output

    recorder.record = counting
    return recorder


@pytest.fixture(autouse=True)
def cpu_compiles(monkeypatch):
    """`generate` asks for a compiled call on a CPU too, where the cache is static."""
    plain = GenerationMixin._valid_auto_compile_criteria

    def criteria(self, model_kwargs, generation_config):
        if self.device.type != "cpu" or generation_config.disable_compile:
            return plain(self, model_kwargs, generation_config)
        cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
        return isinstance(cache, StaticCache)

    monkeypatch.setattr(GenerationMixin, "_valid_auto_compile_criteria", criteria)
    real = generation._free_memory
    monkeypatch.setattr(generation, "_free_memory", lambda device: 2**40 if device.type == "cpu" else real(device))
    monkeypatch.setattr(generation, "_all_memory", lambda device: 0)


def dense(name, **more):
    family, options = MODELS[name]
    kind = getattr(transformers, FAMILIES[family][0])
    torch.manual_seed(0)
    options = {**SMALL, "eos_token_id": None, "initializer_range": 0.3, **FAMILIES[family][1], **options, **more}
    return kind(kind.config_class(**options)).eval()


def packed(name, device="cpu", **more):
    """A packed model; on a GPU a dense one, which is recorded in the same way and needs no kernels compiled."""
    model = dense(name, **more).to(device)
    if device == "cpu":
        model = pack_model(latent_model(model, config(), progress=False))
    else:
        fast_generate(model)
    return model, recorder_of(model)


def recorder_of(model):
    """The recorder of `model`: on a CPU the stand-in, put in place; on a GPU the real one."""
    call = vars(model)["get_compiled_call"]
    if model.device.type == "cpu":
        call.graphs = DecodeGraphs(CpuRecorder())
    else:
        counted(call.graphs.recorder)
    return call.graphs.recorder


def prompt(model, rows, length, seed=0):
    """Tokens and mask, padded on the left: row i lacks 2 i tokens."""
    tokens = torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    for row in range(rows):
        mask[row, : 2 * row] = 0
    return {"input_ids": (tokens * mask).to(model.device), "attention_mask": mask.to(model.device)}


def generate(model, inputs, new=16, **options):
    return model.generate(**inputs, **{"max_new_tokens": new, "do_sample": False, **options})


def eager(model, inputs, new=16, **options):
    return generate(model, inputs, new, cache_implementation="static", disable_compile=True, **options)


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
    assert recorder.recordings == 1
    assert recorder.replays == 17 + 3 * 19
    generate(model, prompt(model, 1, 12), 40)
    assert recorder.recordings == 2
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


def caches(model, monkeypatch):
    """Names of the kinds of caches that `generate` makes, appended as it makes them."""
    made = []
    plain = vars(model)["_prepare_cache_for_generation"]

    def noted(generation_config, model_kwargs, *rest):
        asked = generation_config.cache_implementation
        plain(generation_config, model_kwargs, *rest)
        assert generation_config.cache_implementation == asked
        made.append(type(model_kwargs.get("cache", model_kwargs.get("past_key_values"))).__name__)

    monkeypatch.setitem(vars(model), "_prepare_cache_for_generation", noted)
    return made


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


def unfit(model, recorder, inputs, **options):
    """That nothing is replayed, and the tokens are right."""
    expected = eager(model, inputs, 8)
    recorder.replays = 0
    assert torch.equal(generate(model, inputs, 8, cache_implementation="static", **options), expected)
    assert recorder.replays == 0


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
    vars(model).pop("_upload_modified_files", None)  # it refers to the model, so the collector would have to run
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


def test_layers_of_one_input_are_recorded_together_and_apart():
    model, recorder = packed("llama")
    inputs = prompt(model, 1, 6)
    expected = eager(model, inputs)
    for count, switch in enumerate((lambda model: None, share_inputs, unshare_inputs, share_inputs), 1):
        switch(model)
        assert torch.equal(generate(model, inputs), expected)
        assert recorder.recordings == count


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


def test_experts_stay_as_they_are(family_dir, monkeypatch):
    model = load(family_dir("mixtral"), quantization_config=config())
    recorder_of(model)
    made = caches(model, monkeypatch)
    generate(model, prompt(model, 1, 6), 4)
    assert made == ["DynamicCache"]


def test_a_dense_model_can_have_it_too():
    model = dense("llama")
    inputs = prompt(model, 1, 6)
    expected = eager(model, inputs)
    fast_generate(model)
    recorder = recorder_of(model)
    assert torch.equal(generate(model, inputs), expected) and recorder.replays


@pytest.mark.gpu
@no_gpu
def test_a_packed_model_on_a_gpu(tmp_path):
    dense("llama").save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=config(), device_map="cuda")
    recorder = recorder_of(model)
    inputs = prompt(model, 1, 6)
    expected = eager(model, inputs, 40)
    assert torch.equal(generate(model, inputs, 40), expected)
    assert recorder.recordings == 1 and recorder.replays == 37


@pytest.mark.gpu
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
