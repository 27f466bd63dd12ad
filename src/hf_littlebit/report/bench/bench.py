"""The speed of a model in plain `generate`: tokens per second, memory, and where the time goes, dense against packed.

    prefill   tokens of the prompts / seconds from the call of `generate` to the first new tokens
    decode    the other new tokens, of all sequences / seconds from the first to the last
    per CPU s the same, by the process's CPU seconds, all threads together: on a busy machine, and with one thread, about
              what the model does on a quiet one; with more threads, their waiting counts too

The two models take turns in one process, so that a busy moment of the machine meets both, and medians over the rounds are
given; a ratio is the median of the rounds' ratios. What is not on the disk (the packed form of a dense model, the dense form
of a packed one, both of a bare config.json) is made of random weights.

Memory is what the parameters and buffers take, and the peak adds what the process grew by in the first generation. The
parts' shares come from rounds of their own, because their clock (clock.py) costs time itself; those rounds are eager,
whatever the mode. On a GPU there are three more figures: the host's time for one call of a linear layer (eager, nothing
waited for), the kernels of one decoded token, and how long they run.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tabulate import tabulate

from ... import compat
from ...config import LittleBitConfig
from ...layers.shared_input import siblings
from ...load.meta_model import empty_model
from ...load.source import Source, find_source
from ...plan import plan_model
from ..size_report import format_bytes
from .clock import PARTS, Clock, HostClock, Ticks
from .contender import Contender, Setting
from .machine import PeakMemory, machine, wait
from .trace import Trace

__all__ = ["Bench", "Models", "Speed", "bench", "compare", "load_models"]

SHARES = 3  # rounds with the clock
WARM_UP = {
    "compiled": 3,
    "plain": 3,
    "eager": 0,
}  # generations before the first: compiling, recording the graphs of a step and of a prompt, replaying them


@dataclass
class Speed:
    """One model: medians over the rounds. Bytes, tokens per second, and milliseconds per step by part.

    The last three are None on a CPU, and where they could not be taken.
    """

    weights: str  # "loaded" or "random"
    load_seconds: float | None  # None for random ones
    weight_bytes: int
    growth_bytes: int | None  # None where the system does not tell
    prefill: float = 0.0
    decode: float = 0.0
    decode_cpu: float = 0.0  # tokens per CPU second
    prefill_ms: dict[str, float] = field(default_factory=dict)  # of the whole step
    decode_ms: dict[str, float] = field(default_factory=dict)  # of one token of every sequence
    linear_host_us: float | None = None  # of one call of a linear layer
    kernels: float | None = None  # of one step of decoding
    gpu_us: float | None = None  # that they run


@dataclass
class Bench:
    """What `bench` measured: a model, how it was asked to generate, and the figures of each of its forms."""

    model: str
    bpw: float  # real, over the replaced layers
    prompt: int
    new: int
    batch: int
    mode: str  # of contender.MODES
    rounds: int
    models: dict[str, Speed]  # "dense", "packed" and "shared": packed with shared inputs
    ratio: dict[str, float]  # packed over dense; empty without the dense model
    shared_ratio: dict[str, float]  # shared over packed; empty without the shared one
    machine: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {"benchmark": "generate", **asdict(self)}

    def table(self) -> str:
        """The figures, and what each part of the model takes of a step."""
        rows: list[list[str]] = []
        for name, speed in self.models.items():
            growth = "-" if speed.growth_bytes is None else format_bytes(speed.weight_bytes + speed.growth_bytes)
            memory = [format_bytes(speed.weight_bytes), growth]
            rows.append([name, f"{speed.prefill:.2f}", f"{speed.decode:.2f}", f"{speed.decode_cpu:.2f}", *memory])
            rows[-1].append("-" if speed.load_seconds is None else f"{speed.load_seconds:.2f}")
        if self.ratio:
            rows.append(["packed / dense", *(f"{value:.3g}" for value in self.ratio.values())])
        if self.shared_ratio:
            rows.append(["shared / packed", *(f"{value:.3g}" for value in self.shared_ratio.values())])
        head = ["", "prefill tok/s", "decode tok/s", "per CPU s", "weights", "peak", "load s"]
        tables = [tabulate(rows, head, disable_numparse=True)]
        if any(speed.linear_host_us is not None or speed.kernels is not None for speed in self.models.values()):
            tables.append(self._device_table())
        if any(speed.decode_ms for speed in self.models.values()):
            tables.append(self._shares_table())
        batch = f", batch of {self.batch}" if self.batch > 1 else ""
        tables.insert(
            0,
            f"{self.model}, {self.bpw:.3g} bits per weight, {self.machine['device']} ({self.machine['kernel']}), "
            f"{self.machine['threads']} thread(s), prompt of {self.prompt}, {self.new} new tokens{batch}, {self.mode}",
        )
        return "\n\n".join(tables)

    def _device_table(self) -> str:
        """What decoding asks of the host and of the GPU."""
        rows = []
        for name, speed in self.models.items():
            busy = None if speed.gpu_us is None else speed.gpu_us / 1000
            figures = ((speed.linear_host_us, ".0f"), (speed.kernels, ".0f"), (busy, ".2f"))
            rows.append([name, *("-" if value is None else format(value, form) for value, form in figures)])
        head = ["", "host µs per linear call", "kernels per token", "GPU ms per token"]
        return tabulate(rows, head, disable_numparse=True)

    def _shares_table(self) -> str:
        times = [(name, step) for name in self.models for step in ("prefill", "decode")]
        shares = []
        for part in (*PARTS, "total"):
            cells = []
            for name, step in times:
                spent = getattr(self.models[name], f"{step}_ms")
                total = sum(spent.values())
                ms = total if part == "total" else spent.get(part, 0.0)
                cells.append(f"{ms:.1f} ms ({100 * ms / total:.0f} %)")
            shares.append([part, *cells])
        where = ["a step of", *(f"{name} {step}" for name, step in times)]
        return tabulate(shares, where, disable_numparse=True)


def bench(
    name: str,
    config: LittleBitConfig | None = None,
    *,
    packed_only: bool = False,
    prompt: int = 32,
    new: int = 32,
    rounds: int = 5,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    batch: int = 1,
    mode: str = "plain",
    share_inputs: bool = False,
) -> Bench:
    """Measure a causal language model, dense and packed.

    Args:
        name: a packed folder; a dense folder, Hub id or config.json with `config`.
        packed_only: leave the dense model out, where memory does not hold both.
        prompt, new: tokens that are read and made. rounds: turns of each model. batch: sequences at a time.
        dtype: of what is dense; that of the model by default, bf16 where its config names none.
        mode: "plain", "eager" or "compiled", see contender.py.
        share_inputs: also measure the packed model with layers of one input in one call (shared_input.py).

    Raises:
        ValueError: for a model that cannot generate, sizes beyond its context, or a dense one without `config`.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be at least 1")
    setting = Setting(prompt, new, batch, mode)
    models = load_models(
        name, config, [setting], packed_only=packed_only, device=device, dtype=dtype, share_inputs=share_inputs
    )
    return compare(models, setting, rounds)


