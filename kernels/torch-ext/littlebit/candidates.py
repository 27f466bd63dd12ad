"""What tuner.py measures: the cases of a model, and for each the tile sizes that are tried in place of today's.

A case is a layer, or several that read the same x, with a number of tokens. Its tiles are searched in rounds. Every round
changes a few fields together, those of one of the two products, and leaves the others as the round before left them:

    0    nothing: the tiles of today, which have to be timed too
    1    stage one (expand)        2    stage two (contract)        3    what both share: words of a step, splits, unpacking

The lists are what was fast somewhere on an H100, and what a product can take: too many signs for a thread's registers, or a
grid of too few programs, are not tried. The number of bf16 terms is precision and never changes.
"""

from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import torch

from . import tuning
from .gpu import DECODE
from .tuning import Decode, Few, Tiles

__all__ = ["ROUNDS", "Case", "Group", "cases", "changes", "side_of", "start"]

ROUNDS = 4
SIGNS = (64, 512)  # of a thread of decode.py, that are asked for at once
WIDTH = 16  # splits of decode.py's stage one at the most: stage two reads them all
Layer = Tuple[int, int, Sequence[int]]  # out_features, in_features, ranks
Group = Tuple[Tuple[int, ...], int, Tuple[Tuple[int, ...], ...]]  # out_features of each, in_features, ranks of each


class Case(NamedTuple):
    """What is measured: layers that read the same x (one or several), tokens, dtype, direction."""

    key: str  # its name in the file of tile sizes
    outs: Tuple[int, ...]
    into: int
    ranks: Tuple[Tuple[int, ...], ...]
    tokens: int
    dtype: torch.dtype
    transposed: bool


_DECODE: Dict[str, Tuple[int, ...]] = {
    "columns_one": (16, 32, 64),
    "words_one": (4, 8, 16),
    "warps_one": (2, 4, 8),
    "columns_two": (16, 32, 64, 128),
    "words_two": (4, 8, 16),
    "warps_two": (2, 4, 8),
    "splits": (2, 4, 8, 16, 32),
}
_FIELDS = (("columns_one", "words_one", "warps_one"), ("columns_two", "words_two", "warps_two"), ("splits",))
# (warps, words of a warp) of decode.py.
_WARPS = ((4, 2), (4, 4), (8, 2), (8, 4), (8, 8), (16, 2), (16, 4), (16, 8))
# (ranks or outputs, tokens, warps, stages) of gemm.py, by tokens: 128 for all above.
_TILES = {
    16: ((64, 16, 4, 3), (64, 16, 4, 4), (128, 16, 8, 3)),
    32: ((64, 32, 4, 3), (64, 32, 4, 4), (128, 32, 8, 3)),
    64: ((64, 64, 4, 3), (64, 32, 4, 3), (128, 64, 8, 3)),
    128: ((128, 128, 8, 3), (128, 128, 8, 4), (64, 128, 4, 3), (128, 256, 8, 3), (128, 128, 4, 3), (64, 256, 4, 3)),
}
_SCRATCH = (64, 256)  # MiB of unpacked signs


def cases(
    device: torch.device,
    layers: Sequence[Layer],
    groups: Sequence[Group],
    batches: Sequence[int],
    dtype: torch.dtype,
    gradient: bool,
) -> Iterator[Case]:
    """Every layer and bucket of tokens once; up to four tokens share one choice, of which the largest is measured."""
    few = max((tokens for tokens in batches if tokens <= DECODE), default=0)
    units = tuning.few(device, (64,), 64, ((8,),)) is not None
    for out, into, some in layers:
        ranks = tuple(some)
        if few:
            by_units = units and tuning.few(device, (out,), into, (ranks,)) is not None
            key = tuning.decode_key((out,), into, (ranks,), "few" if by_units else "decode")
            yield Case(key, (out,), into, (ranks,), few, dtype, False)
        for tokens in sorted({tuning.bucket(tokens) for tokens in batches if tokens > DECODE}):
            for transposed in (False, True) if gradient else (False,):
                key = tuning.tiles_key(device, out, into, ranks, tokens, dtype, transposed)
                yield Case(key, (out,), into, (ranks,), tokens, dtype, transposed)
    for outs, into, ranks_of_each in groups if few else ():
        if tuning.few(device, outs, into, ranks_of_each) is not None:
            yield Case(tuning.decode_key(outs, into, ranks_of_each), outs, into, ranks_of_each, few, dtype, False)


def start(device: torch.device, case: Case) -> Any:
    """The tiles that are used today: a Few or Decode, or Tiles."""
    if case.tokens <= DECODE and not case.transposed:
        found = tuning.few(device, case.outs, case.into, case.ranks)
        return found or tuning.decode_group(device, case.outs, case.into, case.ranks)
    return tuning.tiles(device, case.outs[0], case.into, case.ranks[0], case.tokens, case.dtype, case.transposed)


def side_of(config: Any, turn: int) -> str:
    """The part of a product in which a round's candidates differ: "one", "two" or "both".

    Of one to four tokens it is the whole: the splits of stage one are what stage two reads.
    """
    return {1: "one", 2: "two"}.get(turn, "both") if isinstance(config, Tiles) else "both"


def changes(config: Any, case: Case, turn: int) -> List[Any]:
    """What a round tries in place of `config`, which is not among it."""
    if isinstance(config, Few):
        found = _of_few(case, turn)
    elif isinstance(config, Decode):
        fields = _FIELDS[turn - 1] if turn else ()
        found = [{field: value} for field in fields for value in _DECODE[field]]
    else:
        found = _of_tiles(config, case, turn) if config.terms else []
    tried = dict.fromkeys(config._replace(**change) for change in found)
    tried.pop(config, None)
    return list(tried)


def _of_few(case: Case, turn: int) -> List[Dict[str, int]]:
    if turn not in (1, 2):
        return []
    rows = -(-max(max(ranks) for ranks in case.ranks) // 32)  # of words, of the longest path
    paths = max(map(len, case.ranks))
    found = []
    for columns in (32, 64, 128):
        for warps, words in _WARPS:
            signs = columns * words
            if turn == 1:
                fits = columns <= 64 and SIGNS[0] <= signs <= SIGNS[1] and case.into <= WIDTH * 32 * warps * words
            else:
                # Few of the words lie beyond the last rank, and no path is without a warp.
                fits = signs <= SIGNS[1] and warps >= paths and rows / 2 < warps * words < max(9, 3 * rows)
            if fits:
                side = "one" if turn == 1 else "two"
                found.append({f"columns_{side}": columns, f"warps_{side}": warps, f"words_{side}": words})
    return found


def _of_tiles(config: Tiles, case: Case, turn: int) -> List[Dict[str, int]]:
    if turn == 3:
        dense = (
            [{"unpacked": size} for size in _SCRATCH]
            if case.tokens > 128 and config.terms == 1 and case.dtype == torch.bfloat16
            else []
        )
        return [{"words": 4}, {"words": 1}, *dense]
    if turn not in (1, 2):
        return []
    side, made = ("one", "ranks") if turn == 1 else ("two", "outputs")
    names = (made, *(f"{name}_{side}" for name in ("tokens", "warps", "stages", "splits")))
    counts = sorted({1, 2, 4 if case.tokens < 128 else 3, getattr(config, names[-1])})
    found = []
    for tile, tokens, warps, stages in _TILES[min(case.tokens, 128)]:
        for splits in counts:
            values = (tile, min(tokens, case.tokens), warps, stages, splits)
            found.append(dict(zip(names, values)))  # noqa: B905 Python 3.9
    return found
