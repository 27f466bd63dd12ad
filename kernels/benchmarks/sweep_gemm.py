"""Tile sizes of gemm.py on a CUDA GPU: `python kernels/benchmarks/sweep_gemm.py --seconds 100 --out rows.json`.

The two products are measured apart (a tile of one does not depend on the other's), each candidate in a CUDA graph of calls
whose weights have left the caches. Candidates are first run once by processes side by side, which compile into one cache
and find those that do not fit; then each is checked against the reference and timed; last, per case, the best two together
and, with one term, the product of unpacked signs take turns with cuBLAS bf16. Stops when the time is over.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import torch
from bench_gpu import LIMIT, copies_of, error, layer, ranks_of, turns
from hf_littlebit.kernels import gemm, reference, tuning

ONE = ("ranks", "tokens_one", "warps_one", "stages_one", "splits_one")
TWO = ("outputs", "tokens_two", "warps_two", "stages_two", "splits_two")
Case = Tuple[int, int, float, int, bool]  # out, in, bits per weight, tokens, gradient


def tiles_for(tokens: int) -> List[Tuple[int, int, int, int, int]]:
    """(outputs or ranks, tokens, warps, stages, words) worth trying."""
    if tokens <= 64:
        few = min(tokens, 64)
        found = [(64, few, 4, 3, 2), (64, few, 4, 4, 2), (64, few, 4, 3, 4), (128, few, 4, 3, 2), (128, few, 8, 3, 2)]
        return found + ([(64, 32, 4, 3, 2)] if few == 64 else [])
    found = [(128, 128, 8, 3, 2), (128, 128, 8, 4, 2), (128, 128, 8, 3, 4), (64, 128, 4, 3, 2), (64, 128, 4, 3, 4)]
    found += [(128, 256, 8, 3, 2), (128, 256, 8, 4, 2), (64, 256, 4, 3, 2), (128, 128, 4, 3, 2), (256, 128, 8, 3, 2)]
    return found


def candidates(case: Case) -> Iterator[Tuple[str, Any]]:
    """(side, Tiles): the rule's first, then others and splits."""
    out, into, bpw, tokens, gradient = case
    device = torch.device("cuda", 0)
    base = tuning.tiles(
        device, out, into, tuple(ranks_of(out, into, bpw)), tuning.bucket(tokens), torch.bfloat16, gradient
    )
    seen = set()
    for side, names, most in (("one", ONE, 16 if tokens <= 64 else 4), ("two", TWO, 4 if tokens <= 64 else 2)):
        rule = getattr(base, names[4])
        splits = sorted(
            {rule, max(1, rule // 2), min(most, 2 * rule), 1, 2}, key=lambda count, rule=rule: abs(count - rule)
        )
        sizes = [(*(getattr(base, name) for name in names[:4]), base.words), *tiles_for(tokens)]
        for count in splits:
            for made, wide, warps, stages, words in sizes:
                values = dict(zip(names, (made, wide, warps, stages, count)))  # noqa: B905
                config = base._replace(words=words, **values)
                if (side, config) not in seen:
                    seen.add((side, config))
                    yield side, config


class Bench:
    """One case's weights, x and exact result."""

    def __init__(self, case: Case, copies: bool = True):
        out, into, bpw, tokens, self.gradient = case
        self.ranks = ranks_of(out, into, bpw)
        size = sum(self.ranks) * (out + into) // 8
        make = lambda: [*layer(out, into, self.ranks), None, self.ranks]  # noqa: E731
        self.packed = copies_of(make, size) if copies else [make()]
        made, summed = (into, out) if self.gradient else (out, into)
        self.x = torch.randn(tokens, summed, device="cuda").bfloat16()
        self.y = torch.empty(tokens, made, device="cuda", dtype=torch.bfloat16)

    def product(self, config: Any, index: int = 0) -> torch.Tensor:
        gemm.product(self.x, *self.packed[index % len(self.packed)], self.y, config, self.gradient)
        return self.y

    def exact(self) -> torch.Tensor:
        *parts, _, ranks = self.packed[0]
        if self.gradient:
            return reference.littlebit_linear_grad(self.x.float(), *parts, ranks)
        return reference.littlebit_linear(self.x.float(), *parts, None, ranks)

    def side(self, side: str, config: Any) -> Any:
        """A call of one product's launches alone, of the copy of an index."""
        kept: List[Any] = []
        for packed in self.packed:
            own = [self.x, self.y, *packed[:8]]
            every = list(gemm.launches(self.x, *packed, self.y, config, self.gradient))
            if kept:  # one scratch serves all copies, as the allocator's would
                every = [
                    (
                        kernel,
                        grid,
                        tuple(map(lambda new, old: new if any(new is o for o in own) else old, new, old)),
                        options,
                    )
                    for (kernel, grid, new, options), (_, _, old, _) in zip(every, kept[0])  # noqa: B905
                ]
            kept.append(every)
        after = next(i for i, launch in enumerate(kept[0]) if launch[0] is gemm._contract)
        kept = [every[:after] if side == "one" else every[after:] for every in kept]

        def call(index: int) -> None:
            for kernel, grid, arguments, options in kept[index % len(kept)]:
                kernel[grid](*arguments, **options)

        return call


def compile_some(path: Path, part: int, parts: int, deadline: float) -> None:
    """A process of its own: run every candidate of `part` once, and write which of them run."""
    jobs = json.loads(path.read_text())
    benches: Dict[str, Bench] = {}
    with open(f"{path}.{part}", "w") as results:
        for index in range(part, len(jobs), parts):
            if time.time() > deadline:
                break
            case, config = jobs[index]
            bench = benches.get(str(case)) or benches.setdefault(str(case), Bench(tuple(case), copies=False))
            try:
                bench.product(tuning.Tiles(*config))
                torch.cuda.synchronize()
                print(index, file=results, flush=True)
            except Exception as failure:  # every backend has its own error for a tile that does not fit
                print(f"{case} {config}: {type(failure).__name__} {str(failure)[:100]}", flush=True)
                if "CUDA error" in str(failure):
                    return


def prepare(jobs: List[Tuple[Case, Any]], workers: int, deadline: float) -> List[bool]:
    """Compile all jobs side by side; True for those that ran."""
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"sweep-{os.getpid()}.json"
    path.write_text(json.dumps([[list(case), list(config)] for case, config in jobs]))
    command = [sys.executable, __file__, "--part", str(path), str(deadline)]
    running = [subprocess.Popen([*command, str(part), str(workers)]) for part in range(workers)]
    for process in running:
        try:
            process.wait(max(1.0, deadline + 10 - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
    done = set()
    for part in range(workers):
        written = Path(f"{path}.{part}")
        done |= {int(line) for line in written.read_text().split()} if written.exists() else set()
    return [index in done for index in range(len(jobs))]


def measure(case: Case, configs: List[Tuple[str, Any]], rounds: int, deadline: float) -> Iterator[dict]:
    out, into, bpw, tokens, gradient = case
    about = {"out": out, "in": into, "bpw": bpw, "tokens": tokens, "gradient": gradient}
    bench = Bench(case)
    exact = bench.exact()
    best: Dict[str, Tuple[float, Any]] = {}
    for side, config in configs:
        if time.time() > deadline:
            break
        row: dict = {**about, "side": side, "config": config._asdict()}
        try:
            row["error"] = error(lambda: bench.product(config), lambda: exact)  # noqa: B023
            row["us"] = turns({"it": bench.side(side, config)}, rounds, 20)["it"]
        except Exception as failure:
            row["failed"] = f"{type(failure).__name__}: {failure}"[:200]
        yield row
        if row.get("error", 1) < LIMIT and row["us"] < best.get(f"{side} {config.words}", (1e9, None))[0]:
            best[f"{side} {config.words}"] = row["us"], config
    pairs = [
        (best[f"one {words}"][0] + best[f"two {words}"][0], words)
        for words in (2, 4)
        if f"one {words}" in best and f"two {words}" in best
    ]
    if not pairs:
        return
    words = min(pairs)[1]
    one, two = best[f"one {words}"][1], best[f"two {words}"][1]
    both = one._replace(**{name: getattr(two, name) for name in TWO})
    dense = copies_of(lambda: torch.randn(out, into, device="cuda").bfloat16(), 2 * out * into)
    rule = tuning.tiles(
        torch.device("cuda", 0), out, into, tuple(bench.ranks), tuning.bucket(tokens), torch.bfloat16, gradient
    )
    forms = {"best": both, "rule": rule}
    if both.terms == 1:
        forms["unpacked"] = both._replace(unpacked=1)
    calls: Dict[str, Any] = {
        "dense": lambda i: bench.x @ (dense[i % len(dense)] if gradient else dense[i % len(dense)].T)
    }
    calls.update({name: (lambda i, config=config: bench.product(config, i)) for name, config in forms.items()})
    wrong = {name: error(lambda: bench.product(config), lambda: exact) for name, config in forms.items()}  # noqa: B023
    times = turns(calls, rounds, 20)
    ratios = {f"x_{name}": round(times["dense"] / times[name], 3) for name in forms}
    yield {
        **about,
        "side": "both",
        "config": both._asdict(),
        "errors": wrong,
        **times,
        **ratios,
        "sides": {key: value[0] for key, value in best.items()},
    }


def main() -> int:
    if sys.argv[1:2] == ["--part"]:
        path, deadline, part, parts = sys.argv[2:6]
        compile_some(Path(path), int(part), int(parts), float(deadline))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["8192x28672", "11008x4096", "4096x4096"], help="out x in")
    parser.add_argument("--bpw", type=float, nargs="+", default=[0.55, 1.0, 0.1])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 512, 2048])
    parser.add_argument("--gradient", action="store_true")
    parser.add_argument("--most", type=int, default=12, help="candidates of each product of a case")
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--out", type=Path, default=Path("sweep.json"))
    options = parser.parse_args()
    begin = time.time()
    deadline = begin + options.seconds
    shapes = [tuple(int(side) for side in shape.split("x")) for shape in options.shapes]
    cases: List[Case] = [
        (*shape, bpw, tokens, options.gradient) for bpw in options.bpw for tokens in options.tokens for shape in shapes
    ]
    found: Dict[Case, List[Tuple[str, Any]]] = {}
    for case in cases:
        sides: Dict[str, List[Tuple[str, Any]]] = {"one": [], "two": []}
        for side, config in candidates(case):
            if len(sides[side]) < options.most:
                sides[side].append((side, config))
        found[case] = sides["one"] + sides["two"]

    # The same kernels serve all shapes and splits: to compile, one case of a kind is enough, and its tiles by themselves.
    def kind(case: Case, config: Any) -> Any:
        few = config._replace(splits_one=min(2, config.splits_one), splits_two=min(2, config.splits_two))
        return few, case[4], any(rank % 32 for rank in ranks_of(*case[:3]))

    jobs: Dict[Any, Tuple[Case, Any]] = {}
    for case, configs in found.items():
        for _, config in configs:
            jobs.setdefault(kind(case, config), (case, config))
    ran = prepare(list(jobs.values()), options.workers, begin + 0.45 * options.seconds)
    print(f"{sum(ran)} of {len(ran)} candidates compiled and ran, {time.time() - begin:.0f} s", flush=True)
    good = {key for key, runs in zip(jobs, ran) if runs}  # noqa: B905
    rows: List[dict] = []
    with torch.inference_mode():
        for number, (case, configs) in enumerate(found.items()):
            share = time.time() + (deadline - time.time()) / (len(found) - number)
            for row in measure(case, [one for one in configs if kind(case, one[1]) in good], options.rounds, share):
                rows.append(row)
                if row["side"] == "both":
                    print({key: value for key, value in row.items() if key != "sides"}, flush=True)
            options.out.write_text(json.dumps(rows))
            torch.cuda.empty_cache()
            if time.time() > deadline:
                break
    print(f"{len(rows)} rows, {time.time() - begin:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
