"""The packed layout of a table of rows, an embedding or an output head: the file format, written once, here.

A table of `rows` rows (tokens of a vocabulary) and `columns` columns (the hidden size) is stored in two parts:

    codes    8 bits   int8  [rows, columns]                          W[n, k] = codes[n, k] * scale[n, g]
             4 bits   int32 [rows, 8 * ceil(columns / 64)]           W[n, k] = (code - 8) * scale[n, g]
    scale    16-bit floats [rows, 1], one for a row,                 g = 0
             or [rows, ceil(columns / 64)], one for 64 columns       g = k // 64

With 4 bits the 64 columns of group g are the 8 words from 8 g on: bits 4 q .. 4 q + 3 of word 8 g + i are the code, 0 to 15, of
column 64 g + 8 q + i. Columns past the last hold code 8, which is a zero. 8 bits go with either scale and use -127 to 127;
4 bits have one for 64 columns. A scale may be negative, which gives the code with one value more to the sign that needs it.

Why this layout: rows are contiguous, so that an embedding gathers rows, tables are sharded, resized and tied by rows, and a
mat-vec reads memory in its order. A nibble of neighbouring words is neighbouring columns: a register of 8 words meets 8
contiguous values of x after a shift by 4 q, on a CPU (8 or 16 lanes, or a permutation as the table of 16 values) as on a GPU
(where a thread loads 4 words and 4 values at a time), and x is never put into another order. There is no zero point: smaller
groups with a signed scale buy as much for the same bytes (docs/kernels.md).

table_fit.py chooses codes and scales, table_reference.py computes in plain torch.
"""

from typing import NamedTuple, Optional, Tuple

import torch

__all__ = [
    "BITS",
    "GROUP",
    "PackedTable",
    "bits_of",
    "checked",
    "checked_grad",
    "checked_indices",
    "groups_of",
    "pack_codes",
    "table_shapes",
    "unpack_codes",
    "unpack_table",
]

BITS = (8, 4)
GROUP = 64  # columns with one scale
WORDS = 8  # int32 words of a group of 4-bit codes
ZERO = 8  # the 4-bit code of 0
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_CODES = {8: torch.int8, 4: torch.int32}


class PackedTable(NamedTuple):
    """The parts of a table and its number of columns, which padded 4-bit codes do not tell. Shapes in the module's text."""

    codes: torch.Tensor
    scale: torch.Tensor
    columns: int


