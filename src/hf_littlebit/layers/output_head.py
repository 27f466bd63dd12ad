"""The dense output head on a CPU (table.py has the packed one): beside packed layers it is the largest single product of a step.

    y = x W^T + b,  x [..., hidden], W [vocabulary, hidden]

For one row of bf16, torch's matrix product is slower than its matrix-vector product, which reaches the memory's bandwidth
(that of fp16 does not); one row goes there: the same sums in fp32, in another order. And `generate` asks for the last
position of the prompt, a slice whose first stride spans the whole prompt. Where W is frozen, torch then takes x for a batch
and copies W transposed (262 MB for Llama2-7B, many times the cost of the product), so x is flattened first. Only the class
of the module changes: names, parameters and saved files are the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CACHED", "CHUNK", "OutputHead", "attach_head", "detach_head"]

# Logits that losses upcast to fp32 at a time, 64 MiB: those of a long text and a large vocabulary would take gigabytes.
CHUNK = 2**24
CACHED = 2**20  # where a CPU goes over the same logits several times: 4 MiB stay in its cache, four times as fast


class OutputHead(nn.Linear):
    """An `nn.Linear` whose product is made as the module's text says, on a CPU; elsewhere and compiled, it is one."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if x.device.type != "cpu" or weight.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) == 1 and x.dtype == weight.dtype == torch.bfloat16:
            y = torch.mv(weight, rows[0]) if self.bias is None else torch.addmv(self.bias, weight, rows[0])
        else:
            y = F.linear(rows, weight, self.bias)
        return y.view(*x.shape[:-1], weight.shape[0])


def attach_head(model: nn.Module) -> None:
    """Make the output head of `model` an OutputHead, if it is a plain `nn.Linear`."""
    head = _head(model)
    if type(head) is nn.Linear:
        head.__class__ = OutputHead


def detach_head(model: nn.Module) -> None:
    """Undo `attach_head`."""
    head = _head(model)
    if type(head) is OutputHead:
        head.__class__ = nn.Linear  # type: ignore[assignment]


def _head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return None if getter is None else getter()  # type: ignore[operator]  # of any model of transformers