@dataclass
class Models:
    """What is compared: `load_models` makes it once, `compare` measures it in one setting after the other."""

    title: str
    bpw: float  # real, over the replaced layers
    device: torch.device
    contenders: dict[str, Contender]  # "dense", "packed" and "shared"


def load_models(
    name: str,
    config: LittleBitConfig | None,
    settings: Sequence[Setting] = (),
    *,
    packed_only: bool = False,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    share_inputs: bool = False,
) -> Models:
    """The models that `bench` would measure, arguments as there; `settings` are refused before anything is loaded."""
    source = find_source(name)
    used = _choose(source, config)
    skeleton: Any = empty_model(source.config)
    if not skeleton.can_generate() or source.config.is_encoder_decoder:
        raise ValueError(
            f"{type(skeleton).__name__} is no causal language model; give one that continues a prompt with `generate`"
        )
    for setting in settings:
        setting.check(getattr(source.config.get_text_config(), "max_position_embeddings", None))
    plan = plan_model(skeleton, used, source.header)
    if share_inputs and not siblings(weight.module for weight in plan.weights):
        raise ValueError(
            f"{type(skeleton).__name__} has no packed layers that are called like layers with one input; leave "
            "--share-inputs (share_inputs=True) out"
        )
    kept = dtype or compat.resolve_dtype(source.config.dtype or torch.bfloat16)
    contenders = {}
    for form in ("packed",) if packed_only else ("dense", "packed"):
        method = None if form == "dense" else used
        contenders[form] = Contender(source, plan, method, kept, torch.device(device))
    if share_inputs:
        contenders["shared"] = contenders["packed"].sharing()
    return Models(os.path.basename(name.rstrip("/")), plan.bpw, torch.device(device), contenders)


