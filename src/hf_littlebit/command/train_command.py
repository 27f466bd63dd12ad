"""`littlebit train`: a model and some text in, a trained and packed model out, with a plot of how it went.

The model is a dense one, which is its own teacher, or one that is quantized already (refined, say, or trained on other
text), beside which the dense one is named as the teacher.

Under `accelerate launch` or `torchrun` every process runs all of it, with a share of each batch; the first one alone writes
files and the report, and makes the text that the others then read.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from typing import Any

from .out_folder import check_folder
from .text import DATA_HELP, Text, check_names, context_of, is_mixed, text_length, written_at_a_time
from .training_report import REPORT, perplexity, write_report

__all__ = ["add_options", "run_train"]

HELD_OUT = 64  # blocks for evaluation where no --eval is given, but at most a tenth of the data
EVALUATIONS = 5  # during training
CHECKPOINTS = "checkpoints"  # folder within --out
WRITTEN = 1000  # blocks where the model writes all of the text
SAVED = 500  # the most steps between checkpoints by default
MISSING_BPW = "--bpw is missing; say how many bits per weight to keep, e.g. --bpw 0.55"
DTYPES = ("auto", "bfloat16", "float16", "float32")
SAME = (
    "steps",
    "batch-size",
    "accumulate",
    "lr",
    "no-teacher",
    "bf16",
    "seed",
)  # options that a resumed training keeps
LOSS = "the loss"  # under this name it is kept
FORMER_LOSS: dict[str, Any] = {"hidden_error": "mean_square", "hidden_weight": 10 / 2048}  # of trainings that kept none
WAIT = 24 * 3600  # seconds that processes wait for each other: for the first to write the text, say


def add_options(train: argparse.ArgumentParser) -> None:
    """The options of `train` besides those of the method."""
    train.add_argument(
        "model", metavar="MODEL", help="folder or Hub id of a dense model, or of a quantized one to train on"
    )
    train.add_argument(
        "--teacher",
        metavar="DENSE",
        help="folder or Hub id of the model to imitate (default: a dense MODEL; a quantized one has none)",
    )
    train.add_argument("--out", metavar="DIR", required=True, help="folder for the packed model, plot and checkpoints")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in DIR/checkpoints")
    data = train.add_argument_group("the data")
    data.add_argument(
        "--data",
        metavar="TEXT",
        nargs="+",
        required=True,
        help=DATA_HELP,
    )
    data.add_argument("--eval", metavar="TEXT", nargs="+", help="held-out text (default: the last blocks of the data)")
    data.add_argument("--column", metavar="NAME", default="text", help="of datasets and JSON lines (default: text)")
    data.add_argument("--length", metavar="N", type=int, help="tokens per block (default: the context, at most 512)")
    data.add_argument(
        "--blocks",
        metavar="N",
        type=int,
        help="read or write so many blocks (default: all; self alone: 1,000, beside text: what the steps need)",
    )
    how = train.add_argument_group("the training")
    how.add_argument("--steps", metavar="N", type=int, default=300, help="optimizer steps (default: 300)")
    how.add_argument("--batch-size", metavar="N", type=int, default=8, help="blocks at a time and device (default: 8)")
    how.add_argument("--accumulate", metavar="N", type=int, default=1, help="batches per step (default: 1)")
    how.add_argument("--lr", metavar="X", type=float, help="of embeddings and norms; the others are multiples of it")
    how.add_argument("--no-teacher", action="store_true", help="learn from the text alone, without distillation")
    how.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    how.add_argument(
        "--save-steps",
        metavar="N",
        type=int,
        help="steps between checkpoints (default: a fifth of --steps, at most 500)",
    )
    how.add_argument("--dtype", choices=DTYPES, default="auto", help="of what stays dense (default: as in the model)")
    how.add_argument("--cpu", action="store_true", help="train on the CPU even if there is a GPU")


def run_train(args: argparse.Namespace, config: Any, tokenizer: Any) -> int:
    """`littlebit train`; `config` is the LittleBitConfig of the options or None, `tokenizer` the model's."""
    import torch
    from transformers import TrainingArguments, set_seed

    from ..compat import resolve_dtype
    from ..load.meta_model import model_class
    from ..load.replacement import refused_writes, replacement
    from ..load.source import find_source
    from ..load.tables import plan_tables
    from ..report.size import size_report
    from ..train.callback import LittleBitCallback
    from ..train.data import text_blocks
    from ..train.distill import HIDDEN_WEIGHT
    from ..train.documents import read_texts
    from ..train.resume import fingerprint, keep_options, kept_options, model_fingerprint
    from ..train.trainer import LEARNING_RATE, LittleBitTrainer

    checkpoint = _check(args)
    source = find_source(args.model)
    method = _method(args, config, source)
    length = text_length(args.length, source.config)
    imitated = None if args.teacher is None else find_source(args.teacher)
    hidden_weight = HIDDEN_WEIGHT
    if imitated is not None:
        _check_teacher(args, source, imitated, length)
        if not _has_same_states(source, imitated):
            print("note: the teacher has other hidden states, so only its next tokens are learnt", file=sys.stderr)
            hidden_weight = 0.0
    seed = args.seed or 0
    set_seed(seed)
    # Before TrainingArguments, which have engines take apart whatever is loaded after them.
    model = model_class(source.config).from_pretrained(args.model, dtype="float32")
    teacher = None
    if imitated is not None:
        teacher = (
            model_class(imitated.config).from_pretrained(args.teacher, dtype="float32", variant=imitated.variant).eval()
        )
    if config is not None:
        plan_tables(model, config)  # refused before there is any work
    checkpoints = os.path.join(args.out, CHECKPOINTS)
    every = max(1, args.steps // EVALUATIONS)
    arguments = TrainingArguments(
        checkpoints,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=LEARNING_RATE if args.lr is None else args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, args.steps // 20),
        logging_steps=max(1, args.steps // 50),
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=True,
        save_steps=args.save_steps or max(1, min(SAVED, args.steps // EVALUATIONS)),
        save_total_limit=2,
        prediction_loss_only=True,
        bf16=args.bf16,
        use_cpu=args.cpu or not torch.accelerator.is_available(),  # else Trainer refuses --bf16 without a GPU
        seed=seed,
        report_to=[],
        ddp_timeout=WAIT,
    )
    main = arguments.process_index == 0
    # The others have no folder of their own to write to, and write nothing.
    with replacement(args.out) if main else nullcontext(args.out) as folder:
        for each in (model, teacher):
            if each is not None:
                each.to(arguments.device)
        writer = model if teacher is None else teacher
        writes = written_at_a_time(writer.config, length)
        text = Text(args.data, args.column, length, seed, checkpoints, writes)
        with arguments.main_process_first(desc="the text"):
            # Of both halves no more than is trained on: one of them has to be written.
            used = args.steps * args.batch_size * args.accumulate * arguments.world_size + 2 * HELD_OUT
            most = WRITTEN if text.written else used if text.mixed else None
            blocks = text.first(writer, tokenizer, args.blocks or most)
            if args.eval:
                held_out = text_blocks(read_texts(args.eval, args.column), tokenizer, length, args.column, HELD_OUT)
            else:
                blocks, held_out = blocks.split(max(1, min(HELD_OUT, len(blocks) // 10)))
            blocks = text.whole(writer, tokenizer, blocks, len(blocks) if text.mixed else 0)
        # Only whole batches: where processes share them, Trainer weighs those of another size wrongly.
        whole = (size for size in range(args.batch_size, 0, -1) if len(held_out) % size == 0)
        arguments.per_device_eval_batch_size = next(whole)
        made_of = {f"--{name}": getattr(args, name.replace("-", "_")) for name in SAME}
        made_of |= {"the method": method.to_dict(), "--length": length}
        made_of |= {"the text": fingerprint(blocks.tokens), "the model": model_fingerprint(model).hex()}
        made_of["the teacher"] = None if teacher is None else model_fingerprint(teacher).hex()
        minimised: dict[str, Any] = {"hidden_error": "relative", "hidden_weight": hidden_weight}
        if args.resume and LOSS not in kept_options(checkpoints):
            minimised = FORMER_LOSS
        keep_options(checkpoints, made_of | {LOSS: minimised}, args.resume, arguments.process_index == 0)
        losses = {}
        if config is not None:
            losses["dense"] = _evaluate(model, arguments, held_out)
        if teacher is not None:
            losses["teacher"] = _evaluate(teacher, arguments, held_out)
        dtype = resolve_dtype(source.config.dtype) if args.dtype == "auto" else getattr(torch, args.dtype)
        said = None if args.no_teacher else teacher or "self"
        callback = LittleBitCallback(config, said, dtype=dtype, **minimised)
        trainer = LittleBitTrainer(model, arguments, callbacks=[callback], train_dataset=blocks, eval_dataset=held_out)
        with refused_writes(checkpoints):
            trainer.train(resume_from_checkpoint=checkpoint)
        packed = trainer.evaluate()["eval_loss"]
        model.config.use_cache = True
        if main:
            tokenizer.save_pretrained(folder)
        trainer.save_model(folder)
        if not main:
            return 0
        history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
        losses["before training"] = next(entry["eval_loss"] for entry in history if "eval_loss" in entry)
        losses["packed"] = packed
        size = size_report(folder)
        report = {
            "model": args.model if not os.path.isdir(args.model) else os.path.basename(os.path.realpath(args.model)),
            "bpw": size.bpw,
            "steps": args.steps,
            "tokens_per_step": args.batch_size * args.accumulate * length * arguments.world_size,
            "perplexity": {name: perplexity(loss) for name, loss in losses.items()},
            "history": history,
        }
        write_report(folder, report)
    print(size.table())
    print(f"\nperplexity on {len(held_out)} held-out blocks of {length} tokens")
    for name, loss in losses.items():
        print(f"  {name:<16}{perplexity(loss):.4g}")
    print(f"saved to {args.out}")
    return 0


def _check(args: argparse.Namespace) -> str | None:
    """The checkpoint to go on from, if any."""
    for option in ("steps", "batch_size", "accumulate", "save_steps"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise ValueError(f"--{option.replace('_', '-')} is {getattr(args, option)}; it must be at least 1")
    fewest = 4 if is_mixed(args.data) and not args.eval else 2
    if args.blocks is not None and args.blocks < fewest:
        raise ValueError(f"--blocks is {args.blocks}; it must be at least {fewest}")
    if args.lr is not None and not 0 < args.lr < 1:
        raise ValueError(f"--lr is {args.lr:g}; it must be above 0 and below 1")
    if args.format not in (None, "packed"):
        raise ValueError(
            f"--format is {args.format!r}, but train packs its result; the checkpoints in --out are latent"
        )
    check_names(args.data)
    check_names(args.eval or ())
    if args.teacher is not None and args.no_teacher:
        raise ValueError("--teacher and --no-teacher exclude each other; leave one out")
    from ..train.resume import last_checkpoint

    out = args.out
    check_folder(out)
    kept = os.path.join(out, CHECKPOINTS)
    found = last_checkpoint(kept)
    # What is written last tells a finished training from one that was interrupted while its model was saved.
    if os.path.isfile(os.path.join(out, REPORT)) or (os.path.isfile(os.path.join(out, "config.json")) and not found):
        raise ValueError(f"--out {out} holds a model already; give another folder")
    if found and not args.resume:
        raise ValueError(f"{kept} holds an unfinished training; add --resume to go on, or give another --out")
    if args.resume and not found:
        raise ValueError(f"{kept} holds no complete checkpoint to resume from; leave out --resume")
    return found


def _method(args: argparse.Namespace, config: Any, source: Any) -> Any:
    """The LittleBitConfig of what is trained: `config`, as the options have it for a dense model, or that of a quantized one.

    Raises:
        ValueError: for options that do not fit the model that the training starts from.
    """
    method = source.quantization
    if method is None:
        if config is None:
            raise ValueError(MISSING_BPW)
        return config
    if config is not None:
        raise ValueError(
            f"{args.model} is quantized already, at {method.bpw:g} bits; leave out --bpw and the rest of the method to train "
            "it on, or start from the dense model"
        )
    if args.teacher is None and not args.no_teacher:
        known = f" (it was made of {method.base_model})" if method.base_model else ""
        raise ValueError(
            f"{args.model} is quantized already, so it cannot be the teacher; name the dense model with --teacher{known}, or "
            "learn from the text alone with --no-teacher"
        )
    if args.teacher is None and "self" in args.data:
        raise ValueError(
            f"--data self: {args.model} is quantized already, and would write poor text; give other --data, or name the dense "
            "model with --teacher"
        )
    return method


def _check_teacher(args: argparse.Namespace, source: Any, teacher: Any, length: int) -> None:
    """Refuse a model to imitate that cannot be, before anything is loaded.

    Raises:
        ValueError: for a quantized one, another vocabulary, and a context that is too short.
    """
    if teacher.quantization is not None:
        raise ValueError(f"--teacher {args.teacher} is quantized; name the dense model, of which more can be learnt")
    own, other = (each.config.get_text_config() for each in (source, teacher))
    if own.vocab_size != other.vocab_size:
        raise ValueError(
            f"--teacher {args.teacher} has a vocabulary of {other.vocab_size} tokens, and {args.model} one of {own.vocab_size}; "
            "name a model with the same"
        )
    if context_of(teacher.config) < length:
        raise ValueError(
            f"--teacher {args.teacher} reads {context_of(teacher.config)} tokens, less than --length {length}; lower that"
        )


def _has_same_states(source: Any, teacher: Any) -> bool:
    """Whether hidden states of both models can be compared: as many, and as wide."""
    own, other = (each.config.get_text_config() for each in (source, teacher))
    return all(getattr(own, name, None) == getattr(other, name, None) for name in ("num_hidden_layers", "hidden_size"))


def _evaluate(model: Any, arguments: Any, blocks: Any) -> float:
    """Mean loss per token of the dense model, of which each process takes a share of the blocks.

    Trainer.evaluate would let the engine shard the model, which is still to be factorized.
    """
    import torch
    import torch.distributed as dist

    model.eval()
    sums = torch.zeros(2, device=arguments.device)
    mine = range(arguments.process_index, len(blocks), arguments.world_size)
    for at in range(0, len(mine), arguments.per_device_eval_batch_size):
        tokens = torch.stack([blocks[row]["input_ids"] for row in mine[at : at + arguments.per_device_eval_batch_size]])
        tokens = tokens.to(arguments.device)
        with torch.no_grad(), torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.bf16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        sums += torch.stack([loss.float() * len(tokens), torch.full_like(loss, len(tokens))])
    if dist.is_initialized():
        dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()
