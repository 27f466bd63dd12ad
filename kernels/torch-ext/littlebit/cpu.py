"""The compiled CPU kernel: finding it, loading it at first use, calling it.

    y = sum_p h_p * (U_p (l_p * (V_p^T (g_p * x)))) + bias          as reference.py, same arguments

The C++ source is kernels/littlebit_cpu, built into one shared library beside this file (setup.py) where the installing
machine has a compiler. It works on the packed words themselves: 16 outputs are the lanes of an AVX-512 register, and the
signed sums of a few inputs are a table that a permutation looks up. Loading it registers `hf_littlebit_cpu::linear`, and the
same function as the CPU implementation of `hf_littlebit::linear`, the plugin's operator, if there is one; from then on
the plugin's calls on CPU tensors do not pass through Python.

A child of `os.fork` must call `torch.set_num_threads(1)` first, as torch's DataLoader does: GNU OpenMP hangs in a child whose
parent had started its threads, here as in torch's own products.
"""

import threading
from pathlib import Path
from typing import Any, Optional, Sequence

import torch

__all__ = ["LIBRARY", "littlebit_linear", "littlebit_linear_grad", "load", "missing", "select"]

LIBRARY = Path(__file__).with_name("liblittlebit_cpu.so")
REMEDY = (
    "install torch and a C++ compiler first, then hf-littlebit again from its source "
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
        RuntimeError: a part is missing, or has another shape, dtype or device than the ranks and x ask for; or there is
            no compiled kernel.
    """
    parts = (u, u_tail, v, v_tail, scale_out, scale_rank, scale_in)
    return _loaded().linear(x, *parts, bias, list(ranks))


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
    return _loaded().linear_grad(grad, *parts, list(ranks))
