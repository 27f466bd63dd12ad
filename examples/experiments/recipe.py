"""Which start, learning rates and loss train best: short trainings that differ in one thing each.

    python examples/experiments/recipe.py --train train.txt --eval eval.txt [--arm default reference ...]

Every arm sees the same batches in the same order. What counts is the excess loss on held-out text, in nats per token over
the dense model's. Arms are added to recipe.json as they finish; `--plot` draws recipe.png from it. `reference` is the
published algorithm: Dual-SVID, two paths, SmoothSign, KL + 10 / length * MSE per token, one learning rate (three are tried).
Most single changes are of "not calibrated", those with kv_factor 2 of that.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_littlebit import LittleBitConfig
from hf_littlebit.data import read_texts, text_blocks
from hf_littlebit.distill import HIDDEN_WEIGHT
from hf_littlebit.plan import plan_model
from hf_littlebit.sign import ALPHA
from hf_littlebit.trainer import CALIBRATION, LATENT_FACTOR, LEARNING_RATE, SCALE_FACTOR, LittleBitTrainer
from hf_littlebit.training import LittleBitCallback
from hf_littlebit.twins import latents_and_scales

HERE = Path(__file__).parent
PLAIN = {"calibration": 0}  # as the weights alone say
REFERENCE = {**PLAIN, "init": "dual_svid", "residual": True, "hidden": "10 / length", "latent": 1.0, "scale": 1.0}
KV2 = {"kv_factor": 2.0}
# What differs from the defaults. lr: of the dense rest; latent, scale: factors on it; size: median |latent|.
ARMS: dict[str, dict] = {
    "default": {},
    "not calibrated": PLAIN,
    "reference 3e-4": {**REFERENCE, "lr": 3e-4},
    "reference 1e-3": {**REFERENCE, "lr": 1e-3},
    "reference 3e-3": {**REFERENCE, "lr": 3e-3},
    "reference 1e-3, k and v at 0.8 bits": {**REFERENCE, "lr": 1e-3, "kv_bpw": 0.8},
    "kv_factor 2": KV2,
    "kv_factor 4": {"kv_factor": 4.0},
    "kv_factor 2, not calibrated": {**KV2, **PLAIN},
    "kv_factor 2, latents: twice the rate": {**KV2, "latent": LATENT_FACTOR * 2},
    "kv_factor 2, hidden weight 10 / length": {**KV2, "hidden": "10 / length"},
    "kv_factor 2, alpha 30": {**KV2, "alpha": 30.0},
    "kv_factor 2, 400 steps of ADMM": {**KV2, "steps": 400},
    "latents: twice the rate": {**PLAIN, "latent": LATENT_FACTOR * 2},
    "latents 0.005": {**PLAIN, "size": 0.005},
    "latents 0.05": {**PLAIN, "size": 0.05},
    "latents 0.05, twice their rate": {**PLAIN, "size": 0.05, "latent": 2 * LATENT_FACTOR},
    "scales: three times the rate": {**PLAIN, "scale": SCALE_FACTOR * 3},
    "scales: a third of the rate": {**PLAIN, "scale": SCALE_FACTOR / 3},
    "dual_svid": {**PLAIN, "init": "dual_svid"},
    "joint_itq": {**PLAIN, "init": "joint_itq"},
    "admm, two paths": {**PLAIN, "residual": True},
    "straight-through": {**PLAIN, "sign_gradient": "ste"},
    "logits only": {**PLAIN, "hidden": 0.0},
    "hidden weight 10 / length": {**PLAIN, "hidden": "10 / length"},
    "latents: half the rate": {**PLAIN, "latent": LATENT_FACTOR / 2},
    "rest: frozen": {**PLAIN, "freeze": True},
    "one rate for all, 5e-4": {**PLAIN, "lr": 5e-4, "latent": 1.0, "scale": 1.0},
}


def resize(model: torch.nn.Module, size: float) -> None:
    """Give all latents of each weight the median magnitude `size`."""
    with torch.no_grad():
        for latent in latents_and_scales(model)[0]:
            latent.mul_(size / latent.abs().median())


def run(args: argparse.Namespace, name: str, train, held_out, dense_loss: float) -> dict:
    """Train one arm."""
    arm = ARMS[name]
    hidden = arm.get("hidden", HIDDEN_WEIGHT)
    hidden = 10 / args.length if hidden == "10 / length" else hidden
    rate = arm.get("lr", LEARNING_RATE)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    config = LittleBitConfig(
        bpw=args.bpw,
        init=arm.get("init", "admm"),
        residual=arm.get("residual"),
        kv_factor=arm.get("kv_factor", 1.0),
        steps=arm.get("steps"),
        module_config={"*.[kv]_proj": {"bpw": arm["kv_bpw"]}} if "kv_bpw" in arm else None,
    )
    plan = plan_model(model, config)
    callback = LittleBitCallback(
        config,
        "self",
        hidden_weight=hidden,
        sign_gradient=arm.get("sign_gradient", "smooth"),
        alpha=arm.get("alpha", ALPHA),
        pack=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = LittleBitTrainer(
            model,
            arguments(folder, args, rate),
            callbacks=[callback],
            calibration=arm.get("calibration", CALIBRATION),
            latent_learning_rate=rate * arm.get("latent", LATENT_FACTOR),
            scale_learning_rate=rate * arm.get("scale", SCALE_FACTOR),
            train_dataset=train,
            eval_dataset=held_out,
        )
        if "size" in arm:
            resize(model, arm["size"])
        if arm.get("freeze"):
            trained = {id(value) for group in latents_and_scales(model) for value in group}
            for value in model.parameters():
                value.requires_grad_(id(value) in trained)
        before = trainer.evaluate()["eval_loss"]
        start = time.perf_counter()
        trainer.train()
        seconds = (time.perf_counter() - start) / args.steps
        after = trainer.evaluate()["eval_loss"]
    logs = [entry for entry in trainer.state.log_history if "kd_loss" in entry]
    return {
        "bpw": args.bpw,
        "actual_bpw": plan.bpw,
        "seed": args.seed,
        "steps": args.steps,
        "tokens_per_step": args.batch_size * args.length,
        "excess_before": before - dense_loss,
        "excess": after - dense_loss,
        "flipped": logs[-1]["flipped_since_start"],
        "seconds_per_step": round(seconds, 2),
        "options": arm,
        "kd_loss": [[entry["step"], round(entry["kd_loss"], 4)] for entry in logs],
    }


def arguments(folder: str, args: argparse.Namespace, rate: float) -> TrainingArguments:
    return TrainingArguments(
        folder,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=4,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, args.steps // 20),
        logging_steps=max(1, args.steps // 10),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=args.seed,
    )


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE.parent / "models" / "pycode-13m")
    parser.add_argument("--train", nargs="+")
    parser.add_argument("--eval", nargs="+")
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--bpw", type=float, default=0.55)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "recipe.json")
    parser.add_argument("--plot", action="store_true", help="only draw the plot of what is there")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {"arms": {}}
    if not args.plot:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        train = text_blocks(read_texts(args.train), tokenizer, args.length)
        held_out = text_blocks(read_texts(args.eval), tokenizer, 512, max_blocks=16)
        with tempfile.TemporaryDirectory() as folder:
            dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
            dense_loss = Trainer(dense, arguments(folder, args, 0.0), eval_dataset=held_out).evaluate()["eval_loss"]
        results |= {"model": args.model.name, "dense_loss": dense_loss, "machine": platform.machine()}
        results |= {"torch": torch.__version__, "transformers": transformers.__version__}
        for name in args.arm:
            seed = f", seed {args.seed}" if args.seed else ""
            label = f"{name} ({args.bpw:g} bpw, {args.steps} steps{seed})"
            results["arms"][label] = run(args, name, train, held_out, dense_loss)
            args.out.write_text(json.dumps(results, indent=1))
            print(f"{results['arms'][label]['excess']:.4f}  {label}", flush=True)
    plot(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
