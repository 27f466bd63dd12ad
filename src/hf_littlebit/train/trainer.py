"""LittleBitTrainer: for those who want more than the callback in an ordinary Trainer.

Its learning rates are the ones that trained best in `examples/experiments/recipe.py`: latents and scales move by multiples
of `args.learning_rate`, which the dense rest (embeddings, norms, biases, head) has.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput
from transformers.utils import ModelOutput

from ..config import LittleBitConfig
from ..layers.precision import fp32_norms
from ..load.convert import factor_modules, latents_and_scales, unpack_model, unwrapped
from .callback import LittleBitCallback
from .cpu_attention import cpu_attention
from .data import is_listed, spread_batches
from .distributed import gather
from .resume import last_checkpoint
from .session import REBUILT
from .topk import TopKTeacher

__all__ = ["CALIBRATION", "LATENT_FACTOR", "LEARNING_RATE", "SCALE_FACTOR", "LittleBitTrainer"]

LEARNING_RATE = 2e-4  # of the dense rest; what `littlebit train` uses
LATENT_FACTOR = 2.5
SCALE_FACTOR = 15.0
CALIBRATION = 32  # examples


class LittleBitTrainer(Trainer):
    """A Trainer with a LittleBitCallback of its own, a learning rate each for latents and scales, no weight decay on them,
    and a packed model as a starting point. Its loss and its log are methods of its own; it changes neither the model's forward
    nor anything of transformers. While it trains on a CPU with bf16 instructions, attention is that of cpu_attention.py.

    Args:
        config, teacher: as for LittleBitCallback, which may be given among `callbacks` instead.
        latent_learning_rate, scale_learning_rate: of U and V, and of h, l and g; LATENT_FACTOR and SCALE_FACTOR times
            `args.learning_rate` if None. All follow the same schedule.
        calibration: examples from all over `train_dataset` that a dense model is calibrated on before it is factorized
            (calibration.py). 0, a dataset without a length, or batches given to the callback: none of them.
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        *,
        config: LittleBitConfig | None = None,
        teacher: nn.Module | TopKTeacher | str | None = None,
        latent_learning_rate: float | None = None,
        scale_learning_rate: float | None = None,
        calibration: int = CALIBRATION,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        **kwargs: Any,
    ) -> None:
        if model is None or kwargs.get("model_init") is not None:
            raise ValueError(REBUILT if kwargs.get("model_init") is not None else "give the model to train")
        for name, rate in (("latent", latent_learning_rate), ("scale", scale_learning_rate)):
            if rate is not None and not rate >= 0:
                raise ValueError(f"{name}_learning_rate is {rate}; it must be 0 or more")
        if calibration < 0:
            raise ValueError(f"calibration is {calibration} examples; it must be 0 (off) or more")
        others: list[Any] = list(callbacks or [])
        given = [callback for callback in others if isinstance(callback, LittleBitCallback)]
        if given and (config is not None or teacher is not None):
            raise ValueError(
                "config and teacher are given both to the Trainer and in its LittleBitCallback; give them once"
            )
        if not given:
            given = [LittleBitCallback(config, teacher)]
            others += given
        self.session = given[0].session
        self.latent_learning_rate, self.scale_learning_rate = latent_learning_rate, scale_learning_rate
        modules = factor_modules(model).values()
        if modules and not any(module.latent for module in modules):
            unpack_model(model)
        listed = is_listed(kwargs.get("train_dataset"))
        for callback in given:
            callback.attaches = False
            if callback.session.calibration is None and calibration and listed:
                callback.session.calibration = self._calibration_batches(calibration)
        super().__init__(model=model, args=args, callbacks=others, **kwargs)

    def _calibration_batches(self, examples: int) -> Iterator[Mapping[str, Any]]:
        """Batches of the training set, in the same order on every process; read once Trainer has its collator."""
        known = inspect.signature(unwrapped(self.model).forward).parameters

        def collate(batch: list[Any]) -> Any:
            if self.args.remove_unused_columns and all(isinstance(row, Mapping) for row in batch):
                batch = [{key: value for key, value in row.items() if key in known or "label" in key} for row in batch]
            return self.data_collator(batch)

        yield from spread_batches(self.train_dataset, collate, examples, self.args.per_device_train_batch_size)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The teacher's loss in training, if there is a teacher; in evaluation, and without a teacher, the model's own."""
        distillation = self.session.distillation
        if distillation is None or not (distillation.active and unwrapped(model).training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        def student(**given: Any) -> ModelOutput:
            return distillation.outputs(model, given)

        # Trainer's own method calls the student in the model's place, and scales its loss for the devices. The teacher is in
        # no engine's wrapper, so autocast reaches it from here.
        with self.accelerator.autocast():
            return super().compute_loss(student, inputs, return_outputs, num_items_in_batch)  # type: ignore[arg-type]

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own. A packed model in fp16 is evaluated under bf16's autocast on a CPU too."""
        with fp32_norms(self.args.device):
            return super().prediction_step(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the session's figures with those of a training step, e.g. `kd_loss` beside `loss`."""
        if "loss" in logs:
            logs.update(self.session.figures())
        super().log(logs, start_time)

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        """The optimizer of `args.optim`, with groups for latents, scales, and the rest with and without weight decay."""
        if type(self.optimizer).__name__ == "DummyOptim":
            raise ValueError(
                "the DeepSpeed config has an optimizer of its own, which gives latents, scales and the rest one learning rate; "
                "take `optimizer` out of it, so that args.optim is used"
            )
        if self.optimizer is not None:
            return self.optimizer
        trained: Any = self.model if model is None else model
        optimizer_class, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
            self.args, trained
        )
        if {"params", "model", "optimizer_dict"} & set(options):
            raise ValueError(
                f"optim {self.args.optim!s} makes its own parameter groups; use adamw_torch or another plain one"
            )
        latents, scales = latents_and_scales(trained)
        known = {id(value) for value in (*latents, *scales)}
        decayed = set(self.get_decay_parameter_names(trained))
        rest = [(n, p) for n, p in trained.named_parameters() if p.requires_grad and id(p) not in known]
        groups = [
            {"params": latents, "lr": self._rate(self.latent_learning_rate, LATENT_FACTOR), "weight_decay": 0.0},
            {"params": scales, "lr": self._rate(self.scale_learning_rate, SCALE_FACTOR), "weight_decay": 0.0},
            {"params": [p for n, p in rest if n in decayed], "weight_decay": self.args.weight_decay},
            {"params": [p for n, p in rest if n not in decayed], "weight_decay": 0.0},
        ]
        self.optimizer = optimizer_class([group for group in groups if group["params"]], **options)
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model like Trainer.save_model. After a sharded training that was to be packed, gather the latents of all
        processes first, and save a packed model of them."""
        if not self.session.packs_what_is_saved:
            super().save_model(output_dir, _internal_call)
            return
        state = gather(unwrapped(self.model))
        if self.args.should_save:
            trained = self.model
            self.model = self.session.packed(state)  # what _save writes, with the tokenizer and the arguments
            try:
                self._save(output_dir)
            finally:
                self.model = trained
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _rate(self, rate: float | None, factor: float) -> float:
        """The learning rate that the user gave, or `factor` times that of the dense rest."""
        return factor * self.args.learning_rate if rate is None else rate

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train like Trainer.train, but from a checkpoint that a kill has not cut short.

        `resume_from_checkpoint=True` takes the last checkpoint that was written to its end. A model that an earlier call has
        packed is refused before a checkpoint is read into it.
        """
        self.session.refuse_second_training()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"{self.args.output_dir} holds no complete checkpoint to resume from; call train() without "
                    "resume_from_checkpoint"
                )
        teacher = None if self.session.distillation is None else self.session.distillation.teacher
        with cpu_attention(unwrapped(self.model), teacher):
            return super().train(resume_from_checkpoint, *args, **kwargs)
