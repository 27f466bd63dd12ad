"""What the command line writes to a terminal: text from files and from the Hub cannot steer it, or fill it.

A config.json, a file's name or a model's own words may hold control characters, which move the cursor, change colours or the
window's title, and, in some terminals, type for the user. Everything that a command prints goes through `guarded`.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

__all__ = ["guarded", "one_line", "printable", "short"]

# C0 and C1 controls, and those of Unicode that turn the direction of writing. Line ends and tabs pass.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
PROGRESS = re.compile("\r|\x1b\\[A")  # what tqdm moves its bars with
LONGEST_WORD, LONGEST_LINE = 200, 1000


def printable(text: str, progress: bool = False) -> str:
    """`text` with control characters as Python writes them, e.g. "\\x1b"; `progress` lets those of a progress bar pass."""

    def escaped(part: str) -> str:
        return CONTROL.sub(lambda sign: sign[0].encode("unicode_escape").decode(), part)

    if not progress:
        return escaped(text)
    plain, moves = PROGRESS.split(text), PROGRESS.findall(text)
    return "".join(escaped(part) + move for part, move in zip(plain, [*moves, ""], strict=True))


def short(text: str) -> str:
    """One line of an error with the middle of very long words left out, and what comes after 1,000 characters."""
    words = (word if len(word) <= LONGEST_WORD else f"{word[:60]}...{word[-20:]}" for word in text.split())
    line = " ".join(words)
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..."


def one_line(error: Exception) -> str:
    """What an exception says, in one line: where it is none that was raised for a reader, with its class."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = short(" ".join(str(error).split()))
    if isinstance(error, ValueError | OSError | RuntimeError | ImportError) and text:
        return text
    # Nobody wrote this text for a reader of the command line.
    return f"{type(error).__name__}: {text} (--debug shows where)"


class _Guarded:
    """A text stream in front of `stream` that writes what `printable` leaves."""

    def __init__(self, stream: TextIO, progress: bool):
        self._stream, self._progress = stream, progress

    def write(self, text: str) -> int:
        self._stream.write(printable(text, self._progress))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def guarded() -> Iterator[None]:
    """Let what is printed in this block pass `printable`, on stdout and stderr, and what loggers write to a stream."""
    former = sys.stdout, sys.stderr
    # transformers' handler has had its stream since it was imported.
    handlers = {id(handler): (handler, handler.stream) for handler in _stream_handlers()}
    sys.stdout, sys.stderr = _Guarded(sys.stdout, False), _Guarded(sys.stderr, True)  # type: ignore[assignment]
    try:
        for handler, stream in handlers.values():
            handler.stream = _Guarded(stream, False)
        yield
    finally:
        sys.stdout, sys.stderr = former
        for handler, stream in handlers.values():
            handler.stream = stream


def _stream_handlers() -> Iterator[logging.StreamHandler[Any]]:
    """The handlers of all loggers that have been made, which write to a stream that is no file of their own."""
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            # That of a subclass may be no attribute that can be set, as for logging's own last resort.
            if type(handler) is logging.StreamHandler:
                yield handler
