"""A folder that is replaced as a whole or not at all, whatever ends the process, and by one process at a time.

    .NAME.saving      beside NAME: what is being saved; it takes the place of NAME when it is complete
    .NAME.replaced    beside NAME: the former NAME, for the moment between two renames

What else lies in NAME stays there: it is linked into the new folder, as a second name of the same file. Where a sibling
cannot take the place of NAME (NAME is a mount point or holds the working directory, or its parent is read-only), the new
files are saved in NAME/.saving and moved up one by one. A kill between two of these moves leaves files of two saves, which
save_id.py tells apart.

A lock (flock, which a killed process gives back) keeps a second writer out. Where a file system has none, nothing does.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from safetensors import SafetensorError

__all__ = ["LEFT_OVER", "holds_model", "interrupted", "refused_writes", "replacement", "weight_variant"]

SAVING, REPLACED = "saving", "replaced"
LEFT_OVER = f".{SAVING}"  # in a folder that a killed process was saving into; the next save removes it
# What save_pretrained calls weights: model.safetensors, its shards and their index, each with a variant or without.
WEIGHTS = re.compile(
    r"model(?:\.([^.]+?))?(?:-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index(?:\.([^.]+))?\.json"
)
CONFIG = "config.json"
# safetensors and torch say in words, and without a path, what the system refused.
TORCH_WRITER = "inline_container.cc"  # the file of torch that torch.save writes with
SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


def weight_variant(name: str) -> str | None:
    """The variant of a weight file or index called `name`, "" for the plain one; None for a file that is neither."""
    match = WEIGHTS.fullmatch(name)
    return None if match is None else match[1] or match[2] or ""


def holds_model(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` is one in which a model was saved."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return any(name == CONFIG or weight_variant(name) is not None for name in names)


def interrupted(folder: str | os.PathLike[str]) -> str | None:
    """Where the former content of `folder` is, which does not exist, because a kill came between two renames."""
    aside = _beside(os.path.realpath(folder), REPLACED)
    return aside if os.path.isdir(aside) else None


@contextmanager
def replacement(out: str | os.PathLike[str], inside: bool = False) -> Iterator[str]:
    """An empty folder to save into, whose files are in the folder `out` when the block ends; if it fails, `out` is as it was.

    Args:
        out: a folder, or a name that is free; missing parents are made. A link is followed.
        inside: move the files up from a folder in `out`, which keeps its identity, e.g. for a library's caller.

    Raises:
        ValueError: if another process is saving to `out`.
        OSError: with the path, if the system refuses to write, e.g. because the disk is full.
    """
    target = os.path.realpath(out)
    made = _missing_parents(target)
    locks: list[int] = []
    stage = ""
    try:
        try:
            stage = _claim(target, inside, locks)
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(out)) from error
        with refused_writes(os.fspath(out), stage):
            yield stage
            _put_in_place(stage, target)
    except BaseException:
        if stage:
            shutil.rmtree(stage, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # something else lies in it
                os.rmdir(folder)
        raise
    finally:
        for lock in locks:
            os.close(lock)


@contextmanager
def refused_writes(out: str, stage: str = "") -> Iterator[None]:
    """Let a write that the system refuses, in this block, name the path `out`: in place of the `stage`'s, or of none.

    Raises:
        OSError: where Python's own names no path, and for those that safetensors and torch put into words.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        refused = _refused_write(error, stage or out, out)
        if refused is None:
            raise
        raise refused from error


def _refused_write(error: Exception, stage: str, out: str) -> OSError | None:
    """`error` with the path `out` in place of the `stage`'s or of none, if it is the system's refusal to write."""
    if isinstance(error, RuntimeError):
        if TORCH_WRITER not in str(error) or "Reader" in str(error):
            return None
        return OSError(f"{out}: not written to its end, as on a full disk ({error})")
    if isinstance(error, OSError):
        if error.errno is None or (error.filename is not None and not str(error.filename).startswith(stage)):
            return None
        path = out + str(error.filename).removeprefix(stage) if error.filename else out
        return OSError(error.errno, error.strerror, path)
    words = SYSTEM_ERROR.search(str(error)) if isinstance(error, SafetensorError) else None
    return None if words is None else OSError(int(words[1]), os.strerror(int(words[1])), out)


def _missing_parents(target: str) -> list[str]:
    """The folders that have to be made for `target`, the innermost first, with `target` itself as the first."""
    missing = []
    while not os.path.lexists(target):
        missing.append(target)
        target = os.path.dirname(target)
    return missing


