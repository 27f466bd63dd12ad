"""One decode step of a model recorded as a CUDA graph and replayed for every token.

In eager `generate` most of a token's time is Python and kernel launches, not the GPU's work. A CUDA graph replays all
launches of a step with one call. torch.compile(mode="reduce-overhead") does the same after half a minute of compiling; here
the model's own eager code is recorded, which takes about as long as three eager steps:

    1. watched      the step runs eagerly while its operators are looked at: one that waits for the GPU, or a cache layer
                    that hands out a Python number which changes from step to step, cannot be recorded
    2. warmed up    the step runs eagerly on the stream that will record, so that kernels are compiled and loaded
    3. recorded     into static inputs (token, position, 4-D mask) and a static key-value cache, and replayed
    4. replayed     from then on: inputs are copied in, the logits are copied out

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
from collections.abc import Callable
from threading import Lock, get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..compat import CACHE_NAMES
from ..internals.accelerate import has_placement
from ..internals.torch import has_global_hooks, has_own_call, module_hooks, module_state, operators_are_watched
from ..internals.transformers import attention_implementation, is_quiet_hook
from .recorder import Constants, Recorder, Unfit, Watch
from .static_cache import CacheHome, layer_shapes, outgrown, refuse_unknown, sliding_layers, spies

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["DecodeGraphs", "obstacle", "signature"]

logger = logging.getLogger("hf_littlebit")

HOMES = 4  # sets of cache tensors that are kept for one model: batch sizes and threads, in effect, because lengths only grow
GRAPHS = 4  # recorded steps per home
INPUTS = ("input_ids", "position_ids", "attention_mask", "cache_position")  # tensors that a step may be given


class _Graph:
    """One step: how often it ran eagerly, its static inputs and result once it is recorded."""

    def __init__(self) -> None:
        self.runs = 0
        self.unfit: str | None = None  # why it cannot be recorded
        self.constants: dict[Any, Tensor] = {}
        self.static: dict[str, Tensor] = {}
        self.replay: Callable[[], None] | None = None
        self.output: tuple[type, Tensor] | None = None

    def result(self, tensors: dict[str, Tensor], cache: Any, cache_name: str) -> Any:
        """Replay the step with these inputs; the logits are the caller's own."""
        assert self.replay is not None and self.output is not None
        for name, value in tensors.items():
            self.static[name].copy_(value)
        self.replay()
        output_class, logits = self.output
        return output_class(**{"logits": logits.clone(), cache_name: cache})


class _Generation:
    """What one `generate` has found out: whether its model can be recorded, and where its cache is."""

    def __init__(self) -> None:
        self.checked = False
        self.reason: str | None = None
        self.home: CacheHome | None = None
        self.stream: Any = None


