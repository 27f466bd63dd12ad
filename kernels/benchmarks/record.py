"""A benchmark's figures in a JSON file that is whole after every row, so that a run which is cut off keeps what it has."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

__all__ = ["Record"]


class Record:
    """One document: what was measured where, its rows, what failed and what was left out.

    Args:
        benchmark: its name. path: the file, or None to keep the document in memory. about: more entries of the document.
        seconds: after so many, `late` is true and no row should be begun.
    """

    def __init__(self, benchmark: str, path: Optional[Path], about: Dict[str, Any], seconds: Optional[float] = None):
        self.path, self.seconds, self.start = path, seconds, time.monotonic()
        self.rows: List[Dict[str, Any]] = []
        self.failures: List[Dict[str, Any]] = []
        self.left_out: List[Any] = []
        self.document = {"benchmark": benchmark, **about, "rows": self.rows, "failures": self.failures}
        self.document["left_out"] = self.left_out
        self.save()

    def late(self) -> bool:
        return self.seconds is not None and time.monotonic() - self.start > self.seconds

    def add(self, row: Dict[str, Any]) -> None:
        self.rows.append(row)
        self.save()

    def attempt(self, what: Any, work: Callable[[], Any]) -> Any:
        """work()'s result; None where it raises, which is recorded, or where there is no time left for it."""
        if self.late():
            self.left_out.append(what)
            self.save()
            return None
        try:
            return work()
        except Exception as error:  # whatever it is, the next measurement may work, and its figure is worth having
            text = f"{type(error).__name__}: {str(error).strip()[:500]}"
            print(f"failed: {what}: {text}", file=sys.stderr, flush=True)
            self.failures.append({"what": what, "error": text})
            self.save()
            return None

    def finish(self) -> int:
        """Save and print the document, in one line; the exit code: 1 where something failed."""
        self.save()
        print(json.dumps(self.document))
        return 1 if self.failures else 0

    def save(self) -> None:
        self.document["seconds"] = round(time.monotonic() - self.start, 1)
        if self.path is None:
            return
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.document) + "\n")
        os.replace(partial, self.path)
