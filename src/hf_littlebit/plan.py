"""Which weights of a model are replaced: read off the module tree, on meta or not, and a config.

A weight is replaced if it belongs to an `nn.Linear` or to a mixture-of-experts module whose experts are stacked in 3-D
parameters of the common layout (experts.py), is not excluded by name, and is not cheaper to keep: where even the smallest
rank would cost more than the 16-bit weight, it stays dense and is counted. For a saved model the file says which weights
were replaced, so that no rule of this or another version, or of the class it is loaded into, can decide otherwise. What ranks
they have is found in weight_plan.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from torch import nn

from .config import KV_NAMES, LittleBitConfig
from .internals.torch import is_convolution
from .internals.transformers import fp32_modules
from .layers.experts import LittleBitExperts, expert_sizes, is_stack
from .layers.linear import FactorModule
from .layers.parts import part_name
from .model_parts import dense_parts, kept_modules
from .module_names import aliases, check_steps, is_named, matches, needs_fp32
from .ranks import RANK_MULTIPLE
from .weight_plan import WeightPlan, found_ranks, refuse_given, share_leftover_bits

__all__ = ["Plan", "WeightPlan", "plan_model"]

TOLERANCE = 0.01  # of the bits asked, before a user is told
INDEX = re.compile(r"\.\d+(?=\.)")
DENSE_BITS = 16  # of a weight that is kept
SMALLEST_COUNTED = 16  # a kept matrix is worth a warning from this many rows and columns

# These are the reasons why a module stays dense although it could be replaced. Nothing is said of the first two: the user asked
# for the one, and the other holds in every model.
EXCLUDED = "modules_to_not_convert names them"
KEPT = "they are the output head, tied to other weights, or the last module"
IN_FLOATS = "the model's code needs them in floats (_keep_in_fp32_modules)"
NEW = "the checkpoint's class does not have them, so they are new"


@dataclass
class Plan:
    """What becomes of a model: the weights to replace, and those that stay dense with the reason."""

    weights: list[WeightPlan] = field(default_factory=list)
    dense: dict[str, list[tuple[str, int]]] = field(default_factory=dict)  # reason -> (module, weights in it)
    unused: list[str] = field(default_factory=list)  # options that no module answers to
    kv_factor: float = 1.0  # what plan_model found for kv_factor=None, e.g. 2.5
    converted: bool = False  # another program chose the ranks, whatever bits its user asked for

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
        """{name of a module: its weights}, e.g. both stacks of a mixture-of-experts module under one name."""
        modules: dict[str, list[WeightPlan]] = {}
        for weight in self.weights:
            modules.setdefault(weight.module, []).append(weight)
        return modules

    def keep(self, reason: str, module: str, numel: int) -> None:
        """Note that `module`, with `numel` weights, stays dense for a `reason` that the user is told."""
        self.dense.setdefault(reason, []).append((module, numel))

    def record(self, config: LittleBitConfig) -> None:
        """Write what this plan found into `config`, which is to be saved: its kv_factor, and the ranks.

        A saved model then says them itself, and another version of the rules changes nothing about it.
        """
        if config.kv_factor is None:
            config.kv_factor = self.kv_factor
        if not self.converted and any(weight.options.shares for weight in self.weights):
            config.ranks = self.ranks()

    def ranks(self) -> dict[str, list[int]]:
        """{name pattern: ranks} as LittleBitConfig takes them: an entry for what is alike in all blocks, and those that differ.

        In the order of the names, which a config has when it is read from a file: later entries win. A pattern has "*" where a
        name has something else, and so stands before all names that it is for.
        """
        kinds: dict[str, list[WeightPlan]] = {}
        for weight in self.weights:
            kinds.setdefault(INDEX.sub(".*", weight.spoken), []).append(weight)
        found = {}
        for kind, weights in kinds.items():
            found[kind] = list(Counter(weight.ranks for weight in weights).most_common(1)[0][0])
        found = dict(sorted(found.items()))
        for weight in self.weights:
            patterns = [ranks for kind, ranks in found.items() if matches(kind, weight.spoken)]
            if not patterns or tuple(patterns[-1]) != weight.ranks:
                found[weight.spoken] = list(weight.ranks)
        return dict(sorted(found.items()))

    def warnings(self) -> list[str]:
        """What a user must know before trusting the asked bits per weight; empty if every layer is as asked."""
        messages = []
        asked = [] if self.converted else self.weights
        over = [w for w in asked if max(w.ranks) == RANK_MULTIPLE and w.bpw > w.options.bpw]
        under = [w for w in asked if w.capped]
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
        wanted = sum(weight.options.bpw * weight.numel for weight in asked if weight.options.shares)
        taken = sum(weight.bits for weight in asked if weight.options.shares)
        if wanted and abs(taken / wanted - 1) > TOLERANCE:
            messages.append(
                f"the weights take {taken / wanted:.3g} times the bits asked: ranks come in steps of {RANK_MULTIPLE}, from "
                f"{RANK_MULTIPLE} to min(out, in), and these layers are too small to come nearer."
            )
        for reason, kept in self.dense.items():
            count = sum(numel for _, numel in kept)
            messages.append(f"{len(kept)} module(s) with {count:,} weights stay dense: {reason}, e.g. {kept[0][0]}.")
        for option in self.unused:
            messages.append(
                f"{option} has no effect: no replaced layer answers to it. Compare it with model.named_modules()."
            )
        return messages


def plan_model(
    model: nn.Module,
    config: LittleBitConfig,
    stored: Collection[str] | None = None,
    saved: Collection[str] | None = None,
) -> Plan:
    """The plan for a dense model, or the one that a quantized model was built by.

    Args:
        stored: names of the tensors of a quantized model or its file; a weight is replaced if its parts are among them.
            Its ranks are those of the model's layer, or else of the shapes, where `stored` maps names to what verify.py
            reads of a file: (dtype, shape, file). What neither says is taken from the config.
        saved: names of the tensors that a dense checkpoint to be read holds, where that is of another class; what it
            lacks is new and stays dense.

    Raises:
        ValueError: if nothing can be replaced, no part is stored, or the user names modules that the model does not have.
    """
    walk = _Walk(model, config, stored, saved)
    for name, module in model.named_modules():
        walk.visit(name, module)
    plan = walk.plan
    plan.converted = config.converted_from is not None
    if not plan.weights:
        if stored is not None:
            raise ValueError(
                f"no tensor of the checkpoint is a part of a LittleBit layer of {type(model).__name__}, although its config has "
                "quant_method 'littlebit': a dense model was made with the config of a quantized one and saved, another program "
                "wrote it, or it is of another model. For a dense model, remove quantization_config from its config.json"
            )
        raise ValueError(
            f"{type(model).__name__} has no layer that LittleBit can replace: it looks for torch.nn.Linear layers other than "
            f"the output head whose packed form is smaller than 16 bits per weight. Found: {'; '.join(plan.dense) or 'none'}. "
            f"Excluded by name: {', '.join(config.modules_to_not_convert or ()) or 'none'}"
        )
    plan.unused = walk.unused()
    for weight in plan.weights:
        refuse_given(weight)
    plan.weights, plan.kv_factor = share_leftover_bits(plan.weights)
    if stored is not None:
        plan.weights = [replace(each, ranks=found_ranks(model, each, config, stored)) for each in plan.weights]
    return plan


class _Walk:
    """One pass over a module tree; `visit` is called for every module, and `plan` grows. Arguments as of plan_model."""

    def __init__(
        self, model: nn.Module, config: LittleBitConfig, stored: Collection[str] | None, saved: Collection[str] | None
    ):
        self.plan, self.config, self.stored, self.saved = Plan(), config, stored, saved
        if stored is None:
            check_steps("modules_to_not_convert", config.modules_to_not_convert or ())
        self.prefix = str(getattr(model, "base_model_prefix", ""))
        self.kept = kept_modules(model)
        self.fp32 = fp32_modules(model)
        self.parts = dense_parts(model, config.text_only) if stored is None else {}
        self.names = [name for name, _ in model.named_modules()]
        self.inside: tuple[str, ...] = ()  # modules that were replaced, or kept, with all they hold
        self.excluding: set[str] = set()  # entries of modules_to_not_convert that matched

    def visit(self, name: str, module: nn.Module) -> None:
        """Decide about one module: replaced, kept with a reason, or nothing that this package knows."""
        if self.inside and name.startswith(self.inside):
            return
        stack = isinstance(module, LittleBitExperts) or is_stack(module)
        linear = type(module) is nn.Linear or (isinstance(module, FactorModule) and isinstance(module, nn.Linear))
        sizes, reason = expert_sizes(module) if stack else ({}, "")
        if linear:
            sizes = {"weight": (1, module.out_features, module.in_features)}  # type: ignore[dict-item]
        if stack:
            self.inside = (*self.inside, name + ".")
        if not (sizes or reason):
            self._count_kept(name, module)
            return
        if self.stored is None:
            reason = self._exclusion_reason(name, module, tuple(sizes) if stack else ()) or reason
        if reason:
            self._keep(reason, name, module.parameters())
        else:
            self._plan_module(name, sizes)

    def _keep(self, reason: str, name: str, values: Iterable[nn.Parameter]) -> None:
        if reason not in (EXCLUDED, KEPT):
            self.plan.keep(reason, name, sum(value.numel() for value in values))

    def _exclusion_reason(self, name: str, module: nn.Module, weights: tuple[str, ...] = ()) -> str:
        """Why `module` stays dense whatever its size, or "": the user or the model class names it, or no checkpoint has it.

        `weights` are the parameters that the user may name, e.g. "gate_up_proj" of a mixture-of-experts module.
        """
        names = aliases(name, self.prefix)
        names += tuple(f"{alias}.{weight}" for alias in names for weight in weights)
        found = [pattern for pattern in self.config.modules_to_not_convert or () if is_named(names, pattern)]
        self.excluding.update(found)
        if found:
            return EXCLUDED
        if name in self.kept:
            return KEPT
        if needs_fp32(name, self.fp32):
            return IN_FLOATS
        parts = [f"{alias}.{part}" for alias in aliases(name, self.prefix) for part, _ in module.named_parameters()]
        if self.saved is not None and not any(part in self.saved for part in parts):
            return NEW
        return next((reason for reason, held in self.parts.items() if name in held), "")

    def _plan_module(self, name: str, sizes: dict[str, tuple[int, int, int]]) -> None:
        if self.stored is not None and not any(self._is_stored(name, weight) for weight in sizes):
            return
        planned: list[WeightPlan] = []
        small: list[WeightPlan] = []
        for weight, (count, out_features, in_features) in sizes.items():
            options = self.config.for_module(*self._option_names(name, weight))
            ranks = options.ranks(out_features, in_features)
            entry = WeightPlan(name, weight, out_features, in_features, ranks, options, count)
            (small if self.stored is None and entry.bits >= DENSE_BITS * entry.numel else planned).append(entry)
        if small:
            # A module is replaced as a whole or not at all, because its forward is one function.
            for entry in (*small, *planned):
                self.plan.keep("too small to gain from factors", name, entry.numel)
        else:
            self.plan.weights += planned

    def _option_names(self, name: str, weight: str) -> tuple[str, ...]:
        names = aliases(name, self.prefix)
        return names if weight == "weight" else names + tuple(f"{alias}.{weight}" for alias in names)

    def _is_stored(self, name: str, weight: str) -> bool:
        assert self.stored is not None
        parts = [part_name(weight, part) for part in ("scale_out", "scale_rank", "scale_in")]
        return any(f"{alias}.{part}" in self.stored for alias in aliases(name, self.prefix) for part in parts)

    def _count_kept(self, name: str, module: nn.Module) -> None:
        """Note the matrices of a module that is not replaced, if a user may expect them to shrink.

        Embeddings and convolutions are known to be something else, and so is a saved model's every dense module.
        """
        if self.stored is not None or isinstance(module, nn.Embedding) or is_convolution(module):
            return
        matrices = [v for v in module.parameters(recurse=False) if v.ndim > 1 and min(v.shape[-2:]) >= SMALLEST_COUNTED]
        if not matrices:
            return
        reason = self._exclusion_reason(name, module)
        if reason:
            self._keep(reason, name, module.parameters())
        else:
            class_name = type(module).__name__
            own = f"{class_name}'s forward is its own"
            self._keep(own if isinstance(module, nn.Linear) else f"{class_name} is not covered", name, matrices)

    def unused(self) -> list[str]:
        """Options of the config that changed nothing. Raises ValueError for names of modules that the model does not have."""
        config = self.config
        unused = []
        for pattern in config.modules_to_not_convert or () if self.stored is None else ():
            if pattern in self.excluding:
                continue
            if not any(is_named(aliases(name, self.prefix), pattern) for name in self.names):
                raise ValueError(
                    f"modules_to_not_convert holds {pattern!r}, which names no module of this model, so that what it was to leave "
                    "dense would be quantized; compare it with model.named_modules(), or leave it out"
                )
            unused.append(f"modules_to_not_convert entry {pattern!r}")
        names = [self._option_names(weight.module, weight.weight) for weight in self.plan.weights]
        kv = [each for each in names if each[0].rpartition(".")[2] in KV_NAMES]
        for pattern, options in (config.module_config or {}).items():
            answering = kv if set(options) == {"kv_factor"} else names
            if not any(matches(pattern, name) for each in answering for name in each):
                unused.append(f"module_config entry {pattern!r}: {options}")
        unused += [
            f"ranks entry {pattern!r}"
            for pattern in config.ranks or {}
            if not any(matches(pattern, name) for each in names for name in each)
        ]
        if config.kv_factor not in (None, 1.0) and not kv:
            unused.append(f"kv_factor={config.kv_factor:g} (it is for layers named {' and '.join(KV_NAMES)})")
        return unused


def _example(weights: Iterable[WeightPlan]) -> str:
    weight = next(iter(weights))
    size = f"{weight.out_features}x{weight.in_features}"
    return f"{weight.module} ({size}) takes {weight.bpw:.3g} of {weight.options.bpw:g} bits"
