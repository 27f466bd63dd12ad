"""What an output head reads, from a few batches of text: a head in few bits is rounded for it (kernels/table_fit.py).

The hidden states in front of a head are far from alike in all directions. SmolLM2-135M refined to 1.0 bits, its table in 4 bits,
nats per token over 16 bits on kept-back text, Python source and stories: rounded for the weights 0.217, 0.517 and 0.122, for the
products with 32,768 tokens of the refinement's text 0.014, 0.022 and 0.016.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import model_inputs

__all__ = ["HEAD_EXAMPLES", "head_moment"]

HEAD_EXAMPLES = 32  # rows of text, which have 16,384 tokens if they are of 512


def head_moment(model: Any, batches: Iterable[Mapping[str, Any]]) -> Tensor | None:
    """The second moment mean x xᵀ, fp32 [hidden, hidden], of the inputs x of `model`'s output head; the model stays as it is.

    Args:
        batches: as of `calibrate`. Some ten thousand tokens are enough.

    Returns:
        None for a model without a head, and where no token reached it.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        return None
    sums: list[Tensor] = []
    count, mask = 0, None

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal count
        x = args[0].detach()
        x = x[mask.to(x.device)] if mask is not None and mask.shape == x.shape[:-1] else x.flatten(0, -2)
        x = x.float()
        with torch.autocast(x.device.type, enabled=False):  # of a training, would round the sums to 16 bits
            sums[:] = [x.T @ x + (sums[0] if sums else 0.0)]
        count += len(x)

    modes = [(module, module.training) for module in model.modules()]
    handle = head.register_forward_pre_hook(record)
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                inputs, mask = model_inputs(model, batch)
                model(**inputs)
    finally:
        handle.remove()
        for module, mode in modes:
            module.training = mode
    return sums[0] / count if count else None
