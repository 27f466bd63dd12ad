"""`littlebit quantize` without text: the best start that takes minutes, and a look at what came out.

    refined         a causal model that fits into memory writes a little text, and is refined on that (refine_command.py)
    weights alone   any other, and with --weights-only: each weight is factorized as it is read, as by from_pretrained

Either way the dense and the packed model are compared on text that the dense one wrote, before it is let go. What cannot be done
is left out with a word.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .chosen_model import HEADROOM, WORKSPACE, on_gpu
from .refine_command import WEIGHTS_ALONE, quantize_on_text, remove_work
from .text import context_of

__all__ = ["add_options", "quantize_without_text"]

# What ten minutes of a core give SmolLM2-135M; more of it is --data self (docs/real_model.md).
SHORT = {"data": ["self"], "tokens": 16_384, "epochs": 1.0, "distill_epochs": 4.0}
REFINED_INIT = "admm"  # the other initialisers are for comparison, and stay as published
CHECK_ROWS, LENGTH = 8, 256  # blocks of text for the check of weights alone, and tokens in each


def add_options(group: Any) -> None:
    """The options of `quantize` that are about this."""
    group.add_argument(
        "--weights-only",
        action="store_true",
        help="factorize the weights alone as they are read: less memory, and much worse (default: refine the model on a little "
        "text that it writes)",
    )
    group.add_argument("--no-check", action="store_true", help="do not compare the result with the dense model")


def quantize_without_text(args: argparse.Namespace, config: Any, source: Any, tokenizer: Any) -> tuple[Any, Any]:
    """(quantized model, its Check or None) for the options of `littlebit quantize`.

    Args:
        config: the LittleBitConfig of the options. source: of load/source.py, dense. tokenizer: the model's, or None.
    """
    from ..load.meta_model import empty_model
    from ..refinement.blocks import NoChain

    obstacle = _obstacle(empty_model(source.config), tokenizer, args.dtype)
    alone = args.weights_only or config.init != REFINED_INIT or config.format == "latent"
    if obstacle and not (alone and args.no_check):
        print(f"note: the weights alone are quantized, and nothing is checked: {obstacle}", file=sys.stderr)
    if args.resume and (obstacle or alone):
        raise ValueError(
            "--resume goes on with a refinement, but the weights of this model are quantized alone"
            f"{': ' + obstacle if obstacle else ''}; give --overwrite in its place to discard what was begun"
        )
    if not (obstacle or alone):
        if args.workers is not None:
            raise ValueError(f"--workers is {args.workers}, for {WEIGHTS_ALONE}; add --weights-only, or leave it out")
        try:
            short = argparse.Namespace(**{**vars(args), **SHORT})
            # So few tokens do not teach an embedding: moved, it cost 0.1 nats.
            return quantize_on_text(short, config, source, tokenizer, embeddings=False)
        except NoChain as error:
            print(f"note: the weights alone are quantized: {error}", file=sys.stderr)
            remove_work(args.out)
    return _quantize_weights(args, config, source, tokenizer, checked=not (obstacle or args.no_check))


def _quantize_weights(
    args: argparse.Namespace, config: Any, source: Any, tokenizer: Any, checked: bool
) -> tuple[Any, Any]:
    """The same for the weights alone."""
    from ..load.meta_model import model_class
    from ..report.guard import Check, block_loss
    from ..train.data import sample_blocks

    load = model_class(source.config).from_pretrained
    if checked:
        model = load(args.model, dtype=args.dtype)
        length, seed = min(LENGTH, context_of(source.config)), config.seed % 2**31
        with on_gpu(model, args.device):
            tokens = sample_blocks(model, tokenizer, CHECK_ROWS, length, seed=seed, batch_size=CHECK_ROWS).tokens
            dense = block_loss(model, tokens)
        del model  # before the other one is loaded
    model = load(args.model, quantization_config=config, dtype=args.dtype)
    if not checked:
        return model, None
    vocabulary, count = model.get_input_embeddings().num_embeddings, CHECK_ROWS * (length - 1)
    return model, Check(dense, block_loss(model, tokens), count, vocabulary, own=True)


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
