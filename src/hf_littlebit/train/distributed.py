"""What the engines of distributed training do to parameters, and how to look at parameters all the same.

    DDP, DeepSpeed ZeRO-1 and -2    every process holds every parameter
    FSDP2                           a parameter is a DTensor: each process holds some of its rows
    DeepSpeed ZeRO-3                a parameter is empty between uses; `ds_tensor` is this process's part of it, flattened

DeepSpeed is imported only where a parameter or an optimizer shows that it runs already.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..internals import deepspeed as deepspeed_doors
from ..layers.path import is_finite

__all__ = [
    "broadcast_from_rank0",
    "check_optimizer",
    "check_weights",
    "first_nonfinite",
    "gather",
    "is_partitioned",
    "is_sharded",
    "local_part",
    "run_partitioned",
    "sum_over_processes",
]


def is_partitioned(values: Iterable[Tensor]) -> bool:
    """True where ZeRO-3 has taken the parameters apart."""
    return any(deepspeed_doors.is_partitioned(value) for value in values)


def is_sharded(values: Iterable[Tensor]) -> bool:
    """True where a process holds only a part of each parameter (FSDP2, ZeRO-3)."""
    return any(isinstance(value, DTensor) or deepspeed_doors.is_partitioned(value) for value in values)


def local_part(value: Any) -> tuple[Tensor, int | None]:
    """(what this process holds of a parameter, flat and detached; where that begins in the flat whole).

    The place is None where it cannot be told: for a DTensor that is cut in another way than FSDP2's, and for a part that
    ZeRO-3 keeps on disk, which is given as an empty tensor.
    """
    if isinstance(value, DTensor):
        *outer, last = value.placements
        local, mesh = value.to_local().detach().flatten(), value.device_mesh
        if any(place.is_shard() for place in outer) or not (last.is_replicate() or last.is_shard(0)):
            return local, None
        rows, coordinate = value.shape[0], mesh.get_coordinate()
        if last.is_replicate() or coordinate is None:
            return local, 0
        first = min(rows, -(-rows // mesh.size(-1)) * coordinate[-1])
        return local, first * (value.numel() // max(rows, 1))
    if deepspeed_doors.is_partitioned(value):
        return deepspeed_doors.local_part(value)
    return value.detach().flatten(), 0


def check_weights(model: nn.Module, teacher: object) -> None:
    """Refuse a model whose weights an engine took away while it was loaded, and a teacher that has none.

    Raises:
        ValueError: with how to load it.
    """
    if is_partitioned(model.parameters()):
        raise ValueError(
            "DeepSpeed ZeRO-3 partitioned the model while it was loaded, so its layers can be neither factorized nor copied. "
            "Load it before TrainingArguments are made, or with from_pretrained(..., "
            "quantization_config=LittleBitConfig(..., format='latent'))"
        )
    for name, one in (("model", model), ("teacher", teacher)):
        if not isinstance(one, nn.Module) or hasattr(one, "hf_device_map"):
            continue
        if any(value.is_meta for value in one.parameters()):
            raise ValueError(
                f"the {name} has no weights in this process: FSDP's cpu_ram_efficient_loading gives them to the first alone. "
                "Load it before TrainingArguments are made, or set cpu_ram_efficient_loading to false"
            )


def _has_others() -> bool:
    """True where this is one of several processes that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_processes(values: Tensor) -> None:
    """Add to `values`, in place, those of all other processes that train with this one. Each of them must call it."""
    if _has_others():
        dist.all_reduce(values)


def first_nonfinite(model: nn.Module, device: torch.device) -> str | None:
    """The name of the first trained parameter of `model` that holds NaN or Inf; None where all are finite.

    Every process must call it where the model is sharded: one that holds no such part then hears of it, by way of `device`.
    """
    trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    parts = [(name, local_part(value)[0]) for name, value in trained]
    # Few launches; of norms it is this one that a CPU takes as fast as it reads. It may overflow where all values are finite.
    size = torch.nn.utils.get_total_norm([part for _, part in parts if part.numel()])
    suspected = not bool(torch.isfinite(size))
    found = [name for name, part in parts if suspected and not is_finite(part)]
    bad = torch.tensor(float(bool(found)), device=device)
    if is_sharded(value for _, value in trained):
        sum_over_processes(bad)
    if not bad:
        return None
    return found[0] if found else "a parameter in another process"


