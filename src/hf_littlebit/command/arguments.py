"""The options of the command line, and the LittleBitConfig that they say.

Every command has a parser with its help and an example; cli.py runs the commands. Option values are checked where they are
used, so that the command line and Python refuse them in the same words.
"""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from . import refine_command, text_free, train_command, tune_command

__all__ = ["build_parser", "quantization_config"]

DTYPES = train_command.DTYPES
SWITCH = {"auto": None, "on": True, "off": False}

DESCRIPTION = "Language models at 0.1 to 1 bit per weight, in Hugging Face transformers."
EXAMPLES = """\
examples:
  littlebit info org/model --bpw 0.3                     predict the size; downloads config.json only
  littlebit quantize org/model --bpw 0.3 --out packed    quantize and save, with the tokenizer
  littlebit quantize org/model --bpw 1 --data corpus.txt --out packed     refine block by block on text
  littlebit train org/model --bpw 0.3 --data corpus.txt --steps 1000 --out packed
  littlebit pack packed/checkpoints/checkpoint-500 --out other      pack a checkpoint, sharded ones too
  littlebit convert nanoquant-model --out packed         a checkpoint of another program
  littlebit eval packed --text wiki.test.txt             perplexity
  littlebit generate packed --prompt "Once upon a time"
  littlebit bench packed                                 tokens per second, dense against packed
  littlebit tune packed                                  measure this GPU's tile sizes, once
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

    def add(name: str, help: str, example: str) -> argparse.ArgumentParser:
        text = help[0].upper() + help[1:] + "."
        command = commands.add_parser(
            name, help=help, description=text, epilog=f"example:\n  {prog} {example}", formatter_class=raw
        )
        # SUPPRESS: the default of the main parser must not be overwritten by a subcommand's.
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return command

    quantize = add("quantize", "quantize a dense model and save it", "quantize org/model --bpw 0.3 --out packed")
    quantize.add_argument("model", metavar="MODEL", help="folder or Hub id of a dense model")
    quantize.add_argument("--out", metavar="DIR", required=True, help="folder to save to")
    quantize.add_argument("--overwrite", action="store_true", help="replace a model in DIR; other files stay")
    _add_method(quantize, required=True)
    refine_command.add_refine_options(quantize)
    work = quantize.add_argument_group("how the work is done")
    work.add_argument(
        "--device",
        metavar="NAME",
        help="device that computes, e.g. cuda (default: the accelerator if there is one; with --weights-only cpu)",
    )
    work.add_argument("--dtype", choices=DTYPES, default="auto", help="of what stays dense (default: as in the model)")
    work.add_argument(
        "--workers", metavar="N", type=int, help="layers factorized at a time with --weights-only (default: 1)"
    )
    text_free.add_options(work)

    train = add(
        "train",
        "train the bits of a dense or quantized model by distillation, and pack it",
        "train org/model --bpw 0.3 --data corpus.txt --steps 1000 --out packed",
    )
    _add_method(train, required=False, steps="--init-steps")
    train_command.add_options(train)

    pack = add(
        "pack",
        "pack a training's latent checkpoint: plain, or the shards of FSDP2 or DeepSpeed",
        "pack trained/checkpoints/checkpoint-1000 --tokenizer org/model --out packed",
    )
    pack.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="folder that a Trainer saved, whatever engine wrote it; no code in it is run",
    )
    pack.add_argument("--out", metavar="DIR", required=True, help="folder to save to")
    pack.add_argument("--overwrite", action="store_true", help="replace a model in DIR; other files stay")
    pack.add_argument("--tokenizer", metavar="MODEL", help="folder or Hub id to copy it from (default: CHECKPOINT)")
    pack.add_argument("--dtype", choices=DTYPES, default="auto", help="of what stays dense (default: as in CHECKPOINT)")
    pack.add_argument(
        "--data",
        metavar="TEXT",
        nargs="+",
        help="text files, folders, Hub datasets: what a head of 4 bits (--head-bits 4) is rounded for",
    )
    pack.add_argument("--column", metavar="NAME", help="of datasets and JSON lines (default: text)")

    convert = add(
        "convert",
        "pack a checkpoint that LittleBit, NanoQuant, DBF or OneCompression wrote",
        "convert nanoquant-model --out packed",
    )
    convert.add_argument(
        "source", metavar="SOURCE", help="folder or Hub id: config.json and safetensors; a pickle is never read"
    )
    convert.add_argument("--out", metavar="DIR", required=True, help="folder to save to")
    convert.add_argument("--overwrite", action="store_true", help="save even if DIR holds files already")
    convert.add_argument(
        "--base", metavar="DIR", help="folder of the original model, for the config and the tensors that SOURCE lacks"
    )
    convert.add_argument("--tokenizer", metavar="MODEL", help="folder or Hub id to copy it from (default: SOURCE)")
    convert.add_argument(
        "--scale-dtype", metavar="NAME", help="round the scales to bfloat16, float16 or float32 (default: exact)"
    )

    info = add(
        "info",
        "show the size of a packed model, or predict a dense model's",
        "info org/model --bpw 0.1 --layers",
    )
    info.add_argument("model", metavar="MODEL_OR_CONFIG", help="folder, config.json or Hub id; no weights are loaded")
    info.add_argument("--json", action="store_true", help="print everything as one JSON object")
    info.add_argument("--layers", action="store_true", help="list every layer, not groups of alike ones")
    _add_method(info, required=False)

    evaluate = add("eval", "measure perplexity on a text", "eval packed --text wiki.test.txt --stride 512")
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

    generate = add("generate", "continue a prompt", 'generate packed --prompt "Once upon a time"')
    generate.add_argument("model", metavar="MODEL", help="folder or Hub id of a model, packed or dense")
    generate.add_argument("--prompt", metavar="TEXT", required=True, help="text to continue")
    generate.add_argument("--max-new-tokens", metavar="N", type=int, default=100, help="(default: 100)")
    choice = generate.add_mutually_exclusive_group()
    choice.add_argument("--greedy", action="store_true", help="take the likeliest token (default)")
    choice.add_argument("--temperature", metavar="T", type=float, help="sample at this temperature instead")
    generate.add_argument("--seed", metavar="N", type=int, default=0, help="of sampling (default: 0)")
    _add_place(generate)

    bench = add("bench", "measure speed and memory, dense against packed", "bench org/model --bpw 0.1 --threads 1")
    bench.add_argument(
        "model",
        metavar="MODEL_OR_CONFIG",
        help="packed or dense folder, Hub id, or config.json; forms that are not stored get random weights",
    )
    bench.add_argument("--packed-only", action="store_true", help="leave the dense model out, to save memory and time")
    bench.add_argument(
        "--share-inputs",
        action="store_true",
        help="also measure layers that read one input in one call, as a third model",
    )
    bench.add_argument("--prompt-tokens", metavar="N", type=int, default=32, help="tokens that are read (default: 32)")
    bench.add_argument("--max-new-tokens", metavar="N", type=int, default=32, help="tokens that are made (default: 32)")
    bench.add_argument("--rounds", metavar="N", type=int, default=5, help="turns that each model takes (default: 5)")
    bench.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: torch's)")
    bench.add_argument("--batch-size", metavar="N", type=int, default=1, help="sequences at a time (default: 1)")
    modes = bench.add_mutually_exclusive_group()
    modes.add_argument(
        "--mode",
        choices=("plain", "eager", "compiled"),
        default="plain",
        help="generate without options (plain, default), launching every kernel (eager), or by torch.compile (compiled)",
    )
    modes.add_argument(
        "--compile",
        dest="mode",
        action="store_const",
        const="compiled",
        help="decode by torch.compile over a static cache: --mode compiled",
    )
    bench.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    _add_place(bench)
    _add_method(bench, required=False)

    tune = add(
        "tune",
        "measure the tile sizes of a model's GPU kernels on this machine, for your later processes",
        "tune packed --tokens 1 16 512 --seconds 300",
    )
    tune_command.add_options(tune)
    _add_method(tune, required=False)

    push = add("push", "upload a saved packed model with a model card", "push packed me/model-littlebit")
    push.add_argument("folder", metavar="DIR", help="folder of a packed model, as `quantize` writes it")
    push.add_argument("repo", metavar="REPO", help="Hub id to upload to; created if it does not exist")
    push.add_argument("--private", action="store_true", help="create the repository as a private one")
    return parser


def _add_method(parser: argparse.ArgumentParser, required: bool, steps: str = "--steps") -> None:
    """The options that make a LittleBitConfig; None everywhere means its default."""
    group = parser.add_argument_group("the method" if required else "the method (for a dense model)")
    group.add_argument("--bpw", metavar="B", type=float, required=required, help="bits per weight to keep, e.g. 0.3")
    group.add_argument("--init", metavar="NAME", help="admm (default, best), joint_itq, or dual_svid (the paper's)")
    group.add_argument("--residual", choices=SWITCH, default="auto", help="a second path per layer (default: auto)")
    group.add_argument(
        "--kv-factor", metavar="F", type=float, help="of the ranks of k_proj and v_proj (default: what fits)"
    )
    group.add_argument("--skip", metavar="NAME", nargs="+", action="extend", help="modules to leave dense")
    group.add_argument(
        "--towers", action="store_true", help="also quantize a composite's vision towers, audio encoders and projectors"
    )
    group.add_argument(
        "--module",
        metavar="PATTERN:KEY=VALUE,...",
        action="append",
        default=[],
        help="other options for some layers, e.g. '*.down_proj:bpw=1.0,init=admm'; may be repeated",
    )
    group.add_argument("--format", metavar="NAME", help="packed (default), or latent for training")
    group.add_argument("--seed", metavar="N", type=int, help="of the initialiser (default: 0)")
    group.add_argument(steps, dest="init_steps", metavar="N", type=int, help="ADMM steps or Joint-ITQ iterations")
    group.add_argument("--refit-rounds", metavar="N", type=int, help="rounds of the closed-form refit of the scales")
    group.add_argument("--scale-dtype", metavar="NAME", help="of the stored scales: bfloat16 (default) or float16")
    group.add_argument("--embedding-bits", metavar="N", type=int, help="of the embeddings: 16 (default), 8 or 4")
    group.add_argument("--head-bits", metavar="N", type=int, help="of the output head: 16 (default), 8 or 4")
    group.add_argument("--base-model", metavar="ID", help="Hub id of the dense model, for the model card")


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="device to run on (default: cuda if there is one, else cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="to compute in (default: as in the model)")


def quantization_config(args: argparse.Namespace) -> Any:
    """The LittleBitConfig that the options of a command say, or None if there are none.

    Raises:
        ValueError: for options without --bpw, and for values that LittleBitConfig refuses.
    """
    from ..config import LittleBitConfig

    options = {
        "bpw": args.bpw,
        "init": args.init,
        "residual": SWITCH[args.residual],
        "kv_factor": args.kv_factor,
        "modules_to_not_convert": args.skip,
        "text_only": False if args.towers else None,
        "module_config": dict(_override(text) for text in args.module) or None,
        "format": args.format,
        "seed": args.seed,
        "steps": args.init_steps,
        "refit_rounds": args.refit_rounds,
        "scale_dtype": args.scale_dtype,
        "embedding_bits": args.embedding_bits,
        "head_bits": args.head_bits,
        "base_model": args.base_model,
    }
    if args.command == "quantize":
        options.update(svd_device=args.device, workers=args.workers)
    given = {name: value for name, value in options.items() if value is not None}
    if args.command == "train" and args.bpw is None:
        given.pop("seed", None)  # which is the training's, too
        if given:
            raise ValueError(
                f"options of the method ({', '.join(given)}) are for a dense model, which needs --bpw too; leave them out to train "
                "a quantized model on"
            )
        return None
    if given and args.bpw is None:
        raise ValueError(train_command.MISSING_BPW)
    return LittleBitConfig(**given) if given else None


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
