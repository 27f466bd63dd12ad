"""The command `littlebit`: quantize, train, pack, convert, info, eval, generate, bench, tune, push.

`optimum-cli littlebit` is the same.

Results go to stdout, progress and notes to stderr. Bad input ends with one line, "littlebit: error: ...", and exit code 2;
a failure of the machine or the network with the same line and 1; Ctrl-C with 130. torch and transformers are imported by
the commands that need them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from .arguments import build_parser, quantization_config
from .chosen_model import find_device, find_tokenizer, load_model
from .memory import keep_freed_memory
from .out_folder import check_empty
from .refine_command import check_refine_options, check_refine_out, quantize_on_text, remove_work
from .terminal import guarded, one_line
from .text import head_text
from .train_command import run_train

__all__ = ["build_parser", "main"]

SMALLER = 0.75  # of the file: worth a word


def main(argv: Sequence[str] | None = None, prog: str = "littlebit") -> int:
    """Run the command line `argv` (default: the program's own) and return its exit code."""
    with guarded():
        args = build_parser(prog).parse_args(argv)
        if argv is None and args.command in ("quantize", "train"):  # else the process is another program's
            keep_freed_memory()
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    """Run one command, and turn its end into an exit code."""
    commands = {
        "quantize": run_quantize,
        "train": lambda args: run_train(args, quantization_config(args), find_tokenizer(args.model, required=True)),
        "pack": run_pack,
        "convert": run_convert,
        "info": run_info,
        "eval": run_eval,
        "generate": run_generate,
        "bench": run_bench,
        "tune": run_tune,
        "push": run_push,
    }
    try:
        code = commands[args.command](args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("littlebit: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has left: nothing to report, and nothing more may be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if args.debug:
            raise
        print(f"littlebit: error: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def run_quantize(args: argparse.Namespace) -> int:
    """`littlebit quantize`."""
    from ..load.replacement import replacement
    from ..load.source import find_source
    from ..report.card import write_card
    from ..report.size import size_report
    from .text_free import quantize_without_text

    config = quantization_config(args)
    out = args.out
    check_refine_options(args)
    check_refine_out(args)
    source = find_source(args.model)
    if source.quantization is not None:
        raise ValueError(
            f"{args.model} is quantized already, at {source.quantization.bpw:g} bits; start from the dense model"
        )
    # Before the long work, so that they do not fail after it.
    if args.device:
        find_device(args)
    tokenizer = find_tokenizer(args.model, required=args.data is not None)
    quantized = quantize_without_text if args.data is None else quantize_on_text
    with replacement(out) as folder:
        _note_tables(source, config, 8 if args.weights_only else 4, args.dtype)
        model, check = quantized(args, config, source, tokenizer)
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_card(folder, None if check is None else check.evaluation(), former=out)
    remove_work(out)
    print(size_report(out).table())
    if check is not None:
        print(f"\n{check.line()}")
    print(f"\nsaved to {out}")
    return 0


def _note_tables(source: Any, config: Any, bits: int, dtype: str) -> None:
    """Say how much smaller the file could be, where embedding and head are much of it; `dtype` is that of what stays dense."""
    from ..compat import resolve_dtype
    from ..report.size import size_report
    from ..report.size_report import format_bytes

    if (config.embedding_bits, config.head_bits) != (16, 16):
        return
    small = copy.deepcopy(config)
    small.embedding_bits = small.head_bits = bits
    report = size_report(source, small)
    width = resolve_dtype(source.config.dtype if dtype == "auto" else dtype).itemsize
    least = report.total_bytes + report.dense_bytes * (width - 2) // 2  # a prediction has 16 bits for what stays dense
    size = least + sum(width * table.rows * table.columns - table.bytes for table in report.tables)
    if least < SMALLER * size:
        smaller = format_bytes(least)
        sizes = f"{format_bytes(size)}; with --embedding-bits {bits} --head-bits {bits} it would have {smaller}"
        print(f"note: the file will have {sizes}", file=sys.stderr)


def run_pack(args: argparse.Namespace) -> int:
    """`littlebit pack`."""
    from ..initialize.head_inputs import head_moment
    from ..load.convert import pack_model
    from ..load.replacement import replacement
    from ..report.size import size_report
    from ..train.export import latent_checkpoint

    out = args.out
    if args.column is not None and args.data is None:
        raise ValueError(f"--column is {args.column!r}, of a text that is not given; add --data TEXT, or leave it out")
    check_empty(out, args.overwrite, args.checkpoint, "checkpoint")
    tokenizer = find_tokenizer(args.tokenizer, required=True) if args.tokenizer else None
    with replacement(out) as folder:
        model = latent_checkpoint(args.checkpoint, args.dtype)
        if not args.tokenizer:
            tokenizer = find_tokenizer(args.checkpoint, required=args.data is not None)
        moment = None
        if args.data is not None:
            moment = head_moment(model, head_text(args.data, args.column or "text", model, tokenizer))
        pack_model(model, moment=moment).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    print(size_report(out).table())
    print(f"\nsaved to {out}")
    return 0


def run_convert(args: argparse.Namespace) -> int:
    """`littlebit convert`."""
    from ..load.foreign.convert import convert_foreign
    from ..load.foreign.folder import fetch
    from ..load.replacement import replacement
    from ..report.card import write_card
    from ..report.size import size_report

    out = args.out
    check_empty(out, args.overwrite, args.source, "checkpoint")
    if args.base:
        check_empty(out, args.overwrite, args.base, "original model")
    tokenizer = find_tokenizer(args.tokenizer, required=True) if args.tokenizer else None
    with replacement(out) as folder:
        converted = convert_foreign(fetch(args.source), args.base, args.scale_dtype, args.source)
        if not args.tokenizer:
            tokenizer = find_tokenizer(converted.config_folder, required=False)
        converted.model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_card(folder, former=out)
    print(size_report(out).table())
    print(f"\n{converted.summary}\nsaved to {out}")
    return 0


def run_info(args: argparse.Namespace) -> int:
    """`littlebit info`."""
    from ..report.size import size_report

    report = size_report(args.model, quantization_config(args))
    print(json.dumps(report.as_dict(), indent=2) if args.json else report.table(layers=args.layers))
    return 0


def run_eval(args: argparse.Namespace) -> int:
    """`littlebit eval`."""
    from dataclasses import asdict

    from ..report.evaluate import perplexity

    try:
        with open(args.text, encoding="utf-8") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {args.text} is not UTF-8 text: {error}") from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"--text {args.text} is no file ({error.strerror}); give a text file") from error
    model, tokenizer = load_model(args)
    options = {
        "length": args.length,
        "stride": args.stride,
        "max_blocks": args.max_blocks,
        "batch_size": args.batch_size,
    }
    result = perplexity(model, tokenizer, text, **options)
    if args.json:
        print(json.dumps(asdict(result)))
        return 0
    print(f"perplexity  {result.perplexity:.4g}")
    print(f"loss        {result.loss:.4f} nats per token")
    print(f"tokens      {result.tokens} in {result.blocks} windows")
    return 0


def run_generate(args: argparse.Namespace) -> int:
    """`littlebit generate`."""
    from transformers import TextStreamer, set_seed

    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {args.max_new_tokens}; it must be at least 1")
    if args.temperature is not None and not 0 < args.temperature < float("inf"):
        raise ValueError(
            f"--temperature is {args.temperature:g}; it must be above 0 (for the likeliest token use --greedy)"
        )
    model, tokenizer = load_model(args)
    if not getattr(model, "can_generate", lambda: False)():
        raise ValueError(f"{args.model} is a {type(model).__name__}, which does not generate text")
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    length, context = inputs["input_ids"].shape[1], getattr(model.config, "max_position_embeddings", None)
    if length == 0:
        raise ValueError("--prompt has no tokens; give some text")
    if context is not None and length + args.max_new_tokens > context:
        raise ValueError(
            f"{length} tokens of prompt and {args.max_new_tokens} new ones exceed the model's context of {context}; "
            "lower --max-new-tokens or shorten the prompt"
        )
    set_seed(args.seed)
    # The model's own sampling settings would be warned about when they are not used.
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if args.temperature is not None:
        how = {"do_sample": True, "temperature": args.temperature}
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        how["pad_token_id"] = tokenizer.eos_token_id
    inputs.pop("token_type_ids", None)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=args.max_new_tokens, streamer=streamer, **how)
    return 0


def run_bench(args: argparse.Namespace) -> int:
    """`littlebit bench`."""
    import torch

    from ..report.bench.bench import bench

    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads is {args.threads}; it must be at least 1")
        torch.set_num_threads(args.threads)
    result = bench(
        args.model,
        quantization_config(args),
        packed_only=args.packed_only,
        prompt=args.prompt_tokens,
        new=args.max_new_tokens,
        rounds=args.rounds,
        device=find_device(args),
        dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
        batch=args.batch_size,
        mode=args.mode,
        share_inputs=args.share_inputs,
    )
    print(json.dumps(result.as_dict()) if args.json else result.table())
    return 0


def run_tune(args: argparse.Namespace) -> int:
    """`littlebit tune`."""
    from .tune_command import run_tune

    return run_tune(args, quantization_config(args))


def run_push(args: argparse.Namespace) -> int:
    """`littlebit push`."""
    from ..report.upload import push_folder

    print(push_folder(args.folder, args.repo, private=args.private or None).commit_url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
