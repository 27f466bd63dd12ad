"""Distillation: the loss of quantization-aware training, from a teacher that runs beside the model.

    loss = 1/N * sum_t [ KL(teacher_t || student_t) + hidden_weight * sum_layers error(s_tl, d_tl) ]

t runs over the tokens that count: a label other than -100 and no padding. N is Trainer's `num_items_in_batch`, the number
of labels other than -100 in the whole optimizer step, over all its micro-batches and devices, so that neither changes the
gradient; without it, N is the number of tokens that count in this batch. s and d are the hidden states of student and
teacher, embeddings included. Their error is

    relative       |s - d|^2 / |d|^2     (the default)
    mean_square    mean over the hidden units of (s - d)^2     (the paper's)

The paper's is owned by a few tokens wherever these have hidden states a thousand times as large as all others ("massive
activations"): of SmolLM2-135M's loss it was 93 %. Divided by the size of each token's own state, it is not.

Source: LittleBit (arXiv 2506.13771, section 3.3), which sums the KL over a sequence's 2,048 tokens and weighs the mean squares by
10; per token that is a `hidden_weight` of 10 / 2048.
"""

from __future__ import annotations

import functools
import inspect
import logging
import types
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils import ModelOutput

from ..layers.precision import fp32_norms
from ..placement import input_device
from .distributed import is_partitioned, run_partitioned
from .losses import hidden_error, kl_divergence
from .topk import TopK, TopKTeacher

__all__ = ["HIDDEN_ERRORS", "HIDDEN_WEIGHT", "Distillation", "token_mask"]

logger = logging.getLogger("hf_littlebit")
HIDDEN_WEIGHT = 0.3  # of the relative error
HIDDEN_ERRORS = ("relative", "mean_square")
IGNORED = -100  # the label of a token that does not count, everywhere in transformers


def token_mask(labels: Tensor, attention_mask: Tensor | None, shifted: bool) -> Tensor:
    """The positions whose output is compared, bool [batch, seq].

    With `shifted`, position t predicts labels[t + 1], as in causal models; the last one predicts nothing. Positions that
    are padding, or whose label is, never count.
    """
    real = None
    if attention_mask is not None and attention_mask.shape == labels.shape:
        real = attention_mask.to(labels.device).bool()
        labels = labels.masked_fill(~real, IGNORED)
    if shifted:
        labels = F.pad(labels[..., 1:], (0, 1), value=IGNORED)
    mask = labels != IGNORED
    return mask if real is None else mask & real


