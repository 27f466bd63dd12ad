"""Tile sizes of the Triton kernels: by shape and device, from a file of measured ones or by a rule.

    few(device, outs, in, ranks_of_each)                             -> Few, for decode.py, or None
    decode(device, out, in, ranks)                                   -> Decode, for gemv.py
    decode_group(device, outs, in, ranks_of_each)                    -> Decode, for gemv.py's layers that read the same x
    tiles(device, out, in, ranks, bucket, dtype, transposed)         -> Tiles, for gemm.py

`configs/<device>.json` holds what tuner.py measured on a device of that name, and a file of the same name in the user's cache
goes before it; a shape they do not hold, and a device without a file, get the rule: enough programs to fill the device, the
smallest tile that holds the tokens. Tokens are counted in buckets (the next power of two), so that a growing sequence meets
few tile sizes. The number of bf16 terms is precision, not speed, and is never tuned.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch

from .bound import forget as forget_launches
from .device import capability, cores, device_name, multiplies_bf16, shared_memory

__all__ = [
    "CONFIGS",
    "Decode",
    "Few",
    "Tiles",
    "bucket",
    "decode",
    "decode_group",
    "decode_key",
    "few",
    "forget",
    "read_configs",
    "terms",
    "tiles",
    "tiles_key",
    "user_folder",
]

CONFIGS = Path(__file__).with_name("configs")
LARGEST = 4096  # tokens of the last bucket
MOST_PATHS = 4  # that decode.py gives warps of their own
FEW = 64  # tokens up to which tiles are small: the matrix units wait for memory
SCRATCH = 64  # MiB of unpacked signs: more was a few percent faster on an H100
# Multiplications from which unpacking pays, and their tokens: the steps take the host twice as long as those without it.
MUCH, MANY = 1.5e10, 1024


class Decode(NamedTuple):
    """gemv.py: columns and words (of 32 signs along the sum) of a tile, warps, of stage one and two; splits of the sum."""

    columns_one: int
    words_one: int
    warps_one: int
    splits: int
    columns_two: int
    words_two: int
    warps_two: int


class Few(NamedTuple):
    """decode.py: columns of a tile, warps (a power of two) and words (of 32 summed signs) of a warp, of stage one and two."""

    columns_one: int
    warps_one: int
    words_one: int
    columns_two: int
    warps_two: int
    words_two: int


class Tiles(NamedTuple):
    """gemm.py: ranks, tokens, warps, stages and splits of the sum, of expand (one) and contract (two); words of a step.

    terms: bf16 numbers that an fp32 one is cut into. unpacked: MiB for unpacked signs in unpacked.py's dense products, or 0.
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


_TABLES: Dict[str, Any] = {"decode": Decode, "few": Few, "tiles": Tiles}  # by the first word of a key


def bucket(tokens: int) -> int:
    """The next power of two, 16 to LARGEST."""
    return min(LARGEST, max(16, 1 << (tokens - 1).bit_length()))


def user_folder() -> Path:
    """Where `littlebit tune` writes and this user's processes look first: LITTLEBIT_TILES, or the user's cache."""
    given = os.environ.get("LITTLEBIT_TILES")
    # expanduser leaves ~ as it is where there is no home, and then there is no such folder.
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(given) if given else Path(cache) / "hf_littlebit"


