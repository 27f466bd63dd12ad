"""What an embedding and an output head in 8 or 4 bits cost and give: perplexity, bytes, and tokens per second.

    python examples/bench_tables.py quality MODEL --text FILE --blocks 8     the layers stay dense, so that only the tables differ
    python examples/bench_tables.py speed CONFIG --bpw 0.1 --threads 1       random weights; the three take turns in one process

`quality --apart` unties a tied model first, and packs the embedding and the head alone too.
Scales are searched for the weights; or for the products with what the head reads of 64 blocks of the text in front of the measured
end; or not at all: every row (8 bits) or 64 columns (4 bits) is rounded to multiples of its largest magnitude / 127 or 7.
"""

import argparse
import contextlib
import json
import statistics
import tempfile

import torch
from tabulate import tabulate
from torch.utils.data import default_collate
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_littlebit import LittleBitConfig, head_moment, perplexity, text_blocks
from hf_littlebit.initialize.head_inputs import HEAD_EXAMPLES
from hf_littlebit.load.meta_model import empty_model
from hf_littlebit.load.source import find_source
from hf_littlebit.load.tables import pack_tables, plan_tables
from hf_littlebit.plan import plan_model
from hf_littlebit.report.bench.clock import Ticks
from hf_littlebit.report.bench.contender import Contender, Setting
from hf_littlebit.train.data import spread_batches

GROUP = 64


def tables_config(bits: int, bpw: float, head_bits: int | None = None) -> LittleBitConfig:
    """A config whose embedding and head have so many bits."""
    return LittleBitConfig(bpw, embedding_bits=bits, head_bits=bits if head_bits is None else head_bits)


def save_untied(folder: str, out: str) -> None:
    """Save a dense model into `out` with an output head of its own, which has the weights that it shares in `folder`."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(out)


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """`weight` [rows, columns] in so many bits, with scales that just reach the largest magnitudes."""
    width = weight.shape[1] if bits == 8 else GROUP
    groups = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % width)).unflatten(1, (-1, width))
    scale = groups.abs().amax(-1, keepdim=True).div(2 ** (bits - 1) - 1).bfloat16().float().clamp_min(1e-12)
    return (groups / scale).round().mul(scale).flatten(1)[:, : weight.shape[1]].to(weight.dtype)


def quality(args: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    """Print the perplexity of a dense model with its tables in 16, 8 and 4 bits."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with open(args.text, encoding="utf-8") as file:
        text = file.read()
    if not 0 < args.characters < len(text):
        raise SystemExit(
            f"--characters is {args.characters}, and the text has {len(text)}; it must be from 1 to {len(text) - 1}, so that some "
            "is left to round the head for"
        )
    read, text = text[: -args.characters], text[-args.characters :]
    blocks = text_blocks([read], tokenizer, 512, max_blocks=1024)
    dtype = getattr(torch, args.dtype)
    rows = []
    weights, products, none = "for the weights", "for the products", "largest magnitude"
    cases = [(16, 16, weights), (8, 8, weights), (8, 8, none), (4, 4, products), (4, 4, weights), (4, 4, none)]
    where = args.model
    if args.apart:
        where = stack.enter_context(tempfile.TemporaryDirectory())
        save_untied(args.model, where)
        cases += [(a, b, weights) for a, b in ((8, 16), (16, 8), (4, 16), (16, 4), (4, 8), (8, 4))] + [
            (16, 4, products)
        ]
    for bits, head_bits, how in cases:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype).eval()
        config = tables_config(bits, 1.0, head_bits)
        tables = plan_tables(model, config).tables
        size = sum(table.stored_bits for table in tables) / 8
        if how != none:
            moment = None
            if how == products:
                moment = head_moment(model, spread_batches(blocks, default_collate, HEAD_EXAMPLES))
            pack_tables(model, config, moment)
        else:
            for table in tables:
                weight = model.get_parameter(f"{table.owner}.weight")
                weight.data = rounded(weight.data, bits)
        found = perplexity(model, tokenizer, text, length=args.length, max_blocks=args.blocks, progress=False)
        kind = "as it is" if bits == head_bits == 16 else how
        megabytes = f"{size / 1e6:.1f}" if size else "-"
        rows.append((bits, head_bits, kind, f"{found.perplexity:.4f}", f"{found.loss:.5f}", megabytes))
        print(json.dumps(rows[-1]), flush=True)
    columns = ["embedding", "head", "scales", "perplexity", "loss", "MB of tables"]
    print(tabulate(rows, columns, "github", disable_numparse=True))


def speed(args: argparse.Namespace) -> None:
    """Print the tokens per second of a packed model with its tables in 16, 8 and 4 bits, and ratios to 16."""
    torch.set_num_threads(args.threads)
    source = find_source(args.model)
    contenders = {}
    for bits in (16, 8, 4):
        config = tables_config(bits, args.bpw)
        plan = plan_model(empty_model(source.config), config)
        contenders[bits] = Contender(source, plan, config, torch.bfloat16, torch.device("cpu"))
    setting = Setting(prompt=args.prompt, new=args.new)
    seconds: dict[int, list[float]] = {bits: [] for bits in contenders}
    for turn in range(args.rounds + 1):
        for bits, contender in contenders.items():
            ticks = Ticks()
            contender.generate(contender.tokens(setting), setting, ticks)
            _, first, *_, last = ticks.times
            if turn:  # the first warms up
                seconds[bits].append((last - first) / (setting.new - 1))
    rows = []
    for bits, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[16], times, strict=True))
        size = contenders[bits].weight_bytes / 1e6
        rows.append((bits, f"{1e3 * statistics.median(times):.1f}", f"{ratio:.2f}", f"{size:.0f}"))
    print(tabulate(rows, ["bits", "ms per token", "times the speed of 16", "MB of weights"], "github"))


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("quality")
    one.add_argument("model")
    one.add_argument("--text", required=True)
    one.add_argument("--blocks", type=int, default=8)
    one.add_argument("--length", type=int, default=1024)
    one.add_argument("--characters", type=int, default=60_000, help="of the end of the text")
    one.add_argument("--apart", action="store_true", help="also the embedding alone, and the head alone")
    one.add_argument("--dtype", default="float32")
    two = commands.add_parser("speed")
    two.add_argument("model", metavar="CONFIG")
    two.add_argument("--bpw", type=float, default=0.1)
    two.add_argument("--threads", type=int, default=1)
    two.add_argument("--prompt", type=int, default=8)
    two.add_argument("--new", type=int, default=16)
    two.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        quality(args, stack) if args.command == "quality" else speed(args)


if __name__ == "__main__":
    main()
