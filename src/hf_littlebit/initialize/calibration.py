"""What the errors of a weight cost: how large a layer's inputs and output gradients are, from a few batches of text.

A change E of a weight W [out, in] moves the model's distribution by about 1/2 sum over tokens of (o^T E i)^2 nats, where i
is the layer's input and o the gradient of log p(y) at its output, y drawn from the model itself (the Fisher information is
the KL's own curvature, so no labels are needed). With o and i taken apart, as K-FAC does, and only their diagonals kept:

    cost(E) = sum_jk rows_j E_jk^2 cols_k       rows ~ mean o^2 [out], cols ~ mean i^2 [in]

which is what `factorize` minimises when it is given both. Their square roots, the root mean squares, do better than the
moments themselves: the errors of a binary factorization are correlated, and the diagonal then overstates the largest rows
and columns. Loss over the dense model's before training, pycode-13m at 0.3 bits with kv_factor 2, 8,192 tokens:

    none .881    moments .845    moments of inputs alone .772    root mean squares .754

One forward and one backward of the dense model per batch; no gradients of weights are made.

Sources: K-FAC (arXiv 1503.05671) for the split; double binary factorization (arXiv 2505.11076) and NanoQuant
(arXiv 2602.06694) for weighing binary factors by it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers.output_head import CACHED, CHUNK
from ..placement import input_device

__all__ = ["Importance", "Recorder", "calibrate", "counted", "evaluating", "model_inputs", "token_mask"]


class Importance(NamedTuple):
    """Of one weight [out, in]: root mean square of its output gradient, `rows` [out], and input, `cols` [in]; fp32."""

    rows: Tensor
    cols: Tensor


def calibrate(model: Any, batches: Iterable[Mapping[str, Any]], seed: int = 0) -> dict[str, Importance]:
    """{weight name: Importance} of every `nn.Linear` of a dense `model` that `batches` reach; the model stays as it is.

    Args:
        batches: inputs of the model, as a data collator makes them: `input_ids` [batch, seq] and, where there is padding,
            `attention_mask`, whose zeros do not count (in a decoder that an encoder feeds, `decoder_attention_mask`). Labels, and
            what its forward does not take, are left out. A few thousand tokens are enough.
        seed: of the tokens drawn. Same seed, batches and model: same figures.

    Raises:
        ValueError: if there is no batch, or the model has no logits, whose likelihood this is about.
    """
    generator = torch.Generator().manual_seed(seed)
    # By name: an offloaded module has other parameters after its forward.
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    head = model.get_output_embeddings()
    recorder = Recorder({name: module for name, module in model.named_modules() if module is not head})
    # With all weights frozen, the embeddings' output is where gradients begin: of each one that there is, as encoder and decoder
    # read the table that they share by embeddings of their own.
    embeddings = {module for module in model.modules() if isinstance(module, nn.Embedding)} | {
        model.get_input_embeddings()
    }
    begin = [module.register_forward_hook(_begin) for module in embeddings]
    decoder = model.get_decoder() if getattr(model.config, "is_encoder_decoder", False) else None
    if decoder is not None:
        recorder.decoder = next(f"{name}." for name, module in model.named_modules() if module is decoder)
    count = 0
    try:
        for name in trained:
            model.get_parameter(name).requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            for batch in batches:
                inputs = model_inputs(model, batch)
                recorder.mask = token_mask(inputs.get("attention_mask"))
                recorder.decoder_mask = token_mask(inputs.get("decoder_attention_mask"))
                logits = getattr(model(**inputs), "logits", None)
                if logits is None:
                    raise ValueError(
                        f"{type(model).__name__} has no logits to calibrate on; leave it out (calibration=0 of "
                        "LittleBitTrainer)"
                    )
                mask = recorder.mask if decoder is None else recorder.decoder_mask
                _log_likelihood(logits, mask, generator).backward()
                count += 1
    finally:
        recorder.remove()
        for handle in begin:
            handle.remove()
        for name in trained:
            model.get_parameter(name).requires_grad_(True)
    if not count:
        raise ValueError("there is no batch to calibrate on; give at least one")
    return recorder.result()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have `model` in evaluation mode, without dropout; afterwards every module of it is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def model_inputs(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What `model` is called with for `batch`: what its forward takes, on its device, without a cache."""
    known = set(inspect.signature(model.forward).parameters)
    if not getattr(model.config, "is_encoder_decoder", False):
        known -= {"labels"}  # whose loss would be computed for nothing; a decoder takes its inputs from them
    device = input_device(model)
    inputs = {
        key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items() if key in known
    }
    return {**inputs, "use_cache": False} if "use_cache" in known else inputs


