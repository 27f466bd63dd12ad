"""Reading a prompt as a CUDA graph: for prompts of up to a thousand tokens the host is the slower part, as in a decode step.

Prompts are filled up with copies of their last token to one of few lengths (`filled_length`), so that few graphs serve all
of them. That is exact for what is kept: a token sees those before it alone, the logits are taken at the last real one, and
the cache counts the real ones, so that what was written beyond is written anew before it is seen. The products have other
sizes than without, so results may differ in their last bits, as with another batch.

A prompt is read so where the model has generated before with a cache of this length: its tensors are there, and the decode
step was recorded. The first such prompt of a length is watched, the second recorded, the third and later ones are replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..internals.transformers_generation import attention_implementation
from .decode_graph import DecodeGraphs
from .recorded_step import RecordedStep
from .recorder import Unfit
from .static_cache import CacheHome
from .step_inputs import StepInputs, cache_of, step_inputs

__all__ = ["PROMPT_TOKENS", "filled_length", "read_prompt"]

PROMPT_TOKENS = 1024  # of all sequences together; with more the GPU is the slower part
KEPT = "logits_to_keep"  # how a model's forward is told of which tokens logits are wanted
LENGTH = "length"  # the static tensor that tells a recorded reading how many tokens are real


def filled_length(length: int) -> int:
    """The number of tokens to which a prompt of `length` is filled up: steps of 32, from 257 on of 64, from 513 on of 128."""
    step = 32
    while length > 8 * step:
        step *= 2
    return -(-length // step) * step


def read_prompt(graphs: DecodeGraphs, model: Any, inputs: dict[str, Any]) -> Any:
    """The model's result for the prompt of a new generation, with the logits of its last token.

    Args:
        graphs: of the model.
        inputs: what its forward is to be called with, as `prepare_inputs_for_generation` makes it.

    Raises:
        Unfit: with nothing done, where the prompt has to be read as without graphs.
    """
    kept = inputs.get(KEPT)
    if type(kept) is not int or kept != 1:
        raise Unfit("a prompt is not asked for the logits of its last token alone")
    now = step_inputs(_with_masks(model, {name: value for name, value in inputs.items() if name != KEPT}))
    with graphs.lock:
        graphs.refuse_now(model, now.tokens.device)
        home = graphs.home_of_new(model, now)
        now = _filled(now, min(filled_length(now.tokens.shape[1]), home.places))
        step = graphs.step_of(home, ("prompt", now.shapes, now.others), lambda: RecordedStep(_reading(home)))
        if step.unfit is not None:
            raise Unfit(step.unfit)
        home.adopt_new(now.cache)
        return _read(graphs, model, now, step, home)


def _read(graphs: DecodeGraphs, model: Any, now: StepInputs, step: RecordedStep, home: CacheHome) -> Any:
    if step.replay is None:
        graphs.vouch()  # the model's own code runs
    if step.runs == 0:
        result, step.unfit = step.watched(model, now, [])
        return result
    try:
        if step.replay is None:
            result, step.unfit = step.warmed(model, now, graphs.recorder)
            if step.unfit is None:
                # The result is the caller's: a replay writes to memory of the recording.
                step.record(model, now, graphs.recorder)
            return result
        return step.replayed(now)
    except RuntimeError as error:  # of CUDA, or for want of memory
        home.forget()
        step.unfit = str(error).strip().partition("\n")[0]
        raise Unfit(step.unfit) from error


def _with_masks(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with causal masks in place of masks that are left out, bool [1, 1, tokens, places].

    Without one the model would ask the cache whether it is empty, which is a number on the device.
    """
    masks = inputs.get("attention_mask")
    if isinstance(masks, Tensor) or (isinstance(masks, dict) and None not in masks.values()):
        return inputs
    cache = cache_of(inputs)
    if attention_implementation(model.config) != "sdpa" or cache is None:
        raise Unfit("a prompt has no mask, and its attention is not torch's")
    tokens = inputs["input_ids"]
    places = torch.arange(min(layer.max_cache_len for layer in cache.layers), device=tokens.device)
    causal = (places <= places[: tokens.shape[1], None])[None, None]
    if not isinstance(masks, dict):
        return {**inputs, "attention_mask": causal}
    return {**inputs, "attention_mask": {kind: causal if mask is None else mask for kind, mask in masks.items()}}


def _filled(now: StepInputs, filled: int) -> StepInputs:
    """The inputs with `filled` tokens, and the number of real ones beside them."""
    length = now.tokens.shape[1]
    tensors = {}
    for name, value in now.tensors.items():
        # A mask is [sequences, 1, tokens, places]; the others end with the tokens.
        along = 2 if name.startswith("attention_mask") else value.dim() - 1
        if value.shape[along] != length:
            raise Unfit(f"a prompt of {length} tokens is given {name} of {value.shape[along]}")
        last = value.narrow(along, length - 1, 1)
        shape = list(value.shape)
        shape[along] = filled - length
        tensors[name] = torch.cat((value, last.expand(shape)), dim=along)
    tensors[LENGTH] = torch.full((), length, dtype=torch.int64, device=now.tokens.device)
    given = {**now.with_tensors(tensors), LENGTH: tensors[LENGTH]}
    return now._replace(given=given, tensors=tensors)


def _reading(home: CacheHome) -> Callable[..., Any]:
    """What is recorded: a reading of the prompt into the tensors of `home`, which then count the real tokens."""
    counts = home.counts

    def call(model: Any, *, length: Tensor, **inputs: Any) -> Any:
        for count in counts:
            count.zero_()
        result = model(**inputs, **{KEPT: length.reshape(1) - 1})
        for count in counts:
            count.copy_(length)
        return result

    return call
