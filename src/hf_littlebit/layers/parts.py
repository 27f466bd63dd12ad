"""What a weight is stored in, packed or latent: names, shapes and dtypes of its parts, and how factors become parts and back.

    packed   u, u_tail, v, v_tail, scale_out, scale_rank, scale_in     bits and 16-bit floats, as kernels/parts.py says
    latent   u [out, R], v [in, R], scale_out [P, out], scale_rank [R], scale_in [P, in]     fp32, the P paths side by side

R is the sum of the paths' ranks. The parts of one weight are parameters named after it, so that the 3-D weights of
mixture-of-experts layers (experts.py) are stored like linear layers: for the weight "weight" they are weight (U), weight_tail,
v, v_tail, scale_out, scale_rank and scale_in; for "gate_up_proj" gate_up_proj (U), gate_up_proj_tail, gate_up_proj_v, and so on.

Packing latents and unpacking bits are exact: the signs and the rounded scales are the same on both sides, so that packing what
was unpacked gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from ..kernels import PARTS as PACKED_PARTS
from ..kernels import factor_shapes, pack_signs, places, unpack_signs
from .path import Path

__all__ = [
    "LATENT_PARTS",
    "PACKED_PARTS",
    "Shapes",
    "keeping_dtypes",
    "latent_parts",
    "latent_paths",
    "pack_parts",
    "part_name",
    "part_shapes",
    "stored_ranks",
    "unpack_paths",
]

LATENT_PARTS = ("u", "v", "scale_out", "scale_rank", "scale_in")
UNPACKED_LATENT = 0.02  # |latent| that a bare sign is given: small enough for SmoothSign's gradient to move it

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]  # part -> (shape, dtype)


def keeping_dtypes(fn: Callable[[Tensor], Tensor], kept: Collection[int]) -> Callable[[Tensor], Tensor]:
    """`fn`, as Module._apply is given it, which moves but does not cast the tensors whose ids are in `kept`."""

    def keep_dtype(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if id(tensor) in kept and moved.dtype != tensor.dtype:
            return tensor.to(moved.device)
        return moved

    return keep_dtype


def part_name(weight: str, part: str) -> str:
    """The parameter that holds `part` of the weight called `weight` in its module."""
    if part == "u":
        return weight
    if part == "u_tail":
        return f"{weight}_tail"
    return part if weight == "weight" else f"{weight}_{part}"


def part_shapes(
    out_features: int, in_features: int, ranks: Sequence[int], latent: bool, scale_dtype: torch.dtype
) -> Shapes:
    """Shape and dtype of every part of one weight [out_features, in_features], parts of no rows left out.

    Args:
        ranks: of each path. scale_dtype: of the packed scales; latents and their scales are fp32.
    """
    if not latent:
        return factor_shapes(in_features, out_features, ranks, scale_dtype)
    total, paths = sum(ranks), len(ranks)
    shapes = ((out_features, total), (in_features, total), (paths, out_features), (total,), (paths, in_features))
    return {part: (shape, torch.float32) for part, shape in zip(LATENT_PARTS, shapes, strict=True)}


def stored_ranks(
    shapes: Mapping[str, tuple[int, ...]], size: tuple[int, int], planned: tuple[int, ...], latent: bool
) -> tuple[int, ...]:
    """The ranks of a stored weight's paths, read off the shapes of its parts.

    The rows of scale_out (and of scale_in) are the paths, and the length of scale_rank (and the columns of v) is the sum of
    their ranks. Shapes do not say how paths share that sum: those of 56 + 40 are those of 48 + 48 but for one row of u_tail,
    and as latents they are equal. So the ranks are `planned` if these fit, and else those of paths of equal rank.

    Where no ranks fit all parts, one of them is damaged: the ranks that most of them agree on are returned, so that whoever
    compares the shapes finds the part that is the odd one out.

    Args:
        shapes: {part: shape} of one matrix, without the leading axis of a stack of experts; parts may be missing.
        size: (out_features, in_features). planned: the ranks that the config asks for.
    """
    candidates = [planned]
    for paths, total in (
        (_length(shapes, "scale_out", 0), _length(shapes, "scale_rank", 0)),
        (_length(shapes, "scale_in", 0), _length(shapes, "v", 1)),
    ):
        if paths and total and total % paths == 0:
            candidates.append((total // paths,) * paths)

    def odd_ones(ranks: tuple[int, ...]) -> int:
        expected = part_shapes(*size, ranks, latent, torch.bfloat16)
        return sum(part in shapes and shapes[part] != shape for part, (shape, _) in expected.items())

    return min(candidates, key=odd_ones)


def _length(shapes: Mapping[str, tuple[int, ...]], part: str, axis: int) -> int:
    """The length of a part along an axis; 0 where the part is missing or has no such axis."""
    shape = shapes.get(part, ())
    return shape[axis] if len(shape) > axis else 0


def pack_parts(paths: Sequence[Path], scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """Factors as packed parts, those of no rows left out (but for u, which bears the weight's name)."""
    rows = [pack_signs(path.u.T) for path in paths]
    words, tail = pack_signs(torch.cat([path.v for path in paths], dim=1))
    parts = {
        "u": torch.cat([row[0] for row in rows]),
        "u_tail": torch.cat([row[1] for row in rows]),
        "v": words,
        "v_tail": tail,
    }
    parts.update({part: value.to(scale_dtype) for part, value in _scales(paths).items()})
    return {part: value for part, value in parts.items() if part == "u" or value.shape[0]}


def latent_parts(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Factors as fp32 latents, the paths side by side."""
    parts = {
        "u": torch.cat([path.u for path in paths], dim=1),
        "v": torch.cat([path.v for path in paths], dim=1),
        **_scales(paths),
    }
    # Contiguous: fused optimizers pair a parameter with its restored state by memory order.
    return {part: value.float().contiguous() for part, value in parts.items()}


def _scales(paths: Sequence[Path]) -> dict[str, Tensor]:
    return {
        "scale_out": torch.stack([path.scale_out for path in paths]),
        "scale_rank": torch.cat([path.scale_rank for path in paths]),
        "scale_in": torch.stack([path.scale_in for path in paths]),
    }


def unpack_paths(parts: Mapping[str, Tensor | None], ranks: Sequence[int]) -> list[Path]:
    """Packed parts of one weight as factors, with ±UNPACKED_LATENT for latents and the stored scales in fp32."""
    u, u_tail = parts["u"], parts.get("u_tail")
    scales = [parts[part] for part in PACKED_PARTS[4:]]
    assert u is not None
    scale_out, scale_rank, scale_in = (scale.float() for scale in scales if scale is not None)
    v_signs = unpack_signs(parts.get("v"), parts.get("v_tail"), scale_in.shape[-1])
    paths = []
    for place, of_outputs, of_inputs in zip(places(ranks), scale_out, scale_in, strict=True):
        u_signs = unpack_signs(u[place.words], None if u_tail is None else u_tail[place.tail], place.rank)
        latents = (UNPACKED_LATENT * u_signs.T.contiguous(), UNPACKED_LATENT * v_signs[:, place.columns].contiguous())
        paths.append(Path(*latents, of_outputs, scale_rank[place.columns], of_inputs))
    return paths


def latent_paths(parts: Mapping[str, Tensor], ranks: Sequence[int], scale_dtype: torch.dtype) -> list[Path]:
    """Latent parts of one weight as factors, with the scales rounded as in the forward."""
    u, v = (parts[part].detach() for part in LATENT_PARTS[:2])
    scale_out, scale_rank, scale_in = (
        parts[part].detach().to(scale_dtype).float() for part in ("scale_out", "scale_rank", "scale_in")
    )
    return [
        Path(u[:, place.columns], v[:, place.columns], of_outputs, scale_rank[place.columns], of_inputs)
        for place, of_outputs, of_inputs in zip(places(ranks), scale_out, scale_in, strict=True)
    ]
