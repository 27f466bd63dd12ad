"""A training from its start to its end, as steps that a Trainer's events, or anything else, can take.

    dense -> latent      prepare    factorize, and take the teacher in; before Trainer builds the optimizer, wraps the model and
                                    reads a checkpoint, so that all three see the latents
    latent -> training   begin      check what is about to be trained, and switch distillation on
    training             figures    what a step's log gets besides the loss
    training -> packed   end        let the teacher go, and pack the model in place; a sharded one stays latent in memory

What a session cannot train right is refused, in words that say what to do instead: in refusals.py for what it is given, here for
when and how often.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from ..compat import float_dtype
from ..config import LittleBitConfig
from ..initialize.calibration import calibrate
from ..initialize.head_inputs import head_moment
from ..layers.sign import ALPHA, SIGN_GRADIENTS
from ..load.convert import (
    balance_scales,
    factor_modules,
    latent_model,
    latents_and_scales,
    pack_model,
    refuse_latents,
    unwrapped,
    with_format,
)
from ..load.source import quantization_of
from ..load.tables import fitted_tables
from ..plan import plan_model
from .distill import Distillation
from .distributed import (
    broadcast_from_rank0,
    check_optimizer,
    check_weights,
    first_nonfinite,
    is_sharded,
    sum_over_processes,
)
from .export import packed_model, saved_config
from .flips import SignFlips
from .refusals import (
    refuse_adapters,
    refuse_arguments,
    refuse_other_ranks,
    refuse_other_tables,
    refuse_packed,
    refuse_shared_parameters,
)
from .topk import TopKTeacher

__all__ = ["REBUILT", "TrainingSession"]

logger = logging.getLogger("hf_littlebit")
# By the model; weak on both sides, because a session holds its model, which would live as long as this module.
_SESSIONS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[TrainingSession]] = weakref.WeakKeyDictionary()

REBUILT = (
    "the model to train is not the one that LittleBitCallback converted: model_init (and hyperparameter search) makes a new "
    "one in train(). Give `model=`, or convert inside model_init with latent_model(model, config) and leave the callback out"
)
DENSE = "the model is dense; say how to factorize it: LittleBitCallback(LittleBitConfig(bpw=...))"


class TrainingSession:
    """One training of one model. LittleBitCallback, which makes it, says what its arguments are.

    Raises:
        ValueError: for a teacher, a gradient of the sign or a steepness that there is not.
    """

    def __init__(
        self,
        config: LittleBitConfig | None,
        teacher: nn.Module | TopKTeacher | str | None,
        *,
        hidden_weight: float,
        hidden_error: str,
        sign_gradient: str,
        alpha: float,
        pack: bool,
        dtype: torch.dtype | str | None,
        calibration: Iterable[Mapping[str, Any]] | None,
    ) -> None:
        if isinstance(teacher, str) and teacher != "self":
            raise ValueError(f"teacher is {teacher!r}; give a loaded model, a TopKTeacher, 'self' or None")
        if sign_gradient not in SIGN_GRADIENTS:
            raise ValueError(f"sign_gradient is {sign_gradient!r}; choose one of {', '.join(SIGN_GRADIENTS)}")
        if not alpha > 0:
            raise ValueError(f"alpha is {alpha}; it must be above 0 (the paper's is {ALPHA:g})")
        self.config = config
        self.teacher: nn.Module | TopKTeacher | str | None = teacher
        self.hidden_weight, self.hidden_error = hidden_weight, hidden_error
        self.sign_gradient = sign_gradient
        self.alpha = alpha
        self.pack = pack
        self.dtype = float_dtype(dtype)
        self.calibration = calibration
        self.distillation: Distillation | None = None
        self.flips: SignFlips | None = None
        self.sharded = False  # each process holds only a part of the model
        self.ended = False
        self.device = torch.device("cpu")
        self._model: PreTrainedModel | None = None
        self._model_class: type[PreTrainedModel] | None = (
            None  # kept, because FSDP2 puts a class of its own in its place
        )

    @property
    def model(self) -> PreTrainedModel:
        """The model, once it is prepared."""
        assert self._model is not None
        return self._model

    def prepare(self, model: PreTrainedModel | None, args: TrainingArguments, progress: bool = False) -> None:
        """Dense to latent: factorize `model` in place, unless it is latent already, and take the teacher in.

        Args:
            progress: show a bar while layers are factorized.
        """
        self.refuse_second_trainer()
        if model is None:
            raise ValueError("the Trainer has no model to convert")
        self.refuse_second_session(model)
        check_weights(model, self.teacher)
        refuse_arguments(args, self.teacher)
        refuse_adapters(model)
        modules = factor_modules(model)
        if self.teacher is not None:
            self.distillation = Distillation(self._ready_teacher(model), model, self.hidden_weight, self.hidden_error)
        if modules:
            refuse_packed(modules)
            refuse_other_ranks(self.config, model, modules)
            refuse_other_tables(self.config, model)
        else:
            self._factorize(model, args.device, progress)
        broadcast_from_rank0([p for module in factor_modules(model).values() for p in module.parameters()], args.device)
        balance_scales(model)
        for module in factor_modules(model).values():
            module.sign_gradient, module.alpha = self.sign_gradient, self.alpha
        _warn_of_narrow_parameters(model)
        self._model, self._model_class = model, type(model)
        _SESSIONS[model] = weakref.ref(self)
        self.flips = SignFlips(latents_and_scales(model)[0])

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device) -> None:
        """Latent to training: check what Trainer is about to train, and let the teacher's loss take the place of the model's.

        Args:
            model: what the Trainer trains, in the wrappers of its engine.
            device: where the teacher goes, if it has no place of its own.
        """
        trained = unwrapped(model)
        self.refuse_late_start()
        self.refuse_second_training()
        if not isinstance(trained, type(self.model)) or not factor_modules(trained):
            raise ValueError(REBUILT)
        latents, scales = latents_and_scales(trained)
        self.sharded = is_sharded(latents)
        if self.sharded:
            # Trainer gathers a sharded model's state and hands it to save_pretrained, which drops it for quantized models.
            trained.hf_quantizer = None  # type: ignore[assignment]
        elif trained is not self._model:
            raise ValueError(REBUILT)
        check_optimizer(optimizer, latents, scales)
        self.device = device
        self.refuse_nonfinite(trained, 0)
        if self.flips is not None:
            self.flips.rebase(latents)
        if self.distillation is not None:
            self.distillation.place(device)
            self.distillation.active = True

    def end(self, batches: Iterable[Mapping[str, Any]] | None = None) -> None:
        """Training to packed: let the teacher go, and pack the model in place, unless it is to stay latent or is sharded.

        Args:
            batches: of text, the same on every process, which a head of 4 bits is rounded for.
        """
        self.ended = True
        self.teacher = self.flips = None  # their memory is wanted elsewhere
        if self.distillation is not None:
            self.distillation.detach(self.model)
        if self.pack and not self.sharded:
            pack_model(self.model, self.dtype, self._head_moment(batches))
            self.model.register_load_state_dict_pre_hook(refuse_latents)

    def _head_moment(self, batches: Iterable[Mapping[str, Any]] | None) -> Tensor | None:
        """What `pack_model` takes of `batches`, if it is to round a head for it; the same on every process."""
        config = quantization_of(self.model.config)
        fitted = fitted_tables(self.model, with_format(config, "packed")) if config is not None else []
        if batches is None or not fitted:
            return None
        found = None
        try:
            found = head_moment(self.model, batches)
        except Exception as error:  # whatever a dataset, a collator or a forward raises: the training is done
            logger.warning("what the head reads cannot be measured: %s: %s", type(error).__name__, error)
        sent = torch.zeros(fitted[0].columns, fitted[0].columns, device=self.device) if found is None else found
        broadcast_from_rank0([sent], self.device)
        return sent if sent.any() else None

    @property
    def packs_what_is_saved(self) -> bool:
        """True after a sharded training that was to be packed: its model stays latent, and what is saved of it is packed."""
        return self.ended and self.pack and self.sharded

    def packed(self, state: dict[str, Tensor]) -> PreTrainedModel:
        """A packed model on the CPU from the whole latent `state` dict of a sharded one, gathered from its processes."""
        return packed_model(self.saved_config(), state, self.dtype, getattr(self.model, "generation_config", None))

    def saved_config(self) -> PreTrainedConfig:
        """The model's config as save_pretrained writes it, also where an engine has put another class in the model's place."""
        assert self._model_class is not None
        return saved_config(self.model, self._model_class)

    def figures(self) -> dict[str, float]:
        """Means over the tokens since the last call, `kd_loss` and `hidden_loss` (unweighted), and the shares of flipped signs,
        `flipped_since_start` and `flipped_since_log`. Every process of a distributed training must call it."""
        values: dict[str, float] = {}
        sums = None if self.distillation is None else self.distillation.take()
        if self.distillation is not None and sums is not None:
            sum_over_processes(sums)
            total, hidden, tokens = sums.tolist()
            values["kd_loss"] = total / max(tokens, 1.0)
            if self.distillation.hidden_weight:
                values["hidden_loss"] = hidden / max(tokens, 1.0)
        if self.flips is not None:
            values |= self.flips.fractions()
        return values

    def refuse_second_trainer(self) -> None:
        """A session has one Trainer, because it holds the state of one training."""
        if self._model is not None:
            raise ValueError("this LittleBitCallback belongs to another Trainer already; make a new one for each")

    def refuse_second_session(self, model: PreTrainedModel) -> None:
        """A model has one session until that has ended, because two would each distil, and pack what the other trains."""
        known = _SESSIONS.get(model)
        other = None if known is None else known()
        if other is not None and not other.ended:
            raise ValueError(
                "the model is prepared by another LittleBitCallback already; give a Trainer one of them, and a second Trainer "
                "a model of its own"
            )

    def refuse_late_start(self) -> None:
        """A training that starts without `prepare` has an optimizer of dense weights."""
        if self._model is None:
            raise ValueError(
                "this LittleBitCallback was added to a Trainer that existed already, too late to convert its model; give it "
                "as Trainer(..., callbacks=[LittleBitCallback(...)])"
            )

    def refuse_second_training(self) -> None:
        """After its end a session has no teacher, and its model is packed, so that only what is dense would train on."""
        if self.ended:
            start = "unpack_model(model)" if self.pack else "the model"
            raise ValueError(
                "this Trainer has trained its model to the end already. To go on, make a new Trainer with a new "
                f"LittleBitCallback: from {start}, or from a latent checkpoint"
            )

    def refuse_step_without_teacher(self) -> None:
        """A Trainer whose own compute_loss goes around the model's forward would train without distillation, unnoticed."""
        if self.distillation is not None and not self.distillation.calls:
            raise ValueError(
                "a training step was made without the model's own forward, so there was no distillation; a Trainer whose "
                "compute_loss does not call model(**inputs) cannot use LittleBitCallback"
            )

    def refuse_nonfinite(self, model: nn.Module, step: int) -> None:
        """A step that leaves NaN or Inf has ended the training: all that follows is NaN, while Trainer logs a loss of 0.

        Args:
            step: the number of steps made. Every process of a distributed training must call it.
        """
        name = first_nonfinite(unwrapped(model), self.device)
        if name is not None:
            when = f"after step {step}" if step else "before its first step"
            raise ValueError(
                f"{name} holds NaN or Inf {when}, so the training stops; go on from a checkpoint before it with a lower "
                "learning rate (or max_grad_norm), and look at the data of that step"
            )

    def _ready_teacher(self, model: PreTrainedModel) -> nn.Module | TopKTeacher:
        """The teacher that was given, or a copy of the dense `model` for "self".

        The weights that are about to leave the model are handed over to its copy, not copied.
        """
        if not isinstance(self.teacher, str):
            assert self.teacher is not None
            refuse_shared_parameters(model, self.teacher)
            return self.teacher
        if factor_modules(model):
            raise ValueError("teacher is 'self', but the model is no longer dense; load the dense model as a teacher")
        if self.config is None:
            raise ValueError(DENSE)
        leaving = [model.get_parameter(weight.name) for weight in plan_model(model, self.config).weights]
        return copy.deepcopy(model, {id(value): value for value in leaving})

    def _factorize(self, model: PreTrainedModel, device: torch.device, progress: bool) -> None:
        """Factorize the dense `model` in place, on `device` if that is no CPU, for the calibration's errors if there is one."""
        if self.config is None:
            raise ValueError(DENSE)
        accelerator = None if device.type == "cpu" else device
        importance = None if self.calibration is None else calibrate(model, self.calibration)
        latent_model(model, self.config, accelerator, progress=progress, importance=importance)


def _warn_of_narrow_parameters(model: PreTrainedModel) -> None:
    """Warn of trainable parameters in 16 bits, e.g. the embeddings of a model that was loaded in bfloat16."""
    narrow = [name for name, p in model.named_parameters() if p.requires_grad and p.element_size() < 4]
    if narrow:
        logger.warning(
            "%d parameters besides latents and scales are 16-bit, e.g. %s: most of their small updates are rounded away. "
            "Load the model with dtype=torch.float32 (and train with bf16=True), or freeze them.",
            len(narrow),
            narrow[0],
        )
