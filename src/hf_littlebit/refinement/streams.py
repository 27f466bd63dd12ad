"""The hidden states between two blocks, for all tokens: what the dense model makes of a text, and what the refined one makes of it.

    [rows, length, size] fp32, on disk, as long as one file a stream

The file is mapped into memory: where there is room the operating system keeps it there, and where there is none only the rows in
use are. A stream is written under a new name and takes the old one's place when it is complete, so that a kill at any time leaves
a whole one.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Stream"]


class Stream:
    """One stream of hidden states in `folder`, in front of block `index`; `shape` is (rows, length, size)."""

    def __init__(self, folder: str, name: str, index: int, shape: tuple[int, int, int]):
        self.folder, self.name, self.index, self.shape = folder, name, index, shape
        self._data: Tensor | None = None

    @property
    def path(self) -> str:
        """The file that holds it, which says its block: "dense-3.f32"."""
        return os.path.join(self.folder, f"{self.name}-{self.index}.f32")

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Some rows, fp32 in memory, with no tie to the file."""
        if self._data is None:
            rows_, length, size = self.shape
            flat = torch.from_file(self.path, shared=True, size=rows_ * length * size, dtype=torch.float32)
            self._data = flat.view(self.shape)
        return self._data[rows].clone()

    def following(self, index: int) -> Stream:
        """The stream of the same name in front of block `index`, which is still to be written."""
        return Stream(self.folder, self.name, index, self.shape)

    def write(self, make: Callable[[slice], Tensor], batch: int) -> None:
        """Compute all rows by `make`, `batch` at a time, and put the file in its place when it is complete."""
        part = self.path + ".part"
        with open(part, "wb") as file:
            for at in range(0, self.shape[0], batch):
                rows = make(slice(at, min(at + batch, self.shape[0])))
                file.write(rows.detach().float().cpu().contiguous().numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path)

    def remove(self) -> None:
        """Delete the file; on POSIX rows that are still mapped stay readable."""
        self._data = None
        if os.path.isfile(self.path):
            os.remove(self.path)
