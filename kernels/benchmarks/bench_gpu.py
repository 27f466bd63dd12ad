"""The Triton kernels against dense layers: `python kernels/benchmarks/bench_gpu.py [--bpw 0.1 0.55 1.0] [--out FILE]`.

For every shape, batch, bits per weight and number of paths: is the product right (against the reference in fp32)? Then every
candidate is captured in a CUDA graph of many calls, each with weights that have left the caches (copies are rotated), the
graphs take turns, and the medians of one run are compared:

    packed      the Triton kernels, bf16 in and out          bf16        cuBLAS, the dense linear
    gemlite     its 1-bit weights, where it is installed     floor       two kernels in a graph that do nothing

One path is what the default initialiser makes. `--gradient` adds the gradient at 512 and 2,048 tokens, `--shared` layers that
read the same token, called apart and together; `--tune` measures tile sizes first (tuner.py writes them to the user's folder),
with half of `--seconds`.
With `--seconds` the rows that the project promises something about come first, and what there is no time for is named.
`--warm 3/16` measures nothing: it runs the third of sixteen parts of all products once, so that sixteen processes side by
side compile the kernels. Prints a table, then one line of JSON with the machine and the versions; `--out` also writes it.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from hf_littlebit.kernels import PARTS, PackedLayer, factor_shapes, gpu, reference
from record import Record
from turns import MOST, floor, turns

from hf_littlebit.report.bench.machine import machine as describe
from hf_littlebit.report.bench.machine import wait

SHAPES = ((8192, 28672), (28672, 8192), (4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096))  # out, in
BPW = (0.1, 0.55, 1.0)
PATHS = (1, 2)
BATCHES = (1, 4, 16, 64, 512, 2048)  # tokens
GRADIENT = (512, 2048)  # tokens of the gradient: there is none at a few
DEVICE = "cuda"
COLD = 256 << 20  # bytes of copies that are rotated: several times the L2 cache
SHARED = {"q/k/v": ((4096, 4096),) * 3, "gate/up": ((11008, 4096),) * 2}  # (out, in) of layers that read the same x
LIMIT = 5e-3  # of the error's norm, relative to the result's: bf16 in and out
Call = Callable[[int], Any]


class Place(NamedTuple):
    """What is measured in turns: a shape, a number of tokens, forward or gradient."""

    out: int
    into: int
    batch: int
    gradient: bool = False


def marked(place: Place) -> bool:
    """Whether the project promises something about the place: see check_gpu.py."""
    large = (place.out, place.into) in ((8192, 28672), (11008, 4096), (4096, 4096))
    return place.batch in (16, 64) or (large and place.batch in (1, 4, *GRADIENT))


def places(shapes: Sequence[Tuple[int, int]], batches: Sequence[int], gradient: bool) -> List[Place]:
    """All places, those with a mark first, and among them the forward before the gradient, few tokens before many."""
    found = [Place(out, into, batch) for batch in batches for out, into in shapes]
    if gradient:
        found += [Place(out, into, batch, True) for batch in batches if batch in GRADIENT for out, into in shapes]
    return sorted(found, key=lambda place: (not marked(place), place.gradient, place.batch))


def ranks_of(out: int, into: int, bpw: float, paths: int) -> List[int]:
    """Paths of equal rank, a multiple of 8, whose layer takes at most `bpw` bits per weight, scales included."""
    rank = (bpw * out * into - 16 * paths * (out + into)) / (paths * (out + into + 16))
    return [max(8, int(rank) // 8 * 8)] * paths


def layer(out: int, into: int, ranks: Sequence[int]) -> PackedLayer:
    """A layer of random bits on the GPU, without bias; scales near those of a real layer, so that results are near 1."""
    parts: Dict[str, Any] = dict.fromkeys(PARTS)
    for name, (shape, dtype) in factor_shapes(into, out, ranks).items():
        if dtype.is_floating_point:
            parts[name] = (0.1 + torch.rand(shape, device=DEVICE)).to(dtype)
        else:
            info = torch.iinfo(dtype)
            parts[name] = torch.randint(info.min, info.max, shape, device=DEVICE, dtype=torch.int64).to(dtype)
    return PackedLayer(**parts, bias=None, ranks=ranks)


def copies_of(make: Callable[[], Any], size: int) -> List[Any]:
    """Enough of them that going through all leaves none in the cache; at most 64, which a graph still holds."""
    return [make() for _ in range(min(MOST, 1 + COLD // size))]


@functools.lru_cache(maxsize=None)
def dense_copies(out: int, into: int) -> List[torch.Tensor]:
    return copies_of(lambda: torch.randn(out, into, device=DEVICE).bfloat16(), 2 * out * into)


@functools.lru_cache(maxsize=None)
def packed_copies(out: int, into: int, ranks: Tuple[int, ...]) -> List[Any]:
    return copies_of(lambda: layer(out, into, ranks), sum(ranks) * (out + into) // 8)


def error(call: Callable[[], torch.Tensor], exact: Callable[[], torch.Tensor]) -> float:
    """Of the whole result, relative to its norm."""
    expected = exact()
    return float((call().float() - expected).norm() / expected.norm())


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
        bits = torch.randint(0, 2, (out, into), device=DEVICE, dtype=torch.uint8)
        scales = torch.rand(out, into // 128, device=DEVICE).bfloat16().view(-1, 1)
        made.pack(bits, scales, torch.full_like(scales, 0.5), bias=None, fma_mode=False)
        return made
    except Exception as reason:  # not installed, or another version than this was written for
        if not gemlite_linear.__dict__.setdefault("said", False):
            print(f"gemlite is left out: {type(reason).__name__}: {reason}")
            gemlite_linear.__dict__["said"] = True
        return None


@functools.lru_cache(maxsize=None)
def rival_copies(out: int, into: int) -> List[Any]:
    """gemlite's layers, or none."""
    first = gemlite_linear(out, into)
    return [] if first is None else [first, *copies_of(lambda: gemlite_linear(out, into), out * into // 8)[1:]]


def product(place: Place, ranks: Tuple[int, ...], x: torch.Tensor) -> Tuple[Call, Callable[[], torch.Tensor]]:
    """The call of the packed layer's copies, and the exact result of the first."""
    copies = packed_copies(place.out, place.into, ranks)
    return (
        lambda index: gpu.products(x, (copies[index % len(copies)],), place.gradient)[0],
        lambda: reference.products(x.float(), (copies[0],), place.gradient)[0],
    )


def input_of(place: Place) -> torch.Tensor:
    return torch.randn(place.batch, place.out if place.gradient else place.into, device=DEVICE).bfloat16()


def measure(place: Place, kinds: Sequence[Tuple[float, int]], rounds: int, record: Record) -> List[dict]:
    """A row for each (bits per weight, paths) in `kinds`; all candidates take turns. A wrong or failing one is recorded."""
    x, dense = input_of(place), dense_copies(place.out, place.into)
    rivals = [] if place.gradient else rival_copies(place.out, place.into)
    candidates: Dict[str, Call] = {}
    if place.gradient:
        candidates["bf16"] = lambda index: x @ dense[index % len(dense)]
    else:
        candidates["bf16"] = lambda index: torch.nn.functional.linear(x, dense[index % len(dense)])
    if rivals:
        candidates["gemlite"] = lambda index: rivals[index % len(rivals)](x)
    rows = []
    for bpw, paths in kinds:
        ranks = tuple(ranks_of(place.out, place.into, bpw, paths))
        call, exact = product(place, ranks, x)
        what = f"{place} at {bpw}, {paths} path(s)"
        wrong = record.attempt(what, lambda call=call, exact=exact: error(lambda: call(0), exact))
        if wrong is None:
            continue
        if not wrong < LIMIT:
            record.failures.append({"what": what, "error": f"the product is wrong by {wrong:.1e}, limit {LIMIT}"})
        name = f"packed {bpw} {paths}"
        candidates[name] = call
        rows.append((name, {"bpw": bpw, "paths": paths, "ranks": list(ranks), "error": wrong}))
    times = turns(candidates, rounds)
    about = {"out": place.out, "in": place.into, "batch": place.batch, "gradient": place.gradient}
    found = []
    for name, row in rows:
        mine, theirs = round(times[name], 2), round(times["bf16"], 2)
        rival = round(times["gemlite"], 2) if rivals else None
        found.append(
            {**about, **row, "packed": mine, "bf16": theirs, "gemlite": rival, "x_bf16": round(theirs / mine, 2)}
        )
    return found


def measure_shared(name: str, bpw: float, paths: int, rounds: int) -> dict:
    """A row: microseconds of one call for each layer, and of one call for all, of one token."""
    sizes = [(out, into, ranks_of(out, into, bpw, paths)) for out, into in SHARED[name]]
    size = sum(sum(ranks) * (out + into) // 8 for out, into, ranks in sizes)
    groups = copies_of(lambda: [layer(*one) for one in sizes], size)
    x = torch.randn(1, sizes[0][1], device=DEVICE).bfloat16()

    def apart(index: int) -> List[torch.Tensor]:
        return [gpu.products(x, (one,))[0] for one in groups[index % len(groups)]]

    def together(index: int) -> List[torch.Tensor]:
        return gpu.products(x, groups[index % len(groups)])

    wrong = error(lambda: torch.cat(together(0), -1), lambda: torch.cat(apart(0), -1).float())
    if not wrong < LIMIT:
        raise ValueError(f"together and apart differ by {wrong:.1e}, limit {LIMIT}")
    times = turns({"apart": apart, "together": together}, rounds)
    return {"layers": name, "batch": 1, "bpw": bpw, "paths": paths, "sizes": sizes, "error": wrong, **times}


def warm(share: str, found: Sequence[Place], kinds: Sequence[Tuple[float, int]], record: Record) -> None:
    """Run one of several parts ("3/16": the third of sixteen) of all products once, so that they are compiled."""
    part, parts = map(int, share.split("/"))
    # Kernels depend on the tokens, the paths and the bits more than on the shape: shapes stay in one process.
    keys = sorted({(place.batch, place.gradient, *kind) for place in found for kind in kinds}, reverse=True)
    mine = set(keys[part - 1 :: parts])
    for place in found:
        for bpw, paths in kinds:
            if (place.batch, place.gradient, bpw, paths) not in mine:
                continue
            ranks = tuple(ranks_of(place.out, place.into, bpw, paths))
            one = layer(place.out, place.into, ranks)
            x = input_of(place)
            what = f"{place} at {bpw}, {paths} path(s)"
            record.attempt(what, lambda: gpu.products(x, (one,), place.gradient))  # noqa: B023
    if part == 1:
        for name in SHARED:
            for bpw, paths in kinds:
                layers = [layer(*size, ranks_of(*size, bpw, paths)) for size in SHARED[name]]
                x = torch.randn(1, SHARED[name][0][1], device=DEVICE).bfloat16()
                record.attempt(f"{name} at {bpw}, {paths} path(s)", lambda: gpu.products(x, layers))  # noqa: B023
    wait(torch.device(DEVICE))


def tune(shapes: Sequence[Tuple[int, int]], kinds: Sequence[Tuple[float, int]], options: argparse.Namespace) -> None:
    """Measure tile sizes for what this benchmark runs, into the user's folder."""
    from hf_littlebit.kernels import tuner

    layers = [(*shape, ranks_of(*shape, bpw, paths)) for shape in shapes for bpw, paths in kinds]
    groups: List[Any] = []
    for sizes in SHARED.values() if options.shared else ():
        outs = tuple(out for out, _ in sizes)
        groups += [
            (outs, sizes[0][1], tuple(tuple(ranks_of(*size, bpw, paths)) for size in sizes)) for bpw, paths in kinds
        ]
    limit = options.seconds or float("inf")
    result = tuner.tune(layers, groups, options.batches, gradient=options.gradient, seconds=limit)
    for found in result.found:
        print(f"{found.case.key}: {found.before:.1f} -> {found.after:.1f} µs, {tuple(found.config)}")
    print(f"wrote {result.path}", flush=True)


def machine(device: str = DEVICE) -> Dict[str, object]:
    """The device and the versions, also where there is no GPU."""
    import triton

    return {**describe(device), "triton": triton.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bpw", type=float, nargs="+", default=list(BPW))
    parser.add_argument("--paths", type=int, nargs="+", default=list(PATHS), help="per layer; ADMM's default is one")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="numbers of tokens")
    parser.add_argument("--shapes", nargs="+", default=[f"{out}x{into}" for out, into in SHAPES], help="out x in")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--gradient", action="store_true", help="the gradient with respect to x too")
    parser.add_argument(
        "--shared", action="store_true", help="layers that read the same token, apart and together, too"
    )
    parser.add_argument("--tune", action="store_true", help="measure tile sizes first")
    parser.add_argument("--seconds", type=float, help="begin no row after so many")
    parser.add_argument("--warm", metavar="PART/PARTS", help="only compile, and only this part")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    if not torch.cuda.is_available() or not gpu.load():
        print("this measures a CUDA or ROCm GPU with triton, and there is none", file=sys.stderr)
        return 1
    shapes = [tuple(int(side) for side in shape.split("x")) for shape in options.shapes]
    kinds = [(bpw, paths) for paths in options.paths for bpw in options.bpw]
    found = places(shapes, options.batches, options.gradient)
    if options.tune:
        if options.seconds:
            options.seconds /= 2
        tune(shapes, kinds, options)
    record = Record("gpu", options.out, {"machine": machine()}, options.seconds)
    with torch.inference_mode():
        if options.warm:
            warm(options.warm, found, kinds, record)
            return 1 if record.failures else 0
        least = record.document["floor_us"] = round(floor(options.rounds), 3)
        print(f"{record.document['machine']['device']}; two empty launches {least:.2f} µs; times in µs")
        print("             out x in     batch   bpw paths    packed      bf16   gemlite   x bf16  x floor    error")
        shared = [(name, bpw, paths) for name in SHARED for bpw, paths in kinds if options.shared]
        first = sum(map(marked, found))
        for place in found[:first]:
            show(record, record.attempt(str(place), lambda: measure(place, kinds, options.rounds, record)), least)  # noqa: B023
        for name, bpw, paths in shared:
            row = record.attempt(f"{name} at {bpw}", lambda: measure_shared(name, bpw, paths, options.rounds))  # noqa: B023
            if row:
                record.document.setdefault("shared", []).append(row)
                print(
                    f"{name:8}{bpw:6}, {paths} path(s): apart {row['apart']:.1f} µs, together {row['together']:.1f} µs, "
                    f"{row['apart'] / row['together']:.2f}x, {row['together'] / least:.1f}x floor",
                    flush=True,
                )
        for place in found[first:]:
            show(record, record.attempt(str(place), lambda: measure(place, kinds, options.rounds, record)), least)  # noqa: B023
    return record.finish()


def show(record: Record, rows: Optional[List[dict]], least: float) -> None:
    """Record and print the rows of one place."""
    for row in rows or ():
        rival = f"{row['gemlite']:10.1f}" if row["gemlite"] else "         -"
        print(
            f"{'gradient' if row['gradient'] else 'forward':8} {row['out']:6}x{row['in']:<6}{row['batch']:7}{row['bpw']:6}"
            f"{row['paths']:6}{row['packed']:10.1f}{row['bf16']:10.1f}{rival}{row['x_bf16']:8.1f}x"
            f"{row['packed'] / least:8.1f}x   {row['error']:.0e}",
            flush=True,
        )
        record.add(row)


if __name__ == "__main__":
    sys.exit(main())
