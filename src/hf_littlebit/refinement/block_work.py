"""What is done to one block after the other: factor it, tune it, and hand what both models make of the text to the next one.

    dense stream      what the dense block makes of the dense model's hidden states: the target
    factor            its weights, for what their errors cost (factoring.py)
    tune              latents, scales and norms at once, from the refined prefix's hidden states (tuning.py)
    student stream    what the refined block makes of them: the next block's input

Which blocks there are to do, and what comes before and after them, is refinement.py's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import LittleBitConfig
from ..initialize.calibration import Importance
from ..load.convert import pack_modules
from ..plan import Plan
from ..weight_plan import WeightPlan
from .blocks import BlockList, Calls
from .experts import ExpertCounts, warn_of_unseen
from .factoring import block_importance, factor_block, restore_block
from .journal import Journal, Watch
from .recipe import Recipe
from .streams import Stream
from .tuning import tune_block

__all__ = ["BlockWork"]

ADMM_STEPS = 60  # three times as many find 4 % less error, which tuning evens out
FORWARD_ROWS = 4  # rows at a time where nothing is trained
HELD_OUT = 8  # rows that tell which state of a block is the best, at most a tenth of all


@dataclass(frozen=True)
class BlockWork:
    """The work on the `blocks` of a `model`.

    Attributes:
        plan: the layers that become binary. config: the user's options, of latents. recipe: of the refinement.
        rows: tokens [rows, length], that the blocks see.
        device: that computes. dtype: of its products.
        journal: where what is done is kept: every block, and both streams in front of the next one.
    """

    model: PreTrainedModel
    blocks: BlockList
    plan: Plan
    config: LittleBitConfig
    recipe: Recipe
    rows: Tensor
    device: torch.device
    dtype: torch.dtype
    journal: Journal

    @property
    def held_out(self) -> int:
        """How many of the rows a block is not tuned on."""
        return max(1, min(HELD_OUT, len(self.rows) // 10))

    @property
    def batch(self) -> int:
        """Rows per step."""
        return min(self.recipe.batch, len(self.rows) - self.held_out)

    def weights(self, index: int) -> list[WeightPlan]:
        """Those of block `index` that become binary."""
        prefix = self.blocks.names[index] + "."
        return [weight for weight in self.plan.weights if weight.module.startswith(prefix)]

    def restore(self, index: int) -> None:
        """Put block `index` into the model as the journal has it, latent."""
        state = self.journal.read_block(index)
        restore_block(self.model, self.blocks.names[index], self.weights(index), self.config, state)

    def factor_rest(self) -> None:
        """Factor the planned weights that no block holds, e.g. projections behind the embeddings, for themselves alone."""
        inside = tuple(f"{name}." for name in self.blocks.names)
        rest = [weight for weight in self.plan.weights if not weight.module.startswith(inside)]
        factor_block(self.model, rest, self._start(), {})

    def streams(self, index: int) -> tuple[Stream, Stream]:
        """Both streams in front of block `index`, which the journal has, or the embeddings of the text."""
        first = self.blocks.first_input(self.rows[:1].long())
        shape = (*self.rows.shape, first.shape[-1])
        dense, student = (Stream(self.journal.folder, name, index, shape) for name in ("dense", "student"))
        if index == 0:
            for stream in (dense, student):
                stream.write(lambda rows: self.blocks.first_input(self.rows[rows].long()), FORWARD_ROWS)
        return dense, student

    def refine(self, index: int, dense: Stream, student: Stream) -> tuple[tuple[Stream, Stream], dict[str, Any]]:
        """Refine block `index`, write it, and return both streams behind it with its figures."""
        name, block, watch = self.blocks.names[index], self.blocks[index], Watch()
        # Without autocast nothing else makes arguments and weights alike.
        cast = self.dtype if self.dtype == torch.float32 else None
        calls = Calls(self.blocks, index, self.rows, self.device, cast)
        home = next(block.parameters()).device
        dtypes = {own: value.dtype for own, value in block.named_buffers()}
        # In fp32, also what stays dense: Adam's steps are too small for 16 bits. Products are cast by autocast.
        block.to(self.device).float()

        def forward(rows: slice | Tensor, hidden: Tensor) -> Tensor:
            with self._autocast():
                return calls(rows)(block, hidden.to(self.device))

        with torch.no_grad():
            target = dense.following(index + 1)
            target.write(lambda rows: forward(rows, dense[rows]), FORWARD_ROWS)
        watch.note("dense")
        importance = self._importance(index, student, forward)
        factor_block(self.model, self.weights(index), self._start(), importance)
        watch.note("factor")
        trained = len(self.rows) - self.held_out
        outcome = tune_block(
            block,
            lambda rows: forward(rows, student[rows]),
            lambda rows: target[rows].to(self.device),
            rows=len(self.rows),
            held_out=self.held_out,
            steps=math.ceil(self.recipe.epochs * trained / self.batch),
            batch=self.batch,
            rates=self.recipe.rates,
            seed=self.config.seed + index,
        )
        watch.note("tune")
        counts = ExpertCounts(block, name)
        with torch.no_grad():
            result = student.following(index + 1)
            result.write(lambda rows: forward(rows, student[rows]), FORWARD_ROWS)
        counts.remove()
        watch.note("student")
        unseen = counts.unseen()
        warn_of_unseen(unseen)
        block.to(home)
        for own, value in block.named_buffers():
            value.data = value.data.to(dtypes.get(own, value.dtype))
        self.journal.save_block(index, block, name)
        pack_modules(block)
        return (target, result), {"name": name, **outcome._asdict(), "unseen": unseen, "seconds": watch.seconds}

    def _importance(
        self, index: int, student: Stream, forward: Callable[[slice | Tensor, Tensor], Tensor]
    ) -> dict[str, Importance]:
        """Importances of the dense block `index` on what the refined prefix gives it."""
        size = FORWARD_ROWS
        parts = [slice(at, at + size) for at in range(0, min(self.recipe.importance_rows, len(self.rows)), size)]
        batches = ((part, student[part]) for part in parts)
        return block_importance(
            self.blocks[index], self.blocks.names[index], forward, batches, self.config.seed + index
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _start(self) -> LittleBitConfig:
        """The options that weights are factored with. Saved ones are the user's; these steps are this start's own."""
        start = copy.deepcopy(self.config)
        if start.init == "admm" and start.steps is None:
            start.steps = ADMM_STEPS
        return start
