"""The benchmark of whole models: what it measures on tiny ones, by which weights, the clock, and what it refuses."""

import json
import math
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from families import SMALL, build, config, load
from torch import nn
from transformers import CompileConfig

from hf_littlebit import LittleBitConfig, LittleBitLinear
from hf_littlebit.command.cli import main
from hf_littlebit.layers.shared_input import share_inputs
from hf_littlebit.load.meta_model import empty_model
from hf_littlebit.plan import plan_model
from hf_littlebit.report.bench import clock, machine
from hf_littlebit.report.bench.bench import bench, compare, load_models
from hf_littlebit.report.bench.contender import MODES, Setting
from hf_littlebit.report.bench.random_weights import random_state
from hf_littlebit.report.bench.trace import Load, Trace, load_of

QUICK = {"prompt": 5, "new": 3, "rounds": 2}
FAST = ["--prompt-tokens", "5", "--max-new-tokens", "3", "--rounds", "2"]


@pytest.fixture(scope="module")
def packed(family_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "packed"
    load(family_dir("llama"), quantization_config=config()).save_pretrained(folder)
    return str(folder)


def check(result, kinds=("dense", "packed")):
    assert tuple(result.models) == kinds
    for speed in result.models.values():
        assert speed.prefill > 0 and speed.decode > 0 and speed.weight_bytes > 0
        assert (speed.growth_bytes or 0) >= 0
        for spent in (speed.prefill_ms, speed.decode_ms):
            assert tuple(spent) == clock.PARTS and all(math.isfinite(ms) and ms > 0 for ms in spent.values())
    assert json.loads(json.dumps(result.as_dict()))["machine"]["torch"] == torch.__version__
    return result


@pytest.mark.parametrize("family", ["llama", "llama_tied", "opt", "gemma3", "mixtral", "qwen3_moe"])
def test_a_config_alone_is_measured_with_random_weights(family, tmp_path):
    build(family).config.save_pretrained(tmp_path)
    result = check(bench(str(tmp_path / "config.json"), config(), **QUICK))
    dense, packed = result.models["dense"], result.models["packed"]
    assert dense.weights == packed.weights == "random" and dense.load_seconds is None
    assert dense.weight_bytes > packed.weight_bytes
    assert result.ratio["weights"] == packed.weight_bytes / dense.weight_bytes
    table = result.table()
    assert all(part in table for part in (*clock.PARTS, "total", "packed / dense", "decode tok/s", "100 %"))


def test_a_folder_is_loaded_and_its_other_form_is_made(packed, family_dir):
    result = check(bench(packed, **QUICK))
    assert [speed.weights for speed in result.models.values()] == ["random", "loaded"]
    assert result.models["packed"].load_seconds > 0
    result = check(bench(family_dir("llama"), config(), **QUICK))
    assert [speed.weights for speed in result.models.values()] == ["loaded", "random"]
    result = check(bench(packed, packed_only=True, **QUICK), ("packed",))
    assert not result.ratio and "dense" not in result.table()


def test_shared_inputs_are_a_third_model(packed, family_dir, tmp_path, capsys):
    assert main(["bench", packed, *FAST, "--packed-only", "--share-inputs", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["models"]) == ["packed", "shared"] and not found["ratio"]
    assert list(found["shared_ratio"]) == ["prefill", "decode", "decode_cpu"] and found["shared_ratio"]["decode"] > 0
    result = check(bench(packed, share_inputs=True, **QUICK), ("dense", "packed", "shared"))
    assert result.ratio["decode"] > 0 and "shared / packed" in result.table()
    build("phi3").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="leave --share-inputs"):
        bench(str(tmp_path / "config.json"), config(), share_inputs=True, **QUICK)


def test_the_mode_says_how_generate_is_called(packed, monkeypatch):
    """Rounds are called as the mode says; the clock's rounds are eager, because a graph would not run its hooks."""
    calls = []

    def generate(model, tokens, streamer=None, max_new_tokens=0, attention_mask=None, **options):
        options.pop("compile_config", None)
        calls.append((type(streamer).__name__, options))
        for _ in range(max_new_tokens + 1 if streamer else 0):
            streamer.put(None)

    models = load_models(packed, None, packed_only=True)
    monkeypatch.setattr(type(models.contenders["packed"].model), "generate", generate)
    eager = {"cache_implementation": "dynamic", "disable_compile": True}
    asked = {"plain": {}, "eager": eager, "compiled": {"cache_implementation": "static"}}
    assert tuple(asked) == MODES
    for mode, options in asked.items():
        calls.clear()
        compare(models, Setting(5, 3, mode=mode), rounds=2, shares=1)
        warm = [("NoneType", options)] * (4 if mode == "compiled" else 1)
        assert calls == [*warm, *[("Ticks", options)] * 2, ("Clock", eager)]


@pytest.mark.parametrize("mode", ["plain", "eager"])
def test_a_batch_is_measured(packed, mode):
    result = check(bench(packed, packed_only=True, batch=3, mode=mode, **QUICK), ("packed",))
    assert result.batch == 3 and f"3 new tokens, batch of 3, {mode}\n" in result.table()


def test_models_are_loaded_once_for_several_settings(packed):
    models = load_models(packed, None)
    first, second = compare(models, Setting(5, 3), 2, shares=0), compare(models, Setting(4, 6, 2, "eager"), 2)
    assert not first.models["packed"].decode_ms and "a step of" not in first.table()
    check(second)
    assert (second.prompt, second.new, second.batch, second.mode) == (4, 6, 2, "eager")


def test_a_model_stays_as_it_was_loaded_unless_both_ways_are_compared(packed):
    """Whether layers share their input by default is the model's choice, and part of what a user gets."""
    contender = load_models(packed, None, packed_only=True).contenders["packed"]
    layers = [module for module in contender.model.modules() if isinstance(module, LittleBitLinear)]
    share_inputs(contender.model)
    contender.switch()
    assert any(layer.group is not None for layer in layers)
    other = contender.sharing()
    contender.switch()
    assert all(layer.group is None for layer in layers)
    other.switch()
    assert any(layer.group is not None for layer in layers)


def test_every_generation_is_as_long_as_asked(packed, monkeypatch):
    """An end of text would end a random model's text at random."""
    lengths, ticks = [], clock.Ticks.put
    monkeypatch.setattr(clock.Ticks, "put", lambda self, value: (lengths.append(value.numel()), ticks(self, value)))
    bench(packed, packed_only=True, prompt=7, new=40, rounds=3)
    assert lengths == ([7] + [1] * 40) * 6


def test_the_stand_in_is_the_model_that_would_be_saved(packed):
    source = empty_model(build("llama").config)
    state = random_state(source, torch.bfloat16, (plan_model(source, config()), config()))
    stored = load(packed).state_dict()
    assert {name: value.shape for name, value in state.items()} == {k: v.shape for k, v in stored.items()}
    for name, value in state.items():
        assert value.is_floating_point() or value.dtype == stored[name].dtype
        if value.dtype == torch.int32 and value.numel():
            assert abs((value < 0).float().mean() - 0.5) < 3 / value.numel() ** 0.5  # six standard deviations


def test_the_stand_in_has_finite_activations(tmp_path):
    model = build("llama")
    state = random_state(
        empty_model(model.config), torch.float32, (plan_model(model, config(bpw=1.5)), config(bpw=1.5))
    )
    options = model.config
    options.quantization_config = config(bpw=1.5).to_dict()
    packed = type(model).from_pretrained(None, config=options, state_dict=state)
    hidden = packed(torch.arange(24)[None], output_hidden_states=True).hidden_states
    assert all(1e-3 < layer.std() < 1e3 for layer in hidden)


# -- the clock ------------------------------------------------------------------------------------------------------------


class Waits(nn.Module):
    """Takes `seconds` of a clock that only such modules set forward, around `inner`."""

    now = 0.0

    def __init__(self, seconds, inner=None):
        super().__init__()
        self.seconds, self.inner = seconds, inner

    def forward(self, x):
        Waits.now += self.seconds
        if self.inner is not None:
            self.inner(x)
        Waits.now += self.seconds


def test_time_goes_to_the_innermost_part(monkeypatch):
    monkeypatch.setattr(clock.time, "perf_counter", lambda: Waits.now)
    inner = Waits(1)
    outer, other = Waits(10, inner), Waits(100)
    watch = clock.Clock({inner: "linear layers", outer: "attention"}, torch.device("cpu"))

    def run(streamer):
        streamer.put(None)  # the prompt
        outer(0)
        other(0)
        streamer.put(None)
        for _ in range(3):
            outer(0)
            streamer.put(None)

    watch.measure(run)
    assert watch.prefill == {"linear layers": 2, "output head": 0, "attention": 20, "norms": 0, "rest": 200}
    assert watch.decode == {"linear layers": 6, "output head": 0, "attention": 60, "norms": 0, "rest": 0}
    assert not inner._forward_hooks and not outer._forward_pre_hooks


@pytest.mark.subprocess
def test_memory_that_work_takes_is_seen():
    """In a process of its own: after other tests, freed memory that is still resident serves again without growth."""
    code = (
        "import torch; from hf_littlebit.report.bench import machine\n"
        "with machine.PeakMemory(torch.device('cpu')) as memory: torch.ones(1 << 24)\n"
        "print(memory.growth)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    grown = done.stdout.split()[-1]
    assert grown == "None" or 0.9 * (1 << 26) < int(grown) < 2 * (1 << 26)


def test_compiled_decoding_is_measured(packed, monkeypatch):
    quick = partial(CompileConfig, backend="aot_eager", mode=None, fullgraph=True)
    monkeypatch.setattr("hf_littlebit.report.bench.contender.CompileConfig", quick)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    lengths, ticks = [], clock.Ticks.put
    monkeypatch.setattr(clock.Ticks, "put", lambda self, value: (lengths.append(value.numel()), ticks(self, value)))
    result = bench(packed, packed_only=True, **QUICK, mode="compiled")
    assert result.mode == result.as_dict()["mode"] == "compiled" and ", compiled" in result.table()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 and lengths == ([5] + [1] * 3) * 4
    assert result.models["packed"].decode_ms["linear layers"] > 0


# -- the host and the device ----------------------------------------------------------------------------------------------


def test_the_host_clock_takes_the_linear_layers_of_decoding(monkeypatch):
    monkeypatch.setattr(clock.time, "perf_counter", lambda: Waits.now)
    first, second, other = Waits(1e-6), Waits(3e-6), Waits(1)
    watch = clock.HostClock({first: "linear layers", second: "linear layers", other: "attention"})

    def run(streamer):
        streamer.put(None)  # the prompt
        for factor in (1000, 100, 1, 2, 3):  # the prompt's step and the first after it are left out
            first.seconds, second.seconds = 1e-6 * factor, 3e-6 * factor
            first(0), second(0), other(0)
            streamer.put(None)

    assert watch.measure(run) == pytest.approx(8)  # calls of 4 and 12, in the step of the median
    assert not first._forward_hooks and not first._forward_pre_hooks
    assert clock.HostClock({other: "attention"}).measure(run) is None


def test_the_host_clock_in_generate(packed):
    contender = load_models(packed, None, packed_only=True).contenders["packed"]
    setting = Setting(5, 4)
    watch = clock.HostClock(contender.groups)
    spent = watch.measure(lambda streamer: contender.generate(contender.tokens(setting), setting, streamer))
    assert 1 < spent < 1e5 and len(watch.steps) == 3


def test_a_trace_counts_what_runs_on_the_device():
    events = [
        ("kernel", 0.0, 5.0),
        ("gpu_memcpy", 7.0, 1.0),
        ("kernel", 10.0, 2.0),
        ("gpu_user_annotation", 0.0, 100.0),
        ("cuda_runtime", 0.0, 9.0),
    ]

    def load(*more):
        every = [{"cat": kind, "ts": start, "dur": spent} for kind, start, spent in (*events, *more)]
        return load_of({"traceEvents": [*every, {"name": "metadata"}]}, 2)

    assert load() == Load(1.5, 4.0)
    # One that starts before the one before it has ended, and one inside of it.
    assert load(("kernel", 4.0, 2.0), ("kernel", 10.5, 1.0)) == Load(2.5, 4.5)
    assert load_of({"traceEvents": []}, 2) is None


def test_a_trace_is_taken_of_some_tokens(packed, caplog):
    contender = load_models(packed, None, packed_only=True).contenders["packed"]
    for new, steps in ((4, 3), (14, 8)):
        setting, trace = Setting(5, new), Trace(torch.device("cpu"))
        tokens = contender.tokens(setting)
        assert trace.measure(lambda streamer: pytest.fail("nothing to trace")) is None
        trace.activity = torch.profiler.ProfilerActivity.CPU
        assert trace.measure(partial(_streamed, contender, tokens, setting)) is None and trace.steps == steps
    assert not caplog.records
    trace = Trace(torch.device("cpu"))
    trace.activity = "nothing that can be traced"
    assert trace.measure(partial(_streamed, contender, tokens, setting)) is None
    assert "the profiler does not work here" in caplog.text


def _streamed(contender, tokens, setting, streamer):
    contender.generate(tokens, setting, streamer)


def test_figures_of_a_gpu_are_in_the_table(packed):
    result = bench(packed, packed_only=True, **QUICK)
    assert "kernels per token" not in result.table()
    speed = result.models["packed"]
    speed.linear_host_us, speed.kernels = 29.6, 1500.0
    assert re.search(r"packed +30 +1500 +-\n", result.table())


def test_the_kernel_that_runs_is_named(monkeypatch):
    monkeypatch.setenv("LITTLEBIT_BACKEND", "")
    monkeypatch.setattr(machine.gpu, "load", lambda: True)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.6.0"))
    assert [machine.kernel(device) for device in ("cuda", "cuda:1", "xpu")] == ["triton 3.6.0"] * 3
    assert machine.kernel("mps") == "reference" and machine.kernel("cpu") == machine.machine()["kernel"]
    monkeypatch.setenv("LITTLEBIT_BACKEND", "triton")
    assert machine.kernel("cpu") == "triton 3.6.0"
    monkeypatch.setattr(machine.gpu, "load", lambda: False)
    assert machine.kernel("cuda") == machine.kernel("cpu") == "reference"
    monkeypatch.setenv("LITTLEBIT_BACKEND", "reference")
    assert machine.kernel("cpu") == machine.kernel("cuda") == "reference"


# -- errors and the command -----------------------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_refused(packed, family_dir, tmp_path):
    dense = family_dir("llama")
    with pytest.raises(ValueError, match="BertForMaskedLM is no causal language model"):
        bench(family_dir("bert"), config())
    with pytest.raises(ValueError, match=r"dense model; say .* --bpw 0\.55"):
        bench(dense)
    with pytest.raises(ValueError, match=r"quantized already, at 2\.5 bits"):
        bench(packed, config())
    with pytest.raises(ValueError, match="'latent', which is for training"):
        bench(dense, config(format="latent"))
    load(family_dir("mixtral"), quantization_config=config()).save_pretrained(tmp_path / "experts")
    with pytest.raises(ValueError, match=r"packed experts, .* leave --compile"):
        bench(str(tmp_path / "experts"), packed_only=True, **QUICK, mode="compiled")
    limit = SMALL["max_position_embeddings"]
    with pytest.raises(ValueError, match=f"60 tokens of prompt and 5 new ones exceed the context of {limit}"):
        bench(packed, prompt=60, new=5)
    with pytest.raises(ValueError, match="mode is 'fast'; it must be one of plain, eager, compiled"):
        bench(packed, mode="fast")
    for option, value, least in (("prompt", 0, 1), ("new", 1, 2), ("rounds", 0, 1), ("batch", 0, 1)):
        with pytest.raises(ValueError, match=f"{option} is {value}; it must be at least {least}"):
            bench(packed, **{option: value})


def test_the_command(packed, tmp_path, capsys):
    assert main(["bench", packed, *FAST]) == 0
    assert "packed / dense" in capsys.readouterr().out
    build("llama").config.save_pretrained(tmp_path)
    threads = torch.get_num_threads()
    asked = ["--bpw", "2.5", "--init", "dual_svid", "--threads", str(threads), "--packed-only", "--json"]
    assert main(["bench", str(tmp_path / "config.json"), *FAST, *asked, "--dtype", "float32"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert list(figures["models"]) == ["packed"] and figures["prompt"] == 5 and figures["new"] == 3
    assert figures["machine"]["threads"] == threads
    plan = plan_model(empty_model(build("llama").config), LittleBitConfig(bpw=2.5, init="dual_svid"))
    assert figures["bpw"] == plan.bpw
    assert main(["bench", packed, *FAST, "--packed-only", "--json", "--mode", "eager", "--batch-size", "2"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["mode"] == "eager" and figures["batch"] == 2
    assert main(["bench", packed, "--threads", "0"]) == 2
    assert "--threads is 0; it must be at least 1" in capsys.readouterr().err
