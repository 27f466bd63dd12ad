"""How long the rest of a refinement takes, about, from what one of its blocks took.

Blocks differ: one with more bits has more latents, which are factored, multiplied and moved; the rest of its work
(attention, norms, activations, the dense stream) is the same for all. Of SmolLM2-135M's blocks with 0.6 and 1.5 bits
(3.5 M weights, 65,536 tokens twice, one core) tuning takes 11.5 and 18.6 seconds: the rest is as much as that many latents
would be as there are weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from ..weight_plan import WeightPlan
from .distillation import Schedule

__all__ = ["blocks_left", "distillation", "work_of"]


def work_of(weights: Sequence[WeightPlan]) -> float:
    """The work of a pass over a text by a block with these `weights`, in latents."""
    return sum(weight.numel + weight.latents for weight in weights)


def blocks_left(work: Sequence[float], index: int, seconds: float) -> float:
    """Seconds of the blocks behind block `index`, which took `seconds`; `work` is that of all blocks."""
    return seconds * sum(work[index + 1 :]) / work[index]


def distillation(
    work: Sequence[float],
    index: int,
    per_token: float,
    model: PreTrainedModel,
    schedule: Schedule,
    rows: int,
    length: int,
) -> float:
    """Seconds of distilling the whole `model` by `schedule` on `rows` of `length` tokens, where tuning block `index` took so many
    `per_token`.

    Its head is one product forward and one or, where it moves, two backward, as a latent's.
    """
    head: Any = model.get_output_embeddings()
    size = 0 if head is None else head.weight.numel() * (1 if schedule.embeddings else 2 / 3)
    seen = schedule.steps(rows, length) * schedule.batch * length
    return seen * per_token * (sum(work) + size) / work[index]
