"""Time and accuracy of the factorization: SVD algorithms on one large matrix, then each initialiser on a model.

    python examples/bench_factorize.py                              # 4096 x 11008, ranks 128, 256, 544: a minute
    python examples/bench_factorize.py --exact                      # and a full torch.linalg.svd, for the reference
    python examples/bench_factorize.py --ranks --model path/to/model --bpw 1.0 0.55
    python examples/bench_factorize.py --ranks --config examples/configs/llama2-7b.json --bpw 0.55 0.1 --threads 2

With --config, one random layer of every shape in the model is factored, and the time of the whole model is the sum of
each shape's time by the number of such layers: an extrapolation, which holds because the time of a layer depends on its
shape and rank, hardly on its values. A shape that is another's transpose is not assumed to take the same time.

The error column of the SVD table is the excess over the exact truncated SVD, relative; that of the initialisers is the
mean over the layers of the squared weight error over the squared norm. The last line of the output is one JSON object
with every figure; --out writes it to a file too, with --config after every initialiser. cpu_seconds, all threads together, are
what a busy machine hardly changes.
"""

from __future__ import annotations

import argparse
import collections
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from hf_littlebit import LittleBitConfig
from hf_littlebit.config import layer_ranks
from hf_littlebit.initialize.factorize import factorize, relative_error
from hf_littlebit.initialize.svd import truncated_svd
from hf_littlebit.load.meta_model import empty_model
from hf_littlebit.plan import WeightPlan, plan_model
from hf_littlebit.report.bench.machine import machine

PATHS = {"dual_svid": 2, "joint_itq": 2, "admm": 1}


