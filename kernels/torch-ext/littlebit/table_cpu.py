"""A packed table on a CPU, by the compiled library (cpu.py): same functions and arguments as table_reference.py.

Codes are multiplied as they lie in memory, exactly, and sums are fp32; with AVX512-BF16 a bf16 x meets them as bf16 numbers, which
codes of 4 and 8 bits are, and subnormal values of x count as 0.
"""

from typing import Any, Optional

import torch

from . import cpu

__all__ = ["embedding", "head", "head_grad"]


def _operators() -> Any:
    if not cpu.load():
        raise RuntimeError(cpu.missing())
    return torch.ops.hf_littlebit_cpu


def head(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """What `table_reference.head` gives.

    Raises:
        RuntimeError: as there; or there is no compiled kernel.
    """
    return _operators().head(x, codes, scale, bias)


def head_grad(grad: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, columns: int) -> torch.Tensor:
    """What `table_reference.head_grad` gives; errors as `head`."""
    return _operators().head_grad(grad, codes, scale, columns)


def embedding(
    indices: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """What `table_reference.embedding` gives; errors as `head`, also for an index outside of the table."""
    return _operators().embedding(indices, codes, scale, columns, dtype)
