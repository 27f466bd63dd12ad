"""`littlebit train`: a dense model and some text in, a trained and packed model out, with a plot of how it went."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from typing import Any

__all__ = ["register", "run_train"]

HELD_OUT = 64  # blocks for evaluation where no --eval is given, but at most a tenth of the data
EVALUATIONS = 5  # during training


def register(add: Callable[..., argparse.ArgumentParser], add_method: Callable[..., None]) -> None:
    """Add the command to the command line; `add` makes a subcommand and `add_method` its LittleBitConfig options."""
    train = add(
        "train",
        run_train,
        "train a dense model's bits by distillation, and pack it",
        "train org/model --bpw 0.3 --data corpus.txt --steps 1000 --out packed",
    )
    train.add_argument("model", metavar="MODEL", help="folder or Hub id of a dense model, which is also the teacher")
    train.add_argument("--out", metavar="DIR", required=True, help="folder for the packed model, plot and checkpoints")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in DIR")
    add_method(train, required=True)
    data = train.add_argument_group("the data")
    data.add_argument(
        "--data",
        metavar="TEXT",
        nargs="+",
        required=True,
        help="text files, folders, Hub datasets (org/name[:config][@split]), or `self`: the teacher writes the text",
    )
    data.add_argument("--eval", metavar="TEXT", nargs="+", help="held-out text (default: the last blocks of the data)")
    data.add_argument("--column", metavar="NAME", default="text", help="of datasets and JSON lines (default: text)")
    data.add_argument("--length", metavar="N", type=int, help="tokens per block (default: the context, at most 512)")
    data.add_argument("--self-blocks", metavar="N", type=int, help="blocks to write with `self` (default: one epoch)")
    how = train.add_argument_group("the training")
    how.add_argument("--train-steps", "--max-steps", metavar="N", type=int, default=300, help="(default: 300)")
    how.add_argument("--batch-size", metavar="N", type=int, default=8, help="blocks per step and device (default: 8)")
    how.add_argument("--accumulate", metavar="N", type=int, default=1, help="batches per step (default: 1)")
    how.add_argument("--lr", metavar="X", type=float, help="of latents (default: the measured best)")
    how.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    how.add_argument("--no-teacher", action="store_true", help="learn from the text alone, without distillation")
    how.add_argument("--save-steps", metavar="N", type=int, default=500, help="steps between checkpoints (default: 500)")
    how.add_argument("--cpu", action="store_true", help="train on the CPU even if there is a GPU")