class DecodeGraphs:
    """The recorded decode steps of one model. Holds no reference to the model."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.broken = False  # whether a step of this model could not be recorded
        self._lock = Lock()
        self._homes: list[CacheHome] = []  # the least recently used one first
        self._signature: Any = None
        self._told: set[str] = set()

    def release(self) -> None:
        """Free all graphs and their cache tensors; a cache that refers to some keeps those."""
        with self._lock:
            self._homes.clear()
            self._signature, self.broken = None, False

    def calls(self, model: PreTrainedModel) -> Callable[..., Any]:
        """A function to be called in place of `model` for the steps of one generation."""
        generation = _Generation()

        def call(*args: Any, **inputs: Any) -> Any:
            if not args:
                with self._lock:
                    try:
                        return self._step(model, inputs, generation)
                    except Unfit as reason:
                        self._tell(str(reason))
            return model(*args, **inputs)

        return call

    def _check(self, model: PreTrainedModel) -> None:
        reason = obstacle(model)
        if reason is not None:
            raise Unfit(reason)
        now = signature(model)
        if now != self._signature:
            self._homes.clear()
            self._signature, self.broken = now, False

    def _tell(self, reason: str, level: int = logging.INFO) -> None:
        if reason not in self._told:
            self._told.add(reason)
            logger.log(level, "generate goes on without a graph of the decode step: %s", reason)

    def _step(self, model: Any, inputs: dict[str, Any], generation: _Generation) -> Any:
        """The step's result; raises Unfit, with nothing done, where it has to be run as without graphs."""
        if generation.reason is not None:
            raise Unfit(generation.reason)
        if model.training:
            raise Unfit("the model is in training mode")
        if torch.is_grad_enabled():
            raise Unfit("gradients are switched on")
        cache_name, cache, tensors, others = _sorted(inputs)
        device = tensors["input_ids"].device
        if device.type not in self.recorder.device_types:
            raise Unfit(f"the tokens are on {device}")
        if operators_are_watched() or torch.compiler.is_compiling() or self.recorder.busy():
            raise Unfit("something else is tracing or recording the model")
        if torch.is_autocast_enabled(device.type):
            raise Unfit("autocast is on")
        if not generation.checked:
            # After the prefill rather than before: a model may have put tensors of this prompt into its modules.
            try:
                self._check(model)
            except Unfit as reason:
                generation.reason = str(reason)
                raise
            generation.checked = True
        home = self._home_of(cache, device, generation)
        sliding = sliding_layers(cache)
        full = tuple(layer.cumulative_length_int >= layer.max_cache_len for layer in sliding)
        shapes = tuple((name, value.shape, value.dtype, value.device) for name, value in tensors.items())
        graph = self._graph(home, (shapes, others, full))
        if graph.unfit is not None:
            raise Unfit(graph.unfit)
        if graph.runs == 0:
            return self._watched(model, inputs, sliding, graph)
        if graph.runs == 1:
            return self._warmed(model, inputs, cache, device, graph)
        try:
            if not home.holds(cache):
                home.adopt(cache)
            if graph.replay is None:
                self._record(model, inputs, tensors, sliding, device, graph)
        except RuntimeError as error:  # of CUDA, or for want of memory
            said = str(error).strip().partition("\n")[0]
            self._give_up(graph, said, logging.WARNING)
            if isinstance(error, torch.OutOfMemoryError):
                # Another time there may be room; what is held for replays does not help then.
                self._homes.clear()
                self.broken = False
            raise Unfit(said) from error
        result = graph.result(tensors, cache, cache_name)
        for layer in sliding:
            layer.cumulative_length_int += 1
        return result

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

    def _graph(self, home: CacheHome, key: Any) -> _Graph:
        graph = home.graphs.pop(key, None) or _Graph()
        home.graphs[key] = graph
        while len(home.graphs) > GRAPHS:
            home.graphs.popitem(last=False)
        return graph

    def _give_up(self, graph: _Graph, reason: str, level: int = logging.INFO) -> None:
        graph.unfit, self.broken = reason, True
        self._tell(reason, level)

    def _watched(self, model: Any, inputs: dict[str, Any], sliding: list[Any], graph: _Graph) -> Any:
        with (
            Constants(graph.constants, recording=False) as constants,
            Watch(constants) as watch,
            spies(sliding) as asked,
        ):
            result = model(**inputs)
        graph.runs = 1
        reason = watch.reason or (f"a step asks a sliding-window layer for {asked[0]}" if asked else None)
        if reason is not None:
            self._give_up(graph, reason)
        return result

    def _warmed(self, model: Any, inputs: dict[str, Any], cache: Any, device: torch.device, graph: _Graph) -> Any:
        with Constants(graph.constants, recording=False):
            result = self.recorder.warm_up(lambda: model(**inputs), device)
        graph.runs = 2
        if not isinstance(result, ModelOutput) or not isinstance(result.get("logits"), Tensor):
            self._give_up(graph, f"a step returns a {type(result).__name__} without logits")
        elif surplus := [name for name, value in result.items() if name != "logits" and value is not cache]:
            self._give_up(graph, f"a step returns {', '.join(surplus)}")
        return result

    def _record(
        self,
        model: Any,
        inputs: dict[str, Any],
        tensors: dict[str, Tensor],
        sliding: list[Any],
        device: torch.device,
        graph: _Graph,
    ) -> None:
        lengths = [layer.cumulative_length_int for layer in sliding]
        try:
            with torch.inference_mode(False), torch.no_grad():
                static = {
                    name: torch.empty(value.shape, dtype=value.dtype, device=device) for name, value in tensors.items()
                }
                for name, value in tensors.items():
                    static[name].copy_(value)
                fixed = _with_tensors(inputs, static)
                with Constants(graph.constants, recording=True):
                    replay, result = self.recorder.record(lambda: model(**fixed), device)
        finally:
            for layer, length in zip(sliding, lengths, strict=True):
                layer.cumulative_length_int = length
        graph.static, graph.replay, graph.output = static, replay, (type(result), result["logits"])