def token_mask(mask: Tensor | None) -> Tensor | None:
    """Which tokens count, bool [batch, seq], by an attention mask; None for all of them, and for a mask of another kind."""
    return None if mask is None or mask.ndim != 2 else mask.bool()


def counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of `x` [batch, seq, size] that count by `token_mask`, [tokens, size]; all where it is not of these tokens."""
    return x[mask.to(x.device)] if mask is not None and mask.shape == x.shape[:-1] else x.flatten(0, -2)


def _log_likelihood(logits: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    """Sum over the tokens of log p(y), y drawn from p = softmax(logits [..., vocabulary]); those masked count nothing."""
    rows = logits.flatten(0, -2)
    keep = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    if mask is not None and mask.numel() == len(rows):
        keep = mask.flatten().to(rows.device)
    total = rows.new_zeros((), dtype=torch.float32)
    size = max(1, (CACHED if rows.is_cpu else CHUNK) // rows.shape[-1])
    for at in range(0, len(rows), size):
        part = rows[at : at + size].float().log_softmax(-1)
        # Drawn on the CPU, so that every device draws the same.
        drawn = torch.multinomial(part.detach().exp().cpu(), 1, generator=generator).to(part.device)
        total = total + torch.where(keep[at : at + size], part.gather(-1, drawn)[:, 0], 0.0).sum()
    return total


class Recorder:
    """Hooks on the linear layers among `modules`, by name, and what they add up while inputs and gradients pass."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        self.mask: Tensor | None = None  # of the tokens that count [batch, seq]
        self.decoder: str | None = None  # what the names of modules begin with whose tokens are counted by another mask
        self.decoder_mask: Tensor | None = None
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}  # of squares, per row and per column
        self._tokens: dict[str, int] = {}
        self._handles = [
            module.register_forward_hook(self._hook(f"{name}.weight"))
            for name, module in modules.items()
            if isinstance(module, nn.Linear)
        ]

    def _hook(self, name: str) -> Any:
        def backward(grad: Tensor) -> None:
            self._sums[name][0].add_(grad.float().square().flatten(0, -2).sum(0))

        def forward(module: nn.Linear, args: tuple[Any, ...], output: Any) -> None:
            if not torch.is_tensor(output):  # some routers are linear layers that return what they chose as well
                return
            x = args[0].detach()
            mask = self.decoder_mask if self.decoder is not None and name.startswith(self.decoder) else self.mask
            if name not in self._sums:
                self._sums[name] = (
                    torch.zeros(output.shape[-1], device=output.device),
                    torch.zeros(x.shape[-1], device=x.device),
                )
            x = counted(x, mask)
            self._sums[name][1].add_(x.float().square().sum(0))
            self._tokens[name] = self._tokens.get(name, 0) + len(x)
            if output.requires_grad:
                output.register_hook(backward)

        return forward

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def result(self) -> dict[str, Importance]:
        """{weight name: Importance} of every layer that a token reached."""
        return {
            name: Importance(*((value / max(self._tokens[name], 1)).sqrt() for value in sums))
            for name, sums in self._sums.items()
        }


def _begin(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.detach().requires_grad_()
