"""The Triton kernels against dense layers: `python kernels/benchmarks/bench_gpu.py [--bpw 0.1 0.55 1.0] [--out FILE]`.

For every shape, bits per weight and batch: is the product right (against the reference in fp32)? Then every candidate is
captured in a CUDA graph of many calls, each with weights that have left the caches (copies are rotated), the graphs take
turns, and the medians of one run are compared:

    packed      the Triton kernels, bf16 in and out          bf16        cuBLAS, the dense linear
    gemlite     its 1-bit weights, where it is installed     floor       two kernels in a graph that do nothing

`--tune` measures tile sizes first (tuning.py writes them beside the kernels); `--gradient` adds a table of the gradient,
`--shared` one of layers that read the same token, called apart and together.
Prints a table, then one line of JSON with the machine and the versions; `--out` also writes that line to a file.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import torch
from hf_littlebit.kernels import factor_shapes, gpu, reference

SHAPES = ((8192, 28672), (28672, 8192), (4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096))  # out, in
BPW = (0.1, 0.55, 1.0)
BATCHES = (1, 4, 16, 64, 512)  # tokens
COLD = 256 << 20  # bytes of copies that are rotated: several times the L2 cache
NAMES = ("u", "u_tail", "v", "v_tail", "scale_out", "scale_rank", "scale_in")
SHARED = {"q/k/v": ((4096, 4096),) * 3, "gate/up": ((11008, 4096),) * 2}  # (out, in) of layers that read the same x
LIMIT = 5e-3  # of the error's norm, relative to the result's: bf16 in and out
Call = Callable[[int], Any]


def ranks_of(out: int, into: int, bpw: float) -> List[int]:
    """Two paths of equal rank, a multiple of 8, whose layer takes at most `bpw` bits per weight, scales included."""
    rank = (bpw * out * into - 32 * (out + into)) / (2 * (out + into + 16))
    return [max(8, int(rank) // 8 * 8)] * 2


def layer(out: int, into: int, ranks: Sequence[int]) -> List[Optional[torch.Tensor]]:
    """Random packed parts on the GPU; scales near those of a real layer, so that results are near 1."""
    parts: Dict[str, torch.Tensor] = {}
    for name, (shape, dtype) in factor_shapes(into, out, ranks).items():
        if dtype.is_floating_point:
            parts[name] = (0.1 + torch.rand(shape, device="cuda")).to(dtype)
        else:
            info = torch.iinfo(dtype)
            parts[name] = torch.randint(info.min, info.max, shape, device="cuda", dtype=torch.int64).to(dtype)
    return [parts.get(name) for name in NAMES]


def copies_of(make: Callable[[], Any], size: int) -> List[Any]:
    """Enough of them that going through all leaves none in the cache; at most 64, which a graph still holds."""
    return [make() for _ in range(min(64, 1 + COLD // size))]


def captured(call: Call, count: int) -> "torch.cuda.CUDAGraph":
    """A graph of `count` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and gives libraries their workspaces, before anything is recorded
        for index in range(3):
            call(index)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            call(index)
    return graph


def turns(candidates: Dict[str, Call], rounds: int, count: int = 64) -> Dict[str, float]:
    """Median microseconds of one call of each candidate; their graphs alternate."""
    graphs = {name: captured(call, count) for name, call in candidates.items()}
    times: Dict[str, List[float]] = {name: [] for name in candidates}
    for index in range(-2, rounds):
        for name, graph in graphs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            if index >= 0:
                times[name].append(1000 * start.elapsed_time(stop) / count)
    return {name: statistics.median(values) for name, values in times.items()}


def error(call: Callable[[], torch.Tensor], exact: Callable[[], torch.Tensor]) -> float:
    """Of the whole result, relative to its norm."""
    expected = exact()
    return float((call().float() - expected).norm() / expected.norm())


