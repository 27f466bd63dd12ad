"""What `littlebit train` tells of a training: training.json and training.png."""

from __future__ import annotations

import json
import math
import os
from typing import Any

__all__ = ["REPORT", "perplexity", "write_report"]

REPORT = "training.json"  # the last file that is written


def perplexity(loss: float) -> float:
    """exp(loss); infinity where that is no number any more."""
    return math.exp(loss) if loss < 700 else math.inf


def write_report(out: str, report: dict[str, Any]) -> None:
    """Write training.json to the folder `out`, and training.png where matplotlib is installed.

    Args:
        report: model (its name), bpw, steps, tokens_per_step, history (of the log), and perplexity: a dict of packed, before
            training, and of dense and teacher where there are such models.
    """
    with open(os.path.join(out, REPORT), "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1)
    try:
        import matplotlib
    except ImportError:
        print("note: no plot is drawn, because matplotlib is not installed: pip install 'hf-littlebit[plot]'")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    history = report["history"]
    steps = [(entry["step"], entry.get("kd_loss", entry["loss"])) for entry in history if "loss" in entry]
    evaluated = [(entry["step"], perplexity(entry["eval_loss"])) for entry in history if "eval_loss" in entry]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.plot(*zip(*steps, strict=True), color="#3b7dd8")
    left.set(xlabel="step", ylabel="loss in training, nats per token", yscale="log")
    right.plot(*zip(*evaluated, strict=True), marker="o", color="#d1495b", label="trained")
    for name, color in (("dense", "black"), ("teacher", "gray")):
        if name in report["perplexity"]:
            right.axhline(report["perplexity"][name], linestyle="--", color=color, linewidth=1, label=name)
    right.set(xlabel="step", ylabel="perplexity, held-out text", yscale="log")
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3, which="both")
    figure.suptitle(f"{report['model']} at {report['bpw']:.3g} bits per weight")
    figure.savefig(os.path.join(out, "training.png"), dpi=130)
    plt.close(figure)
