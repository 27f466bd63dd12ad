"""The packed layout of a binary factor: the file format, written once, here.

A factor is a matrix of signs F in {+1, -1}, of K rows and N columns, that is multiplied along K:

    y[n] = sum_k x[k] * F[k, n]           V: K = in_features, N = all ranks;   U: K = a path's rank, N = out_features

It is stored in two parts, both with N as the last, contiguous dimension:

    words   int32 [K // 32, N]              bit b of words[i, n] is the sign of F[32 i + b, n]
    tail    uint8 [ceil(K % 32 / 8), N]     bit b of tail[j, n] is the sign of F[32 (K // 32) + 8 j + b, n]

The least significant bit comes first; +1 is stored as 0 and -1 as 1, so a set bit flips a float's sign bit. Padding bits
(only where K is no multiple of 8) are 0. A part of zero rows is not stored, except that a layer always has the words of U,
because they carry the name of the dense weight.

Why this layout (shared by the CPU and the GPU, see the project's notes on kernels): sixteen neighbouring int32 words are
one AVX-512 register whose lanes are sixteen outputs, and a GPU warp reads neighbouring columns; both walk K a word at a
time. The byte tail keeps the padding under 8 signs of a column, so that ranks need only be multiples of 8 and a file
holds what the bits-per-weight formula says. Slicing columns (tensor parallelism over N) or whole word rows (over K) gives
valid factors.

parts.py says which factors a layer has and under which names.
"""

from typing import Optional, Tuple

import torch

__all__ = [
    "FORMAT_VERSION",
    "factor_shape",
    "pack_signs",
    "stored_bits",
    "unpack_signs",
]

FORMAT_VERSION = (
    1  # saved models hold it as format_version; any change of this layout, or of what a config means, adds 1
)
_WORD = 32
_BYTE = 8


def factor_shape(length: int) -> Tuple[int, int]:
    """Rows of words and rows of tail bytes that a column of `length` signs takes."""
    return length // _WORD, -(-(length % _WORD) // _BYTE)


def stored_bits(length: int) -> int:
    """Bits that a column of `length` signs takes in the file: `length` rounded up to a multiple of 8."""
    words, tail = factor_shape(length)
    return _WORD * words + _BYTE * tail


def pack_signs(values: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Pack the signs of `values` [..., K, N] (0 counts as +1) into (words int32, tail uint8), each possibly of 0 rows."""
    *lead, length, columns = values.shape
    bits = (values < 0).to(torch.uint8)
    pad = -length % _BYTE
    if pad:
        bits = torch.cat([bits, bits.new_zeros(*lead, pad, columns)], dim=-2)
    place = (2 ** torch.arange(_BYTE, device=values.device)).to(torch.uint8)
    rows = (bits.unflatten(-2, (-1, _BYTE)) * place[:, None]).sum(dim=-2, dtype=torch.uint8)
    whole = length // _WORD
    quads = rows[..., : 4 * whole, :].unflatten(-2, (whole, 4)).to(torch.int32)
    shift = _BYTE * torch.arange(4, device=values.device, dtype=torch.int32)
    words = (quads << shift[:, None]).sum(dim=-2, dtype=torch.int32)
    return words.contiguous(), rows[..., 4 * whole :, :].contiguous()


def unpack_signs(
    words: Optional[torch.Tensor],
    tail: Optional[torch.Tensor],
    length: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The inverse of `pack_signs`: ±1 in `dtype`, [..., length, N]. A part of zero rows may be None."""
    parts = []
    if words is not None and words.shape[-2]:
        parts.append(_spread(words, _WORD, dtype))
    if tail is not None and tail.shape[-2]:
        parts.append(_spread(tail.to(torch.int32), _BYTE, dtype))
    if not parts:
        like = words if words is not None else tail
        if like is None:
            raise ValueError("nothing to unpack: both the words and the tail are None; pass at least one of them")
        return torch.empty(*like.shape[:-2], 0, like.shape[-1], dtype=dtype, device=like.device)
    signs = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)
    return signs[..., :length, :]


def _spread(words: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Bits 0 .. width-1 of every int32 in [..., rows, N] as ±1, [..., rows * width, N]."""
    # The bit is moved to the sign position and 1.0's exponent is put below it: no comparison, no conversion pass.
    shift = torch.arange(31, 31 - width, -1, device=words.device, dtype=torch.int32)
    signs = words.unsqueeze(-2) << shift[:, None]
    signs.bitwise_and_(-(2**31)).bitwise_or_(0x3F800000)
    return signs.view(torch.float32).flatten(-3, -2).to(dtype)
