"""The layer and its gradient on a GPU, by the Triton kernels: finding triton, checking the parts, choosing by tokens.

    y = sum_p scale_out_p * (U_p (scale_rank_p * (V_p^T (scale_in_p * x)))) + bias          as reference.py, same arguments

One to four tokens go to decode.py, or to gemv.py where matrix units have no bf16 (two launches, also of several layers that
read the same x), more and every gradient to gemm.py; tuning.py says how large the tiles are. A layer's parts are checked
once (bound.py) and its launches are repeated without the JIT's front door (launch.py). The kernels are
triton's common language, so NVIDIA (cuda), AMD (cuda under ROCm) and Intel (xpu) compile the same source. Nothing here waits
for the device or asks it for a value, and a kernel is compiled per dtype, tile size and divisibility of the layer's sizes,
not per number of tokens beyond one, two and four: a call can be captured in a CUDA graph once it has run.

triton is imported at the first product, not with the package.
"""

import contextlib
import functools
import importlib
from types import SimpleNamespace
from typing import Any, Iterator, List, Optional, Sequence

import torch

from .bound import Bound, bind, find, forget
from .check import checked
from .device import abilities
from .launch import Step, record, run
from .parts import PackedLayer

__all__ = [
    "DEVICES",
    "bound",
    "forget",
    "interpreted",
    "load",
    "missing",
    "on",
    "products",
]

DEVICES = ("cuda", "xpu")
DECODE = 4  # tokens up to which decode.py (or gemv.py) computes


@functools.lru_cache(maxsize=None)
def _failure() -> Optional[str]:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton is not installed or does not load ({error})"
    return None


def load() -> bool:
    """True if triton is there; the first call imports it. Never warns and never raises: see `missing`."""
    return _failure() is None


def missing() -> str:
    """Why `load` returned False, and what to do about it."""
    return f"{_failure() or 'triton is there'}; to have it, pip install triton (pytorch-triton-xpu on Intel GPUs)"


def interpreted() -> bool:
    """True if TRITON_INTERPRET=1 was set when the kernels were loaded: they then run on CPU tensors, for tests only."""
    if not load():
        return False
    from .tiles import INTERPRETED

    return INTERPRETED


@functools.lru_cache(maxsize=None)
def _kernels() -> Any:
    """The modules that need triton: decode, gemm, gemv and tuning."""
    if not load():
        raise RuntimeError(missing())
    from . import decode, gemm, gemv, tuning

    return SimpleNamespace(decode=decode, gemm=gemm, gemv=gemv, tuning=tuning)


def products(x: torch.Tensor, layers: Sequence[PackedLayer], transposed: bool = False) -> List[torch.Tensor]:
    """What `reference.products` gives, by the Triton kernels; one to four tokens of several layers in two launches.

    Layers computed together take one choice of tiles, so that the sums of one may be cut elsewhere than alone.

    Raises:
        RuntimeError: a part is missing, or has another shape, dtype or device than the ranks and x ask for; x is on the CPU
            and the kernels are not interpreted; there is no triton.
    """
    if not layers:
        return []
    bound = find(layers, transposed)
    if bound is None or not bound.fits(x):
        if x.device.type == "cpu" and not interpreted():
            raise RuntimeError(
                "x is on the CPU, but triton compiles for GPUs only; move the layer, or set TRITON_INTERPRET=1"
            )
        bound = bind(x, layers, transposed)
    ready, bound.ready = bound.ready, None
    lead = x.shape[:-1]
    tokens = lead.numel()
    if x.is_neg():  # a view that only says so: its memory holds the other signs
        x = x.resolve_neg()
    results = [x.new_empty(*lead, out) for out in bound.outs]
    if not tokens:
        return results
    rows = x
    if not x.is_contiguous():
        rows = x.reshape(tokens, bound.features)
        if rows.stride(1) != 1 and bound.features > 1:
            rows = rows.contiguous()
    address = rows.data_ptr()
    if not address:
        raise RuntimeError("x has no memory: it is released, or stands for zeros that nobody has written yet")
    stride = bound.features if tokens == 1 or rows is x else rows.stride(0)
    key = (tokens, x.dtype, address % 16, stride)
    recorded = bound.recorded.get(key)
    with on(x):
        if recorded is None:
            _first(key, bound, rows.reshape(tokens, bound.features), results, layers, ready, transposed)
        else:
            recorded.repeat(x, address, results)
    return results


def _first(key: Any, bound: Bound, rows: torch.Tensor, results: Any, layers: Any, ready: Any, transposed: bool) -> None:
    """The product by the JIT. What it launches is kept for calls with the same key, unless the layers were met just now:
    parts that are made anew for every call (views of a stack of experts) never come again.

    Args:
        ready: the layers as `checked` gives them if they were met just now, else None.
    """
    met = ready is not None
    if not met:
        ready = [checked(rows, layer, transposed) for layer in layers]
    flat = [y.view(rows.shape[0], y.shape[-1]) for y in results]
    if rows.shape[0] == 1 and rows.stride(0) != bound.features:
        rows = rows.as_strided(rows.shape, (bound.features, 1))
    steps = _steps(rows, ready, flat, transposed)
    kept = [part for layer in ready for part in layer[:8]]
    # A part that had to be made contiguous lives only as long as this call.
    given = {id(part) for layer in layers for part in layer[:8]}
    if met or not all(part is None or id(part) in given for part in kept):
        run(steps)
        return
    recorded = record(steps, [rows, *flat], kept)
    if recorded is not None:
        bound.keep(key, recorded)


def _steps(rows: torch.Tensor, ready: List[PackedLayer], flat: List[torch.Tensor], transposed: bool) -> Iterator[Step]:
    """The steps of results[i] = layers[i](rows)."""
    kernels = _kernels()
    tuning, device, (tokens, features) = kernels.tuning, rows.device, rows.shape
    if tokens <= DECODE and not transposed:
        outs, ranks = tuple([y.shape[1] for y in flat]), tuple([layer.ranks for layer in ready])
        few = tuning.few(device, outs, features, ranks)
        if few is not None:
            return kernels.decode.launches(rows, ready, flat, few, abilities(device))
        return kernels.gemv.launches(rows, ready, flat, tuning.decode_group(device, outs, features, ranks))
    forms = []
    for layer in ready:
        sizes = layer.scale_out.shape[1], layer.scale_in.shape[1], layer.ranks
        config = tuning.tiles(device, *sizes, tuning.bucket(tokens), rows.dtype, transposed)
        forms.append((kernels.gemm.form_of(config, rows.dtype), config))
    return (
        step
        for (form, config), layer, y in zip(forms, ready, flat)  # noqa: B905 Python 3.9
        for step in form(rows, layer, y, config, transposed)
    )


def bound(x: torch.Tensor, layers: Sequence[PackedLayer]) -> Optional[Bound]:
    """What is remembered of these layers on x's CUDA device, to be asked `again`; None where nothing is, or no launch of it."""
    found = find(layers) if x.is_cuda else None
    return None if found is None or found.index < 0 or not found.recorded else found


_here = contextlib.nullcontext()


def on(x: torch.Tensor) -> Any:
    """triton launches on the current device, whatever the tensors are on."""
    if x.is_cuda:
        return _here if torch._C._cuda_getDevice() == x.get_device() else torch.cuda.device(x.device)
    return _here if x.device.type == "cpu" else getattr(torch, x.device.type).device(x.device)
