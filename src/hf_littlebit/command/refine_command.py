"""`littlebit quantize` by refinement: a dense model and text in, a refined and packed model out; goes on after a kill.

The work is kept in DIR/refinement until the model is saved. It is what `--resume` goes on from.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import replace
from typing import Any

from ..load.replacement import LEFT_OVER, interrupted
from .chosen_model import default_device, on_gpu
from .out_folder import check_empty, check_folder
from .text import DATA_HELP, Text, check_names, text_length, written_at_a_time

__all__ = [
    "WEIGHTS_ALONE",
    "add_refine_options",
    "check_refine_options",
    "check_refine_out",
    "discard_work",
    "quantize_on_text",
    "remove_work",
]

WORK = "refinement"  # folder within --out
TOKENS = 786_432  # of text by default: what the distillation sees once
WRITTEN_TOKENS = 65_536  # by default where the model writes the text, which takes as long as using it
BLOCK_TOKENS = 65_536  # of the text by default, which blocks are tuned on
FEWEST = 4  # blocks of text: to tune on, to choose by, and to check on
CHECK_ROWS = 8  # blocks that the result is compared with the dense model on, at most a tenth of the text
# Blocks at a time from which the model writes unasked: they share the reading of its weights, one token each.
SHARED = 16
WEIGHTS_ALONE = "weights that are factorized as they are read (--weights-only), and not for refinement"  # --workers
# That need --data.
OPTIONS = (
    "column",
    "length",
    "tokens",
    "own_text",
    "own_tokens",
    "block_tokens",
    "epochs",
    "distill_epochs",
    "allocate",
)


def add_refine_options(quantize: argparse.ArgumentParser) -> None:
    """The options of `quantize` for refinement on text."""
    data = quantize.add_argument_group(
        "refinement on text, in an hour or so (without --data: on little that the model writes, in minutes)"
    )
    data.add_argument(
        "--data",
        metavar="TEXT",
        nargs="+",
        help=DATA_HELP,
    )
    data.add_argument("--column", metavar="NAME", help="of datasets and JSON lines (default: text)")
    data.add_argument(
        "--length", metavar="N", type=int, help="tokens per block of text (default: the context, at most 512)"
    )
    data.add_argument(
        "--tokens",
        metavar="N",
        type=int,
        help=f"of text, at most, what the model writes included (default: {TOKENS:,}, self alone: {WRITTEN_TOKENS:,})",
    )
    data.add_argument(
        "--own-text",
        action=argparse.BooleanOptionalAction,
        help="have the model write as much text as is given, so that less is unlearnt of what your text is not about; the same as "
        f"self. The default beside less than {TOKENS:,} tokens, up to these, where it writes at least {SHARED} blocks at a time",
    )
    data.add_argument(
        "--own-tokens",
        metavar="N",
        type=int,
        help="have it write so many, and not as many as are given, of which --tokens is then the limit; for a long run, with "
        "--distill-epochs, whose passes are over all of them",
    )
    data.add_argument(
        "--block-tokens",
        metavar="N",
        type=int,
        help=f"of the text, which blocks are tuned on (default: {BLOCK_TOKENS:,})",
    )
    data.add_argument("--epochs", metavar="X", type=float, help="passes over these tokens for every block")
    data.add_argument(
        "--distill-epochs",
        metavar="X",
        type=float,
        help=f"passes of the whole model at the end (default: what makes {TOKENS:,} tokens, at most 4); 0 leaves it out",
    )
    data.add_argument(
        "--allocate",
        action=argparse.BooleanOptionalAction,
        help="share the bits out among the blocks by what an error of each costs (the default), or give all the same",
    )
    data.add_argument(
        "--resume", action="store_true", default=None, help="go on with what a kill left in DIR/refinement"
    )


def check_refine_options(args: argparse.Namespace) -> None:
    """Refuse impossible options before anything is loaded.

    Raises:
        ValueError: with the value and the limit.
    """
    if args.data is not None and args.weights_only:
        raise ValueError("--weights-only quantizes without text, and --data is text to refine on; leave one out")
    if args.data is None:
        given = [name for name in OPTIONS if getattr(args, name) is not None]
        if given:
            no = "no-" if getattr(args, given[0]) is False else ""
            raise ValueError(
                f"--{no}{given[0].replace('_', '-')} is for refinement on text; add --data TEXT, or leave it out"
            )
        if args.resume and args.weights_only:
            raise ValueError("--resume goes on with a refinement, and --weights-only makes none; leave one out")
        return
    if args.workers is not None:
        raise ValueError(f"--workers is {args.workers}, for {WEIGHTS_ALONE}; leave it out")
    check_names(args.data)
    if args.own_text is False and "self" in args.data:
        raise ValueError("--data names self and --no-own-text forbids the model to write; leave one out")
    if args.own_tokens is not None and (args.own_text is False or list(args.data) == ["self"]):
        other = "--no-own-text forbids it to write" if args.own_text is False else "--data names no other text"
        raise ValueError(
            f"--own-tokens is what the model writes beside a text that is given, and {other}; leave one out"
        )
    if args.own_tokens is not None and args.distill_epochs is None:
        raise ValueError(
            f"--own-tokens is {args.own_tokens}, but by default no more than {TOKENS:,} tokens are distilled on; say by "
            "--distill-epochs how many times all of them are"
        )
    if args.format not in (None, "packed"):
        raise ValueError(f"--format is {args.format!r}, but refinement ends with a packed model; use littlebit train")
    if args.block_tokens is not None and args.block_tokens < 1:
        raise ValueError(f"--block-tokens is {args.block_tokens}; it must be 1 or more")
    for name, least in (("epochs", 0), ("distill_epochs", 0)):
        value = getattr(args, name)
        if value is not None and not least <= value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} is {value:g}; it must be {least} or more")
    if args.epochs == 0:
        raise ValueError("--epochs is 0, which would tune nothing; give --weights-only in the place of --data for that")


def check_refine_out(args: argparse.Namespace) -> None:
    """Refuse an --out that holds other files than an unfinished refinement which --resume goes on with.

    Raises:
        ValueError: saying what can be done: go on, discard it by --overwrite, or give another folder.
    """
    from ..refinement.journal import foreign_names

    work = _work(args.out)
    check_folder(args.out)
    foreign = foreign_names(work)
    if foreign and not args.weights_only:
        raise ValueError(
            f"{work} is where the work is kept, and has a {foreign[0]} in it that is none; give another --out"
        )
    if args.resume:
        if not os.path.isdir(work):
            raise ValueError(f"{work} holds no unfinished refinement to resume; leave out --resume")
        return
    if _begun(args.out) and not args.overwrite:
        raise ValueError(
            f"{work} holds an unfinished refinement; add --resume to go on, --overwrite to begin anew, or give another --out"
        )
    others = set(os.listdir(args.out)) - {LEFT_OVER} if os.path.isdir(args.out) else set()
    if not foreign:
        others -= {WORK}
    check_empty(args.out, args.overwrite or not others, args.model, "dense model")


def quantize_on_text(
    args: argparse.Namespace, config: Any, source: Any, tokenizer: Any, embeddings: bool = True
) -> tuple[Any, Any]:
    """(refined model, packed, and its Check or None) for the options of `littlebit quantize`, whose `data` is given here.

    Its work stays in --out until `remove_work`. Arguments as of text_free.quantize_without_text; `embeddings` says whether the
    distillation moves embedding and head, if there is room.
    """
    from ..load.meta_model import empty_model, model_class
    from ..load.tables import plan_tables
    from ..plan import plan_model
    from ..refinement.distillation import affordable
    from ..refinement.journal import DISTILLED, Journal
    from ..refinement.recipe import check_vocabulary
    from ..refinement.refinement import refine, refuse_unfit
    from ..report.guard import Check, block_loss

    length = text_length(args.length, source.config)
    work = _work(args.out)
    names = _names(args)
    text = Text(
        names, args.column or "text", length, config.seed % 2**31, work, written_at_a_time(source.config, length)
    )
    rows = _rows(args, text)
    empty = empty_model(source.config)
    # Refused before there is any text.
    plan = plan_model(empty, config)
    plan_tables(empty, config)
    recipe = _recipe(args, embeddings)
    model = model_class(source.config).from_pretrained(args.model, dtype=args.dtype)
    refuse_unfit(model, config, length, recipe, args.device)
    discard_work(args)
    fits = affordable(recipe.distillation, empty, plan, default_device(args.device), warn=False) is not None
    check = None
    with on_gpu(model, args.device):
        blocks = text.first(model, tokenizer, rows)
        if len(blocks) < FEWEST:
            raise ValueError(
                f"the text has {len(blocks)} block(s) of {length} tokens; at least {FEWEST} are needed: give more text or "
                "less --length"
            )
        vocabulary = model.get_input_embeddings().num_embeddings
        check_vocabulary(blocks.tokens, vocabulary)
        journal = Journal(work)
        if not _begun(args.out):
            journal.forget(DISTILLED)
        # Memory may be another when the work goes on, and how much text there is must not be.
        used = (
            TOKENS if journal.keep(DISTILLED, lambda: fits) else recipe.block_tokens
        )  # of all text; no more is written
        room = max(0, min(rows, used // length) - len(blocks))
        # Also where nothing is checked, so that the rest is the same text.
        blocks, held_out = blocks.split(max(1, min(CHECK_ROWS, len(blocks) // 10)))
        dense = None if args.no_check else block_loss(model, held_out.tokens)
        blocks = text.whole(model, tokenizer, blocks, _own(args, text, len(blocks), room))
    model = refine(model, config, blocks, recipe=recipe, folder=work, device=args.device)
    if dense is not None:
        count = len(held_out) * (length - 1)
        check = Check(dense, block_loss(model, held_out.tokens), count, vocabulary, text.written)
    return model, check


def _names(args: argparse.Namespace) -> list[str]:
    """The names of --data, with self among them where the model is to write as much as is given."""
    others = [name for name in args.data if name != "self"]
    if args.own_tokens is not None:
        return others
    return [*others, "self"] if args.own_text and others else args.data


def _own(args: argparse.Namespace, text: Text, given: int, room: int) -> int:
    """Blocks that the model writes beside `given` ones that were read: as many, and unless it was asked to at most `room`."""
    if text.written or args.own_text is False:
        return 0
    if args.own_tokens is not None:
        return int(args.own_tokens) // text.length
    if text.mixed:
        return given
    own = min(given, room)
    if own and text.writes < SHARED:
        print(
            f"note: the text has {given} blocks, and what it is not about is unlearnt; with --own-text the model writes as many, "
            f"{text.writes} at a time, which may take long",
            file=sys.stderr,
        )
        return 0
    return own


def _rows(args: argparse.Namespace, text: Text) -> int:
    """The most blocks of text."""
    default = WRITTEN_TOKENS if text.written else TOKENS
    tokens = default if args.tokens is None else args.tokens
    if args.own_tokens is not None and args.own_tokens < text.length:
        raise ValueError(f"--own-tokens is {args.own_tokens}; a block of text has {text.length}: give at least that")
    fewest = 2 * FEWEST if text.mixed else FEWEST
    if tokens // text.length < fewest:
        raise ValueError(
            f"--tokens is {tokens}; at least {fewest} blocks of {text.length} are needed (--length makes them shorter)"
        )
    return tokens // text.length


def _recipe(args: argparse.Namespace, embeddings: bool) -> Any:
    """The default Recipe, with what the options say, and whether the distillation moves `embeddings`."""
    from ..refinement.distillation import Schedule
    from ..refinement.recipe import Recipe

    schedule = None if args.distill_epochs == 0 else Schedule(epochs=args.distill_epochs, embeddings=embeddings)
    recipe = Recipe(distillation=schedule)
    if args.epochs is not None:
        recipe = replace(recipe, epochs=args.epochs)
    if args.block_tokens is not None:
        recipe = replace(recipe, block_tokens=args.block_tokens)
    if args.allocate is False:
        recipe = replace(recipe, allocation_rows=0)
    return recipe


def _work(out: str) -> str:
    """Where the work of a refinement into `out` is, also where a kill came while the saved model took its place."""
    aside = None if os.path.isdir(out) else interrupted(out)
    return os.path.join(aside or out, WORK)


def _begun(out: str) -> bool:
    """Whether there is work in `out` that would be lost: options are the first thing that a refinement writes."""
    from ..train.resume import OPTIONS

    return os.path.isfile(os.path.join(_work(out), OPTIONS))


def discard_work(args: argparse.Namespace) -> None:
    """Delete an unfinished refinement in --out that --overwrite does away with; call it where no other process has --out."""
    if args.overwrite and not args.resume and _begun(args.out):
        remove_work(args.out)


def remove_work(out: str) -> None:
    """Delete the work of a refinement whose model is saved in `out`; a folder of its name that holds anything else stays."""
    from ..refinement.journal import foreign_names

    work = _work(out)
    if not foreign_names(work):
        shutil.rmtree(work, ignore_errors=True)