def broadcast_from_rank0(values: Iterable[Tensor], device: torch.device) -> None:
    """Overwrite the `values` of every process with those of process 0, sent by way of `device`.

    All processes factorize the same weights, but not to the last bit, and a factorization that differs a little may have
    other signs. FSDP2 would join parts of both.
    """
    if not _has_others():
        return
    with torch.no_grad():
        for value in values:
            placed = value.detach().to(device).contiguous()
            dist.broadcast(placed, 0)
            value.copy_(placed)


def gather(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a sharded model on the CPU of process 0; the others get an empty one.

    One parameter at a time is whole on the devices. Every process must call it.
    """
    main = dist.get_rank() == 0
    whole: dict[str, Tensor] = {}
    # First the state: FSDP2 keeps its outermost parameters whole after a forward, until the state is asked for.
    state = model.state_dict(keep_vars=True)
    parameters: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    for name, saved in state.items():
        value = parameters.get(name, saved)  # a layer may save another tensor than it has
        if isinstance(value, DTensor):
            # Shards that are offloaded wait on the CPU, where the group that they belong to may not communicate.
            placed: Any = value.detach().to(value.device_mesh.device_type)
            full = placed.full_tensor()
            if main:
                whole[name] = full.to("cpu", copy=True)
        elif deepspeed_doors.is_partitioned(value):
            import deepspeed

            with deepspeed.zero.GatheredParameters([value]):
                if main:
                    whole[name] = value.detach().to("cpu", copy=True)
        elif main:
            whole[name] = value.detach().to("cpu", copy=True)
    return whole


def check_optimizer(optimizer: Any, latents: list[nn.Parameter], scales: list[nn.Parameter]) -> None:
    """Refuse an optimizer of any engine that would not train `latents` and `scales`, or would pull them to zero.

    Raises:
        ValueError: with what to change.
    """
    known = {id(value) for value in (*latents, *scales)}
    if not known:
        raise ValueError(
            "all latents and scales are frozen, so there is nothing to train; set requires_grad_(True) on them"
        )
    found = {value: decay for value, decay in _decays(optimizer).items() if value in known}
    if not found and deepspeed_doors.stepped_groups(optimizer) is None:
        raise ValueError(
            "the optimizer holds none of the latents: it was made before the model was converted. Leave `optimizers=` out, or "
            "convert first with latent_model(model, config)"
        )
    if any(found.values()):
        raise ValueError(
            f"weight decay {max(found.values()):g} would pull latents and scales to zero, where signs are noise; use "
            "LittleBitTrainer, which decays the other parameters only, or weight_decay=0"
        )


def _decays(optimizer: Any) -> dict[int, float]:
    """{id of a model's parameter: its weight decay} of any engine's optimizer; empty if it does not tell."""
    groups = deepspeed_doors.stepped_groups(optimizer)
    if groups is None:
        groups = [(group["params"], group) for group in getattr(optimizer, "param_groups", [])]
    return {id(value): group.get("weight_decay", 0.0) for values, group in groups for value in values}


def run_partitioned(model: nn.Module) -> Any:
    """The DeepSpeed engine that lets a model run which was partitioned while it was loaded, e.g. a teacher.

    The caller keeps it for as long as the model is used; the model itself is then called as ever.
    """
    import deepspeed
    from accelerate.state import AcceleratorState

    plugin = getattr(AcceleratorState(), "deepspeed_plugin", None)
    options = copy.deepcopy(plugin.deepspeed_config) if plugin is not None else {}
    zero = {
        key: value
        for key, value in options.get("zero_optimization", {}).items()
        if value != "auto" and not key.startswith("offload_optimizer")
    }
    dtypes = {value.dtype for value in model.parameters() if value.is_floating_point()}
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {**zero, "stage": 3}}
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if dtypes == {dtype}:
            config[key] = {"enabled": True}
    return deepspeed.initialize(model=model, config=config)[0]
