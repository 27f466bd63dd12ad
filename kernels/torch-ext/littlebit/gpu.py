"""The layer and its gradient on a GPU, by the Triton kernels: finding triton, checking the parts, choosing by tokens.

    y = sum_p h_p * (U_p (l_p * (V_p^T (g_p * x)))) + bias          as reference.py, same arguments

One to four tokens go to gemv.py (two launches, also of several layers that read the same x), more and every gradient to
gemm.py (two, or three where the long sum is cut into splits); tuning.py says how large the tiles are. The kernels are
triton's common language, so NVIDIA (cuda), AMD (cuda under ROCm) and Intel (xpu) compile the same source. Nothing here waits
for the device or asks it for a value, and a kernel is compiled per dtype, tile size and divisibility of the layer's sizes,
never per number of tokens: a call can be captured in a CUDA graph once it has run.

triton is imported at the first product, not with the package.
"""

import contextlib
import functools
import importlib
import weakref
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch

from .launch import Recorded, Step, record, run
from .packing import factor_shapes

__all__ = [
    "DEVICES",
    "bound",
    "forget",
    "interpreted",
    "littlebit_linear",
    "littlebit_linear_grad",
    "littlebit_linears",
    "load",
    "missing",
]

DEVICES = ("cuda", "xpu")
DECODE = 4  # tokens up to which decode.py (or gemv.py) computes
RECORDS = 64  # numbers of tokens, dtypes ... of a layer whose launches are kept
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = ("u", "u_tail", "v", "v_tail", "scale_out", "scale_rank", "scale_in")


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


def littlebit_linear(
    x: torch.Tensor,
    u: torch.Tensor,
    u_tail: Optional[torch.Tensor],
    v: Optional[torch.Tensor],
    v_tail: Optional[torch.Tensor],
    scale_out: torch.Tensor,
    scale_rank: torch.Tensor,
    scale_in: torch.Tensor,
    bias: Optional[torch.Tensor],
    ranks: Sequence[int],
) -> torch.Tensor:
    """x [..., in_features] of fp32, bf16 or fp16 -> [..., out_features] of the same dtype.

    Raises:
        RuntimeError: a part is missing, or has another shape, dtype or device than the ranks and x ask for; x is on the CPU
            and the kernels are not interpreted; there is no triton.
    """
    layer = (u, u_tail, v, v_tail, scale_out, scale_rank, scale_in, bias, ranks)
    return _products(x, (layer,), False)[0]


def littlebit_linears(x: torch.Tensor, layers: Sequence[Sequence[Any]]) -> List[torch.Tensor]:
    """What `littlebit_linear` gives for each of several layers that read the same x; one to four tokens in two launches.

    Args:
        x: [..., in_features] of fp32, bf16 or fp16.
        layers: (u, u_tail, v, v_tail, scale_out, scale_rank, scale_in, bias, ranks) each, of the same in_features; all else
            may differ. The tiles are those of the widest layer: the sums of a much smaller one may be cut elsewhere than alone.

    Returns:
        [..., out_features] of x's dtype for each layer, in their order.

    Raises:
        RuntimeError: as `littlebit_linear`.
    """
    return _products(x, layers, False) if layers else []


def littlebit_linear_grad(
    grad: torch.Tensor,
    u: torch.Tensor,
    u_tail: Optional[torch.Tensor],
    v: Optional[torch.Tensor],
    v_tail: Optional[torch.Tensor],
    scale_out: torch.Tensor,
    scale_rank: torch.Tensor,
    scale_in: torch.Tensor,
    ranks: Sequence[int],
) -> torch.Tensor:
    """The gradient with respect to x: grad [..., out_features] -> [..., in_features]; errors as `littlebit_linear`."""
    layer = (u, u_tail, v, v_tail, scale_out, scale_rank, scale_in, None, ranks)
    return _products(grad, (layer,), True)[0]


