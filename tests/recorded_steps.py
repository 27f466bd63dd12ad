"""Helpers of the tests of decode graphs: a recorder for CPUs, small models, prompts, and what eager code gives.

Like CUDA the recorder takes down operators and addresses, not Python: a replay executes the recorded torch operators on the
recorded tensors, so a number of one step that was baked in gives wrong tokens here too. And like CUDA it computes nothing
while it records, and refuses what waits for the device. On a GPU the same tests run with the real recorder.

A test file imports the fixture `cpu_compiles` with what else it needs: it is for all its tests.
"""

import pytest
import torch
import transformers
from families import FAMILIES, SMALL, config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers import StaticCache
from transformers.generation.utils import GenerationMixin

from hf_littlebit import fast_generate
from hf_littlebit.generate import generation
from hf_littlebit.generate.decode_graph import DecodeGraphs
from hf_littlebit.load.convert import latent_model, pack_model

ATEN = torch.ops.aten
GPU = torch.cuda.is_available()
no_gpu = pytest.mark.skipif(not GPU, reason="no CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=no_gpu)]
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


class CpuRecorder:
    """A recorder whose recordings are lists of operators; it counts recordings and replays."""

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


def unfit(model, recorder, inputs, **options):
    """That nothing is replayed, and the tokens are right."""
    expected = eager(model, inputs, 8)
    recorder.replays = 0
    assert torch.equal(generate(model, inputs, 8, cache_implementation="static", **options), expected)
    assert recorder.replays == 0
