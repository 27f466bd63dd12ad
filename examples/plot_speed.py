"""A table and a plot of what `littlebit bench --json` measured.

    littlebit bench examples/configs/llama2-7b.json --bpw 0.1 --threads 1 --json > docs/speed/llama2-7b-0.1.json
    python examples/plot_speed.py docs/speed/llama*.json --out docs/speed.png

Left: tokens per second of decoding, dense and packed, each pair from one run. Right: where a packed model's step goes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tabulate import tabulate

COLOURS = {"dense": "#9aa0a6", "packed": "#1f77b4"}
PARTS = {
    "linear layers": "#1f77b4",
    "output head": "#ff7f0e",
    "attention": "#2ca02c",
    "norms": "#9467bd",
    "rest": "#c7c7c7",
}
HEAD = (
    "model",
    "bpw",
    "prefill dense",
    "prefill packed",
    "decode dense",
    "decode packed",
    "ratio",
    "peak dense",
    "peak packed",
)


def label(run: dict[str, Any]) -> str:
    return f"{run['model'].removesuffix('.json')}\n{run['bpw']:.2g} bit"


def peak(speed: dict[str, Any]) -> str:
    return f"{(speed['weight_bytes'] + (speed['growth_bytes'] or 0)) / 1e9:.2f} GB"


def row(run: dict[str, Any]) -> list[str]:
    dense, packed = run["models"].get("dense"), run["models"]["packed"]
    cells = [run["model"].removesuffix(".json"), f"{run['bpw']:.3g}"]
    for step in ("prefill", "decode"):
        cells += [f"{dense[step]:.1f}" if dense else "-", f"{packed[step]:.1f}"]
    ratio = f"{run['ratio']['decode']:.1f}" if run["ratio"] else "-"
    return [*cells, ratio, peak(dense) if dense else "-", peak(packed)]


def plot(runs: list[dict[str, Any]], file: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    names = [label(run) for run in runs]
    for offset, kind in ((-0.2, "dense"), (0.2, "packed")):
        at = [i + offset for i, run in enumerate(runs) if kind in run["models"]]
        bars = left.bar(
            at, [r["models"][kind]["decode"] for r in runs if kind in r["models"]], 0.38, color=COLOURS[kind]
        )
        bars.set_label(f"{kind}, bf16" if kind == "dense" else kind)
        left.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
    left.set_xticks(range(len(runs)), names, fontsize=8)
    left.set_ylabel("tokens per second, decoding")
    left.legend(frameon=False, fontsize=8)
    base = [0.0] * len(runs)
    for part, colour in PARTS.items():
        heights = [run["models"]["packed"]["decode_ms"][part] for run in runs]
        right.bar(names, heights, 0.6, bottom=base, color=colour, label=part)
        base = [a + b for a, b in zip(base, heights, strict=True)]
    right.set_ylabel("ms per token, packed")
    right.tick_params(axis="x", labelsize=8)
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.12)
    machine = runs[0]["machine"]
    where = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    title = (
        f"Plain generate, batch 1, random weights, {machine['threads']} thread(s) of {where}, torch {machine['torch']}"
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="what `littlebit bench --json` printed")
    parser.add_argument("--out", type=Path, required=True, help="the picture to write")
    args = parser.parse_args()
    runs = [json.loads(file.read_text()) for file in args.files]
    runs.sort(key=lambda run: (run["models"]["packed"]["weight_bytes"], run["bpw"]))
    runs.sort(key=lambda run: run["model"], reverse=True)
    print(tabulate([row(run) for run in runs], HEAD, tablefmt="github", disable_numparse=True))
    plot(runs, args.out)


if __name__ == "__main__":
    main()
