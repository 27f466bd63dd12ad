"""Tile sizes of the Triton kernels: by shape and device, from a file of measured ones or by a rule.

    decode(device, out, in, ranks)                                   -> Decode, for gemv.py
    decode_group(device, outs, in, ranks_of_each)                    -> Decode, for gemv.py's layers that read the same x
    tiles(device, out, in, ranks, bucket, dtype, transposed)         -> Tiles, for gemm.py

`configs/<device>.json` holds what `tune` measured on a device of that name; a shape it does not hold, and a device without
a file, get the rule: enough programs to fill the device, the smallest tile that holds the tokens. Tokens are counted in
buckets (the next power of two), so that a growing sequence meets few tile sizes. The number of bf16 terms is precision,
not speed, and is never tuned.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch

from .packing import factor_shapes

__all__ = ["CONFIGS", "Decode", "Tiles", "bucket", "decode", "decode_group", "terms", "tiles", "tune"]

CONFIGS = Path(__file__).with_name("configs")
LARGEST = 4096  # tokens of the last bucket
LEAST = 20  # calls in a graph that is timed
FEW = 64  # tokens up to which a second term costs nothing: the matrix units wait for memory


class Decode(NamedTuple):
    """gemv.py: columns and words (of 32 signs along the sum) of a tile, warps, of stage one and two; splits of the sum."""

    columns_one: int
    words_one: int
    warps_one: int
    splits: int
    columns_two: int
    words_two: int
    warps_two: int


class Tiles(NamedTuple):
    """gemm.py: ranks, tokens, warps, stages and splits of the sum, of expand (one) and contract (two); words of a step.

    terms: bf16 numbers that an fp32 one is cut into. unpacked: 1 for dense products of unpacked signs, in unpacked.py.
    """

    ranks: int
    tokens_one: int
    warps_one: int
    stages_one: int
    splits_one: int
    outputs: int
    tokens_two: int
    warps_two: int
    stages_two: int
    splits_two: int
    words: int
    terms: int
    unpacked: int = 0


CHOICES: Dict[str, Tuple[int, ...]] = {
    "columns_one": (16, 32, 64),
    "words_one": (4, 8, 16),
    "warps_one": (2, 4, 8),
    "columns_two": (16, 32, 64, 128),
    "words_two": (4, 8, 16),
    "warps_two": (2, 4, 8),
    "ranks": (64, 128),
    "tokens_one": (16, 32, 64, 128, 256),
    "stages_one": (2, 3, 4, 5),
    "splits_one": (1, 2, 4, 8, 16, 32),
    "outputs": (64, 128),
    "tokens_two": (16, 32, 64, 128, 256),
    "stages_two": (2, 3, 4, 5),
    "splits_two": (1, 2, 4, 8),
    "words": (2, 4),
    "unpacked": (0, 1),
}


def bucket(tokens: int) -> int:
    """The next power of two, 16 to LARGEST."""
    return min(LARGEST, max(16, 1 << (tokens - 1).bit_length()))


@functools.lru_cache(maxsize=None)
def _name(device: torch.device) -> str:
    """A device's name as a file's name."""
    known = "cpu" if device.type == "cpu" else getattr(torch, device.type).get_device_name(device)
    return re.sub(r"[^a-z0-9]+", "-", known.lower()).strip("-")


@functools.lru_cache(maxsize=None)
def _cores(device: torch.device) -> int:
    """How many programs run side by side at the least: streaming multiprocessors, or what corresponds to them."""
    if device.type == "cpu":
        return 2
    properties = getattr(torch, device.type).get_device_properties(device)
    for attribute in ("multi_processor_count", "gpu_subslice_count"):
        if getattr(properties, attribute, 0):
            return int(getattr(properties, attribute))
    return 64


@functools.lru_cache(maxsize=None)
def _memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take."""
    if device.type == "cuda" and not torch.version.hip:
        return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 << 10))
    return 64 << 10


@functools.lru_cache(maxsize=None)
def _measured(name: str) -> Dict[str, List[int]]:
    path = CONFIGS / f"{name}.json"
    return json.loads(path.read_text())["configs"] if path.exists() else {}


def _key(kind: str, out: int, into: int, ranks: Sequence[int], *more: Any) -> str:
    return " ".join([kind, f"{out}x{into}", "+".join(map(str, ranks)), *map(str, more)])


def _way(transposed: bool) -> str:
    return "gradient" if transposed else "forward"


@functools.lru_cache(maxsize=None)
def terms(device: torch.device, dtype: torch.dtype, tokens: int) -> int:
    """bf16 terms of an fp32 factor (gemm.py): as exact as the result's dtype shows, where that costs no time."""
    # torch.version.hip: AMD's numbers mean other things, and its matrix units that triton compiles for have bf16.
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return 0
    if dtype == torch.float32:
        return 3
    return 1 if dtype == torch.bfloat16 and tokens > FEW else 2


