"""Quantize the bundled model at several bit widths with each initialiser, reload, evaluate, plot and generate.

    python examples/demo.py [--bpw 1.0 0.55 0.3] [--init dual_svid joint_itq admm] [--tables 8 4] [--out demo-output]

Every row of the table is a full round trip: `from_pretrained` with a `LittleBitConfig`, `save_pretrained`, and the
saved model loaded again and evaluated. The last initialiser's rows come again with the embedding and the output head
packed to --tables bits. Writes rate_distortion.png, results.json and all packed models to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import matplotlib
import torch
import transformers
from tabulate import tabulate
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_littlebit import LittleBitConfig, LittleBitLinear, perplexity, size_report
from hf_littlebit.initialize.factorize import INITS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
COLUMNS = [
    "init",
    "embedding and head",
    "bpw asked",
    "bpw real",
    "bits, whole model",
    "file MB",
    "ratio",
    "perplexity",
    "weight error",
    "seconds",
]
INIT, TABLES, REAL, MEGABYTES, PERPLEXITY, ERROR = 0, 1, 3, 5, 7, 8  # places of columns
DENSE = 16  # bits of a weight that is not packed
STYLES = {"dual_svid": ("o", "#999999"), "joint_itq": ("s", "#3b7dd8"), "admm": ("D", "#d1495b")}
TABLE_STYLES = {16: ("D", "#d1495b"), 8: ("^", "#2a9d5c"), 4: ("v", "#e09f3e")}
PROMPT = "def read_lines(path):\n"


def weight_error(model: torch.nn.Module, dense: torch.nn.Module) -> float:
    """Mean over the replaced layers of |W - W_hat|^2 / |W|^2 (Frobenius norms)."""
    errors = []
    for name, layer in model.named_modules():
        if isinstance(layer, LittleBitLinear):
            weight = dense.get_submodule(name).weight.float()
            errors.append(((weight - layer.dense()).square().sum() / weight.square().sum()).item())
    return sum(errors) / len(errors)


def folder_of(args: argparse.Namespace, init: str, bits: int, bpw: float) -> Path:
    """Where a row's packed model is."""
    return args.out / f"{args.model.name}-{init}-{bpw:g}{'' if bits == DENSE else f'-tables-{bits}'}"


def round_trip(args: argparse.Namespace, dense, tokenizer, text: str, init: str, bits: int, bpw: float) -> list:
    """One row of the table."""
    folder = folder_of(args, init, bits, bpw)
    start = time.perf_counter()
    config = LittleBitConfig(bpw, init=init, embedding_bits=bits, head_bits=bits, workers=args.workers)
    quantized = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config)
    seconds = time.perf_counter() - start
    quantized.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    report = size_report(folder)
    score = perplexity(model, tokenizer, text, max_blocks=args.blocks)
    error = weight_error(model, dense)
    size = report.file_bytes / 1e6
    return [init, bits, bpw, report.bpw, report.whole_bpw, size, report.ratio, score.perplexity, error, seconds]


def plot(rows: list[list], last: str, dense_perplexity: float, file: Path) -> None:
    """Perplexity and weight error by bits per weight, a line per initialiser; perplexity by file size, a line per table bits."""
    figure, axes = plt.subplots(1, 3, figsize=(13.5, 3.8), layout="constrained")
    lines = [
        (axes[:2], REAL, (PERPLEXITY, ERROR), init, style, [r for r in rows if r[INIT] == init and r[TABLES] == DENSE])
        for init, style in STYLES.items()
    ]
    lines += [
        (
            axes[2:],
            MEGABYTES,
            (PERPLEXITY,),
            f"{last}, {bits} bits",
            style,
            [r for r in rows if r[INIT] == last and r[TABLES] == bits],
        )
        for bits, style in TABLE_STYLES.items()
    ]
    for where, x, columns, label, (marker, colour), mine in lines:
        mine.sort(key=lambda row: row[x])
        for axis, column in zip(where, columns, strict=True):
            axis.plot([r[x] for r in mine], [r[column] for r in mine], marker=marker, color=colour, label=label)
    for axis in (axes[0], axes[2]):
        axis.axhline(dense_perplexity, linestyle="--", color="black", linewidth=1, label="dense, 16 bits")
        axis.set_yscale("log")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks(lambda value, _: f"{value:g}")
        axis.set_ylabel("perplexity (log scale)")
    axes[1].set_ylabel("relative squared weight error")
    axes[1].set_ylim(0, 1)
    for axis in axes:
        axis.set_xlabel("bits per replaced weight, as stored")
        axis.grid(alpha=0.3)
    axes[2].set_xlabel("file, MB")
    axes[2].set_xlim(0, 1.6 * axes[2].get_xlim()[1])  # room for the legend
    axes[0].legend()
    axes[1].legend()
    axes[2].legend(title="embedding and head", loc="right")
    figure.suptitle("pycode-13m, quantized without training")
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "models" / "pycode-13m", help="folder of the dense model")
    parser.add_argument("--text", type=Path, default=HERE / "data" / "pycode_eval.txt", help="text to evaluate on")
    parser.add_argument("--bpw", type=float, nargs="+", default=[0.3, 0.55, 1.0], help="bits per weight to try")
    parser.add_argument("--init", nargs="+", default=list(INITS), choices=INITS, help="initialisers to try")
    parser.add_argument("--tables", type=int, nargs="*", default=[8, 4], help="bits of embedding and head to try")
    parser.add_argument("--blocks", type=int, default=64, help="windows of 512 tokens to evaluate on")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="layers factorized at the same time")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for all results")
    args = parser.parse_args()
    # One thread for each layer: bits then do not depend on the number of cores, and no thread waits for another.
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)

    text = args.text.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dense = AutoModelForCausalLM.from_pretrained(args.model)
    size = (args.model / "model.safetensors").stat().st_size / 1e6
    reference = perplexity(dense, tokenizer, text, max_blocks=args.blocks).perplexity
    kinds = [(init, DENSE) for init in args.init] + [(args.init[-1], bits) for bits in args.tables]
    rows = [round_trip(args, dense, tokenizer, text, *kind, bpw) for kind in kinds for bpw in args.bpw]
    table = [["dense", DENSE, DENSE, DENSE, DENSE, size, 1, reference, 0, ""], *rows]
    formats = ("", "g", "g", ".3f", ".2f", ".2f", ".1f", ".1f", ".3f", ".1f")
    print()
    print(tabulate(table, COLUMNS, tablefmt="github", floatfmt=formats))
    plot(rows, args.init[-1], reference, args.out / "rate_distortion.png")
    results = {
        "columns": COLUMNS,
        "rows": table,
        "blocks": args.blocks,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "workers": args.workers,
        "machine": platform.processor() or platform.machine(),
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    best = min(rows, key=lambda row: row[PERPLEXITY])
    folder = folder_of(args, *best[:3])
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**tokens, max_new_tokens=60, do_sample=False, repetition_penalty=1.1)
    print(f"\n{best[INIT]} at {best[2]:g} bits, untrained, continues:\n\n{tokenizer.decode(out[0])}\n")
    print(f"Plot: {args.out / 'rate_distortion.png'}   Packed models: {args.out}/   Load one:")
    print(
        f"  python -c \"import hf_littlebit, transformers as t; print(t.AutoModelForCausalLM.from_pretrained('{folder}'))\""
    )


if __name__ == "__main__":
    main()
