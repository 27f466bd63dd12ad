"""Causal attention on a CPU with bf16 instructions, in bfloat16: torch's by other products, on short rows faster.

torch's CPU kernel saves memory, which rows of a few hundred tokens do not need, and pays for it with time. Here queries are worked
on CHUNK at a time against the keys up to their own, by products of matrices, and the probabilities are kept for the backward; one
new query of every row reads the keys that its heads share once. Scores are rounded to bfloat16 before the softmax, as by
transformers' eager attention and not by torch's; so the keys' mean over the positions, which no softmax sees, is taken off before
(of some keys, and within the product, where there is one query).
Whatever else there is (a mask, dropout, a bias, long rows or many, other dtypes) goes to torch's as before.

What it gains: `python examples/bench_refine.py --config DIR` with and without `--torch-attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..internals.transformers_generation import attention_implementation, takes_attention
from ..placement import compute_dtype, input_device

__all__ = ["causal_attention", "cpu_attention", "last_attention"]

NAME = "littlebit_causal"
CHUNK = 256  # queries
SAMPLED = 32  # keys, for a vector near the mean of all
LONGEST = 1024  # tokens in a row
LARGEST = 2**25  # probabilities of a layer, which are kept for the backward: 64 MB
REPLACED = "sdpa"  # who has chosen another implementation keeps it


class _CausalAttention(torch.autograd.Function):
    """Heads that share keys are rows of one product: [batch * key heads, shared * queries, size]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        batch, heads, length, _ = query.shape
        groups, shared = batch * key.shape[1], heads // key.shape[1]
        rows = (query * scaling).reshape(groups, shared, length, -1)
        keys, values = _centred(key).reshape(groups, length, -1), value.reshape(groups, length, -1)
        later = rows.new_full((CHUNK, CHUNK), float("-inf")).triu_(1)
        out = values.new_empty(batch, length, heads, values.shape[-1])
        kept = []
        for start, end in _chunks(length):
            asked = rows[:, :, start:end].reshape(groups, shared * (end - start), -1)
            scores = torch.bmm(asked, keys[:, :end].transpose(1, 2))
            own = scores.view(groups, shared, end - start, end)[..., start:]
            own += later[: end - start, : end - start]
            scores = scores.softmax(-1)
            out[:, start:end] = _tokens_first(torch.bmm(scores, values[:, :end]), batch, shared)
            kept.append(scores)
        ctx.scaling = scaling
        ctx.save_for_backward(rows, keys, values, out, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        rows, keys, values, out, *kept = ctx.saved_tensors
        batch, length, heads, _ = out.shape
        groups, shared = rows.shape[:2]
        # What a softmax's gradient takes off a row is the product of its output with the output's gradient.
        taken_off = (out * outer).sum(-1, keepdim=True)
        grad_rows, grad_keys, grad_values = torch.empty_like(rows), torch.zeros_like(keys), torch.zeros_like(values)
        for (start, end), scores in zip(_chunks(length), kept, strict=True):
            asked = rows[:, :, start:end].reshape(groups, shared * (end - start), -1)
            grad = _heads_first(outer[:, start:end], groups, shared)
            grad_values[:, :end] += torch.bmm(scores.transpose(1, 2), grad)
            inner = torch.bmm(grad, values[:, :end].transpose(1, 2))
            inner.sub_(_heads_first(taken_off[:, start:end], groups, shared)).mul_(scores)
            grad_rows[:, :, start:end] = torch.bmm(inner, keys[:, :end]).view(groups, shared, end - start, -1)
            grad_keys[:, :end] += torch.bmm(inner.transpose(1, 2), asked)
        kind = (batch, groups // batch, length, -1)
        return (
            grad_rows.mul_(ctx.scaling).view(batch, heads, length, -1),
            grad_keys.view(kind),
            grad_values.view(kind),
            None,
        )


def _centred(key: Tensor) -> Tensor:
    """Keys [batch, heads, length, size] without their mean over the positions: scores of equal softmax, and smaller ones."""
    return (key - key.mean(2, keepdim=True, dtype=torch.promote_types(key.dtype, torch.float32))).to(key.dtype)


def _chunks(length: int) -> list[tuple[int, int]]:
    """The queries that are worked on together, (first, behind the last)."""
    return [(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]


def _tokens_first(values: Tensor, batch: int, shared: int) -> Tensor:
    """[batch * key heads, shared * queries, size] -> [batch, queries, heads, size]."""
    groups, rows, size = values.shape
    parts = values.view(batch, groups // batch, shared, rows // shared, size).permute(0, 3, 1, 2, 4)
    return parts.flatten(2, 3)


def _heads_first(values: Tensor, groups: int, shared: int) -> Tensor:
    """[batch, queries, heads, size] -> [batch * key heads, shared * queries, size]."""
    return values.transpose(1, 2).reshape(groups, shared * values.shape[1], -1)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(scaling * Q K^T, causal) V, once differentiable.

    query, key, value: [batch, heads, length, size] of one dtype, the latter two with as many heads or a divisor of them. What is
    kept for the backward, and gradients summed over chunks, are in this dtype. Returns [batch, length, heads, size].
    """
    return _CausalAttention.apply(query, key, value, scaling)  # type: ignore[no-any-return]


def last_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention of one query [batch, heads, 1, size] to all keys, otherwise as causal_attention."""
    batch, heads, _, size = query.shape
    groups, length = batch * key.shape[1], key.shape[2]
    asked = (query * scaling).reshape(groups, heads * batch // groups, size)
    keys = key.reshape(groups, length, size)
    # Their mean would take longer than the products: any vector does that is near it, and is taken off in the product itself.
    near = keys[:, :: -(-length // SAMPLED)].mean(1, keepdim=True, dtype=torch.float32).to(keys.dtype)
    scores = torch.baddbmm(torch.bmm(asked, near.mT), asked, keys.mT, beta=-1).softmax(-1)
    return torch.bmm(scores, value.reshape(groups, length, -1)).view(batch, 1, heads, -1)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls, as it calls sdpa_attention_forward."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    computed_in = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    queries, keys = query.shape[2], key.shape[2]
    plain = (
        query.device.type == "cpu"
        and computed_in == torch.bfloat16
        and attention_mask is None
        and len(query) == len(key)
        and (queries == 1 or (causal and queries == keys <= LONGEST))
        and len(query) * query.shape[1] * queries * keys <= LARGEST
        and not dropout
        and all(kwargs.get(name) is None for name in ("position_bias", "softcap", "s_aux"))
    )
    if not plain:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    # Autocast would take the softmax in fp32, which costs more than both products.
    with torch.autocast("cpu", enabled=False):
        query, key, value = (each.to(computed_in) for each in (query, key, value))
        attend = last_attention if queries == 1 else causal_attention
        return attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None


@contextmanager
def cpu_attention(*models: Any) -> Iterator[None]:
    """Give those of `models` that are PreTrainedModels on a CPU with torch's attention this one within the context.

    Copies and pickles of a model that are made within it keep its name, which is known once this was called.
    """
    if compute_dtype(torch.device("cpu")) != torch.bfloat16:
        yield
        return
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    changed = [
        model
        for model in models
        if isinstance(model, PreTrainedModel)
        and input_device(model).type == "cpu"
        and attention_implementation(model.config) == REPLACED
        and takes_attention(model)
    ]
    try:
        for model in changed:
            model.set_attn_implementation(NAME)
        yield
    finally:
        for model in changed:
            if attention_implementation(model.config) == NAME:
                model.set_attn_implementation(REPLACED)
