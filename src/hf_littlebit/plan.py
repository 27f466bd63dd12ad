"""Which weights of a model are replaced, and with what ranks: read off the module tree, on meta or not, and a config.

A weight is replaced if it belongs to an `nn.Linear` or to a mixture-of-experts module whose experts are stacked in 3-D
parameters of the common layout (experts.py), is not excluded by name, and is not cheaper to keep: where even the smallest
rank would cost more than the 16-bit weight, it stays dense and is counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from .config import LayerConfig, LittleBitConfig, bits_of
from .experts import LittleBitExperts, expert_sizes, is_stack
from .linear import LatentLittleBitLinear, LittleBitLinear

__all__ = ["Plan", "WeightPlan", "plan_model"]

DENSE_BITS = 16  # of a weight that is kept


@dataclass(frozen=True)
class WeightPlan:
    """One weight to replace: `count` matrices of `out_features x in_features`, each with paths of `ranks`."""

    module: str  # name of the module in the model
    weight: str  # name of the parameter in the module
    out_features: int
    in_features: int
    ranks: tuple[int, ...]
    options: LayerConfig
    count: int = 1

    @property
    def name(self) -> str:
        return f"{self.module}.{self.weight}"

    @property
    def numel(self) -> int:
        return self.count * self.out_features * self.in_features

    @property
    def bits(self) -> int:
        """Bits that the file holds for it."""
        return self.count * bits_of(self.out_features, self.in_features, self.ranks)

    @property
    def bpw(self) -> float:
        return self.bits / self.numel


@dataclass
class Plan:
    """What becomes of a model: the weights to replace, and those that stay dense with the reason."""

    weights: list[WeightPlan] = field(default_factory=list)
    dense: dict[str, list[tuple[str, int]]] = field(default_factory=dict)  # reason -> (module, weights in it)

    @property
    def numel(self) -> int:
        return sum(weight.numel for weight in self.weights)

    @property
    def bits(self) -> int:
        return sum(weight.bits for weight in self.weights)

    @property
    def bpw(self) -> float:
        """Bits per replaced weight, over all of them."""
        return self.bits / self.numel if self.weights else 0.0

    def by_module(self) -> dict[str, list[WeightPlan]]:
        modules: dict[str, list[WeightPlan]] = {}
        for weight in self.weights:
            modules.setdefault(weight.module, []).append(weight)
        return modules

    def keep(self, reason: str, module: str, numel: int) -> None:
        self.dense.setdefault(reason, []).append((module, numel))

    def warnings(self) -> list[str]:
        """What a user must know before trusting the asked bits per weight; empty if every layer is as asked."""
        messages = []
        over = [w for w in self.weights if w.options.factor == 1.0 and w.bpw > w.options.bpw]
        under = [w for w in self.weights if _capped(w)]
        if over:
            two = any(len(weight.ranks) > 1 for weight in over)
            remedy = "residual=False halves that; or raise bpw" if two else "raise bpw for them in module_config"
            messages.append(
                f"{len(over)} layer(s) are too small for the bits asked: their smallest rank, 8, takes more, e.g. "
                f"{_example(over)}. {remedy}, or leave them dense with modules_to_not_convert."
            )
        if under:
            one = any(len(weight.ranks) == 1 for weight in under)
            remedy = "residual=True doubles that; or lower bpw." if one else "Lower bpw for them in module_config."
            messages.append(
                f"{len(under)} layer(s) stop below the bits asked, because a rank is at most min(out, in), e.g. "
                f"{_example(under)}. {remedy}"
            )
        for reason, kept in self.dense.items():
            count = sum(numel for _, numel in kept)
            messages.append(f"{len(kept)} module(s) with {count:,} weights stay dense: {reason}, e.g. {kept[0][0]}.")
        return messages


def plan_model(model: nn.Module, config: LittleBitConfig) -> Plan:
    """The plan for a dense model, or the one that a quantized model was built by.

    Raises:
        ValueError: if nothing in the model can be replaced.
    """
    excluded = HfQuantizer.get_modules_to_not_convert(
        model,  # type: ignore[arg-type]
        config.modules_to_not_convert,
        keep_in_fp32_modules=_fp32_modules(model),
        add_default_skips=True,
    )
    # transformers names the last module by its last parameter, and takes off only ".weight".
    excluded = [name.removesuffix(".bias") for name in excluded]
    plan = Plan()
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if not should_convert_module(name, excluded):
            continue
        if isinstance(module, LittleBitExperts) or is_stack(module):
            inside = (*inside, name + ".")
            _plan_experts(plan, name, module, config)
        elif isinstance(module, LittleBitLinear | LatentLittleBitLinear) or type(module) is nn.Linear:
            size = (module.out_features, module.in_features)  # type: ignore[arg-type]
            _plan_weight(plan, name, "weight", size, config)  # type: ignore[arg-type]
    if not plan.weights:
        raise ValueError(
            f"{type(model).__name__} has no layer that LittleBit can replace: it looks for torch.nn.Linear layers other than "
            "the output head whose packed form is smaller than 16 bits per weight (GPT-2 style Conv1D layers are not covered); "
            f"excluded by name: {', '.join(sorted(map(str, excluded))[:8]) or 'none'}"
        )
    return plan


def _plan_weight(
    plan: Plan, name: str, weight: str, size: tuple[int, int], config: LittleBitConfig, count: int = 1
) -> None:
    options = config.for_module(name)
    ranks = options.ranks(*size)
    planned = WeightPlan(name, weight, *size, ranks, options, count)
    if planned.bits >= DENSE_BITS * planned.numel:
        plan.keep("too small to gain from factors", name, planned.numel)
    else:
        plan.weights.append(planned)


def _plan_experts(plan: Plan, name: str, module: nn.Module, config: LittleBitConfig) -> None:
    sizes, reason = expert_sizes(module)
    if reason:
        plan.keep(reason, name, sum(value.numel() for value in module.parameters()))
        return
    before = len(plan.weights)
    for weight, (count, *size) in sizes.items():
        _plan_weight(plan, name, weight, (size[0], size[1]), config, count)
    if 0 < len(plan.weights) - before < len(sizes):
        # Half a module cannot be replaced: its forward is one function.
        for planned in plan.weights[before:]:
            plan.keep("too small to gain from factors", name, planned.numel)
        del plan.weights[before:]


def _fp32_modules(model: Any) -> list[str]:
    names: set[str] = set()
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        names.update(getattr(model, attribute, None) or ())
    return sorted(names)


def _capped(weight: WeightPlan) -> bool:
    """True where a larger rank was asked for than min(out, in) allows."""
    ceiling = min(weight.out_features, weight.in_features) // 8 * 8
    return min(weight.ranks) >= ceiling and weight.bpw < 0.95 * weight.options.bpw


def _example(weights: Iterable[WeightPlan]) -> str:
    weight = next(iter(weights))
    size = f"{weight.out_features}x{weight.in_features}"
    return f"{weight.module} ({size}) takes {weight.bpw:.3g} of {weight.options.bpw:g} bits"
