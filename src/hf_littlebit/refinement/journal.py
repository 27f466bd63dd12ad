"""What a refinement has done so far, on disk, so that it goes on after a kill at any time.

    options.json                what the refinement is made of; another one is not mixed into it
    allocation.json             the bits of every block, where they were measured
    block-3.safetensors         the latents, scales and norms of a block that is done
    done.json                   how many blocks are done, and their figures
    dense-4.f32, student-4.f32  the two streams of hidden states in front of the next block (streams.py)
    teacher/, checkpoints/      of the distillation at the end

Every file takes its name only when it is complete. done.json is written when a block's file and both streams are there, so what it
counts is whole; what a kill left behind beyond it is overwritten.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["Journal", "Watch"]

DONE = "done.json"
ALLOCATION = "allocation.json"


class Journal:
    """The record in `folder`, which exists."""

    def __init__(self, folder: str):
        self.folder = folder
        self.blocks: list[dict[str, Any]] = []  # the figures of every block that is done
        file = os.path.join(folder, DONE)
        if os.path.isfile(file):
            with open(file, encoding="utf-8") as stream:
                self.blocks = json.load(stream)

    def path(self, name: str) -> str:
        """Where a file of this refinement is."""
        return os.path.join(self.folder, name)

    def save_block(self, index: int, block: nn.Module, name: str) -> None:
        """Write all parameters of block `index`, called `name` in the model, under their names there."""
        state = {f"{name}.{own}": value.detach().cpu().contiguous() for own, value in block.named_parameters()}
        file = self.path(f"block-{index}.safetensors")
        save_file(state, file + ".part")
        os.replace(file + ".part", file)

    def read_block(self, index: int) -> dict[str, Tensor]:
        """The parameters of block `index`, by their names in the model."""
        return load_file(self.path(f"block-{index}.safetensors"))

    def note(self, figures: dict[str, Any]) -> None:
        """Count one more block as done; its file and the streams behind it are complete."""
        self.blocks.append(figures)
        self._write(DONE, self.blocks)

    def save_allocation(self, module_config: dict[str, Any]) -> None:
        """Keep the options that give every block its bits."""
        self._write(ALLOCATION, module_config)

    def read_allocation(self) -> dict[str, Any] | None:
        """What `save_allocation` kept; None if nothing was measured yet."""
        if not os.path.isfile(self.path(ALLOCATION)):
            return None
        with open(self.path(ALLOCATION), encoding="utf-8") as stream:
            found: dict[str, Any] = json.load(stream)
        return found

    def _write(self, name: str, value: Any) -> None:
        file = self.path(name)
        with open(file + ".part", "w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(file + ".part", file)


class Watch:
    """Seconds, and CPU seconds of all threads, between notes."""

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}
        self._last = time.perf_counter(), time.process_time()

    def note(self, what: str) -> None:
        """Name what the time since the last note was for."""
        now = time.perf_counter(), time.process_time()
        self.seconds[what] = round(now[0] - self._last[0], 3), round(now[1] - self._last[1], 3)
        self._last = now
