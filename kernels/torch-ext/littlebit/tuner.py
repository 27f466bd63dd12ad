"""Measuring tile sizes on a device, for tuning.py: offline, minutes for a model, into a file that later processes read.

    tune(layers, groups, batches)       a Few or Decode, or Tiles, for every layer (and group) and bucket of tokens

Every case starts from the rule, or from what was measured before, and goes through rounds: each tries a list of changes of
a few fields together (the tiles of one of the two products), and keeps what is fastest. Compiling takes far longer than
measuring, so that all changes of a round, for all cases, are first run once by processes side by side, which fill triton's
cache. A change that does not compile or does not fit the device is passed over.
"""

import json
import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch

from . import tuning
from .launch import run
from .packing import factor_shapes
from .tuning import Decode, Few, Tiles, bucket

__all__ = ["random_parts", "tune"]

CALLS = 24  # of a product, in a graph that is timed
COLD = 200 << 20  # bytes of copies that are rotated, so that weights come from memory
COPIES = 64  # at most: the smallest layers stay in the cache, as they do in a model
Group = Tuple[Tuple[int, ...], int, Tuple[Tuple[int, ...], ...]]  # outs, in, ranks of each layer


class Case(NamedTuple):
    """What is measured: layers that read the same x (one or several), tokens, dtype, direction."""

    key: str
    outs: Tuple[int, ...]
    into: int
    ranks: Tuple[Tuple[int, ...], ...]
    tokens: int
    dtype: torch.dtype
    transposed: bool


