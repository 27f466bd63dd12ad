"""Which start, learning rates and loss train best: short trainings that differ in one thing each.

    python examples/experiments/recipe.py [--bpw 0.3] [--steps 60] [--arm default reference ...]

Every arm sees the same batches in the same order. What counts is the excess loss on held-out text, in nats per token over
the dense model's. Arms are added to recipe.json as they finish; `--plot` draws recipe.png from it. `reference` is the
published algorithm (arms.py). Single changes are of "not calibrated", those with kv_factor 2 of that.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from arms import REFERENCE, Arm, Results, Setting

from hf_littlebit.train.trainer import LATENT_FACTOR, SCALE_FACTOR

HERE = Path(__file__).parent
PLAIN = {"calibration": 0, "kv_factor": 1.0}  # as the weights alone say
KV2 = {"kv_factor": 2.0}
# What differs from the defaults.
ARMS: dict[str, dict[str, Any]] = {
    "default": {},
    "not calibrated": PLAIN,
    "reference 3e-4": {**REFERENCE, "learning_rate": 3e-4},
    "reference 1e-3": REFERENCE,
    "reference 3e-3": {**REFERENCE, "learning_rate": 3e-3},
    "reference 1e-3, k and v at 0.8 bits": {**REFERENCE, "kv_bpw": 0.8},
    "kv_factor 1": {"kv_factor": 1.0},
    "kv_factor 2": KV2,
    "kv_factor 4": {"kv_factor": 4.0},
    "kv_factor 2, not calibrated": {**KV2, "calibration": 0},
    "kv_factor 2, latents: twice the rate": {**KV2, "latent_factor": LATENT_FACTOR * 2},
    "kv_factor 2, hidden weight 10 / length": {**KV2, "hidden_weight": None},
    "kv_factor 2, alpha 30": {**KV2, "alpha": 30.0},
    "kv_factor 2, 400 steps of ADMM": {**KV2, "init_steps": 400},
    "latents: twice the rate": {**PLAIN, "latent_factor": LATENT_FACTOR * 2},
    "latents 0.005": {**PLAIN, "latent_size": 0.005},
    "latents 0.05": {**PLAIN, "latent_size": 0.05},
    "latents 0.05, twice their rate": {**PLAIN, "latent_size": 0.05, "latent_factor": 2 * LATENT_FACTOR},
    "scales: three times the rate": {**PLAIN, "scale_factor": SCALE_FACTOR * 3},
    "scales: a third of the rate": {**PLAIN, "scale_factor": SCALE_FACTOR / 3},
    "dual_svid": {**PLAIN, "init": "dual_svid"},
    "joint_itq": {**PLAIN, "init": "joint_itq"},
    "admm, two paths": {**PLAIN, "residual": True},
    "straight-through": {**PLAIN, "sign_gradient": "ste"},
    "logits only": {**PLAIN, "hidden_weight": 0.0},
    "hidden weight 10 / length": {**PLAIN, "hidden_weight": None},
    "latents: half the rate": {**PLAIN, "latent_factor": LATENT_FACTOR / 2},
    "rest: frozen": {**PLAIN, "freeze": True},
    "one rate for all, 5e-4": {**PLAIN, "learning_rate": 5e-4, "latent_factor": 1.0, "scale_factor": 1.0},
}


def plot(results: dict, file: Path) -> None:
    """One bar for each arm, fewer bits further down."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = results["arms"]
    names = sorted(arms, key=lambda name: (-arms[name]["bpw"], arms[name]["excess"]), reverse=True)
    figure, axis = plt.subplots(figsize=(8, 0.32 * len(names) + 1), layout="constrained")
    colours = ["#d1495b" if "default" in n else "#999999" if "reference" in n else "#3b7dd8" for n in names]
    axis.barh(names, [arms[name]["excess"] for name in names], color=colours)
    axis.set(xlabel="loss over the dense model's on held-out text, nats per token")
    axis.margins(y=0.01)
    axis.grid(alpha=0.3, axis="x")
    figure.savefig(file, dpi=130)


def main() -> None:
    usual = Setting(batch_size=4, held_out_blocks=16, bf16=False)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=usual.model)
    parser.add_argument("--train", nargs="+", default=usual.train)
    parser.add_argument("--eval", nargs="+", default=usual.held_out)
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--bpw", type=float, default=0.55)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=usual.batch_size)
    parser.add_argument("--length", type=int, default=usual.length)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "recipe.json")
    parser.add_argument("--plot", action="store_true", help="only draw the plot of what is there")
    args = parser.parse_args()
    size = {"batch_size": args.batch_size, "length": args.length, "held_out_blocks": usual.held_out_blocks}
    results = Results(args.out, Setting(args.model, args.train, args.eval, **size, seed=args.seed, bf16=False))
    if not args.plot:
        for name in args.arm:
            seed = f", seed {args.seed}" if args.seed else ""
            results.train(
                f"{name} ({args.bpw:g} bpw, {args.steps} steps{seed})", Arm(args.bpw, args.steps, **ARMS[name])
            )
    plot(results.data, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
