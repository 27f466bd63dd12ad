"""The compiled CPU kernel: finding it, loading it at first use, calling it.

    y = sum_p scale_out_p * (U_p (scale_rank_p * (V_p^T (scale_in_p * x)))) + bias          as reference.py, same arguments

The C++ source is kernels/littlebit_cpu, built into one shared library beside this file (setup.py) where the installing
machine has a compiler. It works on the packed words themselves: 16 outputs are the lanes of an AVX-512 register, and the
signed sums of a few inputs are a table that a permutation looks up. Loading it registers `hf_littlebit_cpu::linear`, and the
same function as the CPU implementation of `hf_littlebit::linear`, the plugin's operator, if there is one; from then on
the plugin's calls on CPU tensors do not pass through Python.

`scaled_signs` and `scaled_signs_grad` are what a training step does with latents besides matrix products, each in one pass
over memory. They are opaque to torch.compile and record no gradient; src/hf_littlebit/layers/latent_matmul.py calls them.

A child of `os.fork` must call `torch.set_num_threads(1)` first, as torch's DataLoader does: GNU OpenMP hangs in a child whose
parent had started its threads, here as in torch's own products.
"""

import threading
from pathlib import Path
from typing import Any, List, Optional, Sequence, Tuple

import torch

from .parts import PackedLayer

__all__ = [
    "LIBRARY",
    "load",
    "missing",
    "products",
    "scaled_signs",
    "scaled_signs_grad",
    "select",
]

LIBRARY = Path(__file__).with_name("liblittlebit_cpu.so")
REMEDY = (
    "install a C++ compiler (gcc or clang), then hf-littlebit again from its source "
    "(pip install --force-reinstall --no-deps --no-cache-dir --no-binary hf-littlebit hf-littlebit)"
)

_lock = threading.Lock()
_operators: Any = None  # torch.ops.hf_littlebit_cpu, once it is there
_failure: Optional[str] = None  # why there is none, once a search has failed


def load() -> bool:
    """True if the compiled kernel is there; the first call loads it. Never warns and never raises: see `missing`."""
    return _operators is not None or (_failure is None and _load())


def missing() -> str:
    """Why `load` returned False, and what to do about it."""
    return f"{_failure or 'the compiled CPU kernel has not been asked for'}; to have it, {REMEDY}"


def _load() -> bool:
    global _operators, _failure
    with _lock:
        operators = torch.ops.hf_littlebit_cpu
        # Another copy of this package may have brought them, and a library that defines them again ends the process.
        if hasattr(operators, "linear"):
            _operators = operators
        elif not LIBRARY.exists():
            _failure = f"there is no compiled CPU kernel ({LIBRARY} is missing)"
        else:
            try:
                torch.ops.load_library(str(LIBRARY))
                torch.library.register_fake("hf_littlebit_cpu::scaled_signs", _scaled_signs_fake)
                torch.library.register_fake("hf_littlebit_cpu::scaled_signs_grad", _scaled_signs_grad_fake)
                _operators = operators
            except OSError as error:
                _failure = f"the compiled CPU kernel {LIBRARY} does not load ({error})"
    return _operators is not None


def _loaded() -> Any:
    if not load():
        raise RuntimeError(missing())
    return _operators


def select(isa: str = "") -> str:
    """Force an instruction set (amx, avx512, avx2, neon, generic; auto: the best there is) and return the one in use."""
    return _loaded().select(isa)


def products(x: torch.Tensor, layers: Sequence[PackedLayer], transposed: bool = False) -> List[torch.Tensor]:
    """What `reference.products` gives, by the compiled library.

    Several layers take one call, in which the threads meet twice however many there are; each result has the bits that its
    layer has alone. Gradients are computed layer by layer.

    Raises:
        RuntimeError: a part is missing, or has another shape, dtype or device than the ranks and x ask for; the layers take
            different numbers of values; or there is no compiled kernel.
    """
    operators = _loaded()
    if transposed:
        return [operators.linear_grad(x, *layer[:7], list(layer.ranks)) for layer in layers]
    if len(layers) == 1:
        (layer,) = layers
        return [operators.linear(x, *layer[:8], list(layer.ranks))]
    parts = [part for layer in layers for part in layer[:8]]
    ranks = [rank for layer in layers for rank in layer.ranks]
    return operators.linears(x, parts, ranks, [len(layer.ranks) for layer in layers])


def scaled_signs(
    latent: torch.Tensor,
    scale_feature: torch.Tensor,
    scale_rank: Optional[torch.Tensor],
    ranks: Sequence[int],
    dtype: torch.dtype,
    width: Optional[int] = None,
) -> torch.Tensor:
    """scale_feature * sign(latent) * scale_rank, [rows, R] of `dtype` (fp32, bf16 or fp16); sign(±0) is +1.

    The product is fp32, rounded once. With `width` zeros follow in every row: [rows, width].

    Args:
        latent: [rows, R], fp32, the paths side by side; R is the sum of `ranks`.
        scale_feature: fp32, a scale for each row, [paths, rows]. scale_rank: fp32, one for each column, [R], or None for ones.

    Raises:
        RuntimeError: a wrong shape, dtype or device; or there is no compiled kernel.
    """
    return _loaded().scaled_signs(
        latent, scale_feature, scale_rank, ranks, dtype, latent.shape[-1] if width is None else width
    )


def scaled_signs_grad(
    grad: torch.Tensor,
    latent: torch.Tensor,
    scale_feature: torch.Tensor,
    scale_rank: Optional[torch.Tensor],
    ranks: Sequence[int],
    alpha: Optional[float],
) -> Tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
    """The gradients of `scaled_signs` with respect to latent, scale_feature and scale_rank (None without), fp32.

    Args:
        grad: the gradient of its result, [rows, R or more] of fp32, bf16 or fp16, of which the first R columns count.

    The sign's slope is alpha * (1 - tanh(alpha * latent)^2), or, where `alpha` is None, 1 for |latent| < 1 and 0 elsewhere
    (LittleBit, arXiv 2506.13771, section 3.3). Sums are fp32 over 32 rows at a time, and the same bits for any number of
    threads. Errors as `scaled_signs`.
    """
    of_latent, of_feature, of_rank = _loaded().scaled_signs_grad(grad, latent, scale_feature, scale_rank, ranks, alpha)
    return of_latent, of_feature, None if scale_rank is None else of_rank


def _scaled_signs_fake(
    latent: Any, scale_feature: Any, scale_rank: Any, ranks: Any, dtype: torch.dtype, width: int
) -> torch.Tensor:
    return latent.new_empty((latent.shape[0], width), dtype=dtype)


def _scaled_signs_grad_fake(grad: Any, latent: Any, scale_feature: Any, scale_rank: Any, ranks: Any, alpha: Any) -> Any:
    return (
        latent.new_empty(latent.shape),
        scale_feature.new_empty(scale_feature.shape),
        latent.new_empty(0 if scale_rank is None else scale_rank.shape),
    )
