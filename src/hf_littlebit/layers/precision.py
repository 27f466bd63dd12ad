"""Full fp32 for a stretch of computation, whatever the caller has switched on: factors and dense weights are made in it.

The settings are those of the whole process, because torch has no others. So they are raised for as long as any thread needs
them, and every thread that computes meanwhile has them too.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["exact_fp32"]


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
