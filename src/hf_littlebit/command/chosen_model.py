"""What a command is given to work with: the model that it names, its tokenizer, and the device that it is to be on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .terminal import one_line

__all__ = ["HEADROOM", "WORKSPACE", "default_device", "find_device", "find_tokenizer", "load_model", "on_gpu"]

HEADROOM, WORKSPACE = 1.25, 2.5e9  # memory of a dense model that writes: times its size, and bytes on top


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer) of `args.model` on `args.device`."""
    from ..load.meta_model import model_class
    from ..load.source import find_source

    device = find_device(args)
    source = find_source(args.model)
    tokenizer = find_tokenizer(args.model, required=True)
    place = {"dtype": args.dtype, "device_map": device, "variant": source.variant}
    model = model_class(source.config).from_pretrained(args.model, **place)
    return model.eval(), tokenizer


def find_device(args: argparse.Namespace) -> str:
    """--device, checked: that is, whether this machine has it."""
    from ..placement import check_device

    device: str = args.device or default_device(None).type
    check_device(device, "--device", "cpu")
    return device


def find_tokenizer(model: str, required: bool) -> Any:
    """The model's tokenizer; without one, an error if it is `required`, else a note and None."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        reason = "its vocabulary is empty"
    except (OSError, ValueError, ImportError) as error:
        tokenizer, reason = None, one_line(error)
    # Without any file, transformers makes a tokenizer of special tokens alone for some model types.
    if tokenizer is not None and len(tokenizer) > len(set(tokenizer.all_special_ids)):
        return tokenizer
    if required:
        raise ValueError(
            f"{model} has no tokenizer that can be used: {reason}; save the model's tokenizer into its folder"
        )
    print(f"note: no tokenizer is saved along: {reason}", file=sys.stderr)
    return None


@contextmanager
def on_gpu(model: Any, device: str | None) -> Iterator[None]:
    """Have a dense `model` on `device`, or on the GPU that there is if None, where it fits; it comes back afterwards."""
    import torch

    wanted = default_device(device)
    size = sum(value.numel() * value.element_size() for value in model.parameters())
    if wanted.type != "cuda" or HEADROOM * size + WORKSPACE > torch.cuda.mem_get_info(wanted)[0]:
        yield
        return
    home = model.device
    try:
        model.to(wanted)
        yield
    finally:
        model.to(home)


def default_device(name: str | None) -> Any:
    """The torch.device that --device names, by default the GPU that there is, else the CPU."""
    import torch

    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
