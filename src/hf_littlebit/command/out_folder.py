"""The folder that a command saves to: --out, looked at before any work is done, and made when there is something to save."""

from __future__ import annotations

import os

from ..load.replacement import LEFT_OVER

__all__ = ["check_empty", "check_folder"]


def check_folder(out: str | os.PathLike[str]) -> None:
    """Raise a ValueError where --out is something else than a folder, or than a name that is still free."""
    if os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"--out {out} is a file; give a folder")
    if os.path.islink(out) and not os.path.exists(out):
        raise ValueError(f"--out {out} is a link to {os.readlink(out)}, which does not exist; give a folder")


def check_empty(out: str, overwrite: bool, source: str, what: str) -> None:
    """Raise a ValueError where a model that is saved to --out would join other files, or replace its own `source`.

    Args:
        overwrite: whether the user allows other files in the folder.
        what: the source in a word for the message, e.g. "dense model".
    """
    check_folder(out)
    if os.path.isdir(out) and not overwrite and set(os.listdir(out)) - {LEFT_OVER}:
        raise ValueError(f"--out {out} is not empty; give another folder, or --overwrite to save into it")
    if os.path.isdir(source) and os.path.realpath(source) == os.path.realpath(out):
        raise ValueError(f"--out {out} is the {what} itself; give another folder")
