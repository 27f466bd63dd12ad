"""Quantization-aware training with transformers' Trainer.

    trainer = Trainer(model=dense, args=args, train_dataset=data,
                      callbacks=[LittleBitCallback(LittleBitConfig(bpw=0.3), teacher=teacher)])
    trainer.train()
    trainer.save_model(out)      # packed

What happens when, and why there:

    on_init_end     dense layers become latent ones, and the model's forward gets the teacher's loss: before Trainer builds
                    the optimizer, wraps the model and reads a checkpoint, so that all three see the latents
    during train()  an ordinary training: checkpoints hold the fp32 latents and resume exactly
    on_train_end    after the best checkpoint was loaded, the model is packed in place

Sources: LittleBit (arXiv 2506.13771), section 3.3, for the loss and the sign's gradient.
"""

from __future__ import annotations

import copy
import logging
import os
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import transformers.trainer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import LittleBitConfig
from ..initialize.calibration import calibrate
from ..internals.transformers import has_adapters
from ..layers.sign import ALPHA, SIGN_GRADIENTS
from ..load.convert import (
    balance_scales,
    factor_modules,
    is_latent,
    latent_model,
    latents_and_scales,
    pack_model,
    refuse_latents,
    unwrapped,
    weight_ranks,
)
from ..plan import plan_model
from .distill import HIDDEN_WEIGHT, Distillation
from .distributed import agree, check_optimizer, check_weights, is_sharded
from .export import save_packed, saved_config
from .flips import SignFlips
from .topk import TopKTeacher

__all__ = ["REBUILT", "LittleBitCallback"]

logger = logging.getLogger("hf_littlebit")
# By the model; weak on both sides, because a callback holds its model, which would live as long as this module.
_CALLBACKS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[LittleBitCallback]] = weakref.WeakKeyDictionary()


