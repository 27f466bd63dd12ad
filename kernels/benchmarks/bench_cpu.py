"""The CPU kernel against dense torch: `python kernels/benchmarks/bench_cpu.py [--threads 1] [--rounds 12] [--out FILE]`.

For every shape and bits per weight: is the product right (against fp64)? Then the candidates take turns, each with weights
that have left the caches (copies are rotated), and the medians of one run are compared:

    packed      the compiled kernel             bf16, fp32    torch's dense linear
    reference   the product in plain torch      (batch 1 only: it is slow)
    bandwidth   the time in which the machine's memory, as measured here, delivers the dense bf16 weight

Prints a table, then one line of JSON with the machine and the versions; `--out` also writes that line to a file.
"""

import sys
from typing import Any, Dict, Iterator, List, Tuple

import torch
from cpu_run import Candidates, CpuRun, option_parser, turns
from hf_littlebit.kernels import PARTS, PackedLayer, cpu, factor_shapes, places, reference, unpack_signs

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096))  # out, in
BPW = (0.1, 0.3, 0.55, 1.0)
BATCHES = (1, 4, 16, 64)  # tokens
MARKS = {0.1: (80, 30), 0.3: (40, 16), 0.55: (26, 10), 1.0: (15, 6)}  # x bf16 linear, x a mat-vec at memory bandwidth
COLD = 768 << 20  # bytes of copies that are rotated: more than a last-level cache holds


