"""The quantizer that transformers calls while it loads a model: it swaps modules, and everything else is elsewhere.

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
from transformers.quantizers.base import HfQuantizer

from .. import compat
from ..config import FORMAT_VERSION, LittleBitConfig
from ..generate.generation import fast_generate, plain_generate
from ..internals.transformers import before_random_fill, plain_saving, save_under_held_names, upload_through
from ..kernels.packing import factor_shape
from ..layers.experts import LittleBitExperts
from ..layers.linear import FactorModule, LatentLittleBitLinear, LittleBitLinear
from ..layers.output_head import attach_head, detach_head
from ..layers.shared_input import share_as_asked
from ..plan import Plan, WeightPlan, plan_model
from .conversion import LittleBitConversion, part_shapes
from .meta_model import saved_names
from .source import HUB_ID
from .verify import read_headers, refuse_missing, refuse_quantized, verify, verify_dense

__all__ = ["LittleBitHfQuantizer", "replace_modules"]

logger = logging.getLogger("hf_littlebit")


def replace_modules(model: nn.Module, plan: Plan, config: LittleBitConfig, placeholders: bool) -> None:
    """Swap the planned modules of `model` for empty LittleBit ones on meta.

    With `placeholders` each keeps its dense weight on meta under the name of U, so that a dense checkpoint finds it.
    """
    latent = config.format == "latent"
    scale_dtype = getattr(torch, config.scale_dtype)
    for name, weights in plan.by_module().items():
        old = model.get_submodule(name)
        new: FactorModule
        if isinstance(old, nn.Linear):
            bias_dtype = None if old.bias is None else old.bias.dtype
            kind = LatentLittleBitLinear if latent else LittleBitLinear
            bias = old.bias is not None
            new = kind(old.in_features, old.out_features, weights[0].ranks, bias, "meta", bias_dtype, scale_dtype)
        else:
            new = LittleBitExperts(
                old, {weight.weight: weight.ranks for weight in weights}, latent, "meta", scale_dtype
            )
        if placeholders:
            for weight in weights:
                dense = getattr(old, weight.weight).detach().to("meta")
                new.register_parameter(weight.weight, nn.Parameter(dense, requires_grad=False))
        model.set_submodule(name, new.train(old.training))


class LittleBitHfQuantizer(HfQuantizer):
    """See the module's text. One instance serves one `from_pretrained` and stays with its model."""

    quantization_config: LittleBitConfig
    requires_calibration = False
    # What `push_to_hub` calls in place of transformers' `_upload_modified_files(model, folder, repo_id, ...)`. It writes a model
    # card, and cards are reports, which use this wing and not the other way: so the package's __init__.py sets it.
    upload_files: ClassVar[Callable[..., Any]]

    def __init__(self, quantization_config: LittleBitConfig, **kwargs: Any):
        compat.check_transformers()
        # A copy: the model keeps it and completes it (base_model), and the user may load another model with theirs.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.plan: Plan | None = None
        self._pending: dict[str, WeightPlan] = {}
        self._conversion: LittleBitConversion | None = None

    # -- before loading ---------------------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what would fail only after work was done."""
        config = self.quantization_config
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
        if config.svd_device is not None:
            try:
                torch.empty(0, device=config.svd_device)
            except (RuntimeError, AssertionError, NotImplementedError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(
                    f"svd_device is {config.svd_device!r}, which this machine does not offer ({reason}); use 'cpu' or None"
                ) from None
        # transformers calls this a second time, with the places that "auto" came to.
        if self._conversion is not None:
            self._conversion.place(kwargs.get("device_map"))

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Leave a tenth of each device for the dense weight in work and its factorization."""
        if self.pre_quantized:
            return max_memory
        return {key: int(value * 0.9) if isinstance(value, int | float) else value for key, value in max_memory.items()}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self._pending

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes per element, for the device map: a dense placeholder counts as the packed U that takes its place."""
        if param_name in self._pending:
            plan = self._pending[param_name]
            latent = self.quantization_config.format == "latent"
            per_output = 4 * sum(plan.ranks) if latent else sum(4 * factor_shape(rank)[0] for rank in plan.ranks)
            return per_output / plan.in_features
        return super().param_element_size(model, param_name, param)

    def get_quantize_ops(self) -> LittleBitConversion:
        assert self._conversion is not None
        return self._conversion

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        files = kwargs.get("checkpoint_files") or ()
        # Missing tensors would be drawn at random; the files' headers say it first, this hook for any other source.
        before_random_fill(model, partial(self._refuse_missing, model))
        if self.pre_quantized:
            header = read_headers(files) if files else None
            self.plan = plan_model(model, config, header)
            replace_modules(model, self.plan, config, placeholders=False)
            if header is not None:
                verify(model, self.plan, config, header)
            return
        header = read_headers([file for file in files if str(file).endswith(".safetensors")])
        refuse_quantized(header)
        self.plan = plan_model(model, config, saved=saved_names(model))
        self.plan.settle(config)
        self._pending = {weight.name: weight for weight in self.plan.weights}
        if header:
            verify_dense(model, header, self._pending)
        replace_modules(model, self.plan, config, placeholders=True)
        for message in self.plan.warnings():
            logger.warning("%s", message)
        self._conversion = LittleBitConversion(self._pending, config)
        self._conversion.place(kwargs.get("device_map"))
        source = model.config.name_or_path
        # Without a name, as from a state dict, it says "None".
        if config.base_model is None and HUB_ID.fullmatch(source) and source != "None" and not os.path.isdir(source):
            config.base_model = source

    def _refuse_missing(self, model: Any, loading_info: Any) -> None:
        """Raise for tensors that the checkpoint lacks, before transformers fills them with random numbers."""
        if self._conversion is not None:
            self._conversion.wait()
        # What was to be converted and was not, the conversion itself reports.
        config, pending = self.quantization_config, self._pending.values()
        refuse_missing(
            model, loading_info.missing_keys, {part for plan in pending for part in part_shapes(plan, config)}
        )

    # -- after loading ----------------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._conversion is not None:
            self._conversion.finish(model)
            self._conversion = None
            self._pending = {}
            self.pre_quantized = True
        _check_scales(model)
        _own_dtype(model)
        _own_storage(model)
        if self.quantization_config.dequantize:
            self._dequantize(model, dtype=model.dtype)
            return model
        if self.quantization_config.format == "packed":
            for module in _factor_modules(model).values():
                for name, parameter in module.named_parameters(recurse=False):
                    parameter.requires_grad_(name == "bias")
            wanted = self.quantization_config.share_inputs
            if not share_as_asked(model, wanted) and wanted:
                logger.warning("share_inputs: no packed layers of this model are called like layers with one input")
            fast_generate(model)
        attach_head(model)
        # Saved under the names they have: the file's names would be turned back to an older layout otherwise, and a
        # trainer that restores a checkpoint by name would miss them.
        save_under_held_names(model)
        upload_through(model, self.upload_files)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return self.quantization_config.format == "latent"

    @property
    def is_compileable(self) -> bool:
        """False for mixtures of experts: which experts run depends on the data, so `generate` must not compile them."""
        return self.plan is None or all(weight.weight == "weight" for weight in self.plan.weights)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        return None, {"quant_method": "littlebit", "format_version": str(FORMAT_VERSION)}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        dtype, modules = compat.resolve_dtype(dtype), _factor_modules(model)
        parts = {id(value) for module in modules.values() for value in module.parameters(recurse=False)}
        others = [value.dtype for value in model.parameters() if id(value) not in parts and value.is_floating_point()]
        former = next(iter(others), dtype)
        for name, module in modules.items():
            if any(value.is_meta for value in module.parameters(recurse=False)):
                raise ValueError(
                    f"{name} is offloaded, so the model cannot be dequantized in place; load it with device_map='cpu'"
                )
        for name, module in modules.items():
            model.set_submodule(name, _dense_module(module, dtype))
        # Parameters that a model keeps in another dtype than its own (fp32 norms, say) stay there.
        for parameter in model.parameters():
            if parameter.dtype == former:
                parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
        detach_head(model)
        plain_generate(model)
        # Back to an ordinary model: saved and shared as its own class does.
        plain_saving(model)
        return model


def _factor_modules(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FactorModule)}