def tune(
    layers: Sequence[Tuple[int, int, Sequence[int]]],
    groups: Sequence[Group] = (),
    batches: Sequence[int] = (1, 16, 64, 512),
    dtype: torch.dtype = torch.bfloat16,
    gradient: bool = False,
    folder: Optional[Path] = None,
    workers: Optional[int] = None,
    seconds: float = float("inf"),
    say: Callable[[str], None] = print,
) -> Path:
    """Measure tile sizes on the current CUDA device, and write or extend `folder`/<device>.json.

    Args:
        layers: (out_features, in_features, ranks) each. groups: layers that read the same x, for up to four tokens.
        batches: numbers of tokens; those up to four share one choice. `gradient` also measures the gradient's tiles.
        folder: `tuning.user_folder()` by default, which later processes of this user read.
        workers: processes that compile; as many as there are processors by default, at most 16.
        seconds: after which no other round is begun. What was found by then is written.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    folder = folder or tuning.user_folder()
    path = folder / f"{tuning.device_name(device)}.json"
    configs = dict(json.loads(path.read_text())["configs"]) if path.exists() else {}
    cases = list(_cases(layers, groups, batches, dtype, gradient))
    best = {case: (_start(device, case), float("inf")) for case in cases}
    deadline = time.monotonic() + seconds
    workers = workers or min(16, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(workers, _ready) as pool:
        for turn in range(3):
            wanted = [(case, config) for case in cases for config in _changes(best[case][0], case, turn)]
            if not wanted or time.monotonic() > deadline:
                break
            say(f"round {turn + 1}: {len(wanted)} tile sizes of {len(cases)} cases")
            fit = pool.map(_runs, wanted, chunksize=max(1, len(wanted) // (4 * workers)))
            for case in cases:
                if time.monotonic() > deadline:
                    break
                best[case] = _fastest(case, [config for (of, config), ok in zip(wanted, fit) if ok and of is case], best[case])  # noqa: B905
    for case, (config, took) in best.items():
        if took < float("inf"):
            configs[case.key] = list(config)
            say(f"{case.key}: {tuple(config)} {took:.2f} us")
    folder.mkdir(parents=True, exist_ok=True)
    about = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({**about, "configs": configs}).replace('], "', '],\n"') + "\n")
    partial.replace(path)
    tuning.forget()
    return path


def _cases(layers: Any, groups: Any, batches: Any, dtype: torch.dtype, gradient: bool) -> Iterator[Case]:
    from .gpu import DECODE

    few = [tokens for tokens in batches if tokens <= DECODE]
    units = tuning.few(_device(), (64,), 64, ((8,),)) is not None
    kind = "few" if units else "decode"
    for out, into, some in layers:
        ranks = tuple(some)
        if few:
            yield Case(tuning.decode_key((out,), into, (ranks,), kind), (out,), into, (ranks,), max(few), dtype, False)
        for tokens in sorted({bucket(tokens) for tokens in batches if tokens > DECODE}):
            for transposed in (False, True) if gradient else (False,):
                key = tuning.tiles_key(_device(), out, into, ranks, tokens, dtype, transposed)
                yield Case(key, (out,), into, (ranks,), tokens, dtype, transposed)
    for outs, into, ranks_of_each in groups if few and units else ():
        yield Case(tuning.decode_key(outs, into, ranks_of_each), outs, into, ranks_of_each, max(few), dtype, False)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _start(device: torch.device, case: Case) -> Any:
    """The tiles that are used today."""
    from .gpu import DECODE

    if case.tokens <= DECODE and not case.transposed:
        found = tuning.few(device, case.outs, case.into, case.ranks)
        return found or tuning.decode_group(device, case.outs, case.into, case.ranks)
    return tuning.tiles(device, case.outs[0], case.into, case.ranks[0], case.tokens, case.dtype, case.transposed)


def _changes(config: Any, case: Case, turn: int) -> List[Any]:
    """`config` and what a round tries in its place."""
    changes: List[Dict[str, int]] = [{}]
    if isinstance(config, Few) and turn < 2:
        rows = -(-max(max(ranks) for ranks in case.ranks) // 32)
        for columns in (32, 64, 128):
            for warps, words in ((4, 2), (4, 4), (8, 2), (8, 4), (16, 2), (16, 4), (8, 8), (16, 8)):
                signs = columns * words  # of a thread
                # Of stage one, enough programs for every core; of stage two, few of the words beyond the last rank.
                if turn == 0 and (not 64 <= signs <= 256 or columns > 64 or -(-case.into // (32 * warps * words)) > 16):
                    continue
                if turn == 1 and (signs > 256 or not rows / 2 < warps * words < max(9, 3 * rows)):
                    continue
                side = "one" if turn == 0 else "two"
                changes.append({f"columns_{side}": columns, f"warps_{side}": warps, f"words_{side}": words})
    elif isinstance(config, Decode):
        for field in _FIELDS[turn]:
            changes += [{field: value} for value in _DECODE[field]]
    elif isinstance(config, Tiles) and config.terms:
        side, made = ("one", "ranks") if turn == 0 else ("two", "outputs")
        if turn < 2:
            for tile, tokens, warps, stages in _TILES[min(case.tokens, 128)]:
                tokens = min(tokens, case.tokens)
                for splits in sorted({1, 2, 4, getattr(config, f"splits_{side}")} if tokens < 128 else {1, 2, 3}):
                    values = (tile, tokens, warps, stages, splits)
                    names = (made, *(f"{name}_{side}" for name in ("tokens", "warps", "stages", "splits")))
                    changes.append(dict(zip(names, values)))  # noqa: B905 Python 3.9
        else:
            changes += [{"words": 4}, {"unpacked": 1}] if case.tokens > 128 and config.terms == 1 else [{"words": 4}]
    return list(dict.fromkeys(config._replace(**change) for change in changes)) if len(changes) > 1 else []


_FIELDS = (("columns_one", "words_one", "warps_one"), ("columns_two", "words_two", "warps_two"), ("splits",))
_DECODE = {
    "columns_one": (16, 32, 64),
    "words_one": (4, 8, 16),
    "warps_one": (2, 4, 8),
    "columns_two": (16, 32, 64, 128),
    "words_two": (4, 8, 16),
    "warps_two": (2, 4, 8),
    "splits": (2, 4, 8, 16, 32),
}
# (ranks or outputs, tokens, warps, stages) by tokens, 128 for all above.
_TILES = {
    16: ((64, 16, 4, 3), (64, 16, 4, 4), (128, 16, 8, 3)),
    32: ((64, 32, 4, 3), (64, 32, 4, 4), (128, 32, 8, 3)),
    64: ((64, 64, 4, 3), (64, 32, 4, 3), (128, 64, 8, 3)),
    128: ((128, 128, 8, 3), (128, 128, 8, 4), (64, 128, 4, 3), (128, 256, 8, 3)),
}


class _Work:
    """A case's weights and x."""

    def __init__(self, case: Case, most: int):
        device = _device()
        self.case, self.device = case, device
        shapes = [(out, case.into, ranks) for out, ranks in zip(case.outs, case.ranks)]  # noqa: B905 Python 3.9
        size = sum(sum(ranks) * (out + into) // 8 for out, into, ranks in shapes)
        count = min(most, COPIES, 1 + COLD // size)
        self.copies = [[[*random_parts(*shape, device), None, shape[2]] for shape in shapes] for _ in range(count)]
        made, summed = ((case.into,), case.outs[0]) if case.transposed else (case.outs, case.into)
        self.x = torch.randn(case.tokens, summed, device=device).to(case.dtype)
        self.results = [self.x.new_empty(case.tokens, out) for out in made]

    def product(self, config: Any, index: int) -> None:
        from . import decode, gemm, gemv

        layers = self.copies[index % len(self.copies)]
        if isinstance(config, Few):
            run(decode.launches(self.x, layers, self.results, config, tuning.starts_early(self.device)))
        elif isinstance(config, Decode):
            run(gemv.launches(self.x, layers, self.results, config))
        else:
            gemm.product(self.x, *layers[0], self.results[0], config, self.case.transposed)


def random_parts(out: int, into: int, ranks: Sequence[int], device: torch.device) -> List[Optional[torch.Tensor]]:
    """What littlebit_linear takes between x and bias, drawn at random."""
    found: Dict[str, torch.Tensor] = {}
    for name, (shape, dtype) in factor_shapes(into, out, ranks).items():
        if dtype.is_floating_point:
            found[name] = torch.randn(shape, device=device).to(dtype)
        else:
            info = torch.iinfo(dtype)
            found[name] = torch.randint(info.min, info.max, shape, device=device, dtype=dtype)
    found.setdefault("v", found["u"])
    return [found.get(name) for name in ("u", "u_tail", "v", "v_tail", "scale_out", "scale_rank", "scale_in")]


_last: List[_Work] = []  # the case that a worker compiled for last


def _ready() -> None:
    torch.cuda.init()


def _runs(wanted: Tuple[Case, Any]) -> bool:
    """In a process of its own: compile and run once; False where that fails."""
    case, config = wanted
    try:
        if not _last or _last[0].case != case:
            _last[:] = [_Work(case, 1)]
        _last[0].product(config, 0)
        torch.cuda.synchronize()
    except Exception:  # every backend has its own error for a tile that does not fit
        return False
    return True


def _fastest(case: Case, configs: Sequence[Any], known: Tuple[Any, float]) -> Tuple[Any, float]:
    """The fastest of `configs`, with its microseconds; `known` where there are none."""
    if not configs:
        return known
    work = _Work(case, COPIES)
    timed = []
    for config in configs:
        try:
            timed.append((_microseconds(lambda index, config=config: work.product(config, index)), config))
        except Exception as error:  # one that fits alone may not fit a graph
            print(f"passed over {config}: {type(error).__name__}")
    if not timed:
        return known
    took, config = min(timed, key=lambda pair: pair[0])
    return config, took


def _microseconds(call: Callable[[int], None], repeats: int = 5) -> float:
    """Of one call inside a CUDA graph that goes through the copies: the median of the replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(CALLS):
            call(index)
    times = []
    for _ in range(repeats + 1):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(1000 * start.elapsed_time(stop) / CALLS)
    return statistics.median(times[1:])
