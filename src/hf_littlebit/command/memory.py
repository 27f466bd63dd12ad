"""How this program's process gets its memory from the system.

glibc gives large blocks back at once, so that every tensor of a training step is new memory, whose pages the system clears one
by one: a sixth of a step of SmolLM2-135M on a CPU (docs/refinement.md). A program that trains may keep them; a library must
not, since it is the whole process's memory.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# Of malloc.h: what mallopt's first argument means, and what it is set to.
MMAP_MAX, TRIM_THRESHOLD, TOP_PAD = -4, -1, -2
SETTINGS = ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 2**26))


def keep_freed_memory() -> bool:
    """Keep memory that is freed for what is allocated next; whether that could be set, which takes Linux with glibc."""
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return all(mallopt(what, value) == 1 for what, value in SETTINGS)
