"""The command `littlebit`: quantize, info, eval, generate, push. `optimum-cli littlebit` is the same.

Results go to stdout, progress and notes to stderr. Bad input ends with one line, "littlebit: error: ...", and exit code 2;
a failure of the machine or the network with the same line and 1; Ctrl-C with 130. torch and transformers are imported by
the commands that need them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

__all__ = ["build_parser", "main"]

DTYPES = ("auto", "bfloat16", "float16", "float32")
SWITCH = {"auto": None, "on": True, "off": False}

DESCRIPTION = "Language models at 0.1 to 1 bit per weight, in Hugging Face transformers."
EXAMPLES = """\
examples:
  littlebit info org/model --bpw 0.3                     predict the size; downloads config.json only
  littlebit quantize org/model --bpw 0.3 --out packed    quantize and save, with the tokenizer
  littlebit eval packed --text wiki.test.txt             perplexity
  littlebit generate packed --prompt "Once upon a time"
  littlebit push packed me/model-littlebit               upload with a model card

MODEL is a folder that save_pretrained wrote, or a Hub id such as org/model.
`littlebit COMMAND --help` explains a command's options."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"littlebit: error: {message} (see {self.prog} --help)\n")


def build_parser(prog: str = "littlebit") -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=prog, description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", required=True, dest="command")

    def add(name: str, run: Callable[[argparse.Namespace], int], help: str, example: str) -> argparse.ArgumentParser:
        text = help[0].upper() + help[1:] + "."
        command = commands.add_parser(
            name, help=help, description=text, epilog=f"example:\n  {prog} {example}", formatter_class=raw
        )
        command.set_defaults(run=run)
        # SUPPRESS: the default of the main parser must not be overwritten by a subcommand's.
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return command

    quantize = add(
        "quantize", run_quantize, "quantize a dense model and save it", "quantize org/model --bpw 0.3 --out packed"
    )
    quantize.add_argument("model", metavar="MODEL", help="folder or Hub id of a dense model")
    quantize.add_argument("--out", metavar="DIR", required=True, help="folder to save to")
    quantize.add_argument("--overwrite", action="store_true", help="save even if DIR holds files already")
    _add_method(quantize, required=True)
    work = quantize.add_argument_group("how the work is done")
    work.add_argument("--device", metavar="NAME", help="device that factorizes, e.g. cuda (default: cpu)")
    work.add_argument("--dtype", choices=DTYPES, default="auto", help="of what stays dense (default: as in the model)")
    work.add_argument("--workers", metavar="N", type=int, default=1, help="layers factorized at a time (default: 1)")

    info = add(
        "info",
        run_info,
        "show the size of a packed model, or predict a dense model's",
        "info org/model --bpw 0.1 --layers",
    )
    info.add_argument("model", metavar="MODEL_OR_CONFIG", help="folder, config.json or Hub id; no weights are loaded")
    info.add_argument("--json", action="store_true", help="print everything as one JSON object")
    info.add_argument("--layers", action="store_true", help="list every layer, not groups of alike ones")
    _add_method(info, required=False)

    evaluate = add("eval", run_eval, "measure perplexity on a text", "eval packed --text wiki.test.txt --stride 512")
    evaluate.add_argument("model", metavar="MODEL", help="folder or Hub id of a model, packed or dense")
    evaluate.add_argument("--text", metavar="FILE", required=True, help="text file, UTF-8")
    evaluate.add_argument(
        "--length", metavar="N", type=int, help="tokens per window (default: the context, at most 2048)"
    )
    evaluate.add_argument("--stride", metavar="N", type=int, help="tokens from window to window (default: --length)")
    evaluate.add_argument("--max-blocks", metavar="N", type=int, help="stop after N windows")
    evaluate.add_argument("--batch-size", metavar="N", type=int, default=1, help="windows at a time (default: 1)")
    evaluate.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    _add_place(evaluate)

    generate = add("generate", run_generate, "continue a prompt", 'generate packed --prompt "Once upon a time"')
    generate.add_argument("model", metavar="MODEL", help="folder or Hub id of a model, packed or dense")
    generate.add_argument("--prompt", metavar="TEXT", required=True, help="text to continue")
    generate.add_argument("--max-new-tokens", metavar="N", type=int, default=100, help="(default: 100)")
    choice = generate.add_mutually_exclusive_group()
    choice.add_argument("--greedy", action="store_true", help="take the likeliest token (default)")
    choice.add_argument("--temperature", metavar="T", type=float, help="sample at this temperature instead")
    generate.add_argument("--seed", metavar="N", type=int, default=0, help="of sampling (default: 0)")
    _add_place(generate)

    push = add("push", run_push, "upload a saved packed model with a model card", "push packed me/model-littlebit")
    push.add_argument("folder", metavar="DIR", help="folder of a packed model, as `quantize` writes it")
    push.add_argument("repo", metavar="REPO", help="Hub id to upload to; created if it does not exist")
    push.add_argument("--private", action="store_true", help="create the repository as a private one")
    return parser


