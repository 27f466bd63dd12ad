"""`littlebit tune`: measure the tile sizes of a model's GPU kernels on this machine, for this user's later processes.

What is measured follows from the model's layers alone: the shapes and ranks that it has, each once, and the groups of layers
that read one x (shared_input.py), which are launched together for few tokens. No weight is loaded; a config.json with --bpw is
enough. What was found goes to the folder that the kernels read first: LITTLEBIT_TILES, or the user's cache. The package's own
files are never written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .train_command import DTYPES

if TYPE_CHECKING:
    from ..report.size_report import LayerSize

from .out_folder import check_folder

__all__ = ["add_options", "layers_and_groups", "run_tune"]

TOKENS = (1, 16, 64, 512)


def add_options(tune: argparse.ArgumentParser) -> None:
    """The options of `tune` besides those of the method."""
    tune.add_argument("model", metavar="MODEL_OR_CONFIG", help="folder, config.json or Hub id; no weights are loaded")
    tune.add_argument(
        "--tokens",
        metavar="N",
        type=int,
        nargs="+",
        default=list(TOKENS),
        help="numbers of tokens to be fast at: up to four share one choice (default: 1 16 64 512)",
    )
    tune.add_argument(
        "--gradient", action="store_true", help="the gradient too, for training a packed model's adapters"
    )
    tune.add_argument("--seconds", metavar="S", type=float, default=600, help="stop after so many (default: 600)")
    tune.add_argument("--dtype", choices=DTYPES, default="auto", help="to compute in (default: as in the model)")
    tune.add_argument(
        "--out", metavar="DIR", type=Path, help="folder to write to (default: LITTLEBIT_TILES, or the user's cache)"
    )
    tune.add_argument("--json", action="store_true", help="print what was found as one JSON object")


def layers_and_groups(sizes: list[LayerSize]) -> tuple[list[Any], list[Any]]:
    """What tuner.py takes: (out, in, ranks) of every layer, and (outs, in, ranks of each) of layers with one x, each once."""
    from ..layers.shared_input import siblings

    layers = dict.fromkeys((size.out_features, size.in_features, tuple(size.ranks)) for size in sizes)
    linear = {size.module: size for size in sizes if size.weight == "weight" and size.count == 1}
    groups: dict[Any, None] = {}
    for names in siblings(linear):
        members = [linear[name] for name in names]
        if len({member.in_features for member in members}) == 1:
            outs = tuple(member.out_features for member in members)
            groups[outs, members[0].in_features, tuple(tuple(member.ranks) for member in members)] = None
    return list(layers), list(groups)


def run_tune(args: argparse.Namespace, config: Any) -> int:
    """`littlebit tune`; `config` is the LittleBitConfig of the options, None for a packed model."""
    _check(args)
    from ..kernels import tuner, tuning
    from ..load.source import find_source
    from ..report.size import size_report

    source = find_source(args.model)
    layers, groups = layers_and_groups(size_report(source, config).layers)
    result = tuner.tune(
        layers,
        groups,
        args.tokens,
        _dtype(args.dtype, source.config),
        gradient=args.gradient,
        folder=args.out,
        seconds=args.seconds,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    if not result.found:
        raise RuntimeError(f"nothing was measured within {args.seconds:g} s; give --seconds more of them")
    if args.json:
        rows = [
            {"case": one.case.key, "tiles": one.config._asdict(), "before_us": one.before, "after_us": one.after}
            for one in result.found
        ]
        print(json.dumps({"file": str(result.path), "found": rows}))
    else:
        print(_table(result.found))
        print(f"\nsaved to {result.path}")
    if result.path.parent.resolve() != tuning.user_folder().resolve():
        print(f"note: processes read it where LITTLEBIT_TILES={result.path.parent} is set", file=sys.stderr)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises before any work: for values that make no sense, and where there is no GPU to measure."""
    import torch

    from ..kernels import gpu

    if min(args.tokens) < 1:
        raise ValueError(f"--tokens is {min(args.tokens)}; it must be at least 1")
    if not args.seconds > 0:
        raise ValueError(f"--seconds is {args.seconds:g}; it must be above 0")
    if args.out is not None:
        check_folder(args.out)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: the kernels are interpreted, not compiled; unset it to measure them")
    if not torch.cuda.is_available():
        raise RuntimeError(
            "torch finds no CUDA or ROCm GPU here, and tile sizes are measured on the GPU that is to use them; run this on "
            "that machine, with the torch built for it"
        )
    if not gpu.load():
        raise RuntimeError(gpu.missing())


def _dtype(name: str, config: Any) -> Any:
    """--dtype, or what the model computes in; bfloat16 where its config does not say, as it does not for a config alone."""
    import torch

    found = getattr(config, "dtype", None) if name == "auto" else name
    if isinstance(found, str):
        found = getattr(torch, found.removeprefix("torch."))
    return found or torch.bfloat16


def _table(found: list[Any]) -> str:
    from tabulate import tabulate

    from ..kernels.gpu import DECODE

    rows = []
    for one in found:
        case = one.case
        shape = f"{'+'.join(map(str, case.outs))} x {case.into}"
        ranks = ", ".join(dict.fromkeys("+".join(map(str, ranks)) for ranks in case.ranks))
        tokens = "1 to 4" if case.tokens <= DECODE and not case.transposed else str(case.tokens)
        way = "gradient" if case.transposed else "forward"
        gain = one.before / one.after if one.after else math.nan
        rows.append((shape, ranks, way, tokens, f"{one.before:.1f}", f"{one.after:.1f}", f"{gain:.2f}"))
    head = ["out x in", "ranks", "way", "tokens", "before, µs", "after, µs", "times as fast"]
    return tabulate(rows, head, "simple", disable_numparse=True)
