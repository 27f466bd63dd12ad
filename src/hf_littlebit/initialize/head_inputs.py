"""What an output head reads, from a few batches of text: a head in few bits is rounded for it (kernels/table_fit.py).

    HeadInputs     adds up what the head of a model reads while it is called
    head_moment    calls it on batches of text

The hidden states in front of a head are far from alike in all directions, so the errors of its products say more than those of
its weights (docs/results.md has what that is worth).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import counted, evaluating, model_inputs, token_mask

__all__ = ["HEAD_EXAMPLES", "HEAD_TOKENS", "HeadInputs", "head_moment"]

HEAD_EXAMPLES, HEAD_TOKENS = 64, 32_768  # rows of text; what they have if they are of 512


class HeadInputs:
    """A context in which the inputs x [..., hidden] of `model`'s output head are added up to their second moment.

    Attributes:
        mask: bool [batch, seq], of the tokens that count in the next call; None: all of them.
    """

    def __init__(self, model: Any):
        self.mask: Tensor | None = None
        self._sum: Tensor | None = None
        self._head, self._count = model.get_output_embeddings(), 0

    def __enter__(self) -> HeadInputs:
        if isinstance(self._head, nn.Module):
            self._handle = self._head.register_forward_pre_hook(self._record, with_kwargs=True)
        return self

    def __exit__(self, *_: Any) -> None:
        if isinstance(self._head, nn.Module):
            self._handle.remove()

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = counted((args[0] if args else next(iter(kwargs.values()))).detach(), self.mask)
        with torch.autocast(x.device.type, enabled=False):  # of a training, would round the sums to 16 bits
            x = x.float()
            added = x.T @ x
        self._sum = added if self._sum is None else self._sum + added
        self._count += len(x)

    def moment(self) -> Tensor | None:
        """mean x xᵀ, fp32 [hidden, hidden]; None if no token reached a head, or what it read is zeros or not finite."""
        if self._sum is None or not self._sum.isfinite().all() or not self._sum.any():
            return None
        return self._sum / self._count


def head_moment(model: Any, batches: Iterable[Mapping[str, Any]]) -> Tensor | None:
    """The second moment mean x xᵀ of the inputs x of `model`'s output head, for `pack_model`; the model stays as it is.

    Args:
        model: latent or dense. batches: as of `calibrate`: some ten thousand tokens are enough.

    Returns:
        fp32 [hidden, hidden]; None for a model without a head, and where what it read is zeros, not finite, or nothing.

    Raises:
        ValueError: a batch is no mapping of the model's inputs.
    """
    decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    with evaluating(model), HeadInputs(model) as read, torch.no_grad():
        for batch in batches:
            if not isinstance(batch, Mapping):
                raise ValueError(
                    f"a batch is {type(batch).__name__}; give mappings of the model's inputs, e.g. {{'input_ids': tokens}}"
                )
            inputs = model_inputs(model, batch)
            read.mask = token_mask(inputs.get("decoder_attention_mask" if decoder else "attention_mask"))
            model(**inputs)
    return read.moment()