class Distillation:
    """A teacher's loss in place of a model's own, in training mode only.

    LittleBitTrainer asks for it in its compute_loss. A plain Trainer has no such place, because a callback sees neither
    inputs nor loss; there `attach` wraps the model's forward, below autocast and distributed wrappers. The output of a
    training step has the loss and no logits; in evaluation mode a model's output is left as it is.

    Args:
        teacher: a model (any device, quantized or offloaded as it likes) that is only read, or a TopKTeacher.
        model: the one that learns from it.
        hidden_weight: of the hidden-state error, per token; 0 switches it off. The formula above says what it weighs.
        hidden_error: "relative" or "mean_square".

    Raises:
        ValueError: for a weight below 0, an error that there is not, and an encoder-decoder model, whose two stacks are not
            compared here.
    """

    def __init__(
        self,
        teacher: nn.Module | TopKTeacher,
        model: PreTrainedModel,
        hidden_weight: float = HIDDEN_WEIGHT,
        hidden_error: str = "relative",
    ) -> None:
        if hidden_weight < 0:
            raise ValueError(f"hidden_weight is {hidden_weight}; it must be 0 (off) or more")
        if hidden_error not in HIDDEN_ERRORS:
            raise ValueError(f"hidden_error is {hidden_error!r}; choose one of {', '.join(HIDDEN_ERRORS)}")
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder model, which distillation does not cover; "
                "train it without a teacher"
            )
        # In a list: a Module as an attribute of something that a model holds could end up in its state dict.
        self._teacher: list[Any] = [teacher]
        self._config = model.config
        self._shifted = LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss
        self.hidden_weight = 0.0 if isinstance(teacher, TopKTeacher) else hidden_weight
        self.relative = hidden_error == "relative"
        self.active = False
        self.calls = 0
        self._sums: Tensor | None = None  # of KL, hidden error and tokens since they were last taken

    @property
    def teacher(self) -> Any:
        """The teacher: a model, a TopKTeacher, or None once the training is over."""
        return self._teacher[0]

    def attach(self, model: PreTrainedModel) -> None:
        """Wrap `model.forward` so that it returns this loss in training; nothing changes until `active` is set."""
        # As a plain function, so that a deep copy of the model calls its own layers.
        original = getattr(model.forward, "__func__", None) or functools.partial(_call, model.forward)

        @functools.wraps(getattr(model.forward, "__func__", model.forward))
        def forward(module: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            if not (self.active and module.training):
                return original(module, *args, **kwargs)
            if args:
                named = inspect.signature(type(module).forward).bind_partial(module, *args).arguments
                named.pop("self")
                kwargs |= named
            return self.outputs(functools.partial(original, module), kwargs)

        model.forward = types.MethodType(forward, model)

    def detach(self, model: PreTrainedModel) -> None:
        """Leave `model` with its own loss, and forget the teacher."""
        self.active = False
        self._teacher = [None]
        # Under autocast another wrapper lies on top of ours, which then only passes through.
        if getattr(model.__dict__.get("forward"), "__wrapped__", None) is type(model).forward:
            del model.forward

    def place(self, device: torch.device) -> None:
        """Make the teacher ready to run, and move it to `device`, unless it is e.g. offloaded and has places of its own."""
        teacher = self.teacher
        if isinstance(teacher, TopKTeacher):
            return
        teacher.eval()
        if is_partitioned(teacher.parameters()):
            self._teacher = [teacher, run_partitioned(teacher)]
            return
        fixed = getattr(teacher, "hf_device_map", None) or getattr(teacher, "is_quantized", False)
        if not fixed and not any(value.is_meta for value in teacher.parameters()):
            teacher.to(device)

    def take(self) -> Tensor | None:
        """The sums of KL, hidden error and tokens since the last call, fp32 [3], to divide for a log; None without a step."""
        sums, self._sums = self._sums, None
        return sums

    def outputs(self, student: Callable[..., Any], inputs: dict[str, Any]) -> ModelOutput:
        """The output of `student(**inputs)`, a training step's forward, with the distillation's loss and without logits.

        `inputs` may hold Trainer's `num_items_in_batch`, the N of the formula above.

        Raises:
            ValueError: for inputs without labels, and for models whose outputs cannot be compared.
        """
        inputs = dict(inputs)
        labels, shifted = inputs.pop("labels", None), self._shifted
        if inputs.get("shift_labels") is not None:
            labels, shifted = inputs.pop("shift_labels"), False
        if labels is None:
            raise ValueError(
                "a training batch reached the model without labels, so there is nothing to distil on. Give labels "
                "(DataCollatorForLanguageModeling(mlm=False) makes them), and leave out label_smoothing_factor and "
                "compute_loss_func, which take the labels away"
            )
        count = inputs.pop("num_items_in_batch", None)
        keep_states = inputs.pop("output_hidden_states", None)
        inputs["return_dict"] = True
        out = student(**inputs, output_hidden_states=bool(keep_states or self.hidden_weight))
        loss = self._loss(out, inputs, labels, shifted, count)
        # A mixture of experts that was asked for its router's own loss keeps it.
        if out.get("aux_loss") is not None:
            loss = loss + self._config.router_aux_loss_coef * out.aux_loss.to(loss.device)
        # Mixed precision turns whatever is returned into fp32: not the logits, which Trainer does not use in training.
        dropped = ("logits",) if keep_states else ("logits", "hidden_states")
        kept = {key: value for key, value in out.items() if key not in dropped}
        return cast(ModelOutput, type(out)(**{**kept, "loss": loss}))

    # The teacher is no part of what is compiled: it may be offloaded, quantized, or a file.
    @torch.compiler.disable
    def _loss(
        self, student: Any, inputs: dict[str, Any], labels: Tensor, shifted: bool, count: Tensor | int | None
    ) -> Tensor:
        """The loss of one batch from the `student`'s output, divided by `count`; its parts are added to what `take` returns."""
        if student.logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"the logits are {list(student.logits.shape)} and the labels {list(labels.shape)}; distillation compares "
                "token by token. Train this kind of model without a teacher"
            )
        if not self.calls:
            _warn_of_labelled_padding(labels, inputs.get("attention_mask"))
        mask = token_mask(labels, inputs.get("attention_mask"), shifted)
        logits, states = self._ask(inputs, student.logits)
        total = kl_divergence(student.logits, logits, mask)
        hidden = total.new_zeros(())
        if self.hidden_weight:
            shapes = [[list(state.shape) for state in each] for each in (student.hidden_states, states)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"the model has {len(shapes[0])} hidden states of {shapes[0][0]}, the teacher {len(shapes[1])} of "
                    f"{shapes[1][0]}; with a teacher of another size set hidden_weight=0"
                )
            for mine, other in zip(student.hidden_states, states, strict=True):
                hidden = hidden + hidden_error(mine, other, mask, self.relative).to(total.device)
        tokens = mask.sum().to(total.device)
        sums = torch.stack([total.detach(), hidden.detach(), tokens.float()])
        self._sums = sums if self._sums is None else self._sums + sums
        self.calls += 1
        # A step without a label counts nothing: 0 / 0 would make all that it trains NaN.
        count = tokens if count is None else torch.as_tensor(count, device=total.device)
        count = count.masked_fill(count == 0, 1)
        return (total + self.hidden_weight * hidden) / count

    def _ask(self, inputs: dict[str, Any], logits: Tensor) -> tuple[Tensor | TopK, Any]:
        """The teacher's logits, and its hidden states if it has any, for the batch that gave the student's `logits`."""
        teacher = self.teacher
        if isinstance(teacher, TopKTeacher):
            return teacher(inputs["input_ids"], inputs.get("attention_mask"), logits), None
        known = inspect.signature(teacher.forward).parameters
        free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        device = input_device(teacher, logits.device)
        given = {
            key: value.to(device) if torch.is_tensor(value) else value
            for key, value in {**inputs, "use_cache": False, "output_hidden_states": bool(self.hidden_weight)}.items()
            if free or key in known
        }
        with torch.no_grad(), fp32_norms(device):
            out = teacher(**given)
        if out.logits.shape != logits.shape:
            raise ValueError(
                f"the teacher's logits are {list(out.logits.shape)} and the model's {list(logits.shape)}; "
                "both need the same tokenizer and vocabulary size"
            )
        return out.logits, out.get("hidden_states")


def _warn_of_labelled_padding(labels: Tensor, attention_mask: Tensor | None) -> None:
    """Warn of a batch whose padding has labels: Trainer's N then counts tokens that the loss leaves out."""
    if attention_mask is None or attention_mask.shape != labels.shape:
        return
    padding = int(((attention_mask == 0) & (labels != IGNORED)).sum())
    if padding:
        logger.warning(
            "%d padding tokens of the first batch have labels. They are left out of the loss, but Trainer counts them, so the "
            "loss shrinks with the padding; set their labels to %d, as DataCollatorForLanguageModeling does.",
            padding,
            IGNORED,
        )


def _call(forward: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a `forward` that was put on the instance `module`, and therefore does not take it as an argument."""
    return forward(*args, **kwargs)
