"""What distillation minimises: the divergence of a student's logits from a teacher's, and the error of its hidden states.

Both are sums over the tokens that count. Memory: logits are upcast to fp32 CHUNK elements at a time, on a CPU fewer, which its
cache holds. The gradient of the divergence is written over the teacher's logits, in the dtype that the models compute in. Hidden
states of both models are kept until the backward, without copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layers.output_head import CACHED, CHUNK
from .topk import TopK

__all__ = ["hidden_error", "kl_divergence"]

LEAST = 1e-6  # of the mean of the squared states: what an error is divided by at least


class _KLDivergence(torch.autograd.Function):
    """The sum over tokens, with its gradient computed chunk by chunk in the forward."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor | TopK, mask: Tensor) -> Tensor:
        rows, vocabulary = student.reshape(-1, student.shape[-1]), student.shape[-1]
        keep = mask.reshape(-1, 1).to(rows.device)
        needs = ctx.needs_input_grad[0]
        grad = None
        if needs:
            grad = _gradient_memory(rows, teacher)
        total = rows.new_zeros((), dtype=torch.float32)
        size = max(1, (min(CHUNK, CACHED) if rows.is_cpu else CHUNK) // vocabulary)
        for at in range(0, len(rows), size):
            part = slice(at, at + size)
            log_q = rows[part].float().log_softmax(-1)
            if isinstance(teacher, TopK):
                loss, target = teacher.kl(part, log_q)
            else:
                log_p = teacher.reshape(-1, vocabulary)[part].to(rows.device).float().log_softmax(-1)
                target = log_p.exp()
                # p = 0 contributes nothing, also where a model masks tokens with -inf: 0 * inf would be NaN.
                loss = torch.where(target > 0, target * (log_p - log_q), 0.0).sum(-1, keepdim=True)
            total += torch.where(keep[part], loss, 0.0).sum()
            if grad is not None:
                grad[part] = torch.where(keep[part], log_q.exp() - target, 0.0).to(grad.dtype)
        ctx.shape = student.shape
        if grad is not None:
            ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        _refuse_second_derivatives()
        # In place, for memory; autograd itself refuses a second backward through a saved tensor that was changed.
        (grad,) = ctx.saved_tensors
        return grad.mul_(outer.to(grad.dtype)).view(ctx.shape), None, None


def _refuse_second_derivatives() -> None:
    """Refuse create_graph=True: gradients that are computed in the forward, or from saved values, would pass for constants."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the loss of distillation has first derivatives only; leave create_graph=True out, or train without a teacher"
        )


def _gradient_memory(rows: Tensor, teacher: Tensor | TopK) -> Tensor:
    """Memory for the gradient with respect to the student's logits `rows` [positions, vocabulary].

    Every teacher's logit is read once, right before the gradient at its place is known, so the gradient is written over
    the teacher's logits where it fits there. Under autocast the output head computes in 16 bits, and so is its gradient,
    even if accelerate has turned the logits into fp32 since; elsewhere the gradient has the logits' own dtype.
    """
    device = rows.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else rows.dtype
    if isinstance(teacher, Tensor) and teacher.is_contiguous() and (teacher.dtype, teacher.device) == (dtype, device):
        return teacher.view(rows.shape)
    return torch.empty_like(rows)


def kl_divergence(student: Tensor, teacher: Tensor | TopK, mask: Tensor) -> Tensor:
    """sum over the tokens of `mask` of KL(softmax(teacher) || softmax(student)), fp32 scalar, in nats.

    student, teacher: logits [..., vocabulary], any float dtypes; a tensor `teacher` is overwritten. mask: bool [...].
    """
    return _KLDivergence.apply(student, teacher, mask)


class _HiddenError(torch.autograd.Function):
    """Keeps both states as they are and takes the difference again in the backward: no fp32 copy per layer is saved."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor, relative: bool) -> Tensor:
        target = teacher.float()
        if relative:
            size = target.square().sum(-1)
            # A state of nearly nothing, as a row of zeros in an embedding is, would make any error of it endless.
            mean = torch.where(mask, size, 0.0).sum() / mask.sum().clamp_min(1)
            size = torch.maximum(size, (mean * LEAST).clamp_min(LEAST**2))
        else:
            size = torch.full_like(target[..., 0], target.shape[-1])
        ctx.save_for_backward(student, teacher, mask, size)
        error = (student.float() - target).square_().sum(-1) / size
        # Where nothing counts, a state may be anything: attention over a row of padding gives NaN in some implementations.
        return torch.where(mask, error, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        _refuse_second_derivatives()
        student, teacher, mask, size = ctx.saved_tensors
        difference = (student.float() - teacher.float()).mul_((2 * outer / size).unsqueeze(-1))
        return torch.where(mask.unsqueeze(-1), difference, 0.0).to(student.dtype), None, None, None


def hidden_error(student: Tensor, teacher: Tensor, mask: Tensor, relative: bool = True) -> Tensor:
    """sum over the tokens of `mask` of the error of two states [..., hidden]; fp32 scalar.

    relative: |student - teacher|^2 / |teacher|^2, where the latter is at least LEAST of its mean; else the mean over the hidden
    units of (student - teacher)^2.
    """
    return _HiddenError.apply(student, teacher.to(student.device), mask.to(student.device), relative)