def groups_of(columns: int) -> int:
    """Scales of a row with one for GROUP columns."""
    return -(-columns // GROUP)


def table_shapes(
    rows: int, columns: int, bits: int, grouped: Optional[bool] = None, scale_dtype: torch.dtype = torch.bfloat16
) -> dict:
    """{part: (shape, dtype)} of a table.

    Args:
        grouped: a scale for every 64 columns rather than for a row; by default with 4 bits only.

    Raises:
        ValueError: bits are neither 8 nor 4, or 4 with one scale for a row of more than 64 columns; there is no column.
    """
    if columns < 1:
        raise ValueError(f"a table has {columns} columns, but needs one or more")
    if bits not in BITS:
        raise ValueError(f"bits is {bits}, but a table has 8 or 4")
    groups = groups_of(columns) if (bits == 4 if grouped is None else grouped) else 1
    if bits == 4 and groups != groups_of(columns):
        raise ValueError("a table of 4 bits has a scale for every 64 columns: leave grouped out, or take 8 bits")
    width = columns if bits == 8 else WORDS * groups_of(columns)
    return {"codes": ((rows, width), _CODES[bits]), "scale": ((rows, groups), scale_dtype)}


def bits_of(codes: torch.Tensor) -> int:
    """8 or 4, by the dtype of the codes.

    Raises:
        RuntimeError: it is neither int8 nor int32.
    """
    for bits, dtype in _CODES.items():
        if codes.dtype == dtype:
            return bits
    raise RuntimeError(f"codes is {_name(codes.dtype)}, but must be int8 (8 bits) or int32 (4 bits)")


def pack_codes(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers [rows, columns], -127 .. 127 for 8 bits and -8 .. 7 for 4, as the codes of a table."""
    if bits == 8:
        return values.to(torch.int8)
    rows, columns = values.shape
    padded = torch.full((rows, GROUP * groups_of(columns)), ZERO, dtype=torch.int32, device=values.device)
    padded[:, :columns] = values.to(torch.int32) + ZERO
    nibbles = padded.view(rows, groups_of(columns), 8, WORDS)
    shift = 4 * torch.arange(8, device=values.device, dtype=torch.int32)
    return (nibbles << shift[:, None]).sum(dim=2, dtype=torch.int32).view(rows, WORDS * groups_of(columns))


def unpack_codes(codes: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of `pack_codes`: int8 [rows, columns]."""
    if bits_of(codes) == 8:
        return codes
    shift = 4 * torch.arange(8, device=codes.device, dtype=torch.int32)
    nibbles = (codes.view(codes.shape[0], codes.shape[1] // WORDS, 1, WORDS) >> shift[:, None]) & 15
    return (nibbles - ZERO).to(torch.int8).flatten(1)[:, :columns]


def unpack_table(codes: torch.Tensor, scale: torch.Tensor, columns: int) -> torch.Tensor:
    """The dense rows that the parts stand for, fp32 [rows, columns]. Each is one product, so that fp32 rounds it once."""
    values = unpack_codes(codes, columns).float()
    if scale.shape[1] == 1:
        return values.mul_(scale.float())
    return values.mul_(scale.float().repeat_interleave(GROUP, dim=1)[:, :columns])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).replace("torch.", "")


def _parts(device: torch.device, codes: torch.Tensor, scale: torch.Tensor, columns: int) -> None:
    """Raise RuntimeError unless these are the parts of a table of so many columns on the device."""
    bits = bits_of(codes)
    if codes.dim() != 2 or scale.dim() != 2:
        raise RuntimeError(
            f"codes and scale have {codes.dim()} and {scale.dim()} dimensions, but must have 2: [rows, ...]"
        )
    rows, groups = codes.shape[0], groups_of(columns)
    width = columns if bits == 8 else WORDS * groups
    if codes.shape[1] != width:
        raise RuntimeError(
            f"codes is {list(codes.shape)}, but must be [rows, {width}] for {columns} columns in {bits} bits"
        )
    if scale.shape[0] != rows or scale.shape[1] not in ((1, groups) if bits == 8 else (groups,)):
        wanted = f"[{rows}, 1] or [{rows}, {groups}]" if bits == 8 else f"[{rows}, {groups}]"
        raise RuntimeError(f"scale is {list(scale.shape)}, but must be {wanted}")
    if scale.dtype not in _FLOATS:
        raise RuntimeError(f"scale is {_name(scale.dtype)}, but must be float32, bfloat16 or float16")
    for name, part in (("codes", codes), ("scale", scale)):
        if part.device != device:
            raise RuntimeError(f"{name} is on {part.device}, but the input is on {device}; move both to one device")


def checked(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: Optional[torch.Tensor]
) -> Tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
    """(codes, scale, bias), contiguous, of a head that x [..., columns] meets: a wrong shape would read past the end.

    Raises:
        RuntimeError: a part has another shape, dtype or device than the others and x ask for.
    """
    if x.dtype not in _FLOATS:
        raise RuntimeError(f"x is {_name(x.dtype)}, but must be float32, bfloat16 or float16")
    if not x.dim():
        raise RuntimeError("x has no dimension, but must be [..., columns]")
    _parts(x.device, codes, scale, x.shape[-1])
    if bias is not None and (
        tuple(bias.shape) != (codes.shape[0],) or bias.device != x.device or bias.dtype not in _FLOATS
    ):
        raise RuntimeError(
            f"bias is {_name(bias.dtype)} {list(bias.shape)} on {bias.device}, but must be floats [{codes.shape[0]}] on {x.device}"
        )
    return codes.contiguous(), scale.contiguous(), None if bias is None else bias.contiguous()


def checked_grad(
    grad: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, columns: int
) -> Tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale), contiguous, of a head whose gradient is grad [..., rows]; errors as `checked`."""
    if grad.dtype not in _FLOATS:
        raise RuntimeError(f"grad is {_name(grad.dtype)}, but must be float32, bfloat16 or float16")
    _parts(grad.device, codes, scale, columns)
    if not grad.dim() or grad.shape[-1] != codes.shape[0]:
        raise RuntimeError(f"grad is {list(grad.shape)}, but its last dimension must be {codes.shape[0]}")
    return codes.contiguous(), scale.contiguous()


def checked_indices(
    indices: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, columns: int, dtype: torch.dtype
) -> Tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale), contiguous, of an embedding that gathers rows at indices; errors as `checked`."""
    if indices.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"indices is {_name(indices.dtype)}, but must be int64 or int32")
    if dtype not in _FLOATS:
        raise RuntimeError(f"the result would be {_name(dtype)}, but must be float32, bfloat16 or float16")
    _parts(indices.device, codes, scale, columns)
    return codes.contiguous(), scale.contiguous()
