"""Whole models on a GPU, packed against dense: `python kernels/benchmarks/models_gpu.py llama2-7b [--bpw 0.1] [--out FILE]`.

Random weights of the shape of examples/configs/NAME.json, loaded once; then `littlebit bench`'s measurement in every setting:
plain `generate` as a user calls it, eager, a long prompt, batches of 8 and 32, and torch.compile, which takes longest to get
ready and comes last. `--warm` only compiles, so that the caches on the disk serve the run that measures.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, List

import torch
from record import Record

CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "configs"
ROUNDS = 3


def settings() -> List[Any]:
    from hf_littlebit.report.bench.contender import Setting

    return [
        Setting(32, 32, 1, "eager"),
        Setting(32, 32, 1, "plain"),
        Setting(512, 8, 1, "plain"),
        Setting(512, 8, 1, "eager"),
        Setting(32, 16, 8, "plain"),
        Setting(32, 16, 32, "plain"),
        Setting(32, 16, 8, "eager"),
        Setting(32, 16, 32, "eager"),
        Setting(32, 32, 1, "compiled"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", help="of a file in examples/configs, without .json; or a path of a config.json")
    parser.add_argument("--bpw", type=float, default=0.1)
    parser.add_argument("--modes", nargs="+", default=["eager", "plain", "compiled"], help="settings to measure")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, help="begin no setting after so many")
    parser.add_argument("--warm", action="store_true", help="only compile")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("this measures a CUDA or ROCm GPU, and there is none; --device cpu tries the script", file=sys.stderr)
        return 1
    from hf_littlebit import LittleBitConfig
    from hf_littlebit.report.bench.bench import compare, load_models
    from hf_littlebit.report.bench.machine import machine

    about = {"model": options.name, "machine": machine(options.device)}
    record = Record("models", options.out, about, options.seconds)
    file = CONFIGS / f"{options.name}.json"
    path = str(file if file.exists() else options.name)
    chosen = [setting for setting in settings() if setting.mode in options.modes]
    models = load_models(path, LittleBitConfig(bpw=options.bpw), chosen, device=options.device)
    record.document["load_seconds"] = {name: round(one.seconds, 1) for name, one in models.contenders.items()}
    record.document["bpw"] = models.bpw
    record.save()
    for setting in chosen:
        start = time.monotonic()
        if options.warm:
            for name, one in models.contenders.items():
                tokens = one.tokens(setting)
                record.attempt(f"{name}, {setting}", lambda: one.generate(tokens, setting))  # noqa: B023
            continue
        # Where the time goes is asked once: it is the same code in every eager setting.
        shares = int(setting == chosen[0])
        found = record.attempt(str(setting), lambda: compare(models, setting, options.rounds, shares))  # noqa: B023
        if found is None:
            continue
        row = found.as_dict()
        for known in ("benchmark", "machine", "model", "bpw"):
            row.pop(known)
        record.add({**row, "seconds": round(time.monotonic() - start, 1)})
        print(f"{found.table()}\n", flush=True)
    return record.finish()


if __name__ == "__main__":
    sys.exit(main())