def _beside(target: str, what: str) -> str:
    folder, name = os.path.split(target)
    return os.path.join(folder, f".{name}.{what}")


def _claim(target: str, inside: bool, locks: list[int]) -> str:
    """Make the empty folder to save into, keep others out by `locks`, and put right what a kill left behind."""
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
    if os.path.isdir(target):
        _lock(target, target, locks)
        here = os.path.realpath(os.curdir)
        inside = inside or os.path.ismount(target) or os.path.commonpath([here, target]) == target
    if not inside:
        try:
            stage = _locked_folder(_beside(target, SAVING), target, locks)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not os.path.isdir(target):
                raise
        else:
            aside = _beside(target, REPLACED)
            if os.path.isdir(aside) and not os.path.exists(target):
                os.rename(aside, target)
            shutil.rmtree(aside, ignore_errors=True)
            return stage
    os.makedirs(target, exist_ok=True)
    if os.path.isdir(_beside(target, SAVING)):  # a writer that need not look inside began when `target` did not exist
        _lock(_beside(target, SAVING), target, locks)
    return _locked_folder(os.path.join(target, LEFT_OVER), target, locks)


def _locked_folder(path: str, target: str, locks: list[int]) -> str:
    """The folder `path`, empty and locked; one that a killed process left is emptied."""
    while True:
        os.makedirs(path, exist_ok=True)
        lock = _lock(path, target, locks)
        # Whoever had the lock before may have renamed the folder since it was opened here.
        with suppress(FileNotFoundError):
            if lock is None or os.path.samestat(os.fstat(lock), os.stat(path)):
                break
    for name in os.listdir(path):
        _remove(os.path.join(path, name))
    return path


def _lock(folder: str, target: str, locks: list[int]) -> int | None:
    """A lock on `folder`, which is added to `locks`; None where there are no locks.

    Raises:
        ValueError: if another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    lock = os.open(folder, os.O_RDONLY)
    locks.append(lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
            raise ValueError(
                f"another process is saving to {target}; wait until it has ended, or give another folder"
            ) from None
        return None  # the file system knows no locks
    return lock


def _put_in_place(stage: str, target: str) -> None:
    """Let the content of `stage` be that of `target`."""
    if os.path.dirname(stage) == target:
        _move_up(stage, target)
    elif not os.path.isdir(target):
        os.rename(stage, target)
    else:
        others = _others(stage, target)
        try:
            _link(others, target, stage)
            _exchange(stage, target)
        except OSError as error:
            # Hard links, or renaming this folder, may be forbidden; moving files needs neither.
            if error.errno in (errno.ENOSPC, errno.EDQUOT) or not os.path.isdir(target) or not os.path.isdir(stage):
                raise
            for name in others:
                _remove(os.path.join(stage, name))
            _move_up(stage, target)


def _others(stage: str, target: str) -> list[str]:
    """Names in `target` that stay beside what is saved in `stage`: all but the weights of the model that is replaced."""
    new = set(os.listdir(stage))
    stale = _stale(new, target)
    return [name for name in os.listdir(target) if name not in new | stale | {LEFT_OVER}]


def _stale(new: set[str], target: str) -> set[str]:
    """Weight files and indices in `target` that belong to the model before, when files called `new` are saved there."""
    variants = {weight_variant(name) for name in new} - {None}
    return {name for name in os.listdir(target) if weight_variant(name) in variants and name not in new}


def _link(names: list[str], source: str, place: str) -> None:
    """Give what is called `names` in the folder `source` the same names in `place`; of folders, all files in them."""

    def link(file: str, name: str) -> None:
        os.link(file, name, follow_symlinks=False)

    for name in names:
        file, second = os.path.join(source, name), os.path.join(place, name)
        if os.path.isdir(file) and not os.path.islink(file):
            shutil.copytree(file, second, symlinks=True, copy_function=link)
        else:
            link(file, second)


def _exchange(stage: str, target: str) -> None:
    aside = _beside(target, REPLACED)
    shutil.copymode(target, stage)
    os.rename(target, aside)
    try:
        os.rename(stage, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _move_up(stage: str, target: str) -> None:
    """Move the files of `stage` into `target`, the config first: with it, whatever is not moved yet is of another save."""
    new = os.listdir(stage)
    for name in sorted(new, key=lambda name: (name != CONFIG, name)):
        place = os.path.join(target, name)
        if os.path.isdir(place):
            _remove(place)
        shutil.move(os.path.join(stage, name), place)
    for name in _stale(set(new), target):
        os.unlink(os.path.join(target, name))
    os.rmdir(stage)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)
