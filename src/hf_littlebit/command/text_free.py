"""`littlebit quantize` without text: the best start that takes minutes, and a look at what came out.

    fitted          a causal model that fits into memory writes a little text, its layers are fitted to that (refinement/fitting.py)
    weights alone   any other, and with --weights-only: each weight is factorized as it is read, as by from_pretrained

Either way the dense and the packed model are compared on text that the dense one wrote, before it is let go. What cannot be done
is left out with a word.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

__all__ = ["add_options", "quantize_without_text"]

FIT_ROWS, CHECK_ROWS, LENGTH = 16, 8, 256  # blocks of text, and tokens in each
HEADROOM, WORKSPACE = 1.25, 1.5e9  # memory of the work: times the dense model, and bytes on top
FITTED_INIT = "admm"  # the other initialisers are for comparison, and stay as published


def add_options(group: Any) -> None:
    """The options of `quantize` that are about this."""
    group.add_argument(
        "--weights-only",
        action="store_true",
        help="factorize the weights alone as they are read: less memory, and much worse (default: fit the layers to a little "
        "text that the model writes)",
    )
    group.add_argument("--no-check", action="store_true", help="do not compare the result with the dense model")


def quantize_without_text(args: argparse.Namespace, config: Any, source: Any, tokenizer: Any) -> tuple[Any, Any]:
    """(quantized model, its Check or None) for the options of `littlebit quantize`.

    Args:
        config: the LittleBitConfig of the options. source: of load/source.py, dense. tokenizer: the model's, or None.
    """
    from ..load.meta_model import empty_model, model_class
    from ..refinement.fitting import NotFittable, fit_model
    from ..report.guard import Check, block_loss
    from ..train.data import sample_blocks

    load = model_class(source.config).from_pretrained
    obstacle = _obstacle(empty_model(source.config), tokenizer, args.dtype)
    fitted = not args.weights_only and config.init == FITTED_INIT
    dense = check = None
    rows = (FIT_ROWS if fitted else 0) + (0 if args.no_check else CHECK_ROWS)
    if obstacle and rows:
        print(f"note: the weights alone are quantized, and nothing is checked: {obstacle}", file=sys.stderr)
    elif rows:
        model = load(args.model, dtype=args.dtype)
        if args.device and _fits_gpu(model, args.device):
            model.to(args.device)
        context = getattr(source.config.get_text_config(), "max_position_embeddings", None) or LENGTH
        length = min(LENGTH, context)
        tokens = sample_blocks(model, tokenizer, rows, length, seed=config.seed % 2**31, batch_size=rows).tokens
        held_out = tokens[rows - CHECK_ROWS :]
        if not args.no_check:
            dense = block_loss(model, held_out)
        if fitted:
            try:
                model = fit_model(model, config, tokens[:FIT_ROWS])
            except NotFittable as error:
                print(f"note: the weights alone are quantized: {error}", file=sys.stderr)
                fitted = False
        if not fitted:
            del model  # before the other one is loaded
    if obstacle or not (rows and fitted):
        model = load(args.model, quantization_config=config, dtype=args.dtype)
    if dense is not None:
        vocabulary = model.get_input_embeddings().num_embeddings
        count = CHECK_ROWS * (held_out.shape[1] - 1)
        check = Check(dense, block_loss(model, held_out), count, vocabulary, "text that the dense model wrote")
    return model, check


def _obstacle(model: Any, tokenizer: Any, dtype: str) -> str:
    """Why a dense model, here on meta, cannot write text and be measured on this machine; "" if it can."""
    import torch

    if tokenizer is None:
        return "there is no tokenizer"
    from ..placement import free_memory

    config = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False) or not model.can_generate():
        return f"{type(model).__name__} is no causal language model"
    kept = model.config.dtype if dtype == "auto" else getattr(torch, dtype)
    size = (kept or torch.float32).itemsize
    need = HEADROOM * size * sum(value.numel() for value in model.parameters()) + WORKSPACE
    free = free_memory(torch.device("cpu"))
    if free is not None and need > free:
        return f"that takes about {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
    return ""


def _fits_gpu(model: Any, device: str) -> bool:
    """Whether the work on a dense model fits on `device`, too; on the CPU it does, and elsewhere that is not known."""
    import torch

    if torch.device(device).type != "cuda":
        return torch.device(device).type == "cpu"
    size = sum(value.numel() * value.element_size() for value in model.parameters())
    return HEADROOM * size + WORKSPACE < torch.cuda.mem_get_info(device)[0]
