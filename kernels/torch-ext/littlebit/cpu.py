"""The compiled CPU kernel: finding it, loading it at first use, calling it.

    y = sum_p h_p * (U_p (l_p * (V_p^T (g_p * x)))) + bias          as reference.py, same arguments

The C++ source is kernels/littlebit_cpu, built into one shared library beside this file (setup.py) where the installing
machine has a compiler. It works on the packed words themselves: 16 outputs are the lanes of an AVX-512 register, and the
signed sums of a few inputs are a table that a permutation looks up. Loading it registers `hf_littlebit_cpu::linear`, and the
same function as the CPU implementation of `hf_littlebit::linear`, the plugin's operator, if there is one; from then on
the plugin's calls on CPU tensors do not pass through Python. Without the library, reference.py computes: correct, but it
unpacks at every call, so one warning says so.

The environment variable LITTLEBIT_BACKEND is read at the first product: `reference` leaves the library alone, `cpu`
makes its absence an error, unset takes it if it is there.
"""

import os
import warnings
from pathlib import Path
from typing import Optional, Sequence

import torch

__all__ = ["LIBRARY", "littlebit_linear", "littlebit_linear_grad", "load", "select"]

LIBRARY = Path(__file__).with_name("liblittlebit_cpu.so")
BACKENDS = ("reference", "cpu")

_loaded = False
_failure: Optional[str] = None  # why there is no library, once a search has failed


def load() -> bool:
    """True if the compiled kernel is to be used; loads it at the first call. Repeating it changes nothing.

    Raises:
        ValueError: LITTLEBIT_BACKEND holds an unknown name.
        RuntimeError: LITTLEBIT_BACKEND=cpu, and the library is missing or does not load.
    """
    backend = os.environ.get("LITTLEBIT_BACKEND", "")
    if backend and backend not in BACKENDS:
        raise ValueError(
            f"LITTLEBIT_BACKEND={backend!r} is unknown; set it to one of {', '.join(BACKENDS)}, or unset it"
        )
    if backend == "reference":
        return False
    if _loaded or (_failure is None and _load()):
        return True
    if backend == "cpu":
        raise RuntimeError(f"LITTLEBIT_BACKEND=cpu, but {_failure}; {_REMEDY}, or unset the variable")
    return False


_REMEDY = (
    "install a C++ compiler and reinstall hf-littlebit from source (pip install --no-binary hf-littlebit hf-littlebit)"
)


def _load() -> bool:
    global _loaded, _failure
    try:
        if not LIBRARY.exists():
            raise OSError(f"there is no compiled CPU kernel ({LIBRARY} is missing)")
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        _failure = str(error) if not LIBRARY.exists() else f"the compiled CPU kernel {LIBRARY} does not load ({error})"
        if not os.environ.get("LITTLEBIT_BACKEND"):
            warnings.warn(
                f"littlebit: {_failure}; packed layers run in plain torch, which unpacks them at every call and is 10 to "
                f"100 times slower. To have it, {_REMEDY}; to silence this, set LITTLEBIT_BACKEND=reference.",
                stacklevel=4,
            )
        return False
    _loaded = True
    return True


def select(isa: str = "") -> str:
    """Force an instruction set (amx, avx512, avx2, neon, generic; auto: the best there is) and return the one in use."""
    return torch.ops.hf_littlebit_cpu.select(isa)


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
    """x [..., in_features] of fp32, bf16 or fp16 -> [..., out_features] of the same dtype; call `load` before.

    Raises:
        RuntimeError: a part is missing, or has another shape, dtype or device than the ranks and x ask for.
    """
    parts = (u, u_tail, v, v_tail, scale_out, scale_rank, scale_in)
    return torch.ops.hf_littlebit_cpu.linear(x, *parts, bias, list(ranks))


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
    parts = (u, u_tail, v, v_tail, scale_out, scale_rank, scale_in)
    return torch.ops.hf_littlebit_cpu.linear_grad(grad, *parts, list(ranks))
