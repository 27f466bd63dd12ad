"""Measuring tile sizes on a device, for tuning.py: offline, minutes for a model, into a file that later processes read.

    tune(layers, groups, batches)       a Few or Decode, or Tiles, for every layer (and group) and bucket of tokens

Every case starts from the tiles of today and goes through rounds (candidates.py). Compiling takes far longer than measuring,
so a round's kernels, each once, are first compiled and run by processes side by side (workers.py), which fill
triton's cache and find those that do not fit. Those that ran are timed, the two products apart where they can be. The
fastest few are then checked against the reference, and take turns with what was best so far, as whole products: only one
that is right and faster replaces it.

`seconds` bounds all of it, compiling included, and the file is written after every round: whenever this ends, what was found
by then is there, and a case that was never timed is left to the rule.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import torch

from . import tuning
from .candidates import ROUNDS, Case, Group, Layer, cases, changes, side_of, start
from .device import device_name
from .trial import Job, Trial, current_device, kernel_keys, run_once
from .workers import Workers

__all__ = ["Found", "Result", "tune"]

WORKERS = 16  # processes that compile, at most
SHARE = 0.7  # of a round's time, for compiling
FINAL = 3  # candidates of a round that are checked, and timed as whole products
GAIN = 0.99  # of the time so far that a candidate may take at most: less is noise
# Of the error's norm, relative to the result's: what a result of the dtype may have.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}


class Found(NamedTuple):
    """The tiles of a case, microseconds of the tiles that were used before, and of these; infinite where not timed."""

    case: Case
    config: Any
    before: float = float("inf")
    after: float = float("inf")


class Result(NamedTuple):
    """The file that was written, and what is in it for the cases that were asked for and timed."""

    path: Path
    found: List[Found]


def tune(
    layers: Sequence[Layer],
    groups: Sequence[Group] = (),
    batches: Sequence[int] = (1, 16, 64, 512),
    dtype: torch.dtype = torch.bfloat16,
    gradient: bool = False,
    folder: Optional[Path] = None,
    workers: Optional[int] = None,
    seconds: float = float("inf"),
    say: Callable[[str], None] = print,
) -> Result:
    """Measure tile sizes on the current CUDA device, and write or extend `folder`/<device>.json.

    Args:
        layers: (out_features, in_features, ranks) each. groups: layers that read the same x, for up to four tokens.
        batches: numbers of tokens; those up to four share one choice. `gradient` also measures the gradient's tiles.
        folder: `tuning.user_folder()` by default, which later processes of this user read.
        workers: processes that compile; as many as there are processors by default, at most 16.
        seconds: after which this returns with what was found, a few seconds later at the most.

    Raises:
        RuntimeError: the file is damaged; the processes cannot run; the device failed. What was written stays.
    """
    deadline = time.monotonic() + seconds
    device = current_device()
    path = (folder or tuning.user_folder()) / f"{device_name(device)}.json"
    known = tuning.read_configs(path) if path.exists() else {}
    about = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    best = {case: Found(case, start(device, case)) for case in cases(device, layers, groups, batches, dtype, gradient)}

    def save() -> None:
        timed = {one.case.key: list(one.config) for one in best.values() if one.after < float("inf")}
        if timed:
            write_configs(path, {**about, "configs": {**known, **timed}})

    with Workers(run_once, workers or min(WORKERS, os.cpu_count() or 1)) as pool:
        search(best, pool.run, Trial, deadline, save, say)
    tuning.forget()
    return Result(path, [one for one in best.values() if one.after < float("inf")])


def write_configs(path: Path, document: Dict[str, Any]) -> None:
    """Write a file of tile sizes at once, one to a line: a reader finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(document).replace('], "', '],\n"') + "\n")
    partial.replace(path)


def search(
    best: Dict[Case, Found],
    run: Callable[[Sequence[Job], float], List[Optional[bool]]],
    trial: Callable[[Case], Any],
    deadline: float,
    save: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Go through the rounds and keep in `best` what is fastest; `save` after each.

    Args:
        run: of jobs, and a time of time.monotonic(): which of them ran by then; None for those that were not tried.
        trial: makes what has a case's error(config) and microseconds(configs, side, rounds).
    """
    ran: Dict[Any, bool] = {}  # by what is compiled: what serves one case serves the others
    for turn in range(ROUNDS):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        wanted = _wanted(best, turn)
        if not any(wanted.values()):
            continue
        needs = {(case, config): kernel_keys(case, config) for case, configs in wanted.items() for config in configs}
        jobs: Dict[Any, Job] = {}
        # The first candidates of all cases before the second ones: if the time is over, every case has had some.
        for case, config in _in_turns(wanted):
            for side, key in needs[case, config].items():
                if (side, key) not in ran:
                    jobs.setdefault((side, key), Job(case, config, side))
        say(
            f"round {turn + 1} of {ROUNDS}: {len(needs)} tile sizes of {len(wanted)} cases, {len(jobs)} kernels to compile"
        )
        share = SHARE * left / (ROUNDS - turn if turn else 2)
        for key, ok in zip(jobs, run(list(jobs.values()), time.monotonic() + share)):  # noqa: B905 Python 3.9
            if ok is not None:
                ran[key] = ok
        try:
            for case, configs in wanted.items():
                if time.monotonic() > deadline:
                    break
                good = [config for config in configs if all(ran.get(item) for item in needs[case, config].items())]
                if good:
                    best[case] = _faster(best[case], good, side_of(good[0], turn), trial(case), deadline, say)
        finally:
            save()


def _wanted(best: Dict[Case, Found], turn: int) -> Dict[Case, List[Any]]:
    """The candidates of a round: in the first what is used today, later only of cases that could be timed."""
    if not turn:
        return {case: [one.config] for case, one in best.items()}
    timed = {case: one.config for case, one in best.items() if one.after < float("inf")}
    found = {case: changes(config, case, turn) for case, config in timed.items()}
    return {case: configs for case, configs in found.items() if configs}


def _in_turns(wanted: Dict[Case, List[Any]]) -> List[Any]:
    longest = max(map(len, wanted.values()))
    return [(case, configs[at]) for at in range(longest) for case, configs in wanted.items() if at < len(configs)]


def _faster(
    known: Found, configs: List[Any], side: str, trial: Any, deadline: float, say: Callable[[str], None]
) -> Found:
    """`known`, or the fastest of `configs` if it is right and faster."""
    case = known.case
    timed = []
    for config in configs:
        if time.monotonic() > deadline:
            break
        timed.append((trial.microseconds([config], side, 5)[0], config))
    timed.sort(key=lambda pair: pair[0])
    right: List[Any] = []
    for took, config in timed:
        if len(right) == FINAL or took == float("inf"):
            break
        wrong = trial.error(config)
        if wrong < LIMITS[case.dtype]:
            right.append(config)
        else:
            say(f"passed over {tuple(config)} of {case.key}: its result is wrong by {wrong:.1e}")
    if not right:
        return known
    if known.after == float("inf"):  # the first round: what is used today
        took = trial.microseconds(right[:1], "both", 9)[0]
        return Found(case, right[0], took, took)
    before, *others = trial.microseconds([known.config, *right], "both", 9)
    took, config = min(zip(others, right), key=lambda pair: pair[0])  # noqa: B905 Python 3.9
    if took >= GAIN * before:
        return known
    # In the figures of one measurement, so that what a busy device adds to both does not count.
    return Found(case, config, known.before, known.after * took / before)