def timed(function: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """The result of `function` and its seconds, waiting for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def spectrum(rows: int, cols: int, decay: float | None, device: torch.device) -> Tensor:
    """A Gaussian matrix; with `decay`, its rows scaled so that the singular values fall about as k ** -decay."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(rows, cols, generator=generator, dtype=torch.float32).to(device)
    if decay is not None:
        matrix = matrix * torch.arange(1, rows + 1, device=device)[:, None].float() ** -decay
    return matrix


def bench_svd(shape: tuple[int, int], ranks: list[int], exact: bool, device: torch.device) -> list[dict[str, Any]]:
    """Every SVD method at every rank, on a flat and on a decaying spectrum."""
    rows = []
    for decay in (None, 0.6):
        matrix = spectrum(*shape, decay, device)
        energy = float(matrix.double().square().sum())
        name = "flat" if decay is None else f"k^-{decay}"

        def captured(basis: Tensor, matrix: Tensor = matrix) -> float:
            return float((basis.T @ matrix).double().square().sum())

        if exact:
            _, seconds = timed(partial(torch.linalg.svd, matrix, full_matrices=False), device)
            rows.append({"spectrum": name, "method": "torch.linalg.svd", "rank": min(shape), "seconds": seconds})
            report_svd(rows[-1])
        for rank in ranks:
            # Gram is the exact reference in the table: the tests hold it to the fp64 singular values.
            best = 0.0
            for method in ("gram", "krylov"):
                (u, _, _), seconds = timed(partial(truncated_svd, matrix, rank, method=method), device)
                inside = captured(u)
                best = best or inside
                row = {"spectrum": name, "method": method, "rank": rank, "seconds": seconds}
                rows.append({**row, "excess_error": (best - inside) / (energy - best)})
                report_svd(rows[-1])
    return rows


def report_svd(row: dict[str, Any]) -> None:
    error = f"{row['excess_error']:11.1e}" if "excess_error" in row else " " * 11
    print(f"{row['spectrum']:9s} {row['method']:17s} {row['rank']:6d} {row['seconds']:9.2f} {error}", flush=True)


def layers(model: FilePath, limit: int | None) -> list[tuple[str, Tensor]]:
    """The linear layers inside the blocks of a safetensors checkpoint, the first `limit` of them."""
    found = []
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(str(file), "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name.endswith("_proj.weight"):
                    found.append((name, tensors.get_tensor(name)))
    if not found:
        raise SystemExit(
            f"{model} has no *_proj.weight in its *.safetensors; give the folder of a Llama-like checkpoint"
        )
    return found[:limit]


def bench_model(
    config: FilePath, bpws: list[float], inits: list[str], steps: int | None, device: torch.device
) -> Iterator[dict[str, Any]]:
    """One random layer of each shape in the model of `config`, and the sum over its layers; a row per initialiser."""
    model = empty_model(AutoConfig.from_pretrained(config, trust_remote_code=False))
    for bpw in bpws:
        for init in inits:
            alike: dict[tuple[int, int], list[WeightPlan]] = collections.defaultdict(list)
            for plan in plan_model(model, LittleBitConfig(bpw=bpw, init=init)).weights:
                alike[plan.out_features, plan.in_features].append(plan)
            row: dict[str, Any] = {"bpw": bpw, "init": init, "shapes": []}
            for (out, into), plans in alike.items():
                weight, count, ranks = spectrum(out, into, 0.6, device), sum(p.count for p in plans), plans[0].ranks
                begin = time.process_time()
                call = partial(factorize, weight, ranks, init, steps=steps if init == "admm" else None)
                result, seconds = timed(call, device)
                layer = {"out": out, "in": into, "layers": count, "ranks": list(ranks), "seconds": round(seconds, 2)}
                layer["cpu_seconds"] = round(time.process_time() - begin, 2)
                layer["relative_error"] = round(relative_error(weight, result), 4)
                row["shapes"].append(layer)
                shape = f"{out}x{into}"
                print(f"{bpw:5.2f} {init:10s} {shape:>12s} {seconds:9.1f} {layer['cpu_seconds']:9.1f}", flush=True)
            for key in ("seconds", "cpu_seconds"):
                row[f"model_{key}"] = round(sum(layer["layers"] * layer[key] for layer in row["shapes"]))
            print(f"{bpw:5.2f} {init:10s} {'the model':>12s} {row['model_seconds']:9d} {row['model_cpu_seconds']:9d}")
            yield row


def bench_initialisers(
    weights: list[tuple[str, Tensor]], bpws: list[float], steps: int | None, device: torch.device
) -> list[dict[str, Any]]:
    """Mean error and seconds per layer of each initialiser, at equal bits per weight."""
    rows = []
    for bpw in bpws:
        for init, paths in PATHS.items():
            errors, total = [], 0.0
            for name, weight in weights:
                weight = weight.to(device)
                ranks = layer_ranks(weight.shape[0], weight.shape[1], bpw, paths)
                count = steps if init == "admm" else None
                result, seconds = timed(partial(factorize, weight, ranks, init, steps=count, name=name), device)
                errors.append(relative_error(weight, result))
                total += seconds
            row = {"bpw": bpw, "init": init, "paths": paths, "layers": len(weights)}
            rows.append({**row, "mean_error": sum(errors) / len(errors), "seconds_per_layer": total / len(weights)})
            print(
                f"{bpw:5.2f} {init:10s} {paths:6d} {rows[-1]['mean_error']:11.4f} {total / len(weights):12.3f}",
                flush=True,
            )
    return rows


def write(figures: dict[str, Any], file: FilePath | None) -> str:
    """The figures so far as one line, also in `file`."""
    line = json.dumps({**figures, "machine": machine()})
    if file is not None:
        file.write_text(line + "\n")
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 11008], metavar=("OUT", "IN"))
    parser.add_argument(
        "--ranks", type=int, nargs="*", default=[128, 256, 544], help="for the SVD table; none skips it"
    )
    parser.add_argument("--exact", action="store_true", help="also time a full torch.linalg.svd (minutes on one core)")
    parser.add_argument("--model", type=FilePath, help="checkpoint whose *_proj.weight layers are factored")
    parser.add_argument("--layers", type=int, help="only the first so many layers")
    parser.add_argument("--bpw", type=float, nargs="+", default=[1.0, 0.55])
    parser.add_argument("--config", type=FilePath, help="config.json: one random layer of each of its shapes, summed")
    parser.add_argument("--init", nargs="+", choices=PATHS, default=list(PATHS), help="with --config: only these")
    parser.add_argument("--steps", type=int, help="ADMM steps")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=FilePath, help="also write the JSON line here")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {"device": str(args.device), "threads": torch.get_num_threads(), "shape": args.shape}
    if args.ranks:
        print("spectrum  method              rank   seconds excess error")
        figures["svd"] = bench_svd(tuple(args.shape), args.ranks, args.exact, args.device)
    if args.model:
        print("  bpw init        paths  mean error seconds/layer")
        weights = layers(args.model, args.layers)
        figures["initialisers"] = bench_initialisers(weights, args.bpw, args.steps, args.device)
    if args.config:
        print("  bpw init              shape   seconds  cpu sec.")
        figures["model"] = str(args.config)
        figures["factorization"] = []
        for row in bench_model(args.config, args.bpw, args.init, args.steps, args.device):
            figures["factorization"].append(row)
            write(figures, args.out)
    print(write(figures, args.out))


if __name__ == "__main__":
    main()