def floor(rounds: int) -> float:
    """Microseconds of two kernel launches in a graph that do next to nothing."""
    one = torch.zeros(1, device="cuda")

    def two(_: int) -> None:
        one.add_(1)
        one.add_(1)

    return turns({"floor": two}, rounds)["floor"]


def gemlite_linear(out: int, into: int) -> Any:
    """A gemlite layer with 1-bit weights in groups of 128, or None with the reason printed once."""
    try:
        from gemlite.core import DType, GemLiteLinearTriton

        made = GemLiteLinearTriton(
            W_nbits=1,
            group_size=128,
            in_features=into,
            out_features=out,
            input_dtype=DType.BF16,
            output_dtype=DType.BF16,
        )
        bits = torch.randint(0, 2, (out, into), device="cuda", dtype=torch.uint8)
        scales = torch.rand(out, into // 128, device="cuda").bfloat16().view(-1, 1)
        made.pack(bits, scales, torch.full_like(scales, 0.5), bias=None, fma_mode=False)
        return made
    except Exception as reason:  # not installed, or another version than this was written for
        if not gemlite_linear.__dict__.setdefault("said", False):
            print(f"gemlite is left out: {type(reason).__name__}: {reason}")
            gemlite_linear.__dict__["said"] = True
        return None


def measure(out: int, into: int, bpws: Sequence[float], rounds: int, gradient: bool) -> Iterator[dict]:
    """One row per batch and bits per weight; all candidates of a batch take turns."""
    dense = copies_of(lambda: torch.randn(out, into, device="cuda").bfloat16(), 2 * out * into)
    rival = None if gradient else gemlite_linear(out, into)
    rivals = [rival] if rival is None else [rival, *copies_of(lambda: gemlite_linear(out, into), out * into // 8)[1:]]
    ranks = {bpw: ranks_of(out, into, bpw) for bpw in bpws}
    packed = {
        bpw: copies_of(lambda r=ranks[bpw]: layer(out, into, r), sum(ranks[bpw]) * (out + into) // 8) for bpw in bpws
    }
    for batch in BATCHES:
        x = torch.randn(batch, out if gradient else into, device="cuda").bfloat16()
        wrong, candidates = {}, {}
        if gradient:
            candidates["bf16"] = lambda i, x=x: x @ dense[i % len(dense)]
        else:
            candidates["bf16"] = lambda i, x=x: torch.nn.functional.linear(x, dense[i % len(dense)])
        if rival is not None:
            candidates["gemlite"] = lambda i, x=x: rivals[i % len(rivals)](x)
        for bpw in bpws:
            c, r = packed[bpw], ranks[bpw]
            if gradient:
                run = lambda i, c=c, r=r, x=x: gpu.littlebit_linear_grad(x, *c[i % len(c)], r)  # noqa: E731
                wrong[bpw] = error(lambda: run(0), lambda: reference.littlebit_linear_grad(x.float(), *c[0], r))  # noqa: B023
            else:
                run = lambda i, c=c, r=r, x=x: gpu.littlebit_linear(x, *c[i % len(c)], None, r)  # noqa: E731
                wrong[bpw] = error(lambda: run(0), lambda: reference.littlebit_linear(x.float(), *c[0], None, r))  # noqa: B023
            assert wrong[bpw] < LIMIT, f"{out}x{into} at {bpw}, batch {batch}: error {wrong[bpw]:.1e}, limit {LIMIT}"
            candidates[f"packed {bpw}"] = run
        times = turns(candidates, rounds)
        for bpw in bpws:
            row = {"out": out, "in": into, "batch": batch, "bpw": bpw, "ranks": ranks[bpw], "error": wrong[bpw]}
            row.update({"packed": times[f"packed {bpw}"], "bf16": times["bf16"], "gemlite": times.get("gemlite")})
            yield {**row, "gradient": gradient}


def measure_shared(name: str, bpw: float, rounds: int) -> dict:
    """A row: microseconds of one call for each layer, and of one call for all, of one token."""
    sizes = [(out, into, ranks_of(out, into, bpw)) for out, into in SHARED[name]]
    size = sum(sum(ranks) * (out + into) // 8 for out, into, ranks in sizes)
    groups = copies_of(lambda: [(*layer(*one), None, one[2]) for one in sizes], size)
    x = torch.randn(1, sizes[0][1], device="cuda").bfloat16()

    def apart(index: int) -> List[torch.Tensor]:
        return [gpu.littlebit_linear(x, *one) for one in groups[index % len(groups)]]

    def together(index: int) -> List[torch.Tensor]:
        return gpu.littlebit_linears(x, groups[index % len(groups)])

    wrong = error(lambda: torch.cat(together(0), -1), lambda: torch.cat(apart(0), -1).float())
    assert wrong < LIMIT, f"{name} at {bpw}: error {wrong:.1e}, limit {LIMIT}"
    times = turns({"apart": apart, "together": together}, rounds)
    return {"layers": name, "batch": 1, "bpw": bpw, "sizes": sizes, "error": wrong, **times}


def machine() -> Dict[str, object]:
    import triton

    versions = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
    return {"gpu": torch.cuda.get_device_name(), **versions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bpw", type=float, nargs="+", default=list(BPW))
    parser.add_argument("--shapes", nargs="+", default=[f"{out}x{into}" for out, into in SHAPES], help="out x in")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--gradient", action="store_true", help="the gradient with respect to x too")
    parser.add_argument(
        "--shared", action="store_true", help="layers that read the same token, apart and together, too"
    )
    parser.add_argument("--tune", action="store_true", help="measure tile sizes first")
    parser.add_argument("--out", type=Path, help="also write the JSON line here")
    options = parser.parse_args()
    if not torch.cuda.is_available() or not gpu.load():
        print("this measures a CUDA or ROCm GPU with triton, and there is none", file=sys.stderr)
        return 1
    shapes = [tuple(int(side) for side in shape.split("x")) for shape in options.shapes]
    if options.tune:
        from hf_littlebit.kernels import tuning

        layers = [(out, into, ranks_of(out, into, bpw)) for out, into in shapes for bpw in options.bpw]
        print(f"wrote {tuning.tune(layers, BATCHES, gradient=options.gradient)}")
    least, rows = floor(options.rounds), []
    print(
        f"{torch.cuda.get_device_name()}; two empty launches {least:.2f} µs; times in µs, ratios: how many times faster"
    )
    print("   out x in     batch   bpw    packed      bf16   gemlite   x bf16  x floor    error")
    with torch.inference_mode():
        for gradient in (False, True) if options.gradient else (False,):
            print("gradient" if gradient else "forward")
            for out, into in shapes:
                for row in measure(out, into, options.bpw, options.rounds, gradient):
                    rival = f"{row['gemlite']:10.1f}" if row["gemlite"] else "         -"
                    print(
                        f"{out:6}x{into:<6}{row['batch']:5}{row['bpw']:6}{row['packed']:10.1f}{row['bf16']:10.1f}{rival}"
                        f"{row['bf16'] / row['packed']:8.1f}x{row['packed'] / least:8.1f}x   {row['error']:.0e}",
                        flush=True,
                    )
                    rows.append({**row, "x_bf16": round(row["bf16"] / row["packed"], 2)})
                torch.cuda.empty_cache()
        shared = [measure_shared(name, bpw, options.rounds) for name in SHARED for bpw in options.bpw if options.shared]
    for row in shared:
        print(
            f"{row['layers']:8}{row['bpw']:6}: apart {row['apart']:.1f} µs, together {row['together']:.1f} µs, "
            f"{row['apart'] / row['together']:.2f}x, {row['together'] / least:.1f}x floor"
        )
    line = json.dumps({"benchmark": "gpu", "machine": machine(), "floor_us": least, "rows": rows, "shared": shared})
    if options.out:
        options.out.write_text(line + "\n")
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
