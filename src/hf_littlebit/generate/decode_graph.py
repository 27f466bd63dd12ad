"""One decode step of a model recorded as a CUDA graph and replayed for every token.

In eager `generate` most of a token's time is Python and kernel launches, not the GPU's work. A CUDA graph replays all
launches of a step with one call. torch.compile(mode="reduce-overhead") does the same after half a minute of compiling; here
the model's own eager code is recorded, which takes about as long as three eager steps:

    1. watched      the step runs eagerly while its operators are looked at: one that waits for the GPU, or a cache layer
                    that hands out a Python number which changes from step to step, cannot be recorded
    2. warmed up    the step runs on the stream that will record, with static inputs (token, position, 4-D mask) and a static
                    key-value cache, so that kernels are compiled and loaded
    3. recorded     and replayed
    4. replayed     from then on: inputs are copied in, the logits are copied out

Where the user asks for torch.compile, the compiled step is recorded instead of the eager one, after it ran twice: a replay
checks none of the guards of a compiled model, which for one of packed layers are thousands.

What a replay cannot repeat is what Python does in a step. With a `StaticCache` that is one thing: a sliding-window layer
counts its tokens in a Python number. It decides between two ways of storing a token (window full or not), so each way has a
graph of its own, and the number is advanced here. Everything that is not known to be a plain case raises `Unfit` or is run
eagerly: the result is always the one that eager code gives.

Every `generate` makes a new cache. A graph reads and writes fixed addresses, so the tensors of a new cache are copied into
the graph's own (its `CacheHome`), which the cache then refers to; if the cache that did so before is still alive, it first
gets a copy of its own, and if another thread is at work with it, it stays, and the new cache gets another home. Homes are few
(the least recently used one goes; a step for which all are taken runs eagerly) and live and die with the model.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import TYPE_CHECKING, Any

import torch

from ..internals.torch import operators_are_watched
from .obstacle import look
from .recorded_step import Call, RecordedStep
from .recorder import Recorder, Unfit
from .static_cache import CacheHome, layer_shapes, outgrown, refuse_unknown, sliding_layers
from .step_inputs import StepInputs, step_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["DecodeGraphs"]

logger = logging.getLogger("hf_littlebit")

HOMES = 4  # sets of cache tensors that are kept for one model: batch sizes and threads, in effect, because lengths only grow
GRAPHS = 8  # recorded steps and prompts per home


def _nothing() -> None:
    return None


class _Generation:
    """What one `generate` has found out: whether its model can be recorded, and where its cache is."""

    def __init__(self, compiled: Call | None = None) -> None:
        self.compiled = compiled
        self.checked = False
        self.reason: str | None = None
        self.home: CacheHome | None = None
        self.stream: Any = None


class DecodeGraphs:
    """The recorded decode steps of one model. Holds no reference to the model."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.broken = False  # whether a step of this model could not be recorded
        self.lock = Lock()
        self._homes: list[CacheHome] = []  # the least recently used one first
        self._facts: Any = None
        self._vouched: Callable[[], Any] = _nothing
        self._told: set[str] = set()

    @property
    def ready(self) -> bool:
        """Whether there is a cache that something was recorded for."""
        return bool(self._homes)

    def release(self) -> None:
        """Free all graphs and their cache tensors; a cache that refers to some keeps those."""
        with self.lock:
            self._homes.clear()
            self._facts, self.broken = None, False

    def calls(self, model: PreTrainedModel, compiled: Call | None = None, otherwise: Call | None = None) -> Call:
        """A function to be called in place of `model` for the steps of one generation.

        Args:
            model: it is referred to by the function, not by this.
            compiled: what is recorded instead of the model's own call, `compiled(model, **inputs)`.
            otherwise: what is called where nothing can be recorded or replayed, instead of the model.
        """
        generation = _Generation(compiled)

        def call(*args: Any, **inputs: Any) -> Any:
            if not args:
                with self.lock:
                    try:
                        return self._step(model, inputs, generation)
                    except Unfit as reason:
                        self.tell(str(reason))
            return (otherwise or model)(*args, **inputs)

        return call

    def check(self, model: PreTrainedModel) -> str | None:
        """Why nothing can be replayed for `model` as it is now, or None; what was recorded of another state goes."""
        found = look(model)
        if found.obstacle is None and found.facts != self._facts:
            self._homes.clear()
            self._facts, self.broken = found.facts, False
        return found.obstacle

    def _checked(self, model: PreTrainedModel, cache: Any) -> str | None:
        """As `check`, which is left out where it was made for the generation with `cache`."""
        return None if self._vouched() is cache else self.check(model)

    def vouch(self, cache: Any = None) -> None:
        """The model was checked for the generation with `cache`, and nothing of it has run since; None: of no generation."""
        self._vouched = _nothing if cache is None else weakref.ref(cache)

    def tell(self, reason: str, level: int = logging.INFO, what: str = "the decode step") -> None:
        """Log once why something was not recorded."""
        if reason not in self._told:
            self._told.add(reason)
            logger.log(level, "generate goes on without a graph of %s: %s", what, reason)

    def _step(self, model: Any, inputs: dict[str, Any], generation: _Generation) -> Any:
        """The step's result; raises Unfit, with nothing done, where it has to be run as without graphs."""
        if generation.reason is not None:
            raise Unfit(generation.reason)
        now = step_inputs(inputs)
        if now.tokens.shape[1] != 1:
            raise Unfit("a step is not of one token per sequence")
        self.refuse_now(model, now.tokens.device)
        if not generation.checked:
            # After the prefill rather than before: a model may have put tensors of this prompt into its modules.
            # A prompt that was replayed has run no Python.
            if (reason := self._checked(model, now.cache)) is not None:
                generation.reason = reason
                raise Unfit(reason)
            generation.checked = True
        sliding = sliding_layers(now.cache)
        if sliding and generation.compiled is not None:
            raise Unfit("a compiled step counts the tokens of sliding-window layers")
        home = self._home_of(now.cache, now.tokens.device, generation)
        full = tuple(layer.cumulative_length_int >= layer.max_cache_len for layer in sliding)
        compiled = generation.compiled
        step = self.step_of(
            home,
            (now.shapes, now.others, full, compiled),
            RecordedStep if compiled is None else lambda: RecordedStep(compiled, compiled=True),
        )
        if step.unfit is not None:
            raise Unfit(step.unfit)
        if step.runs == 0:
            result, reason = step.watched(model, now, sliding)
            if reason is not None:
                self._give_up(step, reason)
            return result
        if step.runs <= step.warm_ups:
            with self.attempt(step):
                self._settle(home, now.cache)
            result, reason = step.warmed(model, now, self.recorder)
            if reason is not None:
                self._give_up(step, reason)
            return result
        with self.attempt(step):
            self._settle(home, now.cache)
            if step.replay is None:
                lengths = [layer.cumulative_length_int for layer in sliding]
                try:
                    step.record(model, now, self.recorder)
                finally:
                    for layer, length in zip(sliding, lengths, strict=True):
                        layer.cumulative_length_int = length
        result = step.replayed(now)
        for layer in sliding:
            layer.cumulative_length_int += 1
        return result

    def refuse_now(self, model: Any, device: torch.device) -> None:
        """Raise Unfit where nothing is to be recorded or replayed at this moment."""
        if model.training:
            raise Unfit("the model is in training mode")
        if torch.is_grad_enabled():
            raise Unfit("gradients are switched on")
        if device.type not in self.recorder.device_types:
            raise Unfit(f"the tokens are on {device}")
        if operators_are_watched() or torch.compiler.is_compiling() or self.recorder.busy():
            raise Unfit("something else is tracing or recording the model")
        if torch.is_autocast_enabled(device.type):
            raise Unfit("autocast is on")

    @contextmanager
    def attempt(self, step: RecordedStep) -> Iterator[None]:
        """An error of CUDA, or a want of memory, is a reason not to record `step`: Unfit."""
        try:
            yield
        except RuntimeError as error:
            said = str(error).strip().partition("\n")[0]
            self._give_up(step, said, logging.WARNING)
            if isinstance(error, torch.OutOfMemoryError):
                # Another time there may be room; what is held for replays does not help then.
                self._homes.clear()
                self.broken = False
            raise Unfit(said) from error

    @staticmethod
    def _settle(home: CacheHome, cache: Any) -> None:
        if not home.holds(cache):
            home.adopt(cache)

    def _home_of(self, cache: Any, device: torch.device, generation: _Generation) -> CacheHome:
        stream, home = self.recorder.stream(device), generation.home
        # The cache goes on where it was, unless another generation has dropped that home.
        if home in self._homes and generation.stream == stream and home.holds(cache):
            home.thread = get_ident()
            return home
        refuse_unknown(cache)
        generation.home, generation.stream = self._home(cache, stream), stream
        return generation.home

    def _home(self, cache: Any, stream: Any) -> CacheHome:
        layers = layer_shapes(cache)
        key = (stream, layers)
        home = next((home for home in self._homes if home.key == key and home.is_free(cache)), None)
        if home is None:
            home = CacheHome(key)
            # `generate` makes no cache shorter than an earlier one, so a shorter one of the same kind has had its day.
            self._homes = [
                other
                for other in self._homes
                if other.key[0] != stream or not outgrown(other.key[1], layers) or not other.is_free()
            ]
            while len(self._homes) >= HOMES:
                idle = next((other for other in self._homes if other.is_free()), None)
                if idle is None:
                    raise Unfit(f"{HOMES} other threads generate with the model at this moment")
                self._homes.remove(idle)
        else:
            self._homes.remove(home)
        self._homes.append(home)
        return home

    def home_of_new(self, model: PreTrainedModel, now: StepInputs) -> CacheHome:
        """The home of an earlier generation that the empty cache of `now` may move into; raises Unfit where there is none."""
        refuse_unknown(now.cache)
        if (reason := self._checked(model, now.cache)) is not None:
            raise Unfit(reason)
        stream = self.recorder.stream(now.tokens.device)
        for home in reversed(self._homes):
            if home.key[0] == stream and home.suits(now.cache, now.tokens.shape[0]) and home.is_free(now.cache):
                home.thread = get_ident()
                return home
        raise Unfit("no decode step was recorded with a cache of this length")

    @staticmethod
    def step_of(home: CacheHome, key: Any, make: Callable[[], RecordedStep]) -> RecordedStep:
        """The step of that key at `home`, which is now the one used last; a new one where there is none."""
        step = home.graphs.pop(key, None) or make()
        home.graphs[key] = step
        while len(home.graphs) > GRAPHS:
            home.graphs.popitem(last=False)
        return step

    def _give_up(self, step: RecordedStep, reason: str, level: int = logging.INFO) -> None:
        step.unfit, self.broken = reason, True
        self.tell(reason, level)