def _dense_module(module: Any, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, LittleBitExperts):
        return module.dense_module(dtype)
    with torch.device("meta"):
        dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, dtype=dtype)
    dense.weight = nn.Parameter(module.dense(dtype))
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.detach().to(dtype))
    return dense.train(module.training)


def _check_scales(model: nn.Module) -> None:
    """A damaged file can hold anything: a scale that is no number is reported here rather than found in the output."""
    for name, module in _factor_modules(model).items():
        for part, value in module.named_parameters(recurse=False):
            if value.is_floating_point() and not value.is_meta and not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"{name}.{part} holds NaN or Inf; the checkpoint is damaged: download or save it again"
                )


def _own_dtype(model: nn.Module) -> None:
    """Latents and scales that were saved in fewer bits than they are trained in (verify.py)."""
    for module in _factor_modules(model).values():
        for name, dtype in module.part_dtypes.items():
            value = getattr(module, name)
            if value.is_floating_point() and value.dtype != dtype and not value.is_meta:
                value.data = value.data.to(dtype)


def _own_storage(model: nn.Module) -> None:
    """Parts without rows share the address of their neighbour in the file, which `torch.save` takes for one tensor."""
    for module in _factor_modules(model).values():
        for value in module.parameters(recurse=False):
            if value.numel() == 0 and not value.is_meta:
                value.data = torch.empty_like(value)