def _products(x: torch.Tensor, layers: Sequence[Sequence[Any]], transposed: bool) -> List[torch.Tensor]:
    bound = _bound(x, layers, transposed)
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
    stride = bound.features if tokens == 1 or rows is x else rows.stride(0)
    key = (tokens, x.dtype, address % 16, stride)
    recorded = bound.recorded.get(key)
    with _on(x):
        if recorded is None:
            _first(key, bound, rows.reshape(tokens, bound.features), results, layers, transposed)
            return results
        scratch = 0
        if recorded.scratch_bytes:
            memory = x.new_empty(recorded.scratch_bytes, dtype=torch.uint8)
            scratch = memory.data_ptr()
        recorded(_stream(x.get_device()), [address, *[y.data_ptr() for y in results]], scratch)
    return results


def _first(key: Any, bound: "_Bound", rows: torch.Tensor, results: Any, layers: Any, transposed: bool) -> None:
    """The product by the JIT; what it launches is kept for calls with the same key."""
    ready = [_checked(rows, layer, transposed) for layer in layers]
    flat = [y.view(rows.shape[0], y.shape[-1]) for y in results]
    if rows.shape[0] == 1 and rows.stride(0) != bound.features:
        rows = rows.as_strided(rows.shape, (bound.features, 1))
    steps, whole = _steps(rows, ready, flat, transposed)
    kept = [part for layer in ready for part in layer[:8]]
    # A part that had to be made contiguous lives only as long as this call.
    given = {id(part) for layer in layers for part in layer[:8]}
    if not whole or not all(part is None or id(part) in given for part in kept):
        run(steps)
        return
    recorded = record(steps, [rows, *flat], kept)
    if recorded is not None:
        bound.keep(key, recorded)


def _steps(
    rows: torch.Tensor, ready: List[Any], flat: List[torch.Tensor], transposed: bool
) -> Tuple[Iterator[Step], bool]:
    """The launches of results[i] = layers[i](rows), and whether they are all of the work."""
    kernels = _kernels()
    tuning, device, (tokens, features) = kernels.tuning, rows.device, rows.shape
    if tokens <= DECODE and not transposed:
        outs, ranks = tuple([y.shape[1] for y in flat]), tuple([layer[8] for layer in ready])
        few = tuning.few(device, outs, features, ranks)
        if few is not None:
            return kernels.decode.launches(rows, ready, flat, few, kernels.gemm._abilities(device)), True
        return kernels.gemv.launches(rows, ready, flat, tuning.decode_group(device, outs, features, ranks)), True
    forms = []
    for layer in ready:
        sizes = layer[4].shape[1], layer[6].shape[1], layer[8]
        config = tuning.tiles(device, *sizes, tuning.bucket(tokens), rows.dtype, transposed)
        forms.append((*kernels.gemm.form_of(config, rows.dtype), config))
    steps = (
        step
        for (form, _, config), layer, y in zip(forms, ready, flat)  # noqa: B905 Python 3.9
        for step in form(rows, *layer, y, config, transposed)
    )
    return steps, all(whole for _, whole, _ in forms)


