"""The last part of a refinement: the whole model learns the dense one's next tokens, for a short time.

Blocks are tuned one by one, each for its own error; here they learn what these errors together do to the text. The teacher is the
dense model's likeliest tokens with one bucket for the rest (train/topk.py), written before its first block is replaced: no dense
model is held or run any more. Training is that of `littlebit train`: a LittleBitTrainer, whose checkpoints resume
after a kill, without the error of hidden states.

All that moves is in memory for it with its gradient and Adam's state, 16 bytes for each number, and the rest of the model in fp32:
latents, scales, norms, and where there is room embedding and head. Where the latents do not fit, the model stays as its blocks
were tuned.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..initialize.admm import LATENT_RANGE
from ..internals.transformers import train_on_one_gpu
from ..layers.precision import mixed
from ..layers.sign import sign
from ..load.convert import factor_modules, latents_and_scales
from ..placement import free_memory, input_device
from ..plan import Plan
from ..train.callback import LittleBitCallback
from ..train.data import TokenBlocks
from ..train.resume import last_checkpoint
from ..train.topk import TopKTeacher, save_topk
from ..train.trainer import LittleBitTrainer

__all__ = ["SEEN", "Schedule", "affordable", "distil", "memory_needed", "settle_latents", "teacher_of"]

logger = logging.getLogger("hf_littlebit")
LIKELIEST = 64  # tokens that are kept of the teacher for every position
ROWS = 4  # at a time for the teacher
WORKSPACE = 2e9  # bytes for a step's activations and logits
# Tokens of the default; a text that is read again teaches less (docs/refinement.md, which has the time for SmolLM2-135M).
SEEN, MOST_EPOCHS = 786_432, 4.0
SAVES = 8  # checkpoints of a distillation, of which the last is kept, and parts of what the teacher says


@dataclass(frozen=True)
class Schedule:
    """How long the whole model is distilled, and at what rates.

    Attributes:
        epochs: passes over the rows; None for those that make SEEN tokens, at most MOST_EPOCHS, and of a longer text a part from
            all over it (recipe.distilled_rows). batch: rows per step.
        latents, scales, rest: learning rates of U and V, of the scales, and of norms, biases, embedding and head. 0 for the
            latents leaves all signs as they are.
        embeddings: whether embedding and head move.

    Raises:
        ValueError: for a number that is too small.
    """

    epochs: float | None = None
    batch: int = 1
    latents: float = 2.5e-4
    scales: float = 1e-3
    rest: float = 2e-4
    embeddings: bool = True

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; it must be 1 or more")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs is {self.epochs}; it must be above 0 (Recipe(distillation=None) leaves it out)")
        for name in ("latents", "scales", "rest"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, a learning rate; it must be 0 or more")

    def steps(self, rows: int, length: int) -> int:
        """Optimizer steps over so many rows of `length` tokens."""
        epochs = min(MOST_EPOCHS, SEEN / (rows * length)) if self.epochs is None else self.epochs
        return max(1, math.ceil(epochs * rows / self.batch))


def memory_needed(model: PreTrainedModel, plan: Plan, embeddings: bool) -> float:
    """Bytes that the distillation of the dense `model`, quantized by `plan`, takes at its peak, about."""
    latents = sum(weight.latents for weight in plan.weights)
    rest = sum(value.numel() for value in model.parameters()) - plan.numel
    moving = sum(weight.numel() for weight in _embeddings(model)) if embeddings else 0
    # Of embedding and head, beside Adam's state, the gradients of either, and a copy in bf16 with its own.
    return 16.0 * latents + 4.0 * rest + 20.0 * moving + WORKSPACE


def _embeddings(model: PreTrainedModel) -> list[Tensor]:
    """The weights of embedding and head, once where they are tied."""
    found: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = [table.weight for table in found if isinstance(table, nn.Embedding | nn.Linear)]
    return list({id(weight): weight for weight in weights}.values())


def affordable(
    schedule: Schedule | None, model: PreTrainedModel, plan: Plan, device: torch.device, warn: bool = True
) -> Schedule | None:
    """`schedule`, without embeddings where `device` has too little memory for these, or None where for all; with a warning."""
    free = free_memory(device)
    if schedule is None or free is None or memory_needed(model, plan, schedule.embeddings) <= free:
        return schedule
    fits = memory_needed(model, plan, embeddings=False) <= free
    text = (
        "embedding and head stay as they are in the distillation at the end: with them it takes"
        if fits
        else "the distillation at the end is left out, and the blocks are refined all the same: it takes"
    )
    if warn:
        need = memory_needed(model, plan, schedule.embeddings and fits)
        logger.warning("%s about %.1f GB of memory, and %.1f GB are free", text, need / 1e9, free / 1e9)
    return replace(schedule, embeddings=False) if fits else None


def teacher_of(model: PreTrainedModel, tokens: Tensor, folder: str, dtype: torch.dtype) -> TopKTeacher:
    """The likeliest next tokens of the dense `model` for all rows of `tokens` [rows, length], kept in `folder`.

    A folder that has them already is read. `dtype` is what the model computes in.
    """
    try:
        return TopKTeacher(folder)
    except ValueError:  # there is none yet, or a kill cut it short
        k = min(LIKELIEST, model.config.get_text_config().vocab_size - 1)
    # A list: its length makes the time foreseeable.
    batches = [{"input_ids": part} for part in tokens.long().split(ROWS)]
    with mixed(input_device(model), dtype):
        return save_topk(model, batches, folder, k, keep=max(1, len(batches) // SAVES))


def settle_latents(model: nn.Module) -> None:
    """Hold the latents of every weight away from zero, in place, as an initialiser leaves them; all signs stay.

    Tuning leaves many in the middle of a flip. Adam's first step moves every latent by its whole rate, so that all of these would
    flip at once: 0.4 % of the signs, which threw SmolLM2-135M from 1.8 nats above the dense model to 47.
    """
    with torch.no_grad():
        for latent in latents_and_scales(model)[0]:
            size = latent.abs()
            smallest = LATENT_RANGE[0] * size.median()
            latent.copy_(sign(latent) * size.clamp_min(smallest))


class _Bar(ProgressCallback):
    """A bar with the loss behind it, on stderr: Trainer's own prints all of its log to stdout, which is for results."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss."""
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")  # type: ignore[index]


