"""Wrong arguments of a product, each with the words of its refusal: every implementation refuses all of them alike.

`CASES` maps a case to (what it changes of the good arguments, a pattern of the message). The good ones are those of `good`.
"""

from typing import Any, Callable, Dict, List, Tuple

import torch
from hf_littlebit.kernels import PARTS
from test_cpu import layer

Arguments = Dict[str, Any]
NAMES = ("x", *PARTS, "bias", "ranks")
OUT, IN, RANKS = 33, 70, (16, 40)


def good() -> Arguments:
    """x [2, 70] and the fields of a layer of 33 outputs and two paths: all parts have rows."""
    parts, *_ = layer(OUT, IN, RANKS)
    return dict(zip(NAMES, (torch.randn(2, IN), *parts, torch.randn(OUT), list(RANKS))))  # noqa: B905 Python 3.9


def released(part: torch.Tensor) -> torch.Tensor:
    """A tensor like `part` without memory, as sharding leaves it."""
    held = part.clone()
    held.untyped_storage().resize_(0)
    return held


Change = Callable[[Any], Any]
SHAPES: Dict[str, Dict[str, Tuple[Change, str]]] = {
    "u": {"no rows": (lambda u: u[:0], r"u is \[0, 33\], but must be \[1, 33\]"), "stacked": (lambda u: u[None], r"\[1, 1, 33\]")},
    "u_tail": {"a column": (lambda u: u[:, :1], r"u_tail is \[3, 1\], but must be \[3, 33\]")},
    "v": {
        "missing": (lambda v: None, r"v is missing: the layer needs \[2, 56\]"),
        "twice the rows": (lambda v: torch.cat([v, v]), r"v is \[4, 56\], but must be \[2, 56\]"),
    },
    "v_tail": {
        "missing": (lambda v: None, r"v_tail is missing: the layer needs \[1, 56\]"),
        "twice the columns": (lambda v: torch.cat([v, v], 1), r"v_tail is \[1, 112\], but must be \[1, 56\]"),
    },
    "scale_out": {
        "one path": (lambda s: s[:1], r"scale_out is \[1, 33\], but must be \[2, 33\]"),
        "a vector": (lambda s: s[0], "scale_out has 1 dimensions, but must have 2"),
    },
    "scale_rank": {
        "one": (lambda s: s[:1], r"scale_rank is \[1\], but must be \[56\]"),
        "a number": (lambda s: s[0], r"scale_rank is \[\], but must be \[56\]"),
        "a matrix": (lambda s: s[None], r"scale_rank is \[1, 56\], but must be \[56\]"),
    },
    "scale_in": {
        "a vector": (lambda s: s[0], "scale_in has 1 dimensions, but must have 2"),
        "one path": (lambda s: s[:1], r"scale_in is \[1, 70\], but must be \[2, 70\]"),
    },
    "bias": {
        "one": (lambda b: b[:1], r"bias is \[1\], but must be \[33\]"),
        "a matrix": (lambda b: b.expand(3, -1), r"bias is \[3, 33\], but must be \[33\]"),
    },
    "ranks": {
        "empty": (lambda r: [], "ranks is empty, but a layer has at least one path"),
        "zero": (lambda r: [0, 56], "a rank is 0, but must be from 1"),
        "negative": (lambda r: [-8, 64], "a rank is -8, but must be from 1"),
        "huge": (lambda r: [2**40, 16], f"a rank is {2**40}, but must be from 1"),
        "one path": (lambda r: [56], r"but must be \[1, 33\]"),
        "other": (lambda r: [16, 39], r"but must be \[.*55\]"),
    },
}  # fmt: skip


def cases() -> Dict[str, Tuple[str, Change, str]]:
    """{case: (name of the argument, its change, pattern of the message)}."""
    found: Dict[str, Tuple[str, Change, str]] = {}
    for name, changes in SHAPES.items():
        for what, (change, message) in changes.items():
            found[f"{name}: {what}"] = (name, change, message)
    for name in PARTS:
        bits = name in ("u", "u_tail", "v", "v_tail")
        for dtype in (torch.int64, torch.float32 if bits else torch.float64, torch.complex64, torch.bool):
            found[f"{name}: {dtype}"] = (name, lambda part, dtype=dtype: part.to(dtype), f"^{name} is .*, but must be ")
        found[f"{name}: cut"] = (name, lambda part: part[..., :-8], "but (its last dimension )?must be")
        found[f"{name}: released"] = (name, released, f"^{name} has no memory: it is sharded or released")
    for dtype in (torch.int32, torch.float64, torch.complex64):
        found[f"bias: {dtype}"] = ("bias", lambda b, dtype=dtype: b.to(dtype), "^bias is .*, but must be float32, bf")
        found[f"x: {dtype}"] = (
            "x",
            lambda x, dtype=dtype: x.to(dtype),
            "^(x|grad) is .*, but must be float32, bfloat16",
        )
    found["x: a column"] = ("x", lambda x: x[:, :1], r"^(x|grad) is \[2, 1\], but its last dimension must be (70|33)")
    found["x: a number"] = ("x", lambda x: x[0, 0], r"^(x|grad) is \[\], but its last dimension must be (70|33)")
    return found


CASES = cases()


def fields(arguments: Arguments) -> List[Any]:
    """The arguments in the order of `calls.linear`."""
    return [arguments[name] for name in NAMES]