class LittleBitCallback(TrainerCallback):
    """Makes an ordinary `Trainer` train a LittleBit model. One instance serves one Trainer.

    The model may be dense, or latent: loaded with `LittleBitConfig(format="latent")` (as any checkpoint of such a
    training is), or made from a packed one with `unpack_model`.

    Args:
        config: how to factorize a dense model; may be left out for a latent one.
        teacher: what the model learns to imitate: a model with the same vocabulary, a TopKTeacher (logits alone, no hidden
            states), or "self" for the dense model itself, of which a frozen copy is kept. None: cross-entropy on the labels.
        hidden_weight: of the error of hidden states against that of the logits, per token (distill.py).
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
        sign_gradient: str = "smooth",
        alpha: float = ALPHA,
        pack: bool = True,
        dtype: torch.dtype | None = None,
        calibration: Iterable[Mapping[str, Any]] | None = None,
    ):
        if isinstance(teacher, str) and teacher != "self":
            raise ValueError(f"teacher is {teacher!r}; give a loaded model, a TopKTeacher, 'self' or None")
        if sign_gradient not in SIGN_GRADIENTS:
            raise ValueError(f"sign_gradient is {sign_gradient!r}; choose one of {', '.join(SIGN_GRADIENTS)}")
        if not alpha > 0:
            raise ValueError(f"alpha is {alpha}; it must be above 0 (the paper's is {ALPHA:g})")
        self.config, self.teacher = config, teacher
        self.hidden_weight, self.sign_gradient, self.alpha, self.pack = hidden_weight, sign_gradient, alpha, pack
        self.dtype, self.calibration = dtype, calibration
        self.distillation: Distillation | None = None
        self.flips: SignFlips | None = None
        self._model: Any = None
        self._kind: Any = None  # FSDP2 makes another class of the model's
        self.finished = False
        self.sharded = False  # each process holds only a part of the model
        # Reporters (tensorboard, wandb ...) run before a user's callbacks; only a default callback runs before them.
        if _Logs not in transformers.trainer.DEFAULT_CALLBACKS:
            transformers.trainer.DEFAULT_CALLBACKS.append(_Logs)  # type: ignore[arg-type]

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Convert `model` and prepare its loss."""
        if self._model is not None:
            raise ValueError("this LittleBitCallback belongs to another Trainer already; make a new one for each")
        known = None if model is None else _CALLBACKS.get(model)
        other = None if known is None else known()
        if other is not None and not other.finished:
            raise ValueError(
                "the model is prepared by another LittleBitCallback already; give a Trainer one of them, and a second Trainer "
                "a model of its own"
            )
        self._check_arguments(args, model)
        modules = factor_modules(model)
        teacher = self._teacher(model, bool(modules))
        if teacher is not None:
            self.distillation = Distillation(teacher, self.hidden_weight)
            self.distillation.attach(model)
        if modules:
            self._check_latent(model, modules)
        else:
            if self.config is None:
                raise ValueError(
                    "the model is dense; say how to factorize it: LittleBitCallback(LittleBitConfig(bpw=...))"
                )
            accelerator = args.device if args.device.type != "cpu" else None
            importance = None if self.calibration is None else calibrate(model, self.calibration)
            bar = state.is_local_process_zero and not args.disable_tqdm
            latent_model(model, self.config, accelerator, progress=bar, importance=importance)
        agree([value for module in factor_modules(model).values() for value in module.parameters()], args.device)
        balance_scales(model)
        for module in factor_modules(model).values():
            module.sign_gradient, module.alpha = self.sign_gradient, self.alpha
        narrow = [name for name, p in model.named_parameters() if p.requires_grad and p.element_size() < 4]
        if narrow:
            logger.warning(
                "%d parameters besides latents and scales are 16-bit, e.g. %s: most of their small updates are rounded away. "
                "Load the model with dtype=torch.float32 (and train with bf16=True), or freeze them.",
                len(narrow),
                narrow[0],
            )
        self._model, self._kind = model, type(model)
        _CALLBACKS[model] = weakref.ref(self)
        self.flips = SignFlips(latents_and_scales(model)[0])

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check what is about to be trained, and switch distillation on."""
        model = unwrapped(model)
        if self._model is None:
            raise ValueError(
                "this LittleBitCallback was added to a Trainer that existed already, too late to convert its model; give it "
                "as Trainer(..., callbacks=[LittleBitCallback(...)])"
            )
        if self.finished:
            start = "unpack_model(model)" if self.pack else "the model"
            raise ValueError(
                "this Trainer has trained its model to the end already. To go on, make a new Trainer with a new "
                f"LittleBitCallback: from {start}, or from a latent checkpoint"
            )
        if not isinstance(model, type(self._model)) or not factor_modules(model):
            raise ValueError(REBUILT)
        latents, scales = latents_and_scales(model)
        self.sharded = is_sharded(latents)
        if self.sharded:
            # Trainer gathers a sharded model's state and hands it to save_pretrained, which drops it for quantized models.
            model.hf_quantizer = None
        elif model is not self._model:
            raise ValueError(REBUILT)
        check_optimizer(optimizer, latents, scales)
        if self.flips is not None:
            self.flips.follow(latents)
        if self.distillation is not None:
            self.distillation.place(args.device)
            self.distillation.active = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse to train on without the teacher."""
        if self.distillation is not None and not self.distillation.calls:
            raise ValueError(
                "a training step was made without the model's own forward, so there was no distillation; a Trainer whose "
                "compute_loss does not call model(**inputs) cannot use LittleBitCallback"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the teacher away and pack the model."""
        self.finished = True
        model, self.flips = self._model, None
        self.teacher = None  # its memory is wanted elsewhere
        if self.distillation is not None:
            self.distillation.detach(model)
        if not self.pack:
            return
        if self.sharded:
            save_packed(model, self._kind, self.dtype)
            if state.is_world_process_zero:
                logger.warning(SHARDED)
            return
        pack_model(model, self.dtype)
        model.register_load_state_dict_pre_hook(refuse_latents)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Give a checkpoint of shards the config that tells what they are; Trainer writes none."""
        folder = os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}")
        if args.should_save and os.path.isdir(folder) and not os.path.isfile(os.path.join(folder, "config.json")):
            saved_config(self._model, self._kind).save_pretrained(folder)

    def logs(self) -> dict[str, float]:
        """Means over the tokens since the last call: `kd_loss`, `hidden_loss` (unweighted), and the shares of flipped
        signs, `flipped_since_start` and `flipped_since_log`. Every process of a distributed training must call it."""
        values: dict[str, float] = {}
        sums = None if self.distillation is None else self.distillation.take()
        if sums is not None:
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(sums)
            total, hidden, tokens = sums.tolist()
            values["kd_loss"] = total / max(tokens, 1.0)
            if self.distillation is not None and self.distillation.hidden_weight:
                values["hidden_loss"] = hidden / max(tokens, 1.0)
        if self.flips is not None:
            values |= self.flips.fractions()
        return values

    def _check_arguments(self, args: TrainingArguments, model: Any) -> None:
        if model is None:
            raise ValueError("the Trainer has no model to convert")
        check_weights(model, self.teacher)
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process would train by DataParallel, which copies the model in every step; "
                "start with `torchrun --nproc_per_node=N` or `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one"
            )
        if self.teacher is not None and args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor}: Trainer would take the labels from the model and "
                "no distillation would happen. Set it to 0; the teacher's distribution is the smooth target"
            )
        if self.teacher is not None and args.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel replaces the model's forward when training starts, and distillation with it; leave it out"
            )
        if has_adapters(model):
            raise ValueError(
                "the model has PEFT adapters, which train without LittleBitCallback; the callback trains the bits themselves"
            )

    def _teacher(self, model: Any, converted: bool) -> Any:
        teacher = self.teacher
        if teacher == "self":
            if converted:
                raise ValueError(
                    "teacher is 'self', but the model is no longer dense; load the dense model as a teacher"
                )
            if self.config is None:
                raise ValueError(
                    "the model is dense; say how to factorize it: LittleBitCallback(LittleBitConfig(bpw=...))"
                )
            # The weights that are about to leave the model are handed over, not copied.
            kept = {
                id(value): value
                for value in (model.get_parameter(w.name) for w in plan_model(model, self.config).weights)
            }
            return copy.deepcopy(model, dict(kept))
        if isinstance(teacher, nn.Module):
            mine = {id(value) for value in model.parameters()}
            if any(id(value) in mine for value in teacher.parameters()):
                raise ValueError(
                    "teacher and model share parameters, so the teacher would change with the model; load the teacher on "
                    "its own, or say teacher='self'"
                )
        return teacher

    def _check_latent(self, model: Any, modules: dict[str, Any]) -> None:
        packed = [name for name, module in modules.items() if not is_latent(module)]
        if packed:
            raise ValueError(f"{packed[0]} is packed, so its bits cannot be trained; call unpack_model(model) first")
        if self.config is None:
            return
        planned = {weight.name: list(weight.ranks) for weight in plan_model(model, self.config).weights}
        actual = {
            f"{name}.{weight}": list(ranks)
            for name, module in modules.items()
            for weight, ranks in weight_ranks(module).items()
        }
        for name in sorted(planned.keys() | actual.keys()):
            if planned.get(name) != actual.get(name):
                raise ValueError(
                    f"the model is factorized already, and {name} has ranks {actual.get(name)}, but the config of the "
                    f"callback (bpw {self.config.bpw:g}) asks for {planned.get(name)}; leave the callback's config out"
                )


class _Logs(TrainerCallback):
    """Puts a LittleBitCallback's figures among Trainer's own, before any reporter reads them."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        known = None if model is None else _CALLBACKS.get(unwrapped(model))
        callback = None if known is None else known()
        if callback is None or logs is None or "loss" not in logs:
            return
        values = callback.logs()
        logs.update(values)
        state.log_history[-1].update(values)


SHARDED = (
    "The model is sharded, so it stays latent in memory. trainer.save_model packs what it writes if it is LittleBitTrainer's, "
    "or if the engine gathers the state (FSDP2: FULL_STATE_DICT; ZeRO-3: stage3_gather_16bit_weights_on_model_save). Else, in "
    "one process: littlebit pack CHECKPOINT --out DIR"
)
REBUILT = (
    "the model to train is not the one that LittleBitCallback converted: model_init (and hyperparameter search) makes a new "
    "one in train(). Give `model=`, or convert inside model_init with latent_model(model, config) and leave the callback out"
)
