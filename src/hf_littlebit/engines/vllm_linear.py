"""A linear layer of vLLM on packed weights: how its parts are read, and the one call that computes it.

    create_weights                   an empty parameter for every stored part; its loader collects what the files hold
    process_weights_after_loading    what was collected is checked, cut for this process, and becomes the layer's parameters
    apply                            the registered operator (layers/ops.py), which torch.compile takes as it is

vLLM's layer may stand for several of the checkpoint's (q, k and v; gate and up). Each member keeps its own factors and all are
computed in one call; a member that the file holds merged already (Phi-3) has one set of factors for several outputs.

A packed output head is a linear layer too, except that vLLM pads the vocabulary and splits it by its own rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.utils import set_weight_attrs

from ..config import LittleBitConfig
from ..kernels import PARTS, PackedLayer
from ..layers import ops
from ..layers.parts import part_name
from .partition import REMEDY, Partition, checked_ranks, member_range, refuse_mixed

__all__ = ["LittleBitLinearMethod"]

NAMES = {"q": 0, "k": 1, "v": 2}  # vLLM's names for the members of a merged attention layer
WORDS = {"u": torch.int32, "u_tail": torch.uint8, "v": torch.int32, "v_tail": torch.uint8}

Members = tuple[int, ...]  # places of the members that one stored weight is of


class LittleBitLinearMethod(LinearMethodBase):
    """How one linear layer is loaded and computed.

    Args:
        config: of the model. prefix: name of the layer in vLLM's model. names: of the layers of the checkpoint that it is made of.
    """

    def __init__(self, config: LittleBitConfig, prefix: str, names: Sequence[str]):
        self.config, self.prefix, self.names = config, prefix, names
        self.found: dict[Members, dict[str, Tensor]] = {}  # what the files hold: {members: {part: tensor}}
        self.factors: list[tuple[list[str], tuple[int, ...], int]] = []  # names of parameters, ranks, outputs
        self.unquantized = UnquantizedLinearMethod()  # of a layer that turns out to be dense

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Register an empty parameter for every part that a checkpoint may hold; the sizes are those of the dense layer."""
        self.input_size, self.output_sizes, self.dtype = input_size_per_partition, output_partition_sizes, params_dtype
        scale_dtype = getattr(torch, self.config.scale_dtype)
        for part in PARTS:
            empty = nn.Parameter(torch.empty(0, dtype=WORDS.get(part, scale_dtype)), requires_grad=False)
            set_weight_attrs(empty, {"weight_loader": partial(self._collect, part)})
            layer.register_parameter(part_name("weight", part), empty)

    def _collect(
        self, part: str, param: nn.Parameter, loaded: Tensor, loaded_shard_id: str | int | Members | None = None
    ) -> None:
        """Keep a tensor of the file, for the members that vLLM says it is of (None: all)."""
        if loaded_shard_id is None:
            members = tuple(range(len(self.output_sizes)))
        elif isinstance(loaded_shard_id, tuple):
            members = loaded_shard_id
        else:
            place = NAMES.get(loaded_shard_id) if isinstance(loaded_shard_id, str) else loaded_shard_id
            if place is None or place >= len(self.output_sizes):
                raise ValueError(
                    f"{self.prefix} is merged of layers in a way that hf-littlebit does not know (a member is called "
                    f"{loaded_shard_id!r}); serve the model dequantized"
                )
            members = (place,)
        # A copy: loaders may read the next tensor into the same memory.
        self.found.setdefault(members, {})[part] = loaded.clone()

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Make the layer's parameters of what was collected.

        Raises:
            ValueError: if a member is missing, damaged, dense beside packed ones, or cannot be split among the processes.
        """
        found, self.found = dict(sorted(self.found.items())), {}
        if not found and self.factors:
            return  # done before
        names = self._names()
        held = [place for members in found for place in members]
        if held != list(range(len(self.output_sizes))):
            lacking = [name for place, name in enumerate(names) if place not in held]
            raise ValueError(f"{', '.join(lacking) or self.prefix} is not in the checkpoint as a whole; {REMEDY}")
        dense = [members for members, parts in found.items() if _is_dense(parts)]
        packed = [members for members in found if members not in dense]
        refuse_mixed(
            self.prefix,
            [names[place] for each in dense for place in each],
            [names[place] for each in packed for place in each],
        )
        placeholder: Any = layer.weight
        device = placeholder.device
        for part in PARTS:
            delattr(layer, part_name("weight", part))
        if dense:
            self._make_dense(layer, found, device)
        else:
            self._make_packed(layer, found, device)

    def _make_packed(self, layer: nn.Module, found: dict[Members, dict[str, Tensor]], device: torch.device) -> None:
        for index, (members, stored) in enumerate(found.items()):
            name = self._name(members)
            ranks = checked_ranks(name, stored, self.config)
            size = stored["scale_out"].shape[1], stored["scale_in"].shape[1]
            cut = self._partition(layer, name, members, *size)
            parts = _padded(cut.packed(stored), sum(self.output_sizes[place] for place in members) - cut.out_features)
            suffix = f"_{index}" if index else ""  # the first keeps the names that other code of vLLM may look for
            held = []
            for part in PARTS:
                key = part_name("weight", part) + suffix
                value = nn.Parameter(parts[part].to(device), requires_grad=False) if part in parts else None
                layer.register_parameter(key, value)
                held.append(key)
            self.factors.append((held, ranks, cut.out_features))
        self._share_bias(layer)

    def _share_bias(self, layer: nn.Module) -> None:
        """Give every set of factors its part of the layer's bias, as a tensor that stays.

        The kernels add a bias before they round, and on a GPU they know a layer by its tensors (kernels/bound.py): views that
        are made anew for every call would be checked anew.
        """
        bias: Any = getattr(layer, "bias", None)
        for index, (held, _, _) in enumerate(self.factors):
            key = "bias"
            if len(self.factors) > 1:
                key = f"bias_{index}"
                parts = None if bias is None else bias.detach().split([size for _, _, size in self.factors])
                layer.register_parameter(key, parts and nn.Parameter(parts[index].clone(), requires_grad=False))
            held.append(key)

    def _make_dense(self, layer: nn.Module, found: dict[Members, dict[str, Tensor]], device: torch.device) -> None:
        """Hand the layer over to vLLM's own method, with the weight as that would have loaded it."""
        rows = [
            self._partition(layer, self._name(members), members, *parts["u"].shape).dense(parts["u"])
            for members, parts in found.items()
        ]
        weight = nn.Parameter(torch.cat(rows).to(device=device, dtype=self.dtype), requires_grad=False)
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0})
        layer.register_parameter("weight", weight)
        layer.quant_method = self.unquantized
        self.unquantized.process_weights_after_loading(layer)

    def _partition(
        self, layer: nn.Module, name: str, members: Members, out_features: int, in_features: int
    ) -> Partition:
        """What this process keeps of a stored weight [out_features, in_features] that is of some members."""
        rank, world = (getattr(layer, key, default) for key, default in (("tp_rank", 0), ("tp_size", 1)))
        vocabulary: Any = getattr(layer, "shard_indices", None)
        if vocabulary is not None and (out_features, in_features) == (layer.org_vocab_size, self.input_size):
            return Partition(
                name, [(vocabulary.org_vocab_start_index, vocabulary.org_vocab_end_index)], (0, in_features)
            )
        totals = [out_features] if len(members) == 1 else self._totals(layer, members)
        if sum(totals) != out_features or in_features not in (self.input_size, self.input_size * world):
            raise ValueError(
                f"{name} is of {in_features} inputs and {out_features} outputs in the checkpoint, but the model's config "
                f"implies {sum(totals)} outputs of which each of {world} processes has {self.input_size} inputs; {REMEDY}"
            )
        outputs, before = [], 0
        for place, total in zip(members, totals, strict=True):
            first, stop = member_range(name, total, self.output_sizes[place], rank, world)
            outputs.append((before + first, before + stop))
            before += total
        first_input = 0 if in_features == self.input_size else rank * self.input_size
        return Partition(name, outputs, (first_input, first_input + self.input_size))

    def _totals(self, layer: nn.Module, members: Members) -> list[int]:
        """The outputs that each of some members has in the checkpoint, where it holds them merged."""
        heads, keys = getattr(layer, "total_num_heads", None), getattr(layer, "total_num_kv_heads", None)
        if heads and keys and len(self.output_sizes) == len(NAMES):
            # output_sizes counts a head as often as processes keep it.
            totals = [heads * layer.head_size, keys * layer.head_size, keys * layer.v_head_size]
        else:
            totals = list(getattr(layer, "output_sizes", None) or [layer.output_size])
        return [totals[place] for place in members]

    def _names(self) -> list[str]:
        """The name of every member; that of the layer for each where the checkpoint holds them merged."""
        count = len(self.output_sizes)
        return list(self.names) if len(self.names) == count else [self.prefix] * count

    def _name(self, members: Members) -> str:
        return self._names()[members[0]]

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., inputs] -> [..., outputs], the members side by side, of x's dtype; `bias` is the layer's own, or None."""
        layers = []
        for keys, ranks, _ in self.factors:
            *parts, own = [getattr(layer, key) for key in keys]
            layers.append(PackedLayer._make((*parts, None if bias is None else own, ranks)))
        if len(layers) == 1:
            return ops.linear(x, layers[0])
        return torch.cat(ops.linears(x, layers), dim=-1)


def _padded(parts: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The parts with `count` more outputs, all of which compute 0."""
    wide = ("u", "u_tail", "scale_out")
    return {
        part: nn.functional.pad(value, (0, count)) if count and part in wide else value for part, value in parts.items()
    }


def _is_dense(parts: dict[str, Tensor]) -> bool:
    """Whether a stored weight is a matrix of floats, and not factors."""
    return set(parts) == {"u"} and parts["u"].is_floating_point() and parts["u"].dim() == 2
