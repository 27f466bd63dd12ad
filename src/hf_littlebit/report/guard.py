"""What a user must know of a model that was just quantized: its perplexity beside the dense one's, and whether it is usable.

A few thousand tokens are enough to tell a model that works from one that does not; where there is no text, the dense model has
written them. Their figures are for this comparison, and not for a table: a text's perplexity depends on the text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..initialize.calibration import evaluating
from ..placement import input_device
from .evaluate import exp, loss_sum

__all__ = ["MARGIN", "Check", "block_loss"]

# Nats per token above the dense model, 4.5 times its perplexity. A choice: no model measured so far that was further away wrote
# anything that could be read (docs/real_model.md).
MARGIN = 1.5
# On text that the dense model wrote, which flatters what was refined on such: SmolLM2-135M, 1.5 away there, was 2.3 and 3.1
# away on others.
OWN_MARGIN = 0.75
UNUSABLE = "this model is not usable without training or refinement"
WRITTEN, HELD_OUT = "text that the dense model wrote", "the end of the text, which was held out"


@dataclass(frozen=True)
class Check:
    """Losses in nats per token of a `dense` and a `packed` model on `tokens` tokens of text, which the dense model wrote (`own`) or
    which was held out of what was given; `vocabulary` is its size."""

    dense: float
    packed: float
    tokens: int
    vocabulary: int
    own: bool = False

    @property
    def text(self) -> str:
        """What the losses were measured on, in words."""
        return f"{self.tokens:,} tokens of {WRITTEN if self.own else HELD_OUT}"

    @property
    def usable(self) -> bool:
        """False for a model that is worse than a uniform guess, log(vocabulary), or than the dense one by MARGIN (OWN_MARGIN on
        text that it wrote); or no number."""
        # Written so that a NaN is not usable.
        return self.packed < min(math.log(self.vocabulary), self.dense + (OWN_MARGIN if self.own else MARGIN))

    def line(self) -> str:
        """One line for a user."""
        figures = f"perplexity {exp(self.dense):.4g} dense, {exp(self.packed):.4g} packed on {self.text}"
        if self.usable:
            return figures
        worse = "" if self.packed < math.log(self.vocabulary) else f", worse than a uniform guess ({self.vocabulary:,})"
        return f"{figures}{worse}: {UNUSABLE}"

    def evaluation(self) -> dict[str, float | str]:
        """The figures as a model card's."""
        figures: dict[str, float | str] = {
            f"perplexity on {self.text}": exp(self.packed),
            "the dense model's on the same": exp(self.dense),
        }
        if not self.usable:
            figures["verdict"] = UNUSABLE
        return figures


def block_loss(model: Any, blocks: Tensor, batch_size: int = 4) -> float:
    """Mean loss in nats per token of a causal `model` on `blocks` [rows, length] of tokens; all but the first are predicted."""
    device, total = input_device(model), 0.0
    with evaluating(model), torch.no_grad():
        for rows in blocks.long().split(batch_size):
            rows = rows.to(device)
            logits = model(input_ids=rows, use_cache=False).logits
            total += sum(loss_sum(each[:-1], row[1:]) for each, row in zip(logits, rows, strict=True))
    return total / (len(blocks) * (blocks.shape[1] - 1))
