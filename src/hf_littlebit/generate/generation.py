"""Plain `generate` of a packed model on a GPU at the speed of its GPU work: a static cache, and the decode step as a graph.

    model.generate(**inputs, max_new_tokens=200)      # nothing else to write

`fast_generate`, which every way to a packed model calls, hangs three functions on the model, and `plain_generate` takes them
off again:

    get_compiled_call               Public method of transformers, 5.17 to 5.24. `generate` asks it for the function that runs
                                    the decode steps whenever the cache is static and the model may be compiled. It gives
                                    DecodeGraphs (decode_graph.py): of the model's own code, or with a compile_config of what
                                    torch.compile makes of it.
    _prepare_cache_for_generation   Private door of transformers, 5.17 to 5.24. It is where `generate` makes the cache, with
                                    the decoding mode, the batch and the length all settled. On a GPU the cache is a static one
                                    where nobody asked for another and nothing speaks against it (`_static_by_default`).
    _prefill                        Private door of transformers, 5.17 to 5.24. It is where `generate` reads the prompt: here as a
                                    graph too, where there is a cache that one was recorded for (prompt_graph.py).

Why there, and not `generation_config.cache_implementation = "static"`: that would be saved with the model, would hold on a
CPU too, would fail for models without static caches, would collide with a cache that the user passes, and would allocate
whatever `max_length` says. Wrapping `generate` itself would have to work out the length a second time. The functions are
attributes of the model's instance: no class is patched, nothing is saved, and they refer to the model weakly, so that their
graphs go with it. (Its `save_pretrained` is an attribute too, and refers to it: Python frees a deleted model at its next
collection, gc.collect().) A copied, pickled or moved model has its own.
"""

from __future__ import annotations

import copyreg
import weakref
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import StaticCache
from transformers.generation.configuration_utils import GenerationMode

from ..compat import CACHE_NAMES
from ..internals.transformers_generation import (
    PREFILL,
    PREPARE_CACHE,
    attention_implementation,
    cache_request,
    compiles_whole,
    longest_cache,
    prompt_request,
)
from .compiled_step import compiled_step
from .decode_graph import DecodeGraphs
from .prompt_graph import PROMPT_TOKENS, filled_length, read_prompt
from .recorder import CudaRecorder, Unfit
from .step_inputs import cache_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["fast_generate", "plain_generate", "release_graphs"]

MAX_LENGTH = 8192  # of a static cache by default: every step reads all of it, so long ones are for those who ask
SMALL_SHARE = 200  # a cache that takes one part in so many of all memory is made without asking for the free memory
MEMORY_SHARE = 4  # the cache may take one part in so many of the free memory
LAYER_TYPES = {"full_attention", "sliding_attention"}
ATTENTION = ("sdpa", "eager")  # flash attention needs to be told of a static cache before it is made
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


