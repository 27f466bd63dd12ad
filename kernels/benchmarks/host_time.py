"""What one eager call costs the host: `python kernels/benchmarks/host_time.py [--out FILE]`.

On a GPU a token of a 7B model is 224 calls of a linear layer, and launching them takes longer than computing them. Host time
is therefore measured by itself: many calls in a row, nothing waited for, in blocks so short that the queue never fills, the
candidates in turns, the median of the blocks.

    nn.Linear               bf16, the mark to reach                     three of them   as for q, k and v
    LittleBitLinear         the module, one path (ADMM's) and two       q/k/v           three modules, apart and sharing x
    gpu.products            the kernels' door: checks and launches, without the module and the registered operator

Without a GPU the launches go to a driver that does nothing (idle_driver.py): what they cost before the driver is real.
Prints a table in microseconds, then one line of JSON.
"""

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import torch
from bench_gpu import machine, ranks_of
from record import Record
from torch import nn

SIZE = 4096  # in and out features
BPW = 0.1
TOKENS = (1, 32)
GUARDS = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}
Call = Callable[[], Any]


def module(paths: int, device: str) -> Any:
    """A LittleBitLinear of random bits."""
    from hf_littlebit import LittleBitLinear

    made = LittleBitLinear(SIZE, SIZE, ranks_of(SIZE, SIZE, BPW, paths), bias=False, device=device).requires_grad_(
        False
    )
    for value in made.parameters():
        if value.is_floating_point():
            value.data.fill_(0.01)
        else:
            value.data.random_(torch.iinfo(value.dtype).min, torch.iinfo(value.dtype).max)
    return made


def calls(tokens: int, device: str) -> Dict[str, Call]:
    """The candidates, each a call with an x of so many tokens."""
    from hf_littlebit.kernels import gpu

    from hf_littlebit.layers.shared_input import share_inputs

    x = torch.randn(1, tokens, SIZE, device=device).bfloat16()
    dense = [nn.Linear(SIZE, SIZE, bias=False, device=device, dtype=torch.bfloat16) for _ in range(3)]
    one, two = module(1, device), module(2, device)
    apart = [module(1, device) for _ in range(3)]
    names = ("q_proj", "k_proj", "v_proj")
    sharing = nn.ModuleDict({name: module(1, device) for name in names})
    share_inputs(sharing)
    layers = [sharing[name] for name in names]
    layer = (one.packed(),)

    def each(of: Any) -> Call:
        return lambda: [layer(x) for layer in of]

    found: Dict[str, Call] = {
        "nn.Linear": lambda: dense[0](x),
        "LittleBitLinear, one path": lambda: one(x),
        "LittleBitLinear, two paths": lambda: two(x),
        "gpu.products, one path": lambda: gpu.products(x, layer),
        "q/k/v: nn.Linear": each(dense),
        "q/k/v: apart": each(apart),
        "q/k/v: sharing x": each(layers),
    }
    # On a CPU nn.Linear computes: its time is not the host's.
    return found if device == "cuda" else {name: call for name, call in found.items() if "nn.Linear" not in name}


def measure(found: Dict[str, Call], device: str, blocks: int, count: int, attempt: Any) -> Dict[str, float]:
    """Median host microseconds of one call of each candidate; those that fail are left out."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    works = {}
    for name, call in found.items():
        # Twice: the first call compiles, and what a layer remembers from it serves the second.
        if attempt(name, lambda call=call: [call() for _ in range(3)]) is not None:
            works[name] = call
    times: Dict[str, List[float]] = {name: [] for name in works}
    collect = gc.isenabled()
    gc.disable()
    try:
        for block in range(-1, blocks):
            for name, call in works.items():
                wait()
                start = time.perf_counter()
                for _ in range(count):
                    call()
                spent = time.perf_counter() - start
                if block >= 0:
                    times[name].append(1e6 * spent / count)
    finally:
        wait()
        if collect:
            gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=20, help="of calls in a row (default: 20)")
    parser.add_argument("--calls", type=int, default=200, help="of a block (default: 200)")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="of x (default: 1 32)")
    parser.add_argument("--idle", action="store_true", help="the driver that does nothing even where there is a GPU")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not options.idle else "cpu"
    if device == "cpu":
        try:
            from idle_driver import install

            install()
        except ImportError as error:
            print(
                f"without a GPU this needs triton, which does not load ({error}); pip install triton", file=sys.stderr
            )
            return 1
    about = {"machine": machine(device), "driver": "real" if device == "cuda" else "idle", "size": SIZE, "bpw": BPW}
    record = Record("host_time", options.out, about)
    for guard, inside in GUARDS.items():
        for tokens in options.tokens:
            with inside():

                def attempt(name: str, work: Call, place: str = f"{guard}, {tokens} tokens") -> Any:
                    return record.attempt(f"{name} ({place})", work)

                found = measure(calls(tokens, device), device, options.blocks, options.calls, attempt)
            for name, spent in found.items():
                record.add({"call": name, "tokens": tokens, "guard": guard, "us": round(spent, 2)})
    print(f"host µs of one call, {SIZE} x {SIZE}, {BPW} bits per weight, {about['driver']} driver")
    places = [(guard, tokens) for guard in GUARDS for tokens in options.tokens]
    print(" " * 32 + "".join(f"{guard + ', ' + str(tokens):>20}" for guard, tokens in places))
    for name in dict.fromkeys(row["call"] for row in record.rows):
        cells = {(row["guard"], row["tokens"]): row["us"] for row in record.rows if row["call"] == name}
        print(f"{name:32}" + "".join(f"{cells[place]:20.1f}" if place in cells else f"{'-':>20}" for place in places))
    return record.finish()


if __name__ == "__main__":
    sys.exit(main())