def _add_method(parser: argparse.ArgumentParser, required: bool) -> None:
    """The options that make a LittleBitConfig; None everywhere means its default."""
    group = parser.add_argument_group("the method" if required else "the method (for a dense model)")
    group.add_argument("--bpw", metavar="B", type=float, required=required, help="bits per weight to keep, e.g. 0.3")
    group.add_argument("--init", metavar="NAME", help="admm (default, best), joint_itq, or dual_svid (the paper's)")
    group.add_argument("--residual", choices=SWITCH, default="auto", help="a second path per layer (default: auto)")
    group.add_argument("--kv-factor", metavar="F", type=float, help="multiplies the rank of k_proj and v_proj")
    group.add_argument("--skip", metavar="NAME", nargs="+", action="extend", help="modules to leave dense")
    group.add_argument(
        "--module",
        metavar="PATTERN:KEY=VALUE,...",
        action="append",
        default=[],
        help="other options for some layers, e.g. '*.down_proj:bpw=1.0,init=admm'; may be repeated",
    )
    group.add_argument("--format", metavar="NAME", help="packed (default), or latent for training")
    group.add_argument("--seed", metavar="N", type=int, help="of the initialiser (default: 0)")
    group.add_argument("--steps", metavar="N", type=int, help="ADMM steps or Joint-ITQ iterations")


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="device to run on (default: cuda if there is one, else cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="to compute in (default: as in the model)")