def ranks_of(out: int, into: int, bpw: float) -> List[int]:
    """Two paths of equal rank, a multiple of 8, whose layer takes at most `bpw` bits per weight, scales included."""
    rank = (bpw * out * into - 32 * (out + into)) / (2 * (out + into + 16))
    return [max(8, int(rank) // 8 * 8)] * 2


def layer(out: int, into: int, ranks: List[int], seed: int) -> PackedLayer:
    """A layer of random bits, without bias."""
    draw = torch.Generator().manual_seed(seed)
    parts: Dict[str, Any] = dict.fromkeys(PARTS)
    for name, (shape, dtype) in factor_shapes(into, out, ranks).items():
        if dtype == torch.int32:
            parts[name] = torch.randint(-(2**31), 2**31, shape, generator=draw, dtype=torch.int64).to(dtype)
        elif dtype == torch.uint8:
            parts[name] = torch.randint(0, 256, shape, generator=draw, dtype=torch.int64).to(dtype)
        else:
            parts[name] = torch.randn(shape, generator=draw).to(dtype)
    return PackedLayer(**parts, bias=None, ranks=ranks)


def clone(layer: PackedLayer) -> PackedLayer:
    """The layer in other memory."""
    return PackedLayer._make([*[None if part is None else part.clone() for part in layer[:7]], None, layer.ranks])


def error(layer: PackedLayer, x: torch.Tensor) -> float:
    """Of the fp32 product, relative to the sum of magnitudes."""
    signs, y, size = unpack_signs(layer.v, layer.v_tail, x.shape[-1], torch.float64), 0.0, 0.0
    scales_out, scale_rank, scales_in = layer.scale_out.double(), layer.scale_rank.double(), layer.scale_in.double()
    for place, scale_out, scale_in in zip(places(layer.ranks), scales_out, scales_in):  # noqa: B905 Python 3.9
        tail = None if layer.u_tail is None else layer.u_tail[place.tail]
        side = unpack_signs(layer.u[place.words], tail, place.rank, torch.float64)
        scaled, middle = x.double() * scale_in, scale_rank[place.columns]
        y = y + (scaled @ signs[:, place.columns] * middle) @ side * scale_out
        size = size + scaled.abs().sum(-1, keepdim=True) * middle.abs().sum() * scale_out.abs()
    return ((cpu.products(x, (layer,))[0] - y).abs() / size).max().item()


def measure(out: int, into: int, rounds: int) -> Iterator[dict]:
    """One row per batch and bits per weight; all bits per weight of a batch and the dense layers in the same turns."""
    dense = [torch.randn(out, into).bfloat16() for _ in range(1 + COLD // (2 * out * into))]
    single = [torch.randn(out, into) for _ in range(1 + COLD // (4 * out * into))]
    ranks = {bpw: ranks_of(out, into, bpw) for bpw in BPW}
    packed = {}
    for bpw in BPW:
        copies = [layer(out, into, ranks[bpw], seed) for seed in range(2)]
        count = 1 + COLD // sum(part.nbytes for part in copies[0][:7] if part is not None)
        copies += [clone(copies[i % 2]) for i in range(count - 2)]
        packed[bpw] = copies
    for batch in BATCHES:
        x = torch.randn(batch, into, generator=torch.Generator().manual_seed(1))
        half = x.bfloat16()
        wrong = {bpw: error(packed[bpw][0], x) for bpw in BPW}
        for bpw in BPW:
            assert wrong[bpw] < 1e-6, f"{out}x{into} at {bpw}, batch {batch}: error {wrong[bpw]:.1e}, limit 1e-6"
        candidates: Candidates = {
            "bf16": lambda i, half=half: torch.nn.functional.linear(half, dense[i % len(dense)]),
            "fp32": lambda i, x=x: torch.nn.functional.linear(x, single[i % len(single)]),
        }
        plain: Candidates = {}
        for bpw in BPW:
            c = packed[bpw]
            candidates[f"packed {bpw}"] = lambda i, c=c, x=half: cpu.products(x, (c[i % len(c)],))
            plain[f"reference {bpw}"] = lambda i, c=c, x=half: reference.products(x, (c[0],))
        times = turns(candidates, rounds if batch == 1 else max(3, rounds // 3))
        if batch == 1:
            times.update(turns(plain, 1))
        for bpw in BPW:
            row = {"out": out, "in": into, "batch": batch, "bpw": bpw, "ranks": ranks[bpw], "error": wrong[bpw]}
            row.update({name: round(times[name] * 1e6, 1) for name in ("bf16", "fp32")})
            row["packed"] = round(times[f"packed {bpw}"] * 1e6, 1)
            row["reference"] = round(times[f"reference {bpw}"] * 1e6, 1) if batch == 1 else None
            yield row


def call() -> Dict[str, float]:
    """Microseconds of a call that has next to nothing to compute: 32 x 32."""
    half, weight, one = torch.randn(1, 32).bfloat16(), torch.randn(32, 32).bfloat16(), (layer(32, 32, [8], 0),)
    candidates: Candidates = {
        "bf16": lambda _: [torch.nn.functional.linear(half, weight) for _ in range(100)],
        "packed": lambda _: [cpu.products(half, one) for _ in range(100)],
    }
    return {name: round(seconds * 1e4, 2) for name, seconds in turns(candidates, 10).items()}


def show(row: dict, limit: float) -> Tuple[float, float]:
    """Print one row of the table; how many times faster than bf16, and than the memory's bound of it."""
    faster = row["bf16"] / row["packed"]
    bound = 2e6 * row["out"] * row["in"] / limit / row["packed"]
    slow = f"{row['reference'] / row['packed']:7.0f}x" if row["reference"] else "       -"
    print(
        f"{row['out']:6}x{row['in']:<6}{row['batch']:5}{row['bpw']:6}{row['packed']:10.0f}{row['bf16']:10.0f}{row['fp32']:10.0f}"
        f"{faster:9.1f}x{row['fp32'] / row['packed']:8.1f}x{bound:9.1f}x{slow}   {row['error']:.0e}",
        flush=True,
    )
    return faster, bound


def main() -> int:
    run = CpuRun("cpu", option_parser(__doc__.split("\n")[0], rounds=12).parse_args())
    options = run.options
    print("   out x in     batch   bpw    packed      bf16      fp32   x bf16   x fp32  x bound  x ref.   error")
    rows, missed = [], []
    with torch.inference_mode():
        calls = call()
        for out, into in SHAPES:
            for row in measure(out, into, options.rounds):
                batch, (faster, bound) = row["batch"], show(row, run.limit)
                rows.append({**row, "x_bf16": round(faster, 2), "x_bound": round(bound, 2)})
                marks = MARKS[row["bpw"]] if (batch, out, into) == (1, 4096, 4096) else (1.0 if batch > 1 else 0, 0)
                if options.threads == 1 and (faster < marks[0] or bound < marks[1]):
                    missed.append(f"{out}x{into} batch {batch} bpw {row['bpw']}")
    print(f"a call with nothing to compute: packed {calls['packed']} µs, bf16 {calls['bf16']} µs")
    return run.finish(rows, missed, call_us=calls)


if __name__ == "__main__":
    sys.exit(main())
