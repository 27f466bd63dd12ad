"""A benchmark of the CPU kernel: its options, the memory's bandwidth, candidates that take turns, and its line of JSON."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import torch
from hf_littlebit.kernels import cpu

from hf_littlebit.report.bench.machine import cpu_name

__all__ = ["Candidates", "CpuRun", "option_parser", "turns"]

BURST = 6  # calls of a candidate in its turn: each meets cold weights, but warm code, as the layers of a model do
Candidates = Dict[str, Callable[[int], object]]


def option_parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options that all of these benchmarks have; `rounds` is the default of one."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--isa", default="auto", help="amx, avx512, avx2, neon, generic")
    parser.add_argument("--out", type=Path, help="also write the JSON line here")
    return parser


class CpuRun:
    """One run: the kernel is loaded, the machine described and its memory measured before anything else.

    Args:
        benchmark: its name. options: parsed ones of `option_parser`.

    Raises:
        SystemExit: where there is no compiled kernel.
    """

    def __init__(self, benchmark: str, options: argparse.Namespace):
        torch.set_num_threads(options.threads)
        if not cpu.load():
            sys.exit("there is no compiled CPU kernel to measure: " + cpu.missing())
        cpu.select(options.isa)
        others = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
        self.options, self.limit = options, bandwidth()
        self.about: Dict[str, Any] = {"benchmark": benchmark, "machine": machine(), "threads": options.threads}
        self.about.update(load_before=others, bandwidth_gb_s=round(self.limit / 1e9, 2))
        print(
            f"{options.threads} threads, {cpu.select()}, memory {self.limit / 1e9:.1f} GB/s; times in µs, ratios: how many "
            "times faster"
        )

    def finish(self, rows: List[dict], missed: List[str], **more: object) -> int:
        """Print the document in one line, and write it where it was asked; the exit code."""
        line = json.dumps({**self.about, **more, "marks_missed": missed, "rows": rows})
        if self.options.out:
            self.options.out.write_text(line + "\n")
        print(line)
        return 0


def turns(candidates: Candidates, rounds: int) -> Dict[str, float]:
    """Median seconds of each candidate; they alternate, so that a busy moment of the machine meets all of them."""
    seconds: Dict[str, List[float]] = {name: [] for name in candidates}
    for index in range(-2, rounds):
        for name, run in candidates.items():
            for call in range(BURST):
                start = time.perf_counter()
                run(BURST * (index + 2) + call)
                if index >= 0 and call:
                    seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def bandwidth() -> float:
    """Bytes per second that a sum over memory reads, the best of ten passes over 1 GiB."""
    data = torch.ones(1 << 27, dtype=torch.int64)
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - start))
    return best


def machine() -> Dict[str, object]:
    """What a record says about where it was made."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    versions["wait_policy"] = os.environ.get("OMP_WAIT_POLICY", "default")
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.system(), "isa": cpu.select(), **versions}