def main(argv: Sequence[str] | None = None, prog: str = "littlebit") -> int:
    """Run the command line `argv` (default: the program's own) and return its exit code."""
    args = build_parser(prog).parse_args(argv)
    try:
        code = args.run(args)
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
        print(f"littlebit: error: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | OSError | RuntimeError | ImportError) and text:
        return text
    # Nobody wrote this text for a reader of the command line.
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _config(args: argparse.Namespace, **more: Any) -> Any:
    """The LittleBitConfig that the options say, or None if there are none."""
    from .config import LittleBitConfig

    options = {
        "bpw": args.bpw,
        "init": args.init,
        "residual": SWITCH[args.residual],
        "kv_factor": args.kv_factor,
        "modules_to_not_convert": args.skip,
        "module_config": dict(_override(text) for text in args.module) or None,
        "format": args.format,
        "seed": args.seed,
        "steps": args.steps,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if given and args.bpw is None:
        raise ValueError("--bpw is missing; say how many bits per weight to keep, e.g. --bpw 0.55")
    return LittleBitConfig(**given, **more) if given else None


def _override(text: str) -> tuple[str, dict[str, Any]]:
    """(pattern, options) of one --module."""
    pattern, colon, listing = text.rpartition(":")
    pairs = [pair.partition("=") for pair in listing.split(",")]
    if not (pattern and colon) or not all(key and value for key, _, value in pairs):
        raise ValueError(f"--module {text!r} is not PATTERN:KEY=VALUE,...; for example '*.down_proj:bpw=1.0,init=admm'")
    return pattern, {key.strip(): _value(key.strip(), value.strip(), text) for key, _, value in pairs}


def _value(key: str, value: str, text: str) -> Any:
    if key == "residual" and value in SWITCH:
        return SWITCH[value]
    if key in ("bpw", "kv_factor"):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"--module {text!r}: {key} is {value!r}; it must be a number") from None
    return value


def run_quantize(args: argparse.Namespace) -> int:
    """`littlebit quantize`."""
    from .size import size_report
    from .skeleton import model_class
    from .source import find_source

    config = _config(args, svd_device=args.device, workers=args.workers)
    out = args.out
    if os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"--out {out} is a file; give a folder")
    if os.path.isdir(out) and os.listdir(out) and not args.overwrite:
        raise ValueError(f"--out {out} is not empty; give another folder, or --overwrite to save into it")
    if os.path.isdir(args.model) and os.path.realpath(args.model) == os.path.realpath(out):
        raise ValueError(f"--out {out} is the dense model itself; give another folder")
    source = find_source(args.model)
    if source.quantization is not None:
        raise ValueError(
            f"{args.model} is quantized already, at {source.quantization.bpw:g} bits; start from the dense model"
        )
    # Both before the long work, so that neither fails after it.
    tokenizer = _tokenizer(args.model, required=False)
    kind = model_class(source.config)
    new = not os.path.isdir(out)
    os.makedirs(out, exist_ok=True)
    try:
        model = kind.from_pretrained(args.model, quantization_config=config, dtype=args.dtype)
    except BaseException:
        if new:
            os.rmdir(out)
        raise
    model.save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    print(size_report(out).table())
    print(f"\nsaved to {out}")
    return 0


def run_info(args: argparse.Namespace) -> int:
    """`littlebit info`."""
    from .size import size_report

    report = size_report(args.model, _config(args))
    print(json.dumps(report.as_dict(), indent=2) if args.json else report.table(layers=args.layers))
    return 0


def run_eval(args: argparse.Namespace) -> int:
    """`littlebit eval`."""
    from dataclasses import asdict

    from .evaluate import perplexity

    with open(args.text, encoding="utf-8") as file:
        try:
            text = file.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"--text {args.text} is not UTF-8 text: {error}") from error
    model, tokenizer = _load(args)
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
    model, tokenizer = _load(args)
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


def run_push(args: argparse.Namespace) -> int:
    """`littlebit push`."""
    from .card import push_folder

    print(push_folder(args.folder, args.repo, private=args.private or None).commit_url)
    return 0


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer) of `args.model` on `args.device`."""
    import torch

    from .skeleton import model_class
    from .source import find_source

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device is {device!r}, which this machine does not offer ({reason}); use cpu") from None
    source = find_source(args.model)
    tokenizer = _tokenizer(args.model, required=True)
    model = model_class(source.config).from_pretrained(args.model, dtype=args.dtype, device_map=device)
    return model.eval(), tokenizer


def _tokenizer(model: str, required: bool) -> Any:
    """The model's tokenizer; without one, an error if it is `required`, else a note and None."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        reason = "its vocabulary is empty"
    except (OSError, ValueError, ImportError) as error:
        tokenizer, reason = None, _one_line(error)
    # Without any file, transformers makes a tokenizer of special tokens alone for some model types.
    if tokenizer is not None and len(tokenizer) > len(set(tokenizer.all_special_ids)):
        return tokenizer
    if required:
        raise ValueError(
            f"{model} has no tokenizer that can be used: {reason}; save the model's tokenizer into its folder"
        )
    print(f"note: no tokenizer is saved along: {reason}", file=sys.stderr)
    return None
