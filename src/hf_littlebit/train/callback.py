"""Quantization-aware training with transformers' Trainer.

    trainer = Trainer(model=dense, args=args, train_dataset=data,
                      callbacks=[LittleBitCallback(LittleBitConfig(bpw=0.3), teacher=teacher)])
    trainer.train()
    trainer.save_model(out)      # packed

The training itself is a TrainingSession (session.py). The callback gives it Trainer's events:

    on_init_end     session.prepare     dense layers become latent ones
    on_train_begin  session.begin       the teacher's loss takes the place of the model's
    on_train_end    session.end         after the best checkpoint was loaded, the model is packed in place

Between them it is an ordinary training, whose checkpoints hold the fp32 latents and resume exactly.

What a plain Trainer has no place for, the callback attaches to the one model and the one Trainer that it serves: the
teacher's loss by wrapping the model's forward, the figures of the log by a callback before all others, and packing what is
saved of a sharded model by wrapping its save_pretrained. LittleBitTrainer has methods for all three, and attaches nothing.

Sources: LittleBit (arXiv 2506.13771), section 3.3, for the loss and the sign's gradient.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from ..config import LittleBitConfig
from ..initialize.head_inputs import HEAD_EXAMPLES
from ..layers.sign import ALPHA
from .data import is_listed, spread_batches
from .distill import HIDDEN_WEIGHT
from .export import pack_what_is_saved
from .session import TrainingSession
from .topk import TopKTeacher

__all__ = ["LittleBitCallback"]

logger = logging.getLogger("hf_littlebit")
Found = TypeVar("Found")


class LittleBitCallback(TrainerCallback):
    """Makes an ordinary `Trainer` train a LittleBit model. One instance serves one Trainer.

    The model may be dense, or latent: loaded with `LittleBitConfig(format="latent")` (as any checkpoint of such a
    training is), or made from a packed one with `unpack_model`.

    Args:
        config: how to factorize a dense model; may be left out for a latent one.
        teacher: what the model learns to imitate: a model with the same vocabulary, a TopKTeacher (logits alone, no hidden
            states), or "self" for the dense model itself, of which a frozen copy is kept. None: cross-entropy on the labels.
        hidden_weight: of the error of hidden states against that of the logits, per token (distill.py). hidden_error: "relative" to
            the size of each token's state, or "mean_square", the paper's, whose hidden_weight is 10 / 2048.
        sign_gradient: "smooth" (tanh, the paper's) or "ste". alpha: steepness of the former.
        pack: pack the model when training ends. False leaves it latent.
        dtype: of what stays dense in the packed model, which is trained in fp32, and saved in fp32 if None.
        calibration: a few batches of text (calibration.py), to factorize a dense model for what its errors cost rather
            than for their size. A latent model, and the state of a resumed training, are taken as they are.

    Raises:
        ValueError: here, when the Trainer is made, or when training starts, for everything that would silently do something
            else than asked. The message says what to do.
    """

    def __init__(
        self,
        config: LittleBitConfig | None = None,
        teacher: nn.Module | TopKTeacher | str | None = None,
        *,
        hidden_weight: float = HIDDEN_WEIGHT,
        hidden_error: str = "relative",
        sign_gradient: str = "smooth",
        alpha: float = ALPHA,
        pack: bool = True,
        dtype: torch.dtype | str | None = None,
        calibration: Iterable[Mapping[str, Any]] | None = None,
    ) -> None:
        self.session = TrainingSession(
            config,
            teacher,
            hidden_weight=hidden_weight,
            hidden_error=hidden_error,
            sign_gradient=sign_gradient,
            alpha=alpha,
            pack=pack,
            dtype=dtype,
            calibration=calibration,
        )
        self.attaches = True  # False where the Trainer is a LittleBitTrainer

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        """Convert `model` and prepare its loss."""
        self._refuse_trl()
        self.session.prepare(model, args, progress=state.is_local_process_zero and not args.disable_tqdm)
        if not self.attaches:
            return
        if self.session.distillation is not None:
            self.session.distillation.attach(self.session.model)
        handler = _caller(CallbackHandler)
        if handler is not None and self in handler.callbacks:
            # A new list, because the handler is going through the present one.
            handler.callbacks = [_Figures(self.session), *handler.callbacks]

    def _refuse_trl(self) -> None:
        """TRL's trainers make their losses of other outputs than the model's own loss, so that a teacher would not be heard."""
        trainer = _caller(Trainer)
        if self.session.teacher is None or all(
            known.__module__.partition(".")[0] != "trl" for known in type(trainer).__mro__
        ):
            return
        name = type(trainer).__name__
        raise ValueError(
            f"{name} is a trainer of TRL, which computes its loss itself, so there would be no distillation. Distil with "
            f"LittleBitTrainer or transformers' Trainer (the rows that TRL makes are {name}(...).train_dataset), or train with "
            f"{name} on the labels alone: LittleBitCallback(config, teacher=None)"
        )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Check what is about to be trained, and switch distillation on."""
        assert model is not None
        self.session.begin(model, optimizer, args.device)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse to train on without the teacher, and with numbers that are none."""
        assert model is not None
        self.session.refuse_step_without_teacher()
        self.session.refuse_nonfinite(model, state.global_step)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Take the teacher away and pack the model, a head of 4 bits for what it reads of the training's text."""
        rows = getattr(train_dataloader, "dataset", None)
        collate = getattr(train_dataloader, "collate_fn", None)
        self.session.end(spread_batches(rows, collate, HEAD_EXAMPLES) if collate and is_listed(rows) else None)
        if not self.session.packs_what_is_saved:
            return
        if self.attaches:
            pack_what_is_saved(self.session.model, self.session.packed)
        if state.is_world_process_zero:
            logger.warning(SHARDED)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Give a checkpoint of shards the config that tells what they are; Trainer writes none."""
        folder = os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}")
        if args.should_save and os.path.isdir(folder) and not os.path.isfile(os.path.join(folder, "config.json")):
            self.session.saved_config().save_pretrained(folder)


class _Figures(TrainerCallback):
    """Puts a session's figures among Trainer's own in the log, before any other callback reads it."""

    def __init__(self, session: TrainingSession) -> None:
        self.session = session

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures to the log of a training step, and to the history that Trainer has written it to already."""
        if logs is not None and "loss" in logs:
            values = self.session.figures()
            logs.update(values)
            state.log_history[-1].update(values)


def _caller(kind: type[Found]) -> Found | None:
    """The nearest object of this `kind` whose method an event comes from; None if something else calls the callback.

    Trainer puts its reporters (tensorboard, wandb ...) before a user's callbacks, and tells a callback neither of itself nor
    of its handler. Their frames, which every event comes from, are where they can be found.
    """
    frame = inspect.currentframe()
    try:
        while frame is not None:
            caller = frame.f_locals.get("self")
            if isinstance(caller, kind):
                return caller
            frame = frame.f_back
        return None
    finally:
        del frame  # it holds itself, and all that its callers hold


SHARDED = (
    "The model is sharded, so it stays latent in memory. trainer.save_model packs what it writes if it is LittleBitTrainer's, "
    "or if the engine gathers the state (FSDP2: FULL_STATE_DICT; ZeRO-3: stage3_gather_16bit_weights_on_model_save). Else, in "
    "one process: littlebit pack CHECKPOINT --out DIR, with --data TEXT for a head of 4 bits"
)
