"""What vLLM asks about a packed checkpoint: whether it can be served, and how each of its layers is loaded.

vLLM makes one `LittleBitQuantization` from a model's config.json, has it look at the files before any process is started, and
sends it to the engine's processes with pickle, which is why the class stands at the top of a module. There every layer of
the model asks for its method.

Which layers are packed is what the file says. `modules_to_not_convert` names layers that are dense for certain, and these get
vLLM's own method at once; any other linear layer gets `LittleBitLinearMethod`, which also takes a dense weight where it is given
one: layers that were too small to gain, or that the model's code wants in floats, are listed nowhere.

vLLM merges layers (qkv_proj, gate_up_proj) and may rename them. `packed_modules_mapping` says of which layers of the checkpoint
a merged one is made, and `apply_vllm_mapper` renames what the config says about the checkpoint's layers.

Embeddings and heads of a model with packed tables all get `LittleBitTableMethod`, which takes a dense weight too. Many of vLLM's
models ask no method for theirs; what the file has packed there is refused when loading starts, and every layer exists.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.model_executor.layers.quantization import QuantizationConfig

from ..config import LittleBitConfig
from ..load.meta_model import empty_model
from ..load.source import find_source
from ..load.tables import DENSE_BITS, place, plan_tables
from ..load.verify import verify
from ..module_names import aliases, is_named
from ..plan import plan_model
from .partition import refuse_mixed
from .vllm_version import explain_layout

__all__ = ["LittleBitQuantization"]

EMBEDDING, HEAD = "embedding", "output head"
BASE_PREFIX = "model"  # what vLLM's models call the part without the head, as nearly all of transformers' do
REMEDY = "serve it with `transformers serve`, or load it with LittleBitConfig(dequantize=True), save it, and serve the dense model"


class LittleBitQuantization(QuantizationConfig):
    """The quantization method "littlebit" of vLLM; one instance for each model.

    Args:
        config: as the model's config.json has it.
    """

    def __init__(self, config: LittleBitConfig):
        super().__init__()
        self.config = config
        self.skipped = list(config.modules_to_not_convert or ())  # renamed by apply_vllm_mapper
        self.no_experts = False  # True once the files have shown that none are packed
        self.packed_head = False  # True once they have shown that the output head is one of factors
        # Layers that need a table's method: {EMBEDDING or HEAD: name in the checkpoint}.
        self.tables: dict[str, str] = {}
        self.asked: set[str] = set()  # those that vLLM has asked a method for

    # -- what vLLM asks of any method ---------------------------------------------------------------------------------------

    def get_name(self) -> str:
        """The quant_method of the model's config."""
        return "littlebit"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes that x may have."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest CUDA devices that the Triton kernels compile for: compute capability 7.0."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: config.json says everything."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LittleBitQuantization:
        """The method for a model whose config.json has `config` under quantization_config.

        Raises:
            ValueError: for options that are unknown or impossible, a newer format, and latents.
            ImportError: if this vLLM has moved a class that the layers need.
        """
        _layer_classes()  # vLLM calls this before it starts its processes, whose errors are in its log only
        own = LittleBitConfig.from_dict(dict(config))
        if own.bpw is None:
            raise ValueError(
                "the config's quantization_config has no bpw; config.json is damaged: download or save it again"
            )
        if own.format != "packed":
            raise ValueError(
                f"the checkpoint holds {own.format} factors, which are for training; pack it with: littlebit pack CHECKPOINT "
                "--out DIR"
            )
        return cls(own)

    # -- before anything is started -----------------------------------------------------------------------------------------

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Look at the headers of a folder's files, as `from_pretrained` does, before vLLM starts its processes.

        A model that vLLM is yet to download is looked at layer by layer while it is loaded, and so is one whose code is not
        part of transformers.

        Raises:
            ValueError: if the checkpoint is damaged or incomplete, or has packed layers that vLLM cannot be given.
        """
        if not os.path.isdir(model_name) or getattr(hf_config, "auto_map", None):
            return
        source = find_source(model_name)
        if source.header is None or source.quantization is None:
            return
        model = empty_model(source.config)
        plan = plan_model(model, source.quantization, source.header)
        tables = plan_tables(model, source.quantization, source.header)
        for table in tables.tables:
            place(model, table)
        verify(model, plan, source.quantization, source.header, tables.shapes())
        head = model.get_output_embeddings()
        for table in tables.tables:
            kind = HEAD if model.get_submodule(table.owner) is head else EMBEDDING
            self.tables[kind] = table.owner
        for weight in plan.weights:
            module = model.get_submodule(weight.module)
            self.packed_head = self.packed_head or module is head
            if type(module) is not nn.Linear:
                raise ValueError(
                    f"{weight.name} is packed, and vLLM is given packed linear layers only, no experts; {REMEDY}"
                )
        self.no_experts = True

    # -- a layer at a time --------------------------------------------------------------------------------------------------

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename what the config says about layers, as vLLM renames the layers themselves."""
        self.skipped = hf_to_vllm_mapper.apply_list(self.skipped)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of one layer; None where vLLM shall use its own, as for attention, and for embeddings that are not packed.

        Raises:
            ValueError: for experts that are packed, or that may be, and where a merged layer is dense in part.
        """
        classes = _layer_classes()
        if isinstance(layer, classes.experts):
            if self.no_experts or self._is_skipped(prefix):
                return None
            raise ValueError(f"{prefix} are experts, and vLLM is given packed linear layers only; {REMEDY}")
        if isinstance(layer, classes.head) and self.packed_head:
            return classes.packed(self.config, prefix, [prefix])
        if isinstance(layer, classes.embedding):
            return self._table_method(HEAD if isinstance(layer, classes.head) else EMBEDDING, prefix)
        if not isinstance(layer, classes.linear):
            return None
        names = self.members(prefix)
        dense = [name for name in names if self._is_skipped(name)]
        if not dense:
            return classes.packed(self.config, prefix, names)
        refuse_mixed(prefix, dense, [name for name in names if name not in dense])
        return classes.unquantized()

    def _table_method(self, kind: str, prefix: str) -> Any:
        """The method of an embedding or a head; None in a model without packed tables.

        A model with one has it for both, because vLLM asks the head's method, not the embedding's, to tie the two.
        """
        self.asked.add(kind)
        bits = {EMBEDDING: self.config.embedding_bits, HEAD: self.config.head_bits}
        if set(bits.values()) == {DENSE_BITS}:
            return None
        return _layer_classes().table(self.config, bits[kind], prefix or self.tables.get(kind, f"the {kind}"))

    def get_checkpoint_weight_mapper(self) -> Any:  # type: ignore[override]  # vLLM's own needs no instance, and asks one
        """What vLLM leaves out of the files, which it asks when it begins to load a model whose layers all exist: nothing.

        Raises:
            ValueError: for an embedding or a head that is packed, where vLLM's model has asked no method for it.
        """
        lacking = [name for kind, name in self.tables.items() if kind not in self.asked]
        if lacking and not _in_stages():
            raise ValueError(
                f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} packed, but vLLM's own class of this model asks "
                "no quantization method for it; serve it with `transformers serve`, with --model-impl transformers where vLLM can "
                "run the model so, or quantize it with embedding_bits=16 and head_bits=16"
            )
        return super().get_checkpoint_weight_mapper()

    def members(self, prefix: str) -> list[str]:
        """The names that the layers of the checkpoint have which vLLM's layer `prefix` is made of, in their order."""
        parent, dot, own = prefix.rpartition(".")
        return [f"{parent}{dot}{member}" for member in self.packed_modules_mapping.get(own, [own])]

    def _is_skipped(self, name: str) -> bool:
        return any(is_named(aliases(name, BASE_PREFIX), pattern) for pattern in self.skipped)


class _Classes(NamedTuple):
    """Layers of vLLM, its method for dense linear ones, and our methods."""

    experts: type
    embedding: type  # heads are embeddings, too
    head: type
    linear: type
    unquantized: type
    packed: type
    table: type


def _layer_classes() -> _Classes:
    """Imported for packed models only."""
    with explain_layout():
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        from .vllm_linear import LittleBitLinearMethod
        from .vllm_table import LittleBitTableMethod
    return _Classes(
        RoutedExperts,
        VocabParallelEmbedding,
        ParallelLMHead,
        LinearBase,
        UnquantizedLinearMethod,
        LittleBitLinearMethod,
        LittleBitTableMethod,
    )


def _in_stages() -> bool:
    """Whether layers are spread over stages (pipeline parallelism), so that a process has no embedding, or no head."""
    with explain_layout():
        from vllm.distributed import get_pp_group
    return int(get_pp_group().world_size) > 1