def _power(value: float) -> int:
    """The largest power of two that is at most `value`, at least 1."""
    return 1 << max(0, int(value).bit_length() - 1)


@functools.lru_cache(maxsize=None)
def decode(device: torch.device, out: int, into: int, ranks: Tuple[int, ...]) -> Decode:
    """Tiles for one to four tokens of a layer."""
    found = _measured(_name(device)).get(_key("decode", out, into, ranks))
    return Decode(*found) if found else _decode_rule(_cores(device), out, into, ranks)


@functools.lru_cache(maxsize=None)
def decode_group(
    device: torch.device, outs: Tuple[int, ...], into: int, ranks_of_each: Tuple[Tuple[int, ...], ...]
) -> Decode:
    """Tiles for one to four tokens of layers that read the same x: those of the widest alone.

    They are measured where single layers are, and a layer of the same sizes has the bits that it has alone.
    """
    widest = max(range(len(outs)), key=outs.__getitem__)
    return decode(device, outs[widest], into, ranks_of_each[widest])


def _decode_rule(cores: int, out: int, into: int, ranks: Tuple[int, ...]) -> Decode:
    # 64 signs a thread and step: what fits in registers beside the sums.
    columns = 32
    blocks = sum(-(-rank // columns) for rank in ranks)
    splits = min(32, _power(max(1.0, 3 * cores / blocks)), _power(max(1.0, into / 256)))
    wide = 64 if out >= 96 * cores else 32
    return Decode(columns, 8, 4, splits, wide, 256 // wide, 4)


@functools.lru_cache(maxsize=None)
def tiles(
    device: torch.device,
    out: int,
    into: int,
    ranks: Tuple[int, ...],
    tokens: int,
    dtype: torch.dtype,
    transposed: bool,
) -> Tiles:
    """Tiles for a bucket of tokens of a layer, forward or (transposed) for the gradient."""
    count = terms(device, dtype, tokens)
    found = _measured(_name(device)).get(_key("tiles", out, into, ranks, tokens, count, _way(transposed)))
    if found:
        return Tiles(*found)
    summed, made = (out, into) if transposed else (into, out)
    return _tiles_rule(_cores(device), summed, made, ranks, tokens, count, _memory(device))


def _tiles_rule(
    cores: int, summed: int, made: int, ranks: Tuple[int, ...], tokens: int, count: int, memory: int = 99 << 10
) -> Tiles:
    if not count:  # plain.py: what fits in registers beside the tile of signs
        height = min(tokens, 64)
        blocks = -(-tokens // height) * sum(-(-rank // 64) for rank in ranks)
        splits = min(32, _power(max(1.0, 2 * cores / blocks)), _power(max(1.0, summed / 256)))
        return Tiles(64, height, 4, 3, splits, 32, height, 4, 3, 1, 1, count)
    large = tokens > FEW
    widest = 64 if not large else 256 if tokens > 1024 and count == 1 and memory >= 99 << 10 else 128
    # Stages of the other operand's terms, and 4 KiB for words.
    across, stages = next(
        (width, depth)
        for width in (widest, widest // 2, widest // 4, 16)
        for depth in (3, 2)
        if width == 16 or depth * width * count * 128 <= memory - 4096
    )
    across = min(tokens, across)
    side, warps = (128, 8) if large else (64, 4)
    columns = -(-tokens // across)
    # Large tiles have a core to themselves or share it in turns; of the small ones, several wait for memory side by side.
    places, step = (cores, 0.0036 * across) if large else (3 * cores, 0.25)
    counts = []
    for blocks, total, wide in (
        (sum(-(-rank // side) for rank in ranks), summed, sum(ranks)),
        (-(-made // side), sum(ranks), made),
    ):
        counts.append(_splits(places, columns * blocks, -(-total // 64), step, 8e-6 / 2.5 * tokens * wide))
    return Tiles(side, across, warps, stages, counts[0], side, across, warps, stages, counts[1], 2, count)


def _splits(places: int, blocks: int, steps: int, step: float, write: float) -> int:
    """Splits of a sum that take the least time, in microseconds as an H100 has them.

    Args:
        places: tiles computed side by side. blocks: tiles of a split. steps: of the whole sum.
        step, write: time of a step, and of writing and reading the sums of one split.
    """

    def cost(splits: int) -> float:
        rounds = -(-blocks * splits // places)
        return rounds * (1.5 + step * -(-steps // splits)) + (2.5 + write * splits if splits > 1 else 0.0)

    return min((1, 2, 4, 8, 16, 32), key=cost)


def tune(
    layers: Sequence[Tuple[int, int, Sequence[int]]],
    batches: Sequence[int] = (1, 16, 64, 512),
    dtype: torch.dtype = torch.bfloat16,
    gradient: bool = False,
    folder: Path = CONFIGS,
) -> Path:
    """Measure tile sizes on the current CUDA device, and write or extend `folder`/<device>.json.

    Starts from the rule, tries every choice of one field after the other, and keeps what is faster, twice over. A choice
    that does not compile or does not fit is passed over.

    Args:
        layers: (out_features, in_features, ranks) each.
        batches: numbers of tokens; those up to four share one Decode. `gradient` also measures the gradient's tiles.
    """
    from . import gpu

    device = torch.device("cuda", torch.cuda.current_device())
    path = folder / f"{_name(device)}.json"
    configs = dict(json.loads(path.read_text())["configs"]) if path.exists() else {}
    for out, into, some in layers:
        ranks = tuple(some)
        # Rotated, so that the weights are cold; the smallest layers stay in the cache, as they do in a model.
        count = min(64, 1 + (256 << 20) * 8 // (sum(ranks) * (out + into)))
        copies = [[*_random_parts(out, into, ranks, device), None, ranks] for _ in range(count)]
        cases: Dict[str, Tuple[Any, int, int, bool]] = {}
        for tokens in batches:
            for transposed in (False, True) if gradient else (False,):
                if tokens <= gpu.DECODE and not transposed:
                    start: Any = decode(device, out, into, ranks)
                    cases[_key("decode", out, into, ranks)] = (start, tokens, into, False)
                    continue
                start = tiles(device, out, into, ranks, bucket(tokens), dtype, transposed)
                key = _key("tiles", out, into, ranks, bucket(tokens), start.terms, _way(transposed))
                cases[key] = (start, tokens, out if transposed else into, transposed)
        for key, (start, tokens, features, transposed) in cases.items():
            x = torch.randn(tokens, features, device=device).to(dtype)
            y = x.new_empty(tokens, into if transposed else out)
            best, seconds = _search(start, functools.partial(_run, copies, x, y, transposed))
            configs[key] = list(best)
            print(f"{key}: {best} {seconds * 1e6:.1f} us", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    path.write_text(json.dumps({**about, "configs": configs}).replace('], "', '],\n"') + "\n")
    for cached in (_measured, decode, decode_group, tiles):
        cached.cache_clear()
    return path


def _run(copies: Sequence[Any], x: torch.Tensor, y: torch.Tensor, transposed: bool, config: Any) -> float:
    from . import gemm, gemv

    if isinstance(config, Decode):
        return _seconds(lambda layer: gemv.products(x, [layer], [y], config), copies)
    product: Any = gemm.product
    return _seconds(lambda layer: product(x, *layer, y, config, transposed), copies)


def _search(start: Any, run: Callable[[Any], float]) -> Tuple[Any, float]:
    """Coordinate descent over CHOICES from `start`."""
    seen = {start: run(start)}
    best = start
    for _ in range(2):
        before = best
        for field in start._fields:
            for value in CHOICES.get(field, ()):
                config = best._replace(**{field: value})
                if config not in seen:
                    try:
                        seen[config] = run(config)
                    except Exception as error:  # every backend has its own error for a tile that does not fit
                        print(f"passed over {config}: {type(error).__name__}")
                        seen[config] = float("inf")
            best = min(seen, key=lambda config: seen[config])
        if best == before:
            break
    return best, seen[best]


def _random_parts(out: int, into: int, ranks: Tuple[int, ...], device: torch.device) -> List[Optional[torch.Tensor]]:
    """What littlebit_linear takes between x and bias."""
    found: Dict[str, torch.Tensor] = {}
    for name, (shape, dtype) in factor_shapes(into, out, ranks).items():
        if dtype.is_floating_point:
            found[name] = torch.randn(shape, device=device).to(dtype)
        else:
            info = torch.iinfo(dtype)
            found[name] = torch.randint(info.min, info.max, shape, device=device, dtype=dtype)
    found.setdefault("v", found["u"])
    return [found.get(name) for name in ("u", "u_tail", "v", "v_tail", "scale_out", "scale_rank", "scale_in")]


def _seconds(call: Callable[[Any], None], copies: Sequence[Any], repeats: int = 5) -> float:
    """Seconds of one call inside a CUDA graph that goes through all copies."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(copies[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    calls = max(len(copies), LEAST)
    with torch.cuda.graph(graph):
        for index in range(calls):
            call(copies[index % len(copies)])
    times = []
    for _ in range(repeats + 1):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1000 / calls)
    return sorted(times[1:])[repeats // 2]
