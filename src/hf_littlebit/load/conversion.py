"""The step that quantizes: it takes one dense weight, while transformers reads the checkpoint, and gives the parts of its factors.

transformers hands every weight to `LittleBitConversion.convert` as soon as it is read and frees it afterwards, so memory
holds the packed model so far plus one dense weight and its workspace. With `workers` > 1 that many weights are factorized at
the same time in threads; each fills tensors that were already handed back. The first error stops all further work and is
raised, with the layer's name, when loading ends.
"""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps

from ..config import LittleBitConfig
from ..initialize.calibration import Importance
from ..initialize.factorize import factorize
from ..internals.accelerate import offload_beside
from ..layers.experts import LittleBitExperts
from ..layers.linear import FactorModule
from ..layers.parts import latent_parts, pack_parts, part_name
from ..layers.parts import part_shapes as layer_shapes
from ..layers.path import Path
from ..weight_plan import WeightPlan
from .tables import TablePlan, place, quantized_parts

__all__ = ["LittleBitConversion", "check_range", "factor_weight", "part_shapes"]

logger = logging.getLogger("hf_littlebit")


def part_shapes(plan: WeightPlan, config: LittleBitConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """{parameter name in the model: (shape, dtype)} of every part that a planned weight is stored in."""
    lead = () if plan.weight == "weight" else (plan.count,)
    scale_dtype = getattr(torch, config.scale_dtype)
    shapes = layer_shapes(plan.out_features, plan.in_features, plan.ranks, config.format == "latent", scale_dtype)
    return {
        f"{plan.module}.{part_name(plan.weight, part)}": ((*lead, *shape), dtype)
        for part, (shape, dtype) in shapes.items()
    }


def factor_weight(
    weight: Tensor,
    plan: WeightPlan,
    config: LittleBitConfig,
    importance: Importance | None = None,
) -> dict[str, Tensor]:
    """{parameter name in the model: tensor} for one dense weight [out, in], or [experts, out, in].

    Args:
        weight: on any device; `config.svd_device` factorizes, if there is one.
        importance: where the weight's errors cost most (calibration.py); None counts all alike.

    Raises:
        ValueError: for a weight of another shape, of integers, or with NaN or Inf; the message names the layer.
    """
    expected = (plan.out_features, plan.in_features)
    stacked = plan.weight != "weight"
    if tuple(weight.shape) != ((plan.count, *expected) if stacked else expected):
        raise ValueError(
            f"{plan.name} has shape {list(weight.shape)} in the checkpoint, but the model's is {list(expected)}; "
            "the checkpoint belongs to another model"
        )
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(
            f"{plan.name} is {weight.dtype} in the checkpoint; only 16-bit and 32-bit float weights can be factorized. "
            "Load the original checkpoint, not a quantized one"
        )
    home = weight.device
    device = torch.device(config.svd_device) if config.svd_device else home
    scale_dtype = getattr(torch, config.scale_dtype)
    seed = zlib.crc32(plan.name.encode()) ^ config.seed

    def paths(matrix: Tensor, name: str, offset: int = 0) -> list[Path]:
        found = factorize(
            matrix.to(device),
            plan.ranks,
            plan.options.init,
            seed=seed + offset,
            steps=config.steps,
            refit_rounds=config.refit_rounds,
            row_importance=None if importance is None else importance.rows,
            col_importance=None if importance is None else importance.cols,
            name=name,
        )
        for path in found:
            for scale in (path.scale_out, path.scale_rank, path.scale_in):
                check_range(scale, scale_dtype, name)
        return found

    if stacked:
        experts = [paths(matrix, f"{plan.name}[{index}]", index) for index, matrix in enumerate(weight)]
        parts = LittleBitExperts.stack(experts, config.format == "latent", scale_dtype)
    elif config.format == "latent":
        parts = latent_parts(paths(weight, plan.name))
    else:
        parts = pack_parts(paths(weight, plan.name), scale_dtype)
    return {f"{plan.module}.{part_name(plan.weight, part)}": value.to(home) for part, value in parts.items()}


def check_range(scale: Tensor, dtype: torch.dtype, name: str) -> None:
    """Refuse a dtype that keeps less of the scales than bfloat16 would, because they leave its range.

    Raises:
        ValueError: naming the layer, how large its scales are, and what the dtype holds.
    """
    exact = scale.double()  # in fp32 the squares of a norm may overflow
    if float((scale.to(dtype).double() - exact).norm()) <= torch.finfo(torch.bfloat16).eps * float(exact.norm()):
        return
    limits = torch.finfo(dtype)
    raise ValueError(
        f"{name}: scales of magnitude {float(scale.abs().max()):.3g} do not fit {str(dtype).removeprefix('torch.')}, which "
        f'holds {limits.smallest_normal:.2g} to {limits.max:.3g}; use scale_dtype="bfloat16"'
    )


class LittleBitConversion(ConversionOps):
    """transformers' conversion operation for all planned weights of one load.

    Args:
        plans: the weights to factorize, by the name of the dense weight.
        config: how.
        tables: the embeddings and heads to quantize, by the names of all dense weights that are tied in them.
    """

    def __init__(
        self, plans: dict[str, WeightPlan], config: LittleBitConfig, tables: Mapping[str, TablePlan] | None = None
    ):
        self.plans, self.config, self.tables = plans, config, dict(tables or {})
        self._keep = False  # parts of the model go to disk
        self.kept: dict[
            str, Tensor
        ] = {}  # then: every U, by the name of the dense weight, until `finish` writes it to disk
        self.converted: set[str] = set()
        self.error: Exception | None = None
        self._slots = threading.Semaphore(config.workers)
        self._pool = ThreadPoolExecutor(config.workers, "littlebit") if config.workers > 1 else None
        self._threads = torch.get_num_threads()
        self._jobs: list[Future[None]] = []

    def place(self, device_map: Any) -> None:
        """Take note of where the model goes: `device_map` is a dict of places, or stands for one place that is not the disk.

        A weight that goes to disk is written as soon as it is converted, so no worker can fill it in later.
        """
        places = device_map.values() if isinstance(device_map, dict) else ()
        if "disk" not in map(str, places):
            return
        if self.tables:
            raise ValueError(
                "embedding_bits and head_bits cannot be used while parts of the model go to disk; quantize without, e.g. with "
                "device_map='cpu', save the model, and load that with this device_map"
            )
        self._keep = True
        if self._pool is not None:
            logger.warning("workers=%d is reduced to 1, because parts of the model go to disk.", self.config.workers)
            self._pool.shutdown()
            self._pool = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LittleBitConversion:
        return self  # transformers copies its converters, but the record of what was converted is one

    def convert(  # type: ignore[override]  # transformers passes keywords only
        self,
        input_dict: dict[str, Any],
        model: PreTrainedModel,
        missing_keys: set[str] | None = None,
        **unused: Any,
    ) -> dict[str, Tensor]:
        """Replace every planned weight among `input_dict` by its parts; pass anything else through."""
        result: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list | tuple) else value
            if name in self.tables:
                self._pack_table(model, name, weight, missing_keys)
                continue
            if name not in self.plans:
                result[name] = weight
                continue
            parts = self._parts(weight, self.plans[name])
            # U takes the name of the dense placeholder, whose shape must not stay there, also if U itself goes to disk and is
            # set only in the forward.
            module = model.get_submodule(self.plans[name].module)
            assert isinstance(module, FactorModule), type(module)
            module.declare(self.plans[name].weight, "u", parts[name].shape, parts[name].dtype, "meta", train=False)
            result.update(parts)
            self.converted.add(name)
            if self._keep:
                self.kept[name] = parts[name]
        if missing_keys is not None:
            missing_keys.difference_update(result)
        return result

    def _pack_table(self, model: PreTrainedModel, name: str, weight: Tensor, missing_keys: set[str] | None) -> None:
        """Put the packed table of a dense weight into `model`; a checkpoint may hold a tied one under each of its names."""
        table = self.tables[name]
        if missing_keys is not None:
            missing_keys.difference_update(table.weights)
        if self.error is not None:
            return
        try:
            parts = quantized_parts(weight, table, self.config)
        except (ValueError, RuntimeError, MemoryError) as error:  # as in _parts
            self.error = error
            return
        if table.owner in self.converted:
            held = model.get_submodule(table.owner)
            if not all(torch.equal(value, getattr(held, part)) for part, value in parts.items()):
                self.error = ValueError(
                    f"the config ties {' and '.join(table.weights)}, but the checkpoint holds them with different values; set "
                    "tie_word_embeddings to false in its config.json"
                )
            return
        place(model, table, parts)
        self.converted.add(table.owner)

    def _parts(self, weight: Tensor, plan: WeightPlan) -> dict[str, Tensor]:
        if self.error is None and self._pool is None:
            try:
                return factor_weight(weight, plan, self.config)
            # transformers goes on loading after an operation's exception, and reports it in the end without its text. So it is
            # kept for `finish` to raise.
            except (ValueError, RuntimeError, MemoryError) as error:
                self.error = error
        shapes = part_shapes(plan, self.config)
        parts = {name: torch.empty(shape, dtype=dtype, device=weight.device) for name, (shape, dtype) in shapes.items()}
        if self.error is None and self._pool is not None:
            self._slots.acquire()
            self._jobs.append(self._pool.submit(self._fill, weight, plan, parts))
        return parts

    def _fill(self, weight: Tensor, plan: WeightPlan, parts: dict[str, Tensor]) -> None:
        """Fill `parts`, which transformers has already, in a worker's thread."""
        try:
            torch.set_num_threads(max(1, self._threads // self.config.workers))
            if self.error is None:
                for name, value in factor_weight(weight, plan, self.config).items():
                    parts[name].copy_(value)
        except (ValueError, RuntimeError, MemoryError) as error:
            self.error = self.error or error
        finally:
            self._slots.release()

    def wait(self) -> None:
        """Wait for the workers, and end them."""
        for job in self._jobs:
            job.result()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
            torch.set_num_threads(self._threads)  # what a worker sets, threads started later inherit

    def finish(self, model: PreTrainedModel) -> None:
        """Wait for the workers, raise the first error, and write to disk what belongs there.

        Raises:
            ValueError: naming the layer that could not be factorized, or one that the checkpoint has no weights for.
        """
        self.wait()
        if self.error is not None:
            raise ValueError(f"quantization failed: {self.error}") from self.error
        tables = {table.owner for table in self.tables.values()}
        lacking, count = sorted((set(self.plans) | tables) - self.converted), len(self.plans) + len(tables)
        if lacking:
            raise ValueError(
                f"the checkpoint has no weights for {len(lacking)} of {count} layers to quantize, e.g. {lacking[0]}; "
                "random weights are never quantized. Check that the checkpoint is complete and of this model class, or leave "
                "layers that are new in it dense with modules_to_not_convert"
            )
        for name, value in self.kept.items():
            if model.get_parameter(name).is_meta:
                _offload(model, name, value)
        self.kept.clear()


def _offload(model: PreTrainedModel, name: str, value: Tensor) -> None:
    """Put U, which bears the dense weight's name, where the other parts of its layer were offloaded."""
    module, _, weight = name.rpartition(".")
    offload_beside(model.get_submodule(module), name, value, neighbour=f"{module}.{part_name(weight, 'scale_in')}")