def read_configs(path: Path) -> Dict[str, List[int]]:
    """The tile sizes in a file, by their keys.

    Raises:
        RuntimeError: the file is damaged, or was written for other kernels than these.
    """
    try:
        found = json.loads(path.read_text())["configs"]
        for key, values in found.items():
            table = key.split()[0].rstrip("0123456789")
            if not all(type(value) is int for value in values):
                raise ValueError(f"{key} is {values}")
            _TABLES[table](*values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"{type(error).__name__}: {error}"
        raise RuntimeError(f"{path} holds no tile sizes ({text}); delete it, or measure again") from error
    return found


@functools.lru_cache(maxsize=None)
def _measured(name: str) -> Dict[str, List[int]]:
    """What was measured on a device of that name: what comes with the package, and over it what this user measured."""
    found: Dict[str, List[int]] = {}
    for folder in (CONFIGS, user_folder()):
        path = folder / f"{name}.json"
        if os.path.exists(path):  # False, not an error, where the folder may not be read
            found.update(read_configs(path))
    return found


def forget() -> None:
    """Read the files again at the next product, whose launches are made anew."""
    for cached in (_measured, decode, decode_group, few, tiles):
        cached.cache_clear()
    forget_launches()


def _key(table: str, out: Any, into: int, ranks: Sequence[int], *more: Any) -> str:
    return " ".join([table, f"{out}x{into}", "+".join(map(str, ranks)), *map(str, more)])


def decode_key(outs: Sequence[int], into: int, ranks_of_each: Sequence[Sequence[int]], table: str = "few") -> str:
    """The name in a file of one to four tokens' tiles ("few" or "decode"), of a layer or of several that read the same x."""
    table = table if len(outs) == 1 else f"{table}{len(outs)}"
    return _key(table, "+".join(map(str, outs)), into, [rank for ranks in ranks_of_each for rank in ranks])


def tiles_key(
    device: torch.device, out: int, into: int, ranks: Sequence[int], tokens: int, dtype: torch.dtype, transposed: bool
) -> str:
    """The name in a file of a bucket's tiles."""
    return _key("tiles", out, into, ranks, tokens, terms(device, dtype, tokens), _way(transposed))


def _way(transposed: bool) -> str:
    return "gradient" if transposed else "forward"


@functools.lru_cache(maxsize=None)
def terms(device: torch.device, dtype: torch.dtype, tokens: int) -> int:
    """bf16 terms of an fp32 factor (gemm.py): as exact as the result's dtype shows."""
    # AMD's matrix units that triton compiles for have bf16.
    found = capability(device)
    if found and found < (8, 0):
        return 0
    if dtype == torch.float32:
        return 3
    return 1 if dtype == torch.bfloat16 else 2


def _power(value: float) -> int:
    """The largest power of two that is at most `value`, at least 1."""
    return 1 << max(0, int(value).bit_length() - 1)


@functools.lru_cache(maxsize=None)
def decode(device: torch.device, out: int, into: int, ranks: Tuple[int, ...]) -> Decode:
    """Tiles for one to four tokens of a layer."""
    found = _measured(device_name(device)).get(decode_key((out,), into, (ranks,), "decode"))
    return Decode(*found) if found else _decode_rule(cores(device), out, into, ranks)


@functools.lru_cache(maxsize=None)
def decode_group(
    device: torch.device, outs: Tuple[int, ...], into: int, ranks_of_each: Tuple[Tuple[int, ...], ...]
) -> Decode:
    """Tiles for one to four tokens of layers that read the same x: those of the widest alone.

    They are measured where single layers are, and a layer of the same sizes has the bits that it has alone.
    """
    widest = max(range(len(outs)), key=outs.__getitem__)
    return decode(device, outs[widest], into, ranks_of_each[widest])


@functools.lru_cache(maxsize=None)
def few(
    device: torch.device, outs: Tuple[int, ...], into: int, ranks_of_each: Tuple[Tuple[int, ...], ...]
) -> Optional[Few]:
    """Tiles for one to four tokens of layers that read the same x by matrix units; None where gemv.py computes.

    One layer's are measured; those of a group are measured for the group, or else those of its widest layer.
    """
    if not multiplies_bf16(device) or max(map(len, ranks_of_each)) > MOST_PATHS:
        return None
    measured = _measured(device_name(device))
    widest = max(range(len(outs)), key=outs.__getitem__)
    alone = decode_key((outs[widest],), into, (ranks_of_each[widest],))
    found = measured.get(decode_key(outs, into, ranks_of_each)) or measured.get(alone)
    if found:
        return Few(*found)
    return _few_rule(sum(outs), into, max(ranks_of_each, key=max))


def _few_rule(out: int, into: int, ranks: Tuple[int, ...]) -> Few:
    # What was fastest on an H100 at 4096 x 4096, 11008 x 4096 and 8192 x 28672: everything that a program reads is asked for
    # at once, 64 to 512 signs a thread; few splits; some 64 to 128 programs for the outputs.
    rows = -(-into // 32)
    if rows <= 128:
        warps_one, words_one = (4, 4) if sum(ranks) <= 192 else (8, 2)
    else:
        warps_one, words_one = 8, 4 if rows <= 384 else 8
    own = -(-max(ranks) // 32) * (1 << (len(ranks) - 1).bit_length())  # word rows, if all paths were like the longest
    warps_two = 4 if own <= 8 else 8 if own <= 32 else 16
    words_two = min(8, max(2, 1 << (-(-own // warps_two) - 1).bit_length()))
    wide = out >= 8192
    columns_two = (128 if wide else 64) if own <= 8 else 64 if wide else 32
    return Few(32, warps_one, words_one, columns_two, warps_two, words_two)


def _decode_rule(programs: int, out: int, into: int, ranks: Tuple[int, ...]) -> Decode:
    # 64 signs a thread and step: what fits in registers beside the sums.
    columns = 32
    blocks = sum(-(-rank // columns) for rank in ranks)
    splits = min(32, _power(max(1.0, 3 * programs / blocks)), _power(max(1.0, into / 256)))
    wide = 64 if out >= 96 * programs else 32
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
    found = _measured(device_name(device)).get(tiles_key(device, out, into, ranks, tokens, dtype, transposed))
    if found:
        return Tiles(*found)
    summed, made = (out, into) if transposed else (into, out)
    return _tiles_rule(cores(device), summed, made, ranks, tokens, count, shared_memory(device))


def _tiles_rule(
    programs: int, summed: int, made: int, ranks: Tuple[int, ...], tokens: int, count: int, memory: int = 99 << 10
) -> Tiles:
    if not count:  # plain.py: what fits in registers beside the tile of signs
        height = min(tokens, 64)
        blocks = -(-tokens // height) * sum(-(-rank // 64) for rank in ranks)
        splits = min(32, _power(max(1.0, 2 * programs / blocks)), _power(max(1.0, summed / 256)))
        return Tiles(64, height, 4, 3, splits, 32, height, 4, 3, 1, 1, count)
    large = tokens > FEW
    # Ranks are fewer than outputs: their tiles are narrower, so that there are as many.
    (ranked, widest_one, warps_one), (made_by, widest_two, warps_two) = (
        ((64, 256, 4), (128, 128, 8))
        if large and count == 1
        else ((128, 128, 8),) * 2
        if large
        else ((64, 32, 4), (64, 64, 4))
    )
    across_one, stages_one = _across(min(tokens, widest_one), count, memory)
    across_two, stages_two = _across(min(tokens, widest_two), count, memory)
    # Large tiles have a core to themselves or share it in turns; of the small ones, several wait for memory side by side.
    places = programs if large else 6 * programs
    counts = []
    for side, across, blocks, total, wide in (
        (ranked, across_one, sum(-(-rank // ranked) for rank in ranks), summed, sum(ranks)),
        (made_by, across_two, -(-made // made_by), sum(ranks), made),
    ):
        step = 2.8e-5 * side * across if large else 0.25
        counts.append(_splits(places, -(-tokens // across) * blocks, -(-total // 64), step, 3.2e-6 * tokens * wide))
    words = 4 if summed >= 8192 and not large else 2
    much = tokens > MANY and tokens * sum(ranks) * (summed + made) > MUCH
    scratch = SCRATCH if much and count == 1 else 0
    return Tiles(
        *(ranked, across_one, warps_one, stages_one, counts[0]),
        *(made_by, across_two, warps_two, stages_two, counts[1]),
        *(words, count, scratch),
    )


def _across(widest: int, count: int, memory: int) -> Tuple[int, int]:
    """(tokens of a tile, stages): the most whose terms fit, beside 4 KiB for words."""
    return next(
        (width, depth)
        for width in (widest, widest // 2, widest // 4, widest // 8, 16)
        for depth in (3, 2)
        if width <= 16 or depth * width * count * 128 <= memory - 4096
    )


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
