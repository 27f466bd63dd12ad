"""Post-training refinement of a causal model, block by block, on some thousand tokens of text.

    first:            allocate    the bits among the blocks, by what an error of each costs (allocation.py)
    for every block:  refine      factored, and tuned to do what the dense block does (block_work.py)
    at the end:       distil      the whole model on the dense one's likeliest tokens (distillation.py)

Memory holds the model, one block's training, and of the two streams what the system keeps of their files. Every block that is done
is on disk, and so are both streams: what a kill interrupts goes on from the last block (journal.py).

Sources: NanoQuant (arXiv 2602.06694) for the order of things, double binary factorization (arXiv 2505.11076).
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import tempfile
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..config import LittleBitConfig
from ..load.convert import cast_dense, check_in_memory, factor_modules, pack_modules, with_format
from ..load.finite import refuse_non_finite
from ..load.form import finish, record, refuse_float64
from ..load.quantizer import LittleBitHfQuantizer
from ..load.source import quantization_of
from ..load.tables import fitted_tables, pack_tables, plan_tables
from ..placement import compute_dtype
from ..plan import plan_model
from ..train.cpu_attention import cpu_attention
from ..train.resume import OPTIONS, fingerprint, keep_options, model_fingerprint
from ..train.topk import TopKTeacher
from .allocation import allocate, can_share, measure_costs
from .block_work import BlockWork
from .blocks import find_blocks
from .distillation import Schedule, affordable, distil, teacher_of
from .forecast import blocks_left, distillation, work_of
from .journal import ALLOCATION, EMBEDDINGS, Journal
from .recipe import Recipe, as_tokens, block_rows, check_vocabulary, distilled_rows, spread_rows

__all__ = ["refine", "refuse_unfit"]

Model = TypeVar("Model", bound=PreTrainedModel)
logger = logging.getLogger("hf_littlebit")


def refine(
    model: Model,
    config: LittleBitConfig,
    data: Any,
    *,
    recipe: Recipe | None = None,
    folder: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Model:
    """Quantize a dense causal `model` in place by refinement on text, and return it packed.

    Args:
        config: as for from_pretrained. `steps` None means ADMM_STEPS here, because tuning evens out what a longer start gains.
        data: the text as tokens [rows, length] of an integer dtype, or a dataset whose rows have such `input_ids`, as
            `text_blocks` and `sample_blocks` make them. All have one length. Blocks see `recipe.block_tokens` of it, the whole
            model by default at most SEEN tokens (distillation.py).
        recipe: None for the default one.
        folder: where the work is kept until it is done; if it holds an unfinished refinement of the same model, text and
            options, that one goes on. A temporary folder if None. It takes 8 bytes per token and hidden unit for the
            streams while a block is written twice that, and the latents of all blocks in fp32.
        device: that computes; by default the accelerator if there is one, else the CPU.
        progress: show progress bars.

    Raises:
        ValueError: for a model that is no dense causal one, or whose blocks are no chain, text that is too short, a device that the
            distillation cannot have, and a folder of another refinement.
        torch.OutOfMemoryError: with what to do, if the distillation takes more memory than there is; the blocks are kept.
    """
    recipe = Recipe() if recipe is None else recipe
    tokens = as_tokens(data)
    work = _Refinement(model, config, tokens, recipe, device, progress)
    trained = {name: value.requires_grad for name, value in model.named_parameters()}
    with torch.enable_grad(), cpu_attention(model):  # whatever the caller has switched off
        if folder is None:
            with tempfile.TemporaryDirectory(prefix="littlebit-refine-") as temporary:
                work.run(temporary)
        else:
            work.run(os.fspath(folder))
    for name, value in model.named_parameters():
        if name in trained and value.is_floating_point():  # and was perhaps held still
            value.requires_grad_(trained[name])
    return model


def refuse_unfit(
    model: PreTrainedModel, config: LittleBitConfig, length: int, recipe: Recipe, device: torch.device | str | None
) -> None:
    """Refuse a dense model that `refine` would, before there is text in rows of `length` tokens.

    Raises:
        ValueError: as `refine`.
    """
    work = _Refinement(model, config, torch.zeros(2, length, dtype=torch.int32), recipe, device, False)
    work.blocks.check(work.rows[:2].long())


class _Refinement:
    """One refinement: what it is made of, and its steps. Arguments as of `refine`."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: LittleBitConfig,
        tokens: Tensor,
        recipe: Recipe,
        device: torch.device | str | None,
        progress: bool,
    ):
        if quantization_of(model.config) is not None or factor_modules(model):
            raise ValueError("the model has LittleBit layers already; only a dense model can be refined")
        if not model.can_generate() or model.config.get_text_config().is_encoder_decoder:
            raise ValueError(
                f"{type(model).__name__} is no causal language model, which refinement is for; use littlebit train"
            )
        embeddings: Any = model.get_input_embeddings()
        if not isinstance(getattr(embeddings, "num_embeddings", None), int):
            raise ValueError(
                f"{type(model).__name__} reads its tokens by a {type(embeddings).__name__}, and refinement by one embedding; train "
                "it instead (littlebit train)"
            )
        check_vocabulary(tokens, embeddings.num_embeddings)
        self.model = model.eval()
        self.tokens = tokens
        self.recipe = recipe
        self.progress = progress
        self.config = copy.deepcopy(config)
        self.config.format = "latent"
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.device = torch.device(device) if device is not None else accelerator or torch.device("cpu")
        self.config.svd_device = self.config.svd_device or (None if self.device.type == "cpu" else str(self.device))
        if recipe.distillation is not None and self.device.type == "cuda" and self.device.index:
            raise ValueError(
                f"device is {self.device}, and the distillation at the end is on the first GPU; set CUDA_VISIBLE_DEVICES="
                f"{self.device.index} and give cuda, or leave the distillation out"
            )
        self.compute = compute_dtype(self.device)
        refuse_float64(model)
        self.plan = plan_model(model, self.config)
        self.tables = plan_tables(model, self.config)
        check_in_memory(model, self.plan)
        refuse_non_finite(model, dense=True)
        self.dtype = model.dtype
        self.blocks = find_blocks(model, [weight.module for weight in self.plan.weights])
        self.rows = block_rows(tokens, recipe)

    def run(self, folder: str) -> None:
        """All of it, with the work in `folder`."""
        os.makedirs(folder, exist_ok=True)
        self.journal = Journal(folder)
        resumed = os.path.isfile(self.journal.path(OPTIONS))
        keep_options(folder, self._made_of(resumed), resumed)
        self.blocks.check(self.rows[:2].long())
        if self.recipe.allocation_rows and can_share(self.config, self.plan, self.blocks):
            self._allocate()
        for message in (*self.plan.warnings(), *self.tables.warnings()):
            logger.warning("%s", message)
        record(self.config, self.plan, self.model)
        self.work = BlockWork(
            self.model,
            self.blocks,
            self.plan,
            self.config,
            self.recipe,
            self.rows,
            self.device,
            self.compute,
            self.journal,
        )
        teacher = None
        schedule = self.schedule = affordable(self.recipe.distillation, self.model, self.plan, self.device)
        if schedule is not None:
            moved = self.journal.keep(EMBEDDINGS, lambda: schedule.embeddings)
            self.schedule = replace(schedule, embeddings=moved)
            self.distilled = distilled_rows(self.tokens, schedule)
            teacher = teacher_of(self.model, self.distilled, self.journal.path("teacher"), self.compute)
        for index in range(len(self.journal.blocks)):
            self.work.restore(index)
            pack_modules(self.blocks[index])
        self._refine_blocks()
        self.work.factor_rest()
        if self.schedule is not None and teacher is not None:
            self._distil(self.schedule, teacher)
        else:
            packed = with_format(self.config, "packed")
            moment = None
            if fitted_tables(self.model, packed):
                moment = self.blocks.head_moment(self.rows, self.work.streams(len(self.blocks))[1])
            pack_modules(self.model)
            pack_tables(self.model, packed, moment)
            cast_dense(self.model, self.dtype)
            finish(self.model, LittleBitHfQuantizer(packed))

    def _made_of(self, resumed: bool) -> dict[str, Any]:
        """What must be the same in a refinement that goes on."""
        schedule = self.recipe.distillation
        return {
            "the model": model_fingerprint(self.model).hex(),
            "the method": {key: value for key, value in self.config.to_dict().items() if key != "base_model"},
            "the text": fingerprint(self.tokens),
            "the shape of the text": list(self.tokens.shape),
            "the recipe": asdict(replace(self.recipe, distillation=None)),
            # A refinement that has no memory for it goes on without.
            **({} if schedule is None and resumed else {"the distillation": schedule and asdict(schedule)}),
        }

    def _allocate(self) -> None:
        """Give every block the bits that its errors are worth (allocation.py), or those that an earlier run has found."""

        def measured() -> dict[str, Any]:
            rows = spread_rows(self.rows, self.recipe.allocation_rows)
            how: dict[str, Any] = {"device": self.device, "dtype": self.compute, "seed": self.config.seed}
            costs = measure_costs(self.blocks, rows, **how, progress=self.progress)
            return allocate(self.model, self.config, self.blocks, costs).module_config or {}

        self.config.module_config = self.journal.keep(ALLOCATION, measured)
        self.plan = plan_model(self.model, self.config)

    # -- blocks ---------------------------------------------------------------------------------------------------------------

    def _refine_blocks(self) -> None:
        done = len(self.journal.blocks)
        first = next((index for index in range(done, len(self.blocks)) if self.work.weights(index)), None)
        self.journal.sweep()
        dense, student = self.work.streams(done)
        with tqdm(
            total=len(self.blocks), initial=done, desc="refining", unit="block", disable=not self.progress
        ) as bar:
            for index in range(done, len(self.blocks)):
                following, figures = self.work.refine(index, dense, student)
                self.journal.note(figures)
                dense.remove()
                student.remove()
                dense, student = following
                bar.update()
                if index == first:
                    self._foretell(bar, index, figures)
                bar.set_postfix(error=f"{figures['after']:.3f}", flipped=f"{figures['flipped']:.1%}")

    def _foretell(self, bar: Any, index: int, figures: dict[str, Any]) -> None:
        """Say how long it will take, from what block `index` took."""
        if not self.progress:
            return
        work = [work_of(self.work.weights(number)) for number in range(len(self.blocks))]
        seconds = {phase: each for phase, (each, _) in figures["seconds"].items()}
        parts = [f"{blocks_left(work, index, sum(seconds.values())) / 60:.0f} minutes for the other blocks"]
        if self.schedule is not None and figures["steps"]:
            per_token = seconds["tune"] / (figures["steps"] * self.work.batch * self.rows.shape[1])
            end = distillation(work, index, per_token, self.model, self.schedule, *self.distilled.shape)
            parts.append(f"{end / 60:.0f} for the distillation of the whole model")
        bar.write(f"about {' and '.join(parts)}", file=sys.stderr)

    # -- the whole model ------------------------------------------------------------------------------------------------------

    def _distil(self, schedule: Schedule, teacher: TopKTeacher) -> None:
        """Make the packed model latent again, as the journal has it, distil it, and pack it."""
        for index in range(len(self.blocks)):
            self.work.restore(index)
        # Before transformers knows the model as a quantized one, which it would not move or cast.
        cast_dense(self.model, torch.float32)
        self.model.to(self.device)  # type: ignore[arg-type]
        finish(self.model, LittleBitHfQuantizer(self.config))
        try:
            distil(
                self.model,
                self.distilled,
                teacher,
                schedule,
                self.journal.path("checkpoints"),
                dtype=self.dtype,
                bf16=self.compute == torch.bfloat16,
                device=self.device,
                seed=self.config.seed % 2**31,  # Trainer takes no larger one
                progress=self.progress,
            )
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"there is too little memory for the distillation of the whole model: {error}. All blocks are kept: go on without "
                "it by distillation=None (littlebit quantize: --resume --distill-epochs 0)"
            ) from error
