"""What cannot be trained, and is refused before a training begins: models, teachers and arguments.

Each would otherwise train something else than was asked, without a word. What a session refuses for its own state stands there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from ..config import LittleBitConfig
from ..internals.transformers import has_adapters
from ..load.convert import weight_ranks
from ..load.source import quantization_of
from ..load.tables import plan_tables
from ..plan import plan_model
from .topk import TopKTeacher

__all__ = [
    "refuse_adapters",
    "refuse_arguments",
    "refuse_other_ranks",
    "refuse_other_tables",
    "refuse_packed",
    "refuse_shared_parameters",
]

Teacher = nn.Module | TopKTeacher


def refuse_arguments(args: TrainingArguments, teacher: Teacher | str | None) -> None:
    """Some of Trainer's arguments would copy the model in every step, or lead around distillation without a word."""
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would train by DataParallel, which copies the model in every step; "
            "start with `torchrun --nproc_per_node=N` or `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one"
        )
    if teacher is not None and args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor is {args.label_smoothing_factor}: Trainer would take the labels from the model and "
            "no distillation would happen. Set it to 0; the teacher's distribution is the smooth target"
        )
    if teacher is not None and args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel replaces the model's forward when training starts, and distillation with it; leave it out"
        )


def refuse_adapters(model: PreTrainedModel) -> None:
    """PEFT freezes the model below its adapters, so there would be no bits to train."""
    if has_adapters(model):
        raise ValueError(
            "the model has PEFT adapters, which train without LittleBitCallback; the callback trains the bits themselves"
        )


def refuse_shared_parameters(model: PreTrainedModel, teacher: Teacher) -> None:
    """A teacher that holds parameters of the model would change with it, and teach what it is taught."""
    mine = {id(value) for value in model.parameters()}
    if isinstance(teacher, nn.Module) and any(id(value) in mine for value in teacher.parameters()):
        raise ValueError(
            "teacher and model share parameters, so the teacher would change with the model; load the teacher on "
            "its own, or say teacher='self'"
        )


def refuse_packed(modules: Mapping[str, Any]) -> None:
    """Packed layers hold signs without magnitudes, which no gradient can move."""
    packed = [name for name, module in modules.items() if not module.latent]
    if packed:
        raise ValueError(f"{packed[0]} is packed, so its bits cannot be trained; call unpack_model(model) first")


def refuse_other_ranks(config: LittleBitConfig | None, model: PreTrainedModel, modules: Mapping[str, Any]) -> None:
    """A latent model has its ranks, so a config that asks for others would silently have no effect."""
    if config is None:
        return
    planned = {weight.name: list(weight.ranks) for weight in plan_model(model, config).weights}
    actual = {
        f"{name}.{weight}": list(ranks)
        for name, module in modules.items()
        for weight, ranks in weight_ranks(module).items()
    }
    for name in sorted(planned.keys() | actual.keys()):
        if planned.get(name) != actual.get(name):
            raise ValueError(
                f"the model is factorized already, and {name} has ranks {actual.get(name)}, but the config of the "
                f"callback (bpw {config.bpw:g}) asks for {planned.get(name)}; leave the callback's config out"
            )


def refuse_other_tables(config: LittleBitConfig | None, model: PreTrainedModel) -> None:
    """A latent model's own config says in how many bits its embedding and head are packed when training ends.

    What that config says and cannot be is refused here, too, and not after the training.
    """
    own = quantization_of(model.config)
    assert own is not None
    plan_tables(model, own)
    if config is None:
        return
    for option in ("embedding_bits", "head_bits"):
        asked, known = getattr(config, option), getattr(own, option)
        if asked != known:
            raise ValueError(
                f"the config of the callback asks for {option}={asked}, but the model, which is factorized already, will be "
                f"packed with {option}={known}; leave the callback's config out, or set "
                f"model.config.quantization_config.{option} = {asked} before the Trainer is made"
            )
