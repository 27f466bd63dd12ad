"""Perplexity and size of a packed model, beside those of the dense model that it was made from.

    python examples/evaluate.py [--packed quantized]

Without --packed, the bundled model is quantized in memory first. With it, the folder that examples/quantize.py or
examples/train.py wrote is evaluated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tabulate import tabulate
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_littlebit import LittleBitConfig, perplexity, size_report

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "models" / "pycode-13m"), help="the dense model")
    parser.add_argument("--packed", help="folder of a packed model (default: --model, quantized now)")
    parser.add_argument("--bpw", type=float, default=0.55)
    parser.add_argument("--blocks", type=int, default=16, help="windows of 512 tokens of held-out text")
    args = parser.parse_args()

    text = (HERE / "data" / "pycode_eval.txt").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dense = AutoModelForCausalLM.from_pretrained(args.model)
    if args.packed:
        packed = AutoModelForCausalLM.from_pretrained(args.packed)
    else:
        packed = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=LittleBitConfig(bpw=args.bpw))

    rows = [
        [name, perplexity(model, tokenizer, text, max_blocks=args.blocks).perplexity]
        for name, model in (("dense", dense), ("packed", packed))
    ]
    print(tabulate(rows, ["model", "perplexity"], tablefmt="github", floatfmt=".1f"))
    print(f"\n{size_report(args.packed or packed).table()}")


if __name__ == "__main__":
    main()
