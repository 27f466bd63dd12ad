"""Perplexity of a causal language model on a text, the usual way: fixed windows of tokens, next-token loss.

    perplexity = exp(mean over counted tokens of -log p(token | the tokens before it in its window))

With `stride` = `length` (default) the text is cut into blocks; in each, every token but the first is predicted, so the
early ones have little context. A smaller `stride` slides the window: each counts only its last `stride` tokens (the
first counts all), which gives them at least length - stride tokens of context, at length / stride times the cost.

Texts of several documents separate them by the model's own end-of-text token, e.g. lines of "<|endoftext|>", which the
tokenizer turns into one token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..initialize.calibration import evaluating
from ..layers.output_head import CHUNK
from ..placement import input_device

__all__ = ["Perplexity", "exp", "loss_sum", "perplexity"]

MAX_LENGTH = 2048  # of the default window; the papers' choice for WikiText-2
# Of a text that is cut off behind so many characters for a token that is needed, this many tokens at the end may be others.
CHARACTERS, MARGIN = 8, 64


@dataclass(frozen=True)
class Perplexity:
    """`loss` is in nats per token; `tokens` predictions were counted, in `blocks` windows."""

    perplexity: float
    loss: float
    tokens: int
    blocks: int


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    length: int | None = None,
    stride: int | None = None,
    max_blocks: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> Perplexity:
    """Perplexity of `model`, dense or quantized, on `text`.

    Args:
        length: tokens per window; the model's context by default, but at most 2048.
        stride: tokens from one window's start to the next; `length` by default. See the module's text.
        max_blocks: stop after so many windows; all that fit by default. A last, incomplete one is never used.
        batch_size: windows per forward pass.
        progress: show a progress bar.

    Raises:
        ValueError: for impossible numbers, a text shorter than one window, a model that does not predict the next
            token, and tokens that the model does not know.
    """
    config = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False) or not _is_causal(model):
        raise ValueError(
            f"{type(model).__name__} does not predict the next token; perplexity needs a causal language model, "
            "loaded with AutoModelForCausalLM"
        )
    context = getattr(config, "max_position_embeddings", None)
    length = min(context or MAX_LENGTH, MAX_LENGTH) if length is None else length
    stride = length if stride is None else stride
    if length < 2 or (context is not None and length > context):
        raise ValueError(
            f"length is {length}; it must be from 2 to the model's context of {context or 'unknown'} tokens"
        )
    if not 1 <= stride <= length:
        raise ValueError(f"stride is {stride}; it must be from 1 to the length, {length}, so that no token is left out")
    for name, value in (("max_blocks", max_blocks), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    needed = None if max_blocks is None else length + (max_blocks - 1) * stride
    tokens = _tokens(model, tokenizer, text, needed)
    if len(tokens) < length:
        raise ValueError(
            f"the text has {len(tokens)} tokens, fewer than one window of {length}; give more text or less length"
        )
    starts = range(0, len(tokens) - length + 1, stride)[:max_blocks]
    # In windows after the first, what an earlier one has counted is context only.
    firsts = [1 if start == 0 or stride == length else length - stride for start in starts]
    device = input_device(model)
    total, count = 0.0, 0
    bar = tqdm(total=len(starts), desc="perplexity", unit="block", disable=not progress)
    with evaluating(model), torch.no_grad(), bar:
        for at in range(0, len(starts), batch_size):
            batch = torch.stack([tokens[start : start + length] for start in starts[at : at + batch_size]]).to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            for row, first in enumerate(firsts[at : at + batch_size]):
                total += loss_sum(logits[row, first - 1 : -1], batch[row, first:])
                count += length - first
            del logits
            bar.update(len(batch))
            bar.set_postfix(perplexity=f"{exp(total / count):.4g}")
    return Perplexity(exp(total / count), total / count, count, len(starts))


def loss_sum(logits: Tensor, targets: Tensor) -> float:
    """Summed next-token loss of logits [tokens, vocabulary], upcast to fp32 a chunk at a time."""
    rows = max(1, CHUNK // logits.shape[-1])
    pairs = zip(logits.split(rows), targets.to(logits.device).split(rows), strict=True)
    return sum(F.cross_entropy(part.float(), target, reduction="sum").item() for part, target in pairs)


def _tokens(model: Any, tokenizer: Any, text: str, needed: int | None) -> Tensor:
    """The tokens of `text`, or the first `needed` of them, for which a long text is not tokenized to its end."""
    size = len(text) if needed is None else CHARACTERS * (needed + MARGIN)
    while True:
        # verbose=False: a text is meant to be longer than the context here.
        ids = torch.tensor(tokenizer(text[:size], verbose=False)["input_ids"], dtype=torch.long)
        if size >= len(text) or len(ids) >= (needed or 0) + MARGIN:
            break
        size *= 4
    ids = ids[:needed]
    embeddings = model.get_input_embeddings()
    known = getattr(embeddings, "num_embeddings", None)
    if known is not None and len(ids) and int(ids.max()) >= known:
        raise ValueError(
            f"the tokenizer gives token {int(ids.max())}, but the model has {known} embeddings; "
            "use the model's own tokenizer"
        )
    return ids


def _is_causal(model: Any) -> bool:
    can_generate = getattr(model, "can_generate", None)
    return can_generate is None or bool(can_generate())


def exp(loss: float) -> float:
    """e^loss; infinity where that is no number any more."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
