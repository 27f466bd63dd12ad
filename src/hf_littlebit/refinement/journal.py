"""What a refinement has done so far, on disk, so that it goes on after a kill at any time.

    options.json                what the refinement is made of; another one is not mixed into it
    allocation.json             the bits of every block, where they were measured
    distilled.json              whether there was memory for the distillation at the end when it began (command/refine_command.py)
    embeddings.json             whether embedding and head move in it, likewise
    self-*.safetensors          text that the model wrote (train/data.py)
    block-3.safetensors         the latents, scales and norms of a block that is done
    done.json                   how many blocks are done, and their figures
    dense-4.f32, student-4.f32  the two streams of hidden states in front of the next block (streams.py)
    teacher/, checkpoints/      of the distillation at the end; teacher.parts/ of what is said so far

Every file takes its name only when it is complete. done.json is written when a block's file and both streams are there, so what it
counts is whole; what a kill left behind beyond it is overwritten.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["ALLOCATION", "DISTILLED", "EMBEDDINGS", "Journal", "Watch", "foreign_names"]

DONE = "done.json"
ALLOCATION, DISTILLED, EMBEDDINGS = "allocation.json", "distilled.json", "embeddings.json"
# What a refinement calls its files, complete or not.
NAMES = re.compile(
    r"((options|done|allocation|distilled|embeddings)\.json|block-\d+\.safetensors|(dense|student)-\d+\.f32"
    r"|self-[0-9a-f]+(-\d+)?(\.safetensors)?)(\.part)?|teacher(\.parts)?|\.teacher\.(saving|replaced)|checkpoints"
)


def foreign_names(folder: str) -> list[str]:
    """Names in `folder`, which need not exist, that no refinement has given: what somebody else keeps there."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if not NAMES.fullmatch(name))


class Journal:
    """The record in `folder`, which is made when something is kept."""

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

    def sweep(self) -> None:
        """Delete streams other than those in front of the next block, which a kill has left."""
        kept = f"-{len(self.blocks)}.f32"
        for name in os.listdir(self.folder):
            if name.startswith(("dense-", "student-")) and not name.endswith(kept):
                os.remove(self.path(name))

    def note(self, figures: dict[str, Any]) -> None:
        """Count one more block as done; its file and the streams behind it are complete."""
        self.blocks.append(figures)
        self._write(DONE, self.blocks)

    def keep(self, name: str, find: Callable[[], Any]) -> Any:
        """What `find` gives, as JSON in the file `name`, or what an earlier run found: the work must go on as it was begun."""
        if os.path.isfile(self.path(name)):
            with open(self.path(name), encoding="utf-8") as stream:
                return json.load(stream)
        found = find()
        os.makedirs(self.folder, exist_ok=True)
        self._write(name, found)
        return found

    def forget(self, name: str) -> None:
        """Let `keep` find `name` anew."""
        if os.path.isfile(self.path(name)):
            os.remove(self.path(name))

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