class _Attached:
    """A function in place of a model's method; refers to the model weakly, and a copied or unpickled one to the new model."""

    name = ""

    def __init__(self, model: Any):
        self._model = weakref.ref(model)

    @property
    def model(self) -> Any:
        model = self._model()
        if model is None:
            raise RuntimeError(f"the model of this {self.name} is deleted; call it on a model that exists")
        return model

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The method of the model's class."""
        return getattr(type(self.model), self.name)(self.model, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Attached:
        # The copy of the model is known by now, unless this alone is copied.
        copied = memo.get(id(self._model()))
        return self if copied is None else type(self)(copied)

    def __reduce__(self) -> tuple[Any, ...]:
        return copyreg.__newobj__, (type(self),), self.model  # type: ignore[attr-defined]

    def __setstate__(self, model: Any) -> None:
        self.__init__(model)  # type: ignore[misc]


class _CompiledCall(_Attached):
    """The model's `get_compiled_call`: it returns what `generate` calls for each decode step, here the recorded step.

    For example, `generate` with a static cache on a GPU asks it once per text and calls the result for every token.
    """

    name = "get_compiled_call"

    def __init__(self, model: Any):
        super().__init__(model)
        self.graphs = DecodeGraphs(CudaRecorder())

    def __call__(self, compile_config: Any = None) -> Any:
        model = self.model
        unknown = model.device.type not in self.graphs.recorder.device_types
        # transformers itself does not compile this one: its layers decide by numbers that change from step to step.
        if unknown or "llama4" in model.config.model_type:
            return self.plain(compile_config)
        if compile_config is None:
            return self.graphs.calls(model)
        compiled = compiled_step(compile_config)
        plain = self.plain(compile_config)
        return plain if compiled is None else self.graphs.calls(model, compiled, otherwise=plain)


class _PrepareCache(_Attached):
    """The model's method that makes the cache of one `generate`: here a static cache, where nobody asked for another."""

    name = PREPARE_CACHE

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        given = cache_request(model, args, kwargs)
        if not _static_by_default(model, given):
            return self.plain(*args, **kwargs)
        config = given["generation_config"]  # of this one call of generate
        config.cache_implementation = "static"
        try:
            result = self.plain(*args, **kwargs)
        finally:
            config.cache_implementation = None
        vars(model)[_CompiledCall.name].graphs.vouch(cache_of(given["model_kwargs"]))
        return result


class _ReadPrompt(_Attached):
    """The model's method that reads the prompt of one `generate`: here as a graph, where one can be had."""

    name = PREFILL

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        given = prompt_request(model, args, kwargs)
        graphs = _graphs_for_prompt(model, given)
        if given is None or graphs is None:
            attached = vars(model).get(_CompiledCall.name)
            if isinstance(attached, _CompiledCall):
                attached.graphs.vouch()
            return self.plain(*args, **kwargs)
        tokens = given["input_ids"]
        options = {"next_sequence_length": tokens.shape[1], "is_first_iteration": True}
        inputs = model.prepare_inputs_for_generation(tokens, **options, **given["model_kwargs"])
        try:
            return read_prompt(graphs, model, {**inputs, "return_dict": True})
        except Unfit as reason:
            graphs.tell(str(reason), what="the prompt")
            graphs.vouch()
        return model(**inputs, return_dict=True)


def fast_generate(model: PreTrainedModel) -> None:
    """Make plain `generate` of a packed `model` fast on a GPU; see the module's text. Loading such a model does it."""
    if not hasattr(model, "generate") or not model.can_generate():
        return
    for attached in (_CompiledCall, _PrepareCache, _ReadPrompt):
        if hasattr(type(model), attached.name):
            setattr(model, attached.name, attached(model))


def plain_generate(model: PreTrainedModel) -> None:
    """Undo `fast_generate`: caches, decode steps and memory are as transformers has them."""
    for attached in (_CompiledCall, _PrepareCache, _ReadPrompt):
        if isinstance(vars(model).get(attached.name), attached):
            delattr(model, attached.name)


def release_graphs(model: PreTrainedModel) -> None:
    """Free the graphs and the cache that a `generate` on a GPU left for the next one; the next one makes new ones."""
    attached = vars(model).get(_CompiledCall.name)
    if isinstance(attached, _CompiledCall):
        attached.graphs.release()


def _graphs_for_prompt(model: PreTrainedModel, given: dict[str, Any] | None) -> DecodeGraphs | None:
    """The graphs of `model` if the prompt of this call of `_prefill` is one for them: short, the first of its cache, of tokens."""
    attached = vars(model).get(_CompiledCall.name)
    names = ("input_ids", "generation_config", "model_kwargs", "is_first_iteration")
    if given is None or not isinstance(attached, _CompiledCall) or not all(name in given for name in names):
        return None
    config, inputs, tokens = given["generation_config"], given["model_kwargs"], given["input_ids"]
    if config.prefill_chunk_size is not None or config.disable_compile or not given["is_first_iteration"]:
        return None
    if inputs.get("inputs_embeds") is not None or not attached.graphs.ready or tokens.dim() != 2:
        return None
    cache = cache_of(inputs)
    if type(cache) is not StaticCache or any(getattr(layer, "is_initialized", True) for layer in cache.layers):
        return None
    rows, length = tokens.shape
    return attached.graphs if rows * filled_length(length) <= PROMPT_TOKENS else None


def _static_by_default(model: PreTrainedModel, given: dict[str, Any]) -> bool:
    """Whether this generation is to have a static cache although nobody asked for one.

    `given` are the arguments of `_prepare_cache_for_generation`. A cache that outlives the generation stays dynamic, because
    a static one cannot grow.
    """
    attached = vars(model).get(_CompiledCall.name)
    names = ("generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length")
    if not isinstance(attached, _CompiledCall) or not all(name in given for name in names):
        return False
    config, inputs = given["generation_config"], given["model_kwargs"]
    if config.cache_implementation is not None or config.use_cache is False or config.is_assistant:
        return False
    if any(inputs.get(name) is not None for name in (*CACHE_NAMES, "cache_params")):
        return False
    if config.disable_compile or config.compile_config is not None or config.prefill_chunk_size is not None:
        return False
    if given["generation_mode"] not in MODES or config.return_dict_in_generate:
        return False
    if config.output_attentions or config.output_hidden_states:
        return False
    if model.device.type not in attached.graphs.recorder.device_types or attached.graphs.broken:
        return False
    # Under autocast the keys can be of another dtype than the values, which a static cache of transformers 5.17 refuses.
    if torch.is_autocast_enabled(model.device.type):
        return False
    text = model.config.get_text_config()
    layer_types = set(getattr(text, "layer_types", None) or ("full_attention",))
    if (
        text is not model.config
        or not layer_types <= LAYER_TYPES
        or getattr(text, "attention_chunk_size", None) is not None
    ):
        return False
    quantizer = getattr(model, "hf_quantizer", None)
    if not compiles_whole(model) or (quantizer is not None and not quantizer.is_compileable):
        return False
    if attention_implementation(model.config) not in ATTENTION or model.training:
        return False
    if attached.graphs.check(model) is not None:
        return False
    # `generate` makes no static cache shorter than an earlier one of this model.
    length = max(given["max_cache_length"], longest_cache(model), config.max_cache_len or 0)
    sequences = given["batch_size"] * max(config.num_return_sequences or 1, 1)
    size = sequences * length * _bytes_per_token(text, model.dtype)
    if length > MAX_LENGTH:
        return False
    # Asking the driver for the free memory takes longer than a decode step: only for a cache that could be too large.
    return size * SMALL_SHARE <= _all_memory(model.device) or size * MEMORY_SHARE <= _free_memory(model.device)


def _bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * dtype.itemsize


def _all_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def _free_memory(device: torch.device) -> int:
    """Bytes that torch can still allocate on a GPU: free ones, and those that it keeps for itself."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
