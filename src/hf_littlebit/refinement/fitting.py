"""A dense causal model quantized block after block, every layer fitted in closed form to the inputs that it will really get.

Factors of the weights alone make a real model worse than a uniform guess: errors of the first layers reach all later ones, and a
few directions, which the inputs of every layer share, carry most of an output. Both can be mended without a gradient from a few
thousand tokens, which the model may have written itself:

    dense stream     hidden states of the dense model
    packed stream    hidden states of the model whose blocks so far are quantized
    for every layer, in the order in which a block calls them:
        moments      of its inputs in the packed stream, and of these with its outputs in the dense stream
        factor       the weight that gives these outputs for those inputs; scales refitted for the outputs' errors (outputs.py)
    at the end       the gains of the norm before the head, by least squares from one stream to the other

Every token counts as the block changes it in the dense model, relative to its own change: otherwise the first token, whose hidden
states are a hundred times larger in most models, would be all that is fitted.

It is the start for a user who has no text; what tuning brings on top is refinement.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..config import LittleBitConfig
from ..initialize.calibration import Importance
from ..initialize.outputs import compensated, with_ridge
from ..layers.linear import FactorModule
from ..layers.parts import LATENT_PARTS, PACKED_PARTS, part_name
from ..layers.precision import exact_fp32
from ..load.conversion import factor_weight
from ..load.form import factor_modules, finish, record, replace_modules
from ..load.quantizer import LittleBitHfQuantizer
from ..load.source import quantization_of
from ..load.tables import pack_tables, plan_tables
from ..plan import Plan, plan_model
from .blocks import BlockList, find_blocks
from .layer_calls import in_fp32, inputs_of, watched, with_one_input

__all__ = ["NotFittable", "fit_model"]

Model = TypeVar("Model", bound=PreTrainedModel)
logger = logging.getLogger("hf_littlebit")
BATCH = 2048  # tokens at a time
RIDGE = 0.5  # of a layer's mean squared input: how far a weight stays from overfitting some thousand tokens
REFIT_RIDGE = 0.02  # the same for its scales, which are few
ADMM_STEPS = 40  # by default: what more steps win here is lost among the errors of the layers before


class NotFittable(ValueError):
    """A model that is not made of blocks which are called one after the other; it is as it was."""


def fit_model(model: Model, config: LittleBitConfig, tokens: Tensor, *, progress: bool = True) -> Model:
    """Quantize a dense causal `model` in place, fitting its layers to `tokens`, and return it in the form of `config`.

    Weights that no token reaches as it would in the dense model (stacked experts, those of another tower) are factorized alone.

    Args:
        config: as for from_pretrained; `steps` None means ADMM_STEPS here.
        tokens: [rows, length] of an integer dtype, some thousand in all. They stay in memory as hidden states, twice in fp32.
        progress: show a bar.

    Raises:
        NotFittable: for a model whose blocks are no chain, before anything is changed.
        ValueError: for a model that is quantized, tables that it cannot have, and for weights that cannot be factorized.
    """
    if quantization_of(model.config) is not None or factor_modules(model):
        raise ValueError("the model has LittleBit layers already; only a dense model can be quantized")
    config = copy.deepcopy(config)
    plan, tables = plan_model(model, config), plan_tables(model, config)
    try:
        blocks = find_blocks(model, [weight.module for weight in plan.weights])
        blocks.check(tokens[:1])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise NotFittable(f"its blocks cannot be fitted one after the other ({error})") from error
    record(config, plan, model)
    for message in (*plan.warnings(), *tables.warnings()):
        logger.warning("%s", message)
    # Saved options are the user's; these steps are this start's own.
    working = copy.deepcopy(config)
    working.steps = ADMM_STEPS if config.steps is None else config.steps
    training = model.training
    model.eval()
    with torch.no_grad(), tqdm(total=len(plan.weights), desc="factorizing", unit="layer", disable=not progress) as bar:
        _Fit(model, working, plan, blocks, tokens, bar.update).run()
    if config.format == "packed":
        pack_tables(model, config)
    finish(model.train(training), LittleBitHfQuantizer(config))
    return model


class _Fit:
    """The work of `fit_model`; `step` is told of every weight that is done."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: LittleBitConfig,
        plan: Plan,
        blocks: BlockList,
        tokens: Tensor,
        step: Callable[[], Any],
    ):
        self.model, self.config, self.blocks, self.step = model, config, blocks, step
        self.modules = plan.by_module()
        rows = max(1, BATCH // tokens.shape[1])
        self.batches = list(tokens.long().split(rows))

    def run(self) -> None:
        """All blocks, what is in none of them, and the last norm."""
        dense = [self.blocks.first_input(batch).float() for batch in self.batches]
        packed = [hidden.clone() for hidden in dense]
        for index, name in enumerate(self.blocks.names):
            dense, packed = self._block(index, name, dense, packed)
        for module in list(self.modules):  # in no block: of another tower, or between embeddings and blocks
            self._replace(module, self._alone(module))
        _fit_last_norm(self.model, self.blocks, self.batches, dense, packed)

    def _block(
        self, index: int, name: str, dense: list[Tensor], packed: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Quantize one block; returns both streams behind it."""
        block = self.blocks[index]
        calls = [in_fp32(self.blocks.call(index, batch)) for batch in self.batches]
        dtypes = {own: value.dtype for own, value in block.named_parameters()}
        block.float()
        planned = {own: self.model.get_submodule(own) for own in self.modules if own.startswith(f"{name}.")}
        layers = {own: layer for own, layer in planned.items() if isinstance(layer, nn.Linear)}
        outputs, order, after = watched(block, calls, dense, layers)
        share = _shares([new - old for new, old in zip(after, dense, strict=True)])
        # Those that cannot be fitted come first, so that the layers before and behind them know of their errors.
        for module in [module for module in self.modules if module.startswith(f"{name}.") and module not in outputs]:
            self._replace(module, self._alone(module))
        done: dict[str, nn.Module] = {}
        for together in with_one_input(order):
            inputs = inputs_of(block, calls, packed, layers[together[0]])
            gram = _moments(inputs, inputs, share) if _same_tokens(inputs, share) else None
            for module in together:
                layer, ys = layers[module], outputs.pop(module)
                if gram is None or not _same_tokens(ys, share):
                    parts = self._alone(module)
                else:
                    bias = 0.0 if layer.bias is None else layer.bias
                    cross = _moments([y - bias for y in ys], inputs, share)
                    parts = self._fitted(layer.weight, module, gram, cross)
                # Until the block is done a dense layer gives what the packed one will: its product with many tokens is faster.
                done[module] = self._replace(module, parts)
                self.model.set_submodule(module, layer)
                layer.weight.data = done[module].dense(torch.float32)  # type: ignore[operator]
        packed = [call(block, hidden) for call, hidden in zip(calls, packed, strict=True)]
        for module, new in done.items():
            self.model.set_submodule(module, new)
        for own, value in block.named_parameters():
            if own in dtypes and not _is_part(block, own):
                value.data = value.data.to(dtypes[own])
        return after, packed

    def _fitted(self, weight: Tensor, module: str, gram: Tensor, cross: Tensor) -> dict[str, Tensor]:
        """The parts of a linear layer's weight for the moments of `_moments`."""
        target = compensated(weight.detach(), gram, cross, RIDGE)
        # Root mean squares, as calibration.py recommends.
        importance = Importance(torch.ones(len(target), device=target.device), gram.diagonal().clamp_min(0).sqrt())
        parts = factor_weight(target, self.modules[module][0], self.config, importance, with_ridge(gram, REFIT_RIDGE))
        self.step()
        return parts

    def _alone(self, name: str) -> dict[str, Tensor]:
        """The parts of a module's weights, all errors counted alike."""
        module = self.model.get_submodule(name)
        parts: dict[str, Tensor] = {}
        for weight in self.modules[name]:
            parts |= factor_weight(getattr(module, weight.weight).detach(), weight, self.config)
            self.step()
        return parts

    def _replace(self, name: str, parts: dict[str, Tensor]) -> nn.Module:
        """Put a LittleBit module with `parts` in the place of a dense one, and return it."""
        old, weights = self.model.get_submodule(name), self.modules.pop(name)
        replace_modules(self.model, Plan(weights), self.config, placeholders=False)
        new = self.model.get_submodule(name)
        assert isinstance(new, FactorModule), type(new)
        if getattr(old, "bias", None) is not None:
            new.bias = old.bias
        for weight in weights:
            own = {part: f"{name}.{part_name(weight.weight, part)}" for part in (*PACKED_PARTS, *LATENT_PARTS)}
            new.fill(weight.weight, {part: parts[known] for part, known in own.items() if known in parts})
        return new


def _same_tokens(values: Sequence[Tensor], share: Sequence[Tensor]) -> bool:
    """Whether every batch of `values` has the rows of tokens that `share` has; experts of a list get some of them only."""
    return len(values) == len(share) and all(
        value.shape[:-1].numel() == each.numel() for value, each in zip(values, share, strict=True)
    )


def _shares(changes: Sequence[Tensor]) -> list[Tensor]:
    """How much each token counts [batch * length]: the reciprocal of its squared change, which tiny ones do not blow up."""
    squares = [change.square().sum(-1).flatten() for change in changes]
    typical = torch.cat(squares).median().clamp_min(torch.finfo(torch.float32).tiny)
    shares = [1 / (each + typical) for each in squares]
    mean = torch.cat(shares).mean()
    return [each / mean for each in shares]


def _moments(left: Sequence[Tensor], right: Sequence[Tensor], share: Sequence[Tensor]) -> Tensor:
    """Mean over the tokens, weighted by `share`, of left^T right: [left's size, right's size]."""
    total = left[0].new_zeros(left[0].shape[-1], right[0].shape[-1])
    with exact_fp32(total.device):
        for a, b, weight in zip(left, right, share, strict=True):
            total.addmm_((a.flatten(0, -2) * weight[:, None]).T, b.flatten(0, -2))
    return total / sum(each.numel() for each in share)


def _is_part(block: nn.Module, name: str) -> bool:
    """Whether a parameter is a part of a LittleBit layer, whose dtype is its own."""
    module, _, own = name.rpartition(".")
    owner = block.get_submodule(module)
    return isinstance(owner, FactorModule) and own in owner.part_dtypes


def _fit_last_norm(
    model: PreTrainedModel,
    blocks: BlockList,
    batches: Sequence[Tensor],
    dense: Sequence[Tensor],
    packed: Sequence[Tensor],
) -> None:
    """Refit the gains of the norm between the last block and the head, so that its output is nearest to the dense model's.

    What the packed stream has of the dense one in a channel is less than all of it, and the rest is noise, which a smaller gain
    lets less of through. The norm is found by what it is: the only vector of its size that the model's end owns. Its output
    need not be proportional to the gain (Gemma's is 1 + gain times), only affine in it.
    """
    inside = tuple(f"{name}." for name in blocks.names)
    size = dense[0].shape[-1]
    norms = [
        module
        for name, module in model.named_modules()
        if not f"{name}.".startswith(inside) and tuple(getattr(getattr(module, "weight", None), "shape", ())) == (size,)
    ]
    seen: list[nn.Module] = []
    handles = [norm.register_forward_hook(lambda module, args, output: seen.append(module)) for norm in norms]
    try:
        blocks.logits(batches[0][:1, :2], dense[0][:1, :2].to(model.dtype))
    finally:
        for handle in handles:
            handle.remove()
    if not seen or sum(norm is seen[-1] for norm in seen) != 1:
        return
    norm = seen[-1]
    dtypes = {name: value.dtype for name, value in norm.named_parameters()}
    norm.float()
    gain = norm.weight.detach().float()  # type: ignore[operator, union-attr]
    above = below = torch.zeros(size, device=gain.device)
    for of_dense, of_packed in zip(dense, packed, strict=True):
        norm.weight.data = gain
        target, found = norm(of_dense).float(), norm(of_packed).float()
        norm.weight.data = gain + 1
        slope = norm(of_packed).float() - found
        above = above + (slope * (target - found)).flatten(0, -2).sum(0)
        below = below + slope.square().flatten(0, -2).sum(0)
    change = torch.where(below > 0, above / below.clamp_min(1e-30), 0.0)
    norm.weight.data = gain + change
    for name, value in norm.named_parameters():
        value.data = value.data.to(dtypes[name])
