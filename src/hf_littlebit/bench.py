"""The speed of a model in plain `generate`: tokens per second, memory, and where the time goes, dense against packed.

    prefill   tokens of the prompt / seconds from the call of `generate` to the first new token
    decode    the other new tokens / seconds from the first to the last
    per CPU s the same, by the process's CPU seconds, all threads together: on a busy machine, and with one thread, about
              what the model does on a quiet one; with more threads, their waiting counts too

The two models take turns in one process, so that a busy moment of the machine meets both, and medians over the rounds are
given; a ratio is the median of the rounds' ratios. What is not on the disk (the packed form of a dense model, the dense form
of a packed one, both of a bare config.json) is made of random weights.

Memory is what the parameters and buffers take, and the peak adds what the process grew by in the first generation. The
parts' shares come from rounds of their own, because their clock (clock.py) costs time itself.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from tabulate import tabulate
from transformers import CompileConfig, GenerationConfig

from . import compat
from .clock import PARTS, Clock, Ticks, groups_of
from .config import LittleBitConfig
from .machine import growth, machine, wait
from .plan import Plan, plan_model
from .shared import share_inputs as together
from .shared import siblings, unshare_inputs
from .size import format_bytes
from .skeleton import empty_model, model_class
from .source import Source, find_source
from .stand_in import random_state

__all__ = ["Bench", "Speed", "bench"]

SHARES = 3  # rounds with the clock
WARM_UP = 3  # generations before a compiled one is measured: compiling, recording a graph, replaying it


@dataclass
class Speed:
    """One model: medians over the rounds. Bytes, tokens per second, and milliseconds per step by part."""

    weights: str  # "loaded" or "random"
    load_seconds: float | None  # None for random ones
    weight_bytes: int
    growth_bytes: int | None  # None where the system does not tell
    prefill: float = 0.0
    decode: float = 0.0
    decode_cpu: float = 0.0  # tokens per CPU second
    prefill_ms: dict[str, float] = field(default_factory=dict)  # of the whole step
    decode_ms: dict[str, float] = field(default_factory=dict)  # of one token


@dataclass
class Bench:
    """See `bench`."""

    model: str
    bpw: float  # real, over the replaced layers
    prompt: int
    new: int
    rounds: int
    compiled: bool
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
        return (
            f"{self.model}, {self.bpw:.3g} bits per weight, {self.machine['threads']} thread(s), prompt of {self.prompt}, "
            f"{self.new} new tokens{', compiled' if self.compiled else ''}\n\n{tabulate(rows, head, disable_numparse=True)}\n\n"
            f"{tabulate(shares, where, disable_numparse=True)}"
        )


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
    compiled: bool = False,
    share_inputs: bool = False,
) -> Bench:
    """Measure a causal language model, dense and packed.

    Args:
        name: a packed folder; a dense folder, Hub id or config.json with `config`.
        packed_only: leave the dense model out, where memory does not hold both.
        prompt, new: tokens that are read and made. rounds: turns of each model.
        dtype: of what is dense; that of the model by default, bf16 where its config names none.
        compiled: decode by torch.compile over a static cache (CUDA graphs on a GPU), as `generate` does with
            `cache_implementation="static"`. The time shares are those of the same cache without compilation.
        share_inputs: also measure the packed model with layers of one input in one call (shared.py).

    Raises:
        ValueError: for a model that cannot generate, sizes beyond its context, or a dense one without `config`.
    """
    for what, value, least in (("prompt", prompt, 1), ("new", new, 2), ("rounds", rounds, 1)):
        if value < least:
            raise ValueError(f"{what} is {value}; it must be at least {least}")
    source = find_source(name)
    used = _choose(source, config)
    skeleton: Any = empty_model(source.config)
    if not skeleton.can_generate() or source.config.is_encoder_decoder:
        raise ValueError(
            f"{type(skeleton).__name__} is no causal language model; give one that continues a prompt with `generate`"
        )
    context = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and prompt + new > context:
        raise ValueError(f"{prompt} tokens of prompt and {new} new ones exceed the context of {context}; lower them")
    plan = plan_model(skeleton, used, source.header)
    if share_inputs and not siblings(weight.module for weight in plan.weights):
        raise ValueError(
            f"{type(skeleton).__name__} has no packed layers that are called like layers with one input; leave "
            "--share-inputs (share_inputs=True) out"
        )
    kept = dtype or compat.resolve_dtype(source.config.dtype or torch.bfloat16)
    runs: dict[str, _Run] = {}
    for kind in ("packed",) if packed_only else ("dense", "packed"):
        method = None if kind == "dense" else used
        runs[kind] = _Run(source, plan, method, kept, torch.device(device), prompt, new, compiled)
    if share_inputs:
        runs["shared"] = runs["packed"].sharing()
    for _ in range(rounds):
        for run in runs.values():
            run.turn()
    models = {kind: run.result() for kind, run in runs.items()}
    ratio, shared_ratio = (
        _ratios(runs[over], runs[under]) if over in runs and under in runs else {}
        for over, under in (("packed", "dense"), ("shared", "packed"))
    )
    if ratio:
        packed, dense = models["packed"], models["dense"]
        ratio["weights"] = packed.weight_bytes / dense.weight_bytes
        if packed.growth_bytes is not None and dense.growth_bytes is not None:
            ratio["peak"] = (packed.weight_bytes + packed.growth_bytes) / (dense.weight_bytes + dense.growth_bytes)
    title = os.path.basename(name.rstrip("/"))
    return Bench(title, plan.bpw, prompt, new, rounds, compiled, models, ratio, shared_ratio, machine(device))


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
    """One model, its prompt and its times."""

    def __init__(
        self,
        source: Source,
        plan: Plan,
        quantization: LittleBitConfig | None,  # None for the dense model
        dtype: torch.dtype,
        device: torch.device,
        prompt: int,
        new: int,
        compiled: bool,
    ):
        self.device, self.new, self.prompt = device, new, prompt
        self.compile_config = CompileConfig()
        self.compile_config._compile_all_devices = True  # type: ignore[assignment]  # else a CPU is left out
        self.compiled = compiled
        loaded = not os.path.isfile(source.name) and (source.quantization is None) == (quantization is None)
        start = time.perf_counter()
        if loaded:
            place = {"dtype": dtype, "device_map": str(device), "variant": source.variant}
            self.model = model_class(source.config).from_pretrained(source.name, **place)
        else:
            config = copy.deepcopy(source.config)
            config.__dict__.pop("quantization_config", None)
            skeleton: Any = empty_model(config)
            state = random_state(skeleton, dtype, (plan, quantization) if quantization else None)
            if quantization is not None:
                config.quantization_config = quantization.to_dict()
            # As a checkpoint is loaded, so that the quantizer and the model's own buffers come to be as they do there.
            kind = type(skeleton)
            self.model = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype).to(device)
        seconds = time.perf_counter() - start
        self.model.eval()
        quantizer = getattr(self.model, "hf_quantizer", None)
        if compiled and quantizer is not None and not quantizer.is_compileable:
            raise ValueError(
                f"{type(self.model).__name__} has packed experts, which are chosen by value and cannot be compiled; leave "
                "--compile (compiled=True) out"
            )
        # Without an end of text: every round makes as many tokens.
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        draw = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(vocabulary, (1, prompt), generator=draw).to(device)
        self.groups = groups_of(self.model, plan)
        size = sum(value.nbytes for value in (*self.model.parameters(), *self.model.buffers()))
        self.shared = False
        self.speed = Speed("loaded" if loaded else "random", seconds if loaded else None, size, self._warm_up())
        self.times: list[tuple[float, float, float]] = []

    def sharing(self) -> _Run:
        """The same model, weights at the same places in memory, with layers of one input in one call."""
        run = copy.copy(self)
        run.shared, run.times = True, []
        run.speed = replace(self.speed, growth_bytes=run._warm_up(), prefill_ms={}, decode_ms={})
        return run

    def _warm_up(self) -> int | None:
        """Bytes that the process grew by in the first generation after what compiling needs."""
        self._switch()
        for _ in range(WARM_UP if self.compiled else 0):
            self.generate()
        with growth(self.device) as grown:
            self.generate()
        return grown[0]

    def _switch(self) -> None:
        together(self.model) if self.shared else unshare_inputs(self.model)

    def generate(self, streamer: Ticks | None = None) -> None:
        options: dict[str, Any] = {"max_new_tokens": self.new, "streamer": streamer}
        if self.compiled:
            options["cache_implementation"] = "static"
            # The clock's hooks would be compiled too, and their times with them.
            by_parts = isinstance(streamer, Clock)
            options |= {"disable_compile": True} if by_parts else {"compile_config": self.compile_config}
        with torch.inference_mode():
            self.model.generate(self.tokens, attention_mask=torch.ones_like(self.tokens), **options)

    def turn(self) -> None:
        """Append to `times` the tokens per second of prefill and decode, and per CPU second of decode."""
        self._switch()
        wait(self.device)
        start, ticks = time.perf_counter(), Ticks()
        self.generate(ticks)
        _, first, *_, last = ticks.times
        steps = self.new - 1
        self.times.append(
            (self.prompt / (first - start), steps / (last - first), steps / (ticks.cpu[-1] - ticks.cpu[1]))
        )

    def result(self) -> Speed:
        """The medians, and the shares."""
        self._switch()
        medians = [statistics.median(values) for values in zip(*self.times, strict=True)]
        self.speed.prefill, self.speed.decode, self.speed.decode_cpu = medians
        clocks = [Clock(self.groups, self.device) for _ in range(min(SHARES, len(self.times)))]
        for clock in clocks:
            clock.measure(self.generate)
        for part in PARTS:
            self.speed.prefill_ms[part] = 1e3 * statistics.median(clock.prefill[part] for clock in clocks)
            decode = statistics.median(clock.decode[part] for clock in clocks)
            self.speed.decode_ms[part] = 1e3 * decode / (self.new - 1)
        return self.speed