def _sorted(inputs: dict[str, Any]) -> tuple[str, Any, dict[str, Tensor], Any]:
    """(name of the cache, cache, tensors by name, the rest) of a step's inputs; raises Unfit for any but a plain step."""
    cache_name, cache, tensors, others = "", None, {}, []
    for name, value in inputs.items():
        if value is None:
            continue
        if name in CACHE_NAMES:
            cache_name, cache = name, value
        elif name in INPUTS and isinstance(value, Tensor):
            tensors[name] = value
        elif name == "attention_mask" and isinstance(value, dict):
            tensors |= {f"{name}.{layer_type}": mask for layer_type, mask in value.items() if mask is not None}
        elif isinstance(value, bool | int | float | str):
            others.append((name, value))
        else:
            raise Unfit(f"a step is given {name}")
    if inputs.get("output_attentions") or inputs.get("output_hidden_states"):
        raise Unfit("attentions or hidden states are asked for")
    tokens = tensors.get("input_ids")
    if tokens is None or tokens.dim() != 2 or tokens.shape[1] != 1:
        raise Unfit("a step is not of one token per sequence")
    masks = [mask for name, mask in tensors.items() if name.startswith("attention_mask")]
    # With any other mask the model would make its own, from numbers that may be those of one step only.
    if not masks or not all(isinstance(mask, Tensor) and mask.dim() == 4 for mask in masks):
        raise Unfit("a step has no 4-D attention mask")
    if any(value.device != tokens.device for value in tensors.values()):
        raise Unfit("a step's inputs are on several devices")
    return cache_name, cache, tensors, tuple(others)


def _with_tensors(inputs: dict[str, Any], static: dict[str, Tensor]) -> dict[str, Any]:
    """The inputs of a step with the static tensors in place of its own, masks in a dictionary too."""
    fixed = {name: static.get(name, value) for name, value in inputs.items()}
    if isinstance(masks := inputs.get("attention_mask"), dict):
        fixed["attention_mask"] = {layer_type: static.get(f"attention_mask.{layer_type}") for layer_type in masks}
    return fixed


def obstacle(model: PreTrainedModel) -> str | None:
    """Why a step of `model` cannot be replayed, whatever its inputs; None if it can.

    A replay runs no Python, so hooks, wrappers and adapters that could be switched off would be frozen as they were.
    """
    if has_own_call(model):
        return "the model is compiled"
    if has_global_hooks():
        return "there are hooks on all modules"
    if model.config.is_encoder_decoder:
        return "the model has an encoder and a decoder"
    for name, module in model.named_modules():
        if "forward" in vars(module) or has_placement(module):
            return f"{name or 'the model'} has a forward of its own, as of a model on several devices"
        if not all(is_quiet_hook(hook) for hook in module_hooks(module)):
            return f"{name or 'the model'} has hooks"
        if type(module).__module__.partition(".")[0] == "peft":
            return f"{name} is an adapter"
    parameters = list(model.parameters())
    if any(type(value) is not nn.Parameter for value in parameters):
        return "the model's parameters are of a class of their own"
    if len({value.device for value in parameters}) != 1:
        return "the model is on several devices"
    return None


def signature(model: PreTrainedModel) -> Any:
    """What a recorded step takes as fixed: the classes of modules, where their tensors are, which are computed together."""
    facts: list[Any] = [attention_implementation(model.config)]
    for module in model.modules():
        facts += type(module), id(vars(module).get("group"))  # of shared_input.py
        for value in module_state(module):
            if isinstance(value, Tensor):
                facts.append((value.data_ptr(), value.dtype, value.shape))
    return facts
