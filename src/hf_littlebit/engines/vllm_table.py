"""An embedding or output head of vLLM on a packed table: how its parts are read, and the operators that compute it.

    create_weights                   an empty parameter for every part and a dense weight; its loader keeps this process's rows
    process_weights_after_loading    what was kept is checked, padded as vLLM pads the vocabulary, and becomes parameters
    embedding, apply                 the registered operators (layers/table_ops.py), which torch.compile takes as they are
    tie_weights                      a head that reads the table of the embedding

vLLM splits the vocabulary among processes by whole rows (`shard_indices` of the layer), which is how tables are stored. A layer
that is dense in the file, because a list or the model's code wants it so, becomes vLLM's own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.utils import set_weight_attrs

from ..config import LittleBitConfig
from ..kernels import table_shapes
from ..layers.table import ROWS_LIKE, TABLE_PARTS, TableWeight
from ..layers.table_ops import embedding, head
from ..load.tables import DENSE_BITS
from .partition import REMEDY, checked_table, padded_rows

__all__ = ["LittleBitTableMethod"]

DENSE = "weight"


class LittleBitTableMethod(QuantizeMethodBase):
    """How one embedding or head is loaded and computed.

    Args:
        config: of the model. bits: of the table, 8 or 4; 16 for a layer that is dense unless it is tied to a packed one.
        name: of the layer in the checkpoint, for errors.
    """

    def __init__(self, config: LittleBitConfig, bits: int, name: str):
        self.bits, self.name = bits, name
        self.scale_dtype: torch.dtype = getattr(torch, config.scale_dtype)
        self.found: dict[str, Tensor] = {}  # this process's rows of what the file holds
        self.stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}  # of the whole: {part: (shape, dtype)}
        self.tied: nn.Module | None = None  # the layer whose table this one reads

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
        """Register an empty parameter for every tensor that a checkpoint may hold."""
        self.columns, self.rows, self.dtype = input_size, sum(output_partition_sizes), params_dtype
        shard: Any = layer.shard_indices
        self.shard = shard.org_vocab_start_index, shard.org_vocab_end_index
        shapes = {} if self.bits == DENSE_BITS else table_shapes(1, 1, self.bits, scale_dtype=self.scale_dtype)
        for part in (DENSE, *TABLE_PARTS, ROWS_LIKE):
            _, dtype = shapes.get(part, ((), params_dtype))
            empty = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(empty, {"weight_loader": partial(self._collect, part)})
            layer.register_parameter(part, empty)

    def _collect(self, part: str, param: nn.Parameter, loaded: Tensor) -> None:
        """Keep this process's rows of a tensor of the file: a copy, because loaders may read the next one into the same memory."""
        if part != ROWS_LIKE:
            self.stored[part] = tuple(loaded.shape), loaded.dtype
            self.found[part] = (loaded[slice(*self.shard)] if loaded.dim() else loaded).clone()

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Make the layer's parameters of what was kept.

        Raises:
            ValueError: if a part is missing or damaged.
        """
        found, self.found = self.found, {}
        if ROWS_LIKE not in dict(layer.named_parameters(recurse=False)):
            return  # done before
        device = layer.get_parameter(ROWS_LIKE).device
        for part in (DENSE, *TABLE_PARTS, ROWS_LIKE):
            delattr(layer, part)
        if self.tied is not None:
            self._share(layer, self.tied)
        elif set(self.stored) == {DENSE}:
            self._make_dense(layer, found[DENSE], device)
        elif self.stored:
            self._make_packed(layer, found, device)
        else:
            raise ValueError(f"{self.name} is not in the checkpoint; {REMEDY}")

    def _make_packed(self, layer: Any, found: dict[str, Tensor], device: torch.device) -> None:
        checked_table(self.name, self.stored, (_vocabulary(layer), self.columns), self.bits, self.scale_dtype)
        if not bool(torch.isfinite(found["scale"]).all()):
            raise ValueError(f"{self.name}.scale holds NaN or Inf; {REMEDY}")
        for part in TABLE_PARTS:
            value = padded_rows(found.pop(part), self.rows).to(device)
            layer.register_parameter(part, nn.Parameter(value, requires_grad=False))
        # Code of transformers' models asks an embedding's weight for its dtype.
        layer.weight = TableWeight(torch.Size((self.rows, self.columns)), self.dtype, device)

    def _make_dense(self, layer: nn.Module, rows: Tensor, device: torch.device) -> None:
        """Hand the layer over to vLLM's own method, with the weight as that would have loaded it."""
        expected, (shape, dtype) = (_vocabulary(layer), self.columns), self.stored[DENSE]
        if shape != expected or not dtype.is_floating_point:
            raise ValueError(
                f"{self.name}.{DENSE} is {dtype} {list(shape)}, but the model's config implies floats {list(expected)}; {REMEDY}"
            )
        weight = padded_rows(rows.to(self.dtype), self.rows).to(device)
        self._hand_over(layer, nn.Parameter(weight, requires_grad=False))

    def _share(self, layer: Any, owner: Any) -> None:
        """Give a tied layer what its owner has, which is made first."""
        if isinstance(owner.quant_method, LittleBitTableMethod):
            owner.quant_method.process_weights_after_loading(owner)
        if not isinstance(owner.quant_method, LittleBitTableMethod):
            self._hand_over(layer, owner.weight)
            return
        for part in TABLE_PARTS:
            layer.register_parameter(part, owner.get_parameter(part))
        layer.weight = owner.weight

    @staticmethod
    def _hand_over(layer: Any, weight: nn.Parameter) -> None:
        if not hasattr(weight, "output_dim"):
            set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0})
        layer.register_parameter(DENSE, weight)
        layer.quant_method = UnquantizedEmbeddingMethod()
        layer.quant_method.process_weights_after_loading(layer)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Let `layer`, a head, read the table of `embed_tokens`; returns it.

        The head shares the empty parameters too, so that a file which holds the table under both names is read once.
        """
        self.tied = embed_tokens
        for part, empty in embed_tokens.named_parameters(recurse=False):
            layer.register_parameter(part, empty)
        return layer

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Rows of the table: indices [...] of this process's rows -> [..., columns] of the model's dtype."""
        return embedding(input_, layer.codes, layer.scale, self.columns, self.dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., columns] -> [..., this process's rows], of x's dtype."""
        return head(x, layer.codes, layer.scale, bias)


def _vocabulary(layer: nn.Module) -> int:
    """Rows that the checkpoint has, without what vLLM adds."""
    return int(layer.org_vocab_size)  # type: ignore[arg-type]
