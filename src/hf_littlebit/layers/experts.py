"""Mixture-of-experts layers whose experts are stacked in 3-D parameters, quantized expert by expert.

transformers holds the experts of Mixtral, Qwen3-MoE and about sixty others as one module with

    gate_up_proj [experts, 2 * intermediate, hidden]     (or up_proj, where there is no gate)
    down_proj    [experts, hidden, intermediate]

and a forward of (hidden_states, top_k_index, top_k_weights). Every matrix of the stack is factored on its own; the parts
are stacked likewise and named after the weight (linear.py). Stacks that are transposed, have biases or a norm after each
expert (gpt-oss, Llama 4) are not covered and stay dense; plan.py counts them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..internals.torch import own_parameters
from ..internals.transformers import apply_gate, gates_its_experts
from ..kernels import PackedLayer
from . import ops
from .bits import asked_by_peft
from .linear import FactorModule, autocast_input, latent_product
from .parts import LATENT_PARTS, PACKED_PARTS, latent_parts, latent_paths, pack_parts, unpack_paths
from .path import Path, cast, dense_weight

__all__ = ["LittleBitExperts", "expert_sizes", "is_stack"]


def is_stack(module: nn.Module) -> bool:
    """True for a module that holds its experts in 3-D parameters."""
    down = own_parameters(module).get("down_proj")
    return isinstance(down, Tensor) and down.ndim == 3


def expert_sizes(module: nn.Module) -> tuple[dict[str, tuple[int, int, int]], str]:
    """{weight: (experts, out, in)} of a stack, and the reason why it cannot be replaced ("" if it can)."""
    if isinstance(module, LittleBitExperts):
        return dict(module.sizes), ""
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    if not gates_its_experts(type(module)) or not hasattr(module, "config"):
        return {}, "experts with their own forward are not covered"
    for flag, what in (
        ("is_transposed", "transposed experts"),
        ("has_bias", "experts with biases"),
        ("has_post_expert_norm", "experts with a norm of their own"),
    ):
        if getattr(module, flag, False):
            return {}, f"{what} are not covered"
    values = dict(module.named_parameters())
    if set(values) != {first, "down_proj"} or any(value.ndim != 3 for value in values.values()):
        return {}, f"experts with parameters {', '.join(sorted(values))} are not covered"
    return {name: (value.shape[0], value.shape[1], value.shape[2]) for name, value in values.items()}, ""


class LittleBitExperts(FactorModule):
    """Experts on packed bits or, with `latent=True`, on fp32 latents.

    Args:
        source: the dense module it stands for; its class applies the gate and is rebuilt by `dense_module`.
        ranks: {weight: ranks} for each of the source's two weights.
    """

    def __init__(
        self,
        source: nn.Module,
        ranks: Mapping[str, Sequence[int]],
        latent: bool = False,
        device: torch.device | str | None = None,
        scale_dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(scale_dtype)
        self.sizes, reason = expert_sizes(source)
        if reason:
            raise ValueError(f"{type(source).__name__}: {reason}; leave it dense with modules_to_not_convert")
        # What the source's gate reads (limits, slopes, flags) is kept under the same names; activation modules with it.
        for key, value in source.__dict__.items():
            if not key.startswith("_") and key not in ("training", "part_dtypes"):
                setattr(self, key, value)
        for key, child in source.named_children():
            self.add_module(key, child)
        self.source_class: type[nn.Module] = (
            source.source_class if isinstance(source, LittleBitExperts) else type(source)
        )
        self.path_ranks = {weight: list(rank) for weight, rank in ranks.items()}
        self.latent = latent
        for weight, (count, out_features, in_features) in self.sizes.items():
            self.declare_parts(weight, (out_features, in_features), self.path_ranks[weight], latent, device, (count,))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k] -> [tokens, hidden]."""
        first, last = self.sizes
        count = self.sizes[first][0]
        out = torch.zeros_like(hidden_states)
        # Only the experts that were chosen run; an index equal to their number marks a token that another rank serves.
        for expert in top_k_index.unique().tolist():
            if expert >= count:
                continue
            token, choice = torch.where(top_k_index == expert)
            hidden = self._gate(self._product(first, expert, hidden_states[token]))
            chosen = self._product(last, expert, hidden) * top_k_weights[token, choice, None]
            out.index_add_(0, token, chosen.to(out.dtype))
        return out

    def _gate(self, hidden: Tensor) -> Tensor:
        if getattr(self, "has_gate", True):
            return apply_gate(self.source_class, self, hidden)
        return self.act_fn(hidden)  # type: ignore[operator]

    def _product(self, weight: str, expert: int, x: Tensor) -> Tensor:
        x = autocast_input(x)
        ranks = self.path_ranks[weight]
        if self.latent:
            return latent_product(x, self.parts(weight, LATENT_PARTS, expert), ranks, self)
        return ops.linear(x, PackedLayer(**self.parts(weight, PACKED_PARTS, expert), bias=None, ranks=ranks))

    def paths(self, weight: str, expert: int) -> list[Path]:
        """The factors of one matrix of the stack."""
        if self.latent:
            return latent_paths(self.parts(weight, LATENT_PARTS, expert), self.path_ranks[weight], self.scale_dtype)
        return unpack_paths(self.parts(weight, PACKED_PARTS, expert), self.path_ranks[weight])

    @property
    def W_q(self) -> Tensor:
        """Refuses adapters: PEFT asks every module that it attaches one to for this. To others, nothing of the kind is here."""
        if not asked_by_peft():
            raise AttributeError("W_q")
        raise ValueError(
            "adapters cannot attach to stacked LittleBit experts, which hold bits (or latents) and no dense weights: give "
            "target_modules a list of linear layers in the place of 'all-linear', and no target_parameters, or call "
            "model.dequantize() first"
        )

    def _twin(self, latent: bool) -> LittleBitExperts:
        twin = LittleBitExperts(self, self.path_ranks, latent, "meta", self.scale_dtype)
        for weight, (count, *_) in self.sizes.items():
            twin.fill(
                weight, self.stack([self.paths(weight, expert) for expert in range(count)], latent, self.scale_dtype)
            )
        return twin.train(self.training)

    def pack(self) -> LittleBitExperts:
        """The packed twin of a latent module."""
        return self._twin(latent=False)

    def unpack(self) -> LittleBitExperts:
        """The trainable twin of a packed module."""
        return self._twin(latent=True)

    @staticmethod
    def stack(experts: Sequence[Sequence[Path]], latent: bool, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        """The parts of a stack from the factors of its matrices."""
        each = [latent_parts(paths) if latent else pack_parts(paths, scale_dtype) for paths in experts]
        return {part: torch.stack([parts[part] for parts in each]) for part in each[0]}

    def dense_module(self, dtype: torch.dtype) -> nn.Module:
        """The dense module that this one stands for, of the source's class."""
        with torch.device("meta"):
            module = self.source_class(self.config)
        for weight, (count, *_) in self.sizes.items():
            stack = torch.stack([cast(dense_weight(self.paths(weight, expert)), dtype) for expert in range(count)])
            setattr(module, weight, nn.Parameter(stack))
        for key, child in self.named_children():
            module.add_module(key, child)
        return module.train(self.training)

    def ranks_of(self, weight: str) -> tuple[int, ...]:
        return tuple(self.path_ranks[weight])

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{weight}={size}, ranks={self.path_ranks[weight]}" for weight, size in self.sizes.items())
        return f"{sizes}, latent={self.latent}"