def distil(
    model: PreTrainedModel,
    tokens: Tensor,
    teacher: TopKTeacher,
    schedule: Schedule,
    folder: str,
    *,
    dtype: torch.dtype,
    bf16: bool,
    device: torch.device,
    seed: int,
    progress: bool,
) -> None:
    """Train the latent `model` in place on rows of `tokens`, and pack it; goes on from a checkpoint in `folder`.

    Args:
        dtype: of what stays dense, once packed. bf16: compute in it.
    """
    for parameter in model.parameters():
        # Routers are the dense model's: the text is too short to move them.
        parameter.requires_grad_(parameter.ndim == 1 and parameter.is_floating_point())
    for weight in _embeddings(model) if schedule.embeddings else ():
        weight.requires_grad_(True)
    latents = [value for module in factor_modules(model).values() for value in module.parameters(recurse=False)]
    for parameter in latents:
        parameter.requires_grad_(True)
    settle_latents(model)
    cached = getattr(model.config, "use_cache", None)
    steps = schedule.steps(*tokens.shape)
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=schedule.batch,
        learning_rate=schedule.rest,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        optim="adamw_torch_fused",
        bf16=bf16,
        use_cpu=device.type == "cpu",
        logging_steps=max(1, steps // 20),
        save_strategy="steps",
        save_steps=max(1, steps // SAVES),
        save_total_limit=1,
        seed=seed,
        report_to=[],
        disable_tqdm=not progress,
    )
    train_on_one_gpu(arguments)  # of several Trainer would take all, and be refused
    callback = LittleBitCallback(None, teacher, hidden_weight=0.0, dtype=dtype)
    trainer = LittleBitTrainer(
        model,
        arguments,
        callbacks=[callback],
        train_dataset=TokenBlocks(tokens),
        latent_learning_rate=schedule.latents,
        scale_learning_rate=schedule.scales,
        calibration=0,
    )
    trainer.remove_callback(ProgressCallback if progress else PrinterCallback)
    if progress:
        trainer.add_callback(_Bar())
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    # Takes autocast off the model's forward, which was for the training, as is dropout.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model.eval()
    if cached is not None:  # Trainer switches it off, for the training alone
        model.config.use_cache = cached
