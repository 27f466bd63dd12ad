"""In which precision a stretch of computation is done.

    exact_fp32     full fp32, whatever the caller has switched on: factors and dense weights are made in it
    mixed          autocast, in which a model in fp16 runs on a CPU too
    fp32_norms     what of that is missing there in an autocast that somebody else has switched on

The settings of exact_fp32 are those of the whole process, because torch has no others. So they are raised for as long as any
thread needs them, and every thread that computes meanwhile has them too.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["exact_fp32", "fp32_norms", "mixed"]

NORMS = (F.layer_norm, F.group_norm, F.rms_norm, torch.layer_norm, torch.group_norm, torch.rms_norm)


class _Precision:
    """The matmul precision of this process, raised to full fp32 while any thread is inside `exact_fp32`."""

    lock = threading.Lock()
    inside = 0
    before: list[str] = []  # noqa: RUF012  (one process, one setting)

    @staticmethod
    def backends() -> list[Any]:
        # Per backend, because the global getter raises once a caller has set any backend on its own.
        return [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]

    @classmethod
    def enter(cls) -> None:
        with cls.lock:
            if not cls.inside:
                cls.before = [backend.fp32_precision for backend in cls.backends()]
                for backend in cls.backends():
                    backend.fp32_precision = "ieee"
            cls.inside += 1

    @classmethod
    def leave(cls) -> None:
        with cls.lock:
            cls.inside -= 1
            if not cls.inside:
                for backend, precision in zip(cls.backends(), cls.before, strict=True):
                    backend.fp32_precision = precision


@contextlib.contextmanager
def exact_fp32(device: torch.device) -> Iterator[None]:
    """Compute without autograd, autocast and TF32 on `device`, whatever the caller has switched on; restore it after.

    TF32 keeps 10 bits: normal equations squared in it lose the small directions that a solve then divides by. The
    setting is one per process, so several threads may be inside at once: the last to leave restores it.
    """
    _Precision.enter()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        _Precision.leave()


class _Fp32Norms(TorchFunctionMode):
    """Compute norms whose arguments differ in dtype in fp32, as autocast does on CUDA.

    On a CPU it hands them on as they are, and torch refuses there what a model in fp16 gives its LayerNorms under autocast to
    bf16: bf16 products, which added to fp16 become fp32, beside weights in fp16.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func in NORMS and len({each.dtype for each in (*args, *named.values()) if torch.is_tensor(each)}) > 1:
            args = tuple(each.float() if torch.is_tensor(each) else each for each in args)
            named = {name: each.float() if torch.is_tensor(each) else each for name, each in named.items()}
        return func(*args, **named)


def fp32_norms(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Norms as `_Fp32Norms` computes them on a CPU; nothing elsewhere, where watching every call would cost a GPU's host time."""
    return _Fp32Norms() if device.type == "cpu" else contextlib.nullcontext()


@contextlib.contextmanager
def mixed(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Autocast to `dtype` on `device`, also of models in fp16 on a CPU; nothing for fp32."""
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32), fp32_norms(device):
        yield