class _Bound:
    """Layers whose parts were checked once, and what was launched for them.

    Attributes:
        features: of the input (of the gradient, where transposed). outs: of each result.
        recorded: by number of tokens, dtype, alignment and row stride.
    """

    __slots__ = ("__weakref__", "_addresses", "_parts", "_shapes", "device", "features", "index", "outs", "ranks", "recorded")

    def __init__(self, x: torch.Tensor, layers: Sequence[Sequence[Any]], transposed: bool, dead: Callable[[Any], None]):
        ready = [_checked(x, layer, transposed) for layer in layers]
        self.features = x.shape[-1]
        self.device = x.device
        self.outs = [layer[6 if transposed else 4].shape[1] for layer in ready]
        self.ranks = [layer[8][:] for layer in layers]
        self.recorded: Dict[Any, Recorded] = {}
        self._shapes: Dict[Any, Tuple[Recorded, List[Tuple[int, ...]]]] = {}
        self.index = x.get_device()
        # Weak: the parts live as long as their layer does, and so does this.
        parts = [part for layer in layers for part in layer[:8]]
        self._parts = [None if part is None else weakref.ref(part, dead) for part in parts]
        self._addresses = [0 if part is None else part.data_ptr() for part in parts]

    def keep(self, key: Any, recorded: Recorded) -> None:
        """Remember what was launched for `key`."""
        if len(self.recorded) >= RECORDS:
            self.recorded.clear()
            self._shapes.clear()
        self.recorded[key] = recorded

    def again(self, x: torch.Tensor) -> Optional[List[torch.Tensor]]:
        """The results for x, a plain CUDA tensor, if launches for one like it are recorded; None otherwise.

        Nothing of the layers is checked: whoever keeps this object answers for their parts being where they were.
        """
        address = x.data_ptr()
        found = self._shapes.get((x.dtype, x.shape))
        if found is None:
            return self._learn(x)
        if address % 16 or not x.is_contiguous() or x.is_neg() or x.get_device() != self.index:
            return None
        if torch._C._cuda_getDevice() != self.index:
            return None
        recorded, shapes = found
        results = [x.new_empty(shape) for shape in shapes]
        addresses = [address]
        for y in results:
            addresses.append(y.data_ptr())
        scratch = 0
        if recorded.scratch_bytes:
            memory = x.new_empty(recorded.scratch_bytes, dtype=torch.uint8)
            scratch = memory.data_ptr()
        recorded(_stream(self.index), addresses, scratch)
        return results

    def _learn(self, x: torch.Tensor) -> None:
        """From now on `again` serves tensors of this shape, if one of as many tokens was recorded."""
        if not x.dim() or x.shape[-1] != self.features:
            return
        tokens = x.shape[:-1].numel()
        recorded = self.recorded.get((tokens, x.dtype, 0, self.features))
        if recorded is not None and tokens:
            if len(self._shapes) >= RECORDS:
                self._shapes.clear()
            self._shapes[x.dtype, x.shape] = recorded, [(*x.shape[:-1], out) for out in self.outs]

    def holds(self, layers: Sequence[Sequence[Any]]) -> bool:
        """These are the layers that were checked: the same tensors, with the same memory."""
        index = 0
        for place, layer in enumerate(layers):
            if layer[8] != self.ranks[place]:
                return False
            for part in layer[:8]:
                known = self._parts[index]
                if part is None:
                    if known is not None:
                        return False
                elif known is None or known() is not part or part.data_ptr() != self._addresses[index]:
                    return False
                index += 1
        return index == len(self._parts)


_all_bound: Dict[Any, _Bound] = {}


def _bound(x: torch.Tensor, layers: Sequence[Sequence[Any]], transposed: bool) -> _Bound:
    """What is known of the layers, checked again if a part is another one or elsewhere in memory.

    Raises:
        RuntimeError: as `littlebit_linear`.
    """
    key = (transposed, *[id(layer[0]) for layer in layers])
    found = _all_bound.get(key)
    if found is not None and found.holds(layers):
        if x.shape and x.shape[-1] == found.features and x.device == found.device and x.dtype in _DTYPES:
            return found
    if x.device.type == "cpu" and not interpreted():
        raise RuntimeError(
            "x is on the CPU, but triton compiles for GPUs only; move the layer, or set TRITON_INTERPRET=1"
        )
    made = _Bound(x, layers, transposed, lambda _: _all_bound.pop(key, None))
    _all_bound[key] = made
    return made


def bound(x: torch.Tensor, layers: Sequence[Sequence[Any]]) -> Optional[_Bound]:
    """What `littlebit_linears` remembers of these layers on x's CUDA device, to be asked `again`; None where it has nothing."""
    found = _all_bound.get((False, *[id(layer[0]) for layer in layers]))
    if found is None or found.index < 0 or not x.is_cuda or not found.recorded or not found.holds(layers):
        return None
    return found


def forget() -> None:
    """Drop what is known of all layers: tile sizes were measured anew, or a test changes them."""
    for known in _all_bound.values():
        known.recorded.clear()
        known._shapes.clear()
    _all_bound.clear()


