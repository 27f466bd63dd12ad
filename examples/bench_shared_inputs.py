"""What a shared first stage would gain: q, k and v read the same x, and so do gate and up.

    python examples/bench_shared_inputs.py --threads 1 [--bpw 0.1 0.55] [--out FILE]

Their first stages V^T (g x) have a g and a V each, so that stacking them saves calls and the waking of threads, but no
arithmetic. What it saves is measured with the layer as it is: a layer of 32 outputs is nearly its first stage alone, and
one with the paths of q, k and v side by side is the three in one call.

    gain = first(q) + first(k) + first(v) - first(q, k, v)  +  first(gate) + first(up) - first(gate, up)

One random layer of every kind per block of the model, called in the model's order, so that weights are as cold as they are
in decoding; one token; the candidates take turns; medians. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from hf_littlebit import LittleBitConfig
from hf_littlebit.linear import LittleBitLinear
from hf_littlebit.machine import machine
from hf_littlebit.plan import WeightPlan, plan_model
from hf_littlebit.skeleton import empty_model

SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
OUTPUTS = 32


def layer(in_features: int, out_features: int, ranks: list[int]) -> nn.Module:
    """A packed layer of random bits."""
    made = LittleBitLinear(in_features, out_features, ranks, bias=False, device="cpu")
    for value in made.parameters():
        if value.is_floating_point():
            nn.init.constant_(value, in_features**-0.5)
        else:
            limits = torch.iinfo(value.dtype)
            value.random_(limits.min, limits.max)
    return made.requires_grad_(False)


def seconds(calls: list[tuple[nn.Module, Tensor]]) -> float:
    start = time.perf_counter()
    for module, x in calls:
        module(x)
    return time.perf_counter() - start


def measure(model: Any, bpw: float, rounds: int) -> dict[str, Any]:
    """Milliseconds per token, for all blocks of the model."""
    blocks: dict[str, dict[str, WeightPlan]] = {}
    for plan in plan_model(model, LittleBitConfig(bpw=bpw)).weights:
        block, _, name = plan.module.rpartition(".")
        blocks.setdefault(block.rpartition(".")[0], {})[name] = plan
    inputs: dict[int, Tensor] = {}
    calls: dict[str, list[tuple[nn.Module, Tensor]]] = {"layers": [], "separate": [], "shared": []}
    for plans in blocks.values():
        for plan in plans.values():
            x = inputs.setdefault(plan.in_features, torch.randn(1, 1, plan.in_features).bfloat16())
            calls["layers"].append((layer(plan.in_features, plan.out_features, list(plan.ranks)), x))
        for names in SHARED:
            ranks = [list(plans[name].ranks) for name in names]
            size = plans[names[0]].in_features
            calls["separate"] += [(layer(size, OUTPUTS, each), inputs[size]) for each in ranks]
            calls["shared"].append((layer(size, OUTPUTS, [rank for each in ranks for rank in each]), inputs[size]))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(-2, rounds):
        for name, listed in calls.items():
            took = seconds(listed)
            if index >= 0:
                times[name].append(1e3 * took)
    gains = [first - second for first, second in zip(times["separate"], times["shared"], strict=True)]
    shares = [gain / whole for gain, whole in zip(gains, times["layers"], strict=True)]
    row: dict[str, Any] = {"bpw": bpw}
    row.update({f"{name}_ms": round(statistics.median(values), 3) for name, values in times.items()})
    return {**row, "gain_ms": round(statistics.median(gains), 3), "gain_of_layers": round(statistics.median(shares), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=FilePath, default=FilePath(__file__).parent / "configs" / "llama2-7b.json")
    parser.add_argument("--bpw", type=float, nargs="+", default=[0.1, 0.55])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=FilePath, help="also write the JSON line here")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = empty_model(AutoConfig.from_pretrained(args.config, trust_remote_code=False))
    with torch.inference_mode():
        rows = [measure(model, bpw, args.rounds) for bpw in args.bpw]
    print("  bpw  all layers  first stages  in shared calls  gain, ms per token  of the layers")
    for row in rows:
        times = f"{row['layers_ms']:10.2f}{row['separate_ms']:14.2f}{row['shared_ms']:17.2f}{row['gain_ms']:20.2f}"
        print(f"{row['bpw']:5.2f}{times}{100 * row['gain_of_layers']:13.1f} %")
    line = json.dumps({"benchmark": "shared inputs", "model": args.config.name, "rows": rows, "machine": machine()})
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
