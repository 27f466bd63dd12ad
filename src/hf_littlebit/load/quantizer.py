"""The quantizer that transformers calls while it loads a model. It only says what happens when; what happens is elsewhere.

    dense checkpoint    linear layers become empty LittleBit layers on meta, each weight is factorized as it is read
                        (conversion.py), and the model that comes back is packed, or latent with format="latent"
    quantized one       the same layers on meta; the files' headers are checked (verify.py) and the parts read as they are

Registered under "littlebit" by importing `hf_littlebit`.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from .. import compat
from ..config import FORMAT_VERSION, LittleBitConfig
from ..internals.transformers import before_random_fill
from ..kernels.packing import factor_shape
from ..placement import check_device
from ..plan import Plan, plan_model
from ..weight_plan import WeightPlan
from .conversion import LittleBitConversion, part_shapes
from .finite import refuse_non_finite
from .form import factor_modules, finish, make_dense, record, refuse_float64, replace_modules
from .meta_model import saved_names
from .save_id import check_save
from .saving import stamped
from .tables import TablePlan, place, plan_tables, table_modules
from .verify import read_headers, refuse_missing, refuse_quantized, verify, verify_dense

__all__ = ["LittleBitHfQuantizer"]

logger = logging.getLogger("hf_littlebit")


class LittleBitHfQuantizer(HfQuantizer):
    """LittleBit's implementation of transformers' HfQuantizer; one instance serves one `from_pretrained` and stays with its model.

    Args:
        quantization_config: as the user or the saved model gives it; it is copied.
    """

    quantization_config: LittleBitConfig
    requires_calibration = False
    # `push_to_hub` calls this in place of transformers' `_upload_modified_files(model, folder, repo_id, ...)`. It writes a model
    # card. Cards are reports, which import this wing, so this wing cannot import them: the package's __init__.py sets it.
    upload_files: ClassVar[Callable[..., Any]]

    def __init__(self, quantization_config: LittleBitConfig, **kwargs: Any):
        compat.check_transformers()
        # The model keeps the config and completes it (base_model), while the user may load another model with theirs.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.plan: Plan | None = None
        self._pending: dict[str, WeightPlan] = {}
        self._tables: dict[str, TablePlan] = {}  # by the names of the dense weights that they take the place of
        self._conversion: LittleBitConversion | None = None

    # -- before loading ---------------------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what would fail only after work was done.

        Raises:
            ValueError: for options that do not fit each other, the checkpoint or the machine.
        """
        config = self.quantization_config
        ignored = config.ignore_loading_options() if self.pre_quantized else []
        if ignored:
            logger.warning(
                "%s in the model's config.json: ignored, because only you decide how it is loaded; give "
                "from_pretrained(..., quantization_config=LittleBitConfig(...)) to set it.",
                " and ".join(ignored),
            )
        if config.dequantize and not self.pre_quantized:
            raise ValueError(
                "dequantize=True is for loading a saved LittleBit model as a dense one; this checkpoint is dense already. "
                "To see the effect of quantization, load without it and call model.dequantize()"
            )
        if config.share_inputs and config.format != "packed":
            raise ValueError(
                f"share_inputs is for packed models, but format is {config.format!r}; leave it out, and load the packed model "
                "with it once it is trained"
            )
        check_device(config.svd_device)
        # transformers calls this method twice; the second call has the places that device_map="auto" came to.
        if self._conversion is not None:
            self._conversion.place(kwargs.get("device_map"))

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Leave a tenth of each device for the dense weight in work and its factorization."""
        if self.pre_quantized:
            return max_memory
        return {key: int(value * 0.9) if isinstance(value, int | float) else value for key, value in max_memory.items()}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """True for the name of a dense weight that is to be factorized when it is read."""
        return param_name in self._pending or param_name in self._tables

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes per element, for the device map. A dense placeholder counts as the U that takes its place."""
        if param_name in self._pending:
            plan = self._pending[param_name]
            latent = self.quantization_config.format == "latent"
            per_output = 4 * sum(plan.ranks) if latent else sum(4 * factor_shape(rank)[0] for rank in plan.ranks)
            return per_output / plan.in_features
        if param_name in self._tables:
            return self._tables[param_name].bits / 8
        return super().param_element_size(model, param_name, param)

    def get_quantize_ops(self) -> LittleBitConversion:
        """The operation that factorizes; transformers asks for it once for every weight of param_needs_quantization."""
        assert self._conversion is not None
        return self._conversion

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        files = kwargs.get("checkpoint_files") or ()
        refuse_float64(model)
        # Missing tensors would be drawn at random. The files' headers, if there are files, say earlier what is missing.
        before_random_fill(model, partial(self._refuse_missing, model))
        if self.pre_quantized:
            header = read_headers(files) if files else None
            if files:
                check_save(os.path.dirname(files[0]), files)
            self.plan = plan_model(model, config, header)
            tables = plan_tables(model, config, header)
            replace_modules(model, self.plan, config, placeholders=False)
            for table in tables.tables:
                place(model, table)
            if header is not None:
                verify(model, self.plan, config, header, tables.shapes())
            return
        header = read_headers([file for file in files if str(file).endswith(".safetensors")])
        refuse_quantized(header)
        saved = saved_names(model)
        self.plan, tables = plan_model(model, config, saved=saved), plan_tables(model, config, saved=saved)
        self._tables = tables.by_weight()
        record(config, self.plan, model)
        self._pending = {weight.name: weight for weight in self.plan.weights}
        if header:
            verify_dense(model, header, self._pending)
        replace_modules(model, self.plan, config, placeholders=True)
        for message in (*self.plan.warnings(), *tables.warnings()):
            logger.warning("%s", message)
        self._conversion = LittleBitConversion(self._pending, config, self._tables)
        self._conversion.place(kwargs.get("device_map"))

    def _refuse_missing(self, model: PreTrainedModel, loading_info: Any) -> None:
        """Raise for tensors that the checkpoint lacks, before transformers fills them with random numbers."""
        if self._conversion is not None:
            self._conversion.wait()
        # LittleBitConversion.finish reports the weights that were to be factorized and are missing.
        config, pending = self.quantization_config, self._pending.values()
        refuse_missing(
            model, loading_info.missing_keys, {part for plan in pending for part in part_shapes(plan, config)}
        )

    # -- after loading ----------------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self._conversion is not None:
            self._conversion.finish(model)
            self._conversion = None
            self._pending, self._tables = {}, {}
        refuse_non_finite(model, dense=not self.pre_quantized)
        _own_dtype(model)
        _own_storage(model)
        if self.quantization_config.dequantize:
            self._dequantize(model, dtype=model.dtype)
            return model
        finish(model, self)
        return model

    def is_serializable(self) -> bool:
        """True: `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters train on a packed model, and Trainer accepts it with them."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True for a latent model: Trainer accepts it without adapters."""
        return self.quantization_config.format == "latent"

    @property
    def is_compileable(self) -> bool:
        """False for mixtures of experts: which experts run depends on the data, so `generate` must not compile them."""
        return self.plan is None or all(weight.weight == "weight" for weight in self.plan.weights)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """No state dict, so that the model's own is saved, and what the headers of its files say of the format and the save."""
        written = {"quant_method": "littlebit", "format_version": str(FORMAT_VERSION)}
        return None, written | stamped(model, self.quantization_config)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        make_dense(model, compat.resolve_dtype(dtype))
        return model


def _own_dtype(model: nn.Module) -> None:
    """Give latents and scales the dtype that they are trained in: some engines save them in 16 bits (verify.py)."""
    for module in factor_modules(model).values():
        for name, dtype in module.part_dtypes.items():
            value = getattr(module, name)
            if value.is_floating_point() and value.dtype != dtype and not value.is_meta:
                value.data = value.data.to(dtype)


def _own_storage(model: nn.Module) -> None:
    """Give parts without rows an address of their own.

    Read from a file, they have that of their neighbour in the file, and `torch.save` takes the two for one tensor.
    """
    for module in (*factor_modules(model).values(), *table_modules(model).values()):
        for value in module.parameters(recurse=False):
            if value.numel() == 0 and not value.is_meta:
                value.data = torch.empty_like(value)
