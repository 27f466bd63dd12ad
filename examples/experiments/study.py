"""The questions that any implementation of the method should answer for itself, each by one command:

    python examples/experiments/study.py start           random, Dual-SVID, Joint-ITQ and ADMM at 0.55 and 1.0 bits
    python examples/experiments/study.py latent-scale    l fixed at one, at 0.3 bits
    python examples/experiments/study.py sign            SmoothSign and STE at the fewest bits that the model allows
    python examples/experiments/study.py paths           one path and two at equal bits
    python examples/experiments/study.py hidden          the error of hidden states: its measure and its weight
    python examples/experiments/study.py recipe          the defaults beside the paper's recipe, 300 and 1,500 steps
    python examples/experiments/study.py all

All arms go to study.json as they finish; one that is there is not trained again (`--out` names another file). Each
question's plot is drawn from it: study-NAME.png. `--table` prints what is there in Markdown. The text is bundled.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from arms import REFERENCE, Arm, Results, Setting

HERE = Path(__file__).parent
EVERY = 10  # evaluations in a training
PLAIN = {"calibration": 0}


def _arms(bpw: float, steps: int = 300, **named: dict[str, Any]) -> dict[str, Arm]:
    return {
        f"{name.replace('_', ' ')} ({bpw:g} bpw, {steps} steps)": Arm(bpw, steps, **options)
        for name, options in named.items()
    }


def _starts(bpw: float) -> dict[str, Arm]:
    return _arms(
        bpw,
        random={**PLAIN, "init": "random", "residual": False},
        DualSVID={**PLAIN, "init": "dual_svid"},
        JointITQ={**PLAIN, "init": "joint_itq"},
        ADMM=PLAIN,
        default={},
    )


def _recipes(bpw: float, steps: int) -> dict[str, Arm]:
    arms = _arms(bpw, steps, default={}, paper=REFERENCE)
    if steps == 300:
        # As many bits as the default takes: from the leftover, or, where its k and v have no room for two paths, by asking.
        more = {"kv_factor": None} if bpw > 0.5 else {"bpw": 0.31}
        arms[f"paper, bits as the default ({bpw:g} bpw, {steps} steps)"] = Arm(**{"bpw": bpw, **REFERENCE, **more})
    return arms


def _hidden(bpw: float, weights: tuple[float, ...]) -> dict[str, Arm]:
    relative = {f"relative_{weight:g}": {"hidden_weight": weight, "hidden_error": "relative"} for weight in weights}
    return _arms(bpw, 60, mean_square={}, **relative)


STUDIES: dict[str, dict[str, Arm]] = {
    "start": _starts(0.55) | _starts(1.0),
    "latent-scale": _arms(0.3, default={}, no_latent_scale={"no_latent_scale": True}),
    "sign": _arms(
        0.1,
        default={},
        STE={"sign_gradient": "ste"},
        DualSVID={**PLAIN, "init": "dual_svid"},
        DualSVID_with_STE={**PLAIN, "init": "dual_svid", "sign_gradient": "ste"},
    ),
    "paths": _arms(
        0.55,
        ADMM=PLAIN,
        ADMM_two_paths={**PLAIN, "residual": True},
        JointITQ_one_path={**PLAIN, "init": "joint_itq", "residual": False},
        JointITQ={**PLAIN, "init": "joint_itq"},
        DualSVID_one_path={**PLAIN, "init": "dual_svid", "residual": False},
        DualSVID={**PLAIN, "init": "dual_svid"},
    ),
    "hidden": _hidden(0.55, (0.0, 0.03, 0.1, 0.3, 1.0)) | _hidden(1.0, (0.3,)) | _hidden(0.3, (0.3,)),
    "recipe": {
        label: arm for steps in (300, 1500) for bpw in (1.0, 0.55, 0.3) for label, arm in _recipes(bpw, steps).items()
    },
}


def plot(results: Results, name: str, file: Path) -> None:
    """The excess loss against steps, one panel for each label's bits per weight and number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = {label: results.arms[label] for label in STUDIES[name] if label in results.arms}
    panels = list(dict.fromkeys(label.partition(" (")[2] for label in arms))
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(6.0, 4.2 * columns), 3.4 * rows), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        for label, arm in arms.items():
            name, _, asked = label.partition(" (")
            if asked == panel:
                axis.plot(*zip(*arm["curve"], strict=True), marker=".", label=f"{name}: {arm['excess']:.3f}")
        axis.set(title=panel.rstrip(")"), xlabel="step", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("loss over the dense model's, nats per token")
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def table(results: Results, name: str) -> str:
    """Markdown: one row for each arm that is there."""
    lines = ["| bpw | real | steps | arm | excess at the start | after | perplexity |", "|---|---|---|---|---|---|---|"]
    for label in STUDIES[name]:
        arm = results.arms.get(label)
        if arm is not None:
            shown = (arm["bpw"], f"{arm['actual_bpw']:.3f}", arm["steps"], label.partition(" (")[0])
            figures = (f"{arm['excess_before']:.3f}", f"{arm['excess']:.3f}", f"{arm['perplexity']:.2f}")
            lines.append(f"| {' | '.join(map(str, (*shown, *figures)))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*STUDIES, "all"])
    parser.add_argument("--out", type=Path, default=HERE / "study.json")
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="TEXT", default="", help="arms whose label holds this text")
    parser.add_argument("--table", action="store_true", help="only draw and print what is there")
    args = parser.parse_args()
    results = Results(args.out, Setting(seed=args.seed, bf16=not args.fp32))
    for name in STUDIES if args.study == "all" else [args.study]:
        for label, arm in STUDIES[name].items():
            if not args.table and args.only in label:
                results.train(label, arm, max(1, arm.steps // EVERY))
        plot(results, name, args.out.with_name(f"{args.out.stem}-{name}.png"))
        if args.table:
            print(f"\n{name}\n\n{table(results, name)}")


if __name__ == "__main__":
    main()