def compare(models: Models, setting: Setting, rounds: int = 5, shares: int = SHARES) -> Bench:
    """Measure all models in one setting; with `shares` = 0, without where the time goes."""
    for contender in models.contenders.values():
        contender.check(setting)
    runs = {name: _Run(contender, setting) for name, contender in models.contenders.items()}
    for _ in range(rounds):
        for run in runs.values():
            run.turn()
    found = {name: run.result(min(shares, rounds)) for name, run in runs.items()}
    ratio, shared_ratio = (
        _ratios(runs[over], runs[under]) if over in runs and under in runs else {}
        for over, under in (("packed", "dense"), ("shared", "packed"))
    )
    if ratio:
        packed, dense = found["packed"], found["dense"]
        ratio["weights"] = packed.weight_bytes / dense.weight_bytes
        if packed.growth_bytes is not None and dense.growth_bytes is not None:
            ratio["peak"] = (packed.weight_bytes + packed.growth_bytes) / (dense.weight_bytes + dense.growth_bytes)
    return Bench(
        models.title,
        models.bpw,
        setting.prompt,
        setting.new,
        setting.batch,
        setting.mode,
        rounds,
        found,
        ratio,
        shared_ratio,
        machine(str(models.device)),
    )


def _ratios(over: _Run, under: _Run) -> dict[str, float]:
    """The medians over the rounds of one model's speeds relative to another's."""
    rounds = list(zip(over.times, under.times, strict=True))
    steps = enumerate(("prefill", "decode", "decode_cpu"))
    return {step: statistics.median(a[index] / b[index] for a, b in rounds) for index, step in steps}


def _choose(source: Source, given: LittleBitConfig | None) -> LittleBitConfig:
    own = source.quantization
    if own is not None and given is not None:
        raise ValueError(f"{source.name} is quantized already, at {own.bpw:g} bits per weight; leave the options out")
    used = own or given
    if used is None:
        raise ValueError(f"{source.name} is a dense model; say at how many bits to run it packed, e.g. --bpw 0.55")
    if used.format != "packed":
        raise ValueError(f"the format is {used.format!r}, which is for training; only packed models are measured")
    return used


class _Run:
    """One model in one setting, and its times."""

    def __init__(self, contender: Contender, setting: Setting):
        self.contender, self.setting = contender, setting
        self.tokens = contender.tokens(setting)
        seconds = contender.seconds if contender.loaded else None
        weights = "loaded" if contender.loaded else "random"
        self.speed = Speed(weights, seconds, contender.weight_bytes, self._warm_up())
        self.times: list[tuple[float, float, float]] = []

    def _warm_up(self) -> int | None:
        """Bytes that the process grew by in the first generation after what compiling needs."""
        self.contender.switch()
        device, mode = self.contender.device, self.setting.mode
        warm_up = 0 if mode == "plain" and device.type == "cpu" else WARM_UP[mode]
        if mode == "plain" and warm_up:
            # What plain generate keeps for the next call (a cache, a graph) counts: there is nothing else to make ready.
            with PeakMemory(device) as memory:
                for _ in range(warm_up + 1):
                    self.generate()
            return memory.growth
        for _ in range(warm_up):
            self.generate()
        with PeakMemory(device) as memory:
            self.generate()
        return memory.growth

    def generate(self, streamer: Ticks | None = None) -> None:
        self.contender.generate(self.tokens, self.setting, streamer)

    def turn(self) -> None:
        """Append to `times` the tokens per second of prefill and decode, and per CPU second of decode."""
        if self.contender.switch():
            self.generate()  # what follows from the change is not timed
        wait(self.contender.device)
        start, ticks = time.perf_counter(), Ticks()
        self.generate(ticks)
        _, first, *_, last = ticks.times
        read = self.setting.batch * self.setting.prompt
        made = self.setting.batch * (self.setting.new - 1)
        self.times.append((read / (first - start), made / (last - first), made / (ticks.cpu[-1] - ticks.cpu[1])))

    def result(self, shares: int) -> Speed:
        """The medians; the shares, by the median of so many rounds; on a GPU, what decoding asks of host and device."""
        self.contender.switch()
        speed, groups, device = self.speed, self.contender.groups, self.contender.device
        speed.prefill, speed.decode, speed.decode_cpu = map(statistics.median, zip(*self.times, strict=True))
        if device.type != "cpu":
            # The trace first: hooks that were there would make torch.compile look at the model again.
            load = Trace(device).measure(self.generate)
            if load is not None:
                speed.kernels, speed.gpu_us = load.kernels, load.microseconds
            speed.linear_host_us = HostClock(groups).measure(self.generate)
        clocks = [Clock(groups, device) for _ in range(shares)]
        for clock in clocks:
            clock.measure(self.generate)
        for part in PARTS if clocks else ():
            speed.prefill_ms[part] = 1e3 * statistics.median(clock.prefill[part] for clock in clocks)
            decode = statistics.median(clock.decode[part] for clock in clocks)
            speed.decode_ms[part] = 1e3 * decode / (self.setting.new - 1)
        return speed
