"""One weight to replace, and the ranks it has: from its options, from the bits that all weights share, or from a file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from .budget import Share, meet_budget
from .config import LayerConfig, LittleBitConfig
from .layers.linear import FactorModule
from .layers.parts import PACKED_PARTS, part_name, stored_ranks
from .module_names import aliases
from .ranks import bits_of, ceiling

__all__ = ["WeightPlan", "found_ranks", "refuse_given", "share_leftover_bits"]

KV_FACTORS = tuple(eighths / 8 for eighths in range(32, 8, -1))  # tried in this order; 4 is the paper's choice


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
    def latents(self) -> int:
        """Numbers in the latents of its factors."""
        return self.count * sum(self.ranks) * (self.out_features + self.in_features)

    @property
    def bits(self) -> int:
        """Bits that the file holds for it."""
        return self.count * bits_of(self.out_features, self.in_features, self.ranks, self.options.scale_bits)

    @property
    def bpw(self) -> float:
        return self.bits / self.numel

    @property
    def spoken(self) -> str:
        """What a config calls it: the module, or a weight of stacked experts."""
        return self.module if self.weight == "weight" else self.name

    @property
    def capped(self) -> bool:
        """Whether a larger rank was asked for than min(out, in) allows."""
        full = min(self.ranks) >= ceiling(self.out_features, self.in_features)
        return full and self.bpw < 0.95 * self.options.bpw

    def with_factor(self, factor: float) -> WeightPlan:
        """The same with the ranks that its options give it for another `factor`."""
        options = replace(self.options, factor=factor)
        return replace(self, options=options, ranks=options.ranks(self.out_features, self.in_features))


def refuse_given(weight: WeightPlan) -> None:
    """Refuse ranks of the config that no path of the layer can use.

    Raises:
        ValueError: with the layer, its ranks and their limit.
    """
    limit = ceiling(weight.out_features, weight.in_features)
    if weight.options.given is not None and max(weight.ranks) > limit:
        raise ValueError(
            f"ranks: {weight.spoken} ({weight.out_features}x{weight.in_features}) is given {list(weight.ranks)}; a rank is at "
            f"most min(out, in), here {limit}"
        )


def share_leftover_bits(weights: Sequence[WeightPlan]) -> tuple[list[WeightPlan], float]:
    """(`weights`, of which those that share their bits take what was asked for all of them; the kv_factor that was found).

    First the ranks of keys and values are raised by what rounding all ranks down has left over. They need these bits most:
    where queries are grouped they hold an eighth of the weights or less, and their ranks are a few tens (docs/training.md).
    What is left then, and what small layers took too much, is for all.
    """
    kv_factor = 1.0
    sharing = [weight for weight in weights if weight.options.shares]
    budget = sum(weight.options.bpw * weight.numel for weight in sharing)
    if any(weight.options.auto_kv_factor for weight in sharing):
        for factor in KV_FACTORS:
            tried = [weight.with_factor(factor) if weight.options.auto_kv_factor else weight for weight in sharing]
            if sum(weight.bits for weight in tried) <= budget:
                sharing, kv_factor = tried, factor
                break
    # What keys and values were raised to is what they ask for from here on.
    asked = [weight.options.bpw if weight.options.factor == 1.0 else weight.bpw for weight in sharing]
    shares = [
        Share(weight.out_features, weight.in_features, weight.count, weight.ranks, bpw, weight.options.scale_bits)
        for weight, bpw in zip(sharing, asked, strict=True)
    ]
    found = {weight.name: weight for weight in sharing}
    for weight, ranks in zip(sharing, meet_budget(shares, budget), strict=True):
        found[weight.name] = replace(weight, ranks=ranks)
    return [found.get(weight.name, weight) for weight in weights], kv_factor


def found_ranks(
    model: nn.Module, weight: WeightPlan, config: LittleBitConfig, stored: Collection[str]
) -> tuple[int, ...]:
    """The ranks that a weight of a quantized model or file has, whatever its config would give a new one."""
    module = model.get_submodule(weight.module)
    if isinstance(module, FactorModule):
        return module.ranks_of(weight.weight)
    if not isinstance(stored, Mapping):
        return weight.ranks
    shapes: dict[str, tuple[int, ...]] = {}
    for part in PACKED_PARTS:
        name = f"{weight.module}.{part_name(weight.weight, part)}"
        for alias in aliases(name, getattr(model, "base_model_prefix", "")):
            if alias in stored:
                shape = stored[alias][1]
                shapes[part] = shape if weight.weight == "weight" else shape[1:]
    size = weight.out_features, weight.in_features
    return stored_ranks(shapes, size, weight.ranks, config.format == "latent")