def _stream(index: int) -> int:
    """The current stream of a device, as triton's launcher takes it. Replaces itself by what triton asks torch with."""
    global _stream
    import triton

    _stream = triton.runtime.driver.active.get_current_stream
    return _stream(index)


_here = contextlib.nullcontext()


def _on(x: torch.Tensor) -> Any:
    """triton launches on the current device, whatever the tensors are on."""
    if x.is_cuda:
        return _here if torch._C._cuda_getDevice() == x.get_device() else torch.cuda.device(x.device)
    return _here if x.device.type == "cpu" else getattr(torch, x.device.type).device(x.device)


@functools.lru_cache(maxsize=4096)
def _expected(in_features: int, out_features: int, ranks: Tuple[int, ...]) -> List[Tuple[Tuple[int, ...], str]]:
    """(shape, kind) of every part: int32, uint8 or float; a part of no rows has the shape (0, columns)."""
    if not ranks or min(ranks) < 1:
        raise RuntimeError(f"ranks is {list(ranks)}, but a layer has one path or more, each of rank 1 or more")
    shapes = factor_shapes(in_features, out_features, ranks)
    kinds = {torch.int32: "int32", torch.uint8: "uint8"}
    absent = {"u": "int32", "u_tail": "uint8", "v": "int32", "v_tail": "uint8"}
    found = []
    for name in _NAMES:
        shape, dtype = shapes.get(name, ((0, out_features if name[0] == "u" else sum(ranks)), None))
        found.append((shape, kinds.get(dtype, "float") if dtype else absent[name]))
    return found


def _checked(x: torch.Tensor, layer: Sequence[Any], transposed: bool) -> List[Any]:
    """The layer, its parts contiguous, as the kernels take it: a wrong shape would read past the end of a tensor.

    A tail of no rows becomes None; words of no rows become u's, which are then never read.
    """
    *parts, bias, ranks = layer
    ranks = tuple(ranks)
    u, scale_out, scale_in = parts[0], parts[4], parts[6]
    if u is None or scale_out is None or scale_in is None or scale_out.dim() != 2 or scale_in.dim() != 2:
        raise RuntimeError("u, scale_out and scale_in are needed, the scales with 2 dimensions: [paths, features]")
    features = (scale_out if transposed else scale_in).shape[1]
    if x.dtype not in _DTYPES:
        raise RuntimeError(f"x is {x.dtype}, but must be float32, bfloat16 or float16")
    if not x.dim() or x.shape[-1] != features:
        raise RuntimeError(f"x is {list(x.shape)}, but its last dimension must be {features}")
    ready: List[Any] = []
    for name, part, (shape, kind) in zip(_NAMES, parts, _expected(scale_in.shape[1], scale_out.shape[1], ranks)):  # noqa: B905
        if part is None:
            if shape[0]:
                raise RuntimeError(f"{name} is missing: the layer needs {list(shape)}")
            ready.append(None)
            continue
        if tuple(part.shape) != tuple(shape):
            raise RuntimeError(f"{name} is {list(part.shape)}, but must be {list(shape)}")
        if part.device != x.device:
            raise RuntimeError(f"{name} is on {part.device}, but x is on {x.device}; move both to one device")
        right = part.dtype in _DTYPES if kind == "float" else str(part.dtype) == f"torch.{kind}"
        if not right:
            raise RuntimeError(f"{name} is {part.dtype}, but must be {kind if kind != 'float' else 'a float'}")
        ready.append(part.contiguous() if shape[0] else None)
    if bias is not None and (tuple(bias.shape) != (scale_out.shape[1],) or bias.device != x.device):
        raise RuntimeError(
            f"bias is {list(bias.shape)} on {bias.device}, but must be [{scale_out.shape[1]}] on {x.device}"
        )
    for index in (0, 2):
        ready[index] = u if ready[index] is None else ready[index]
    return [*ready, None if bias is None else bias.contiguous(), ranks]
