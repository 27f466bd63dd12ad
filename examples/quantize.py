"""Quantize the bundled model to 0.55 bits per weight, save it packed, load it again and generate.

    python examples/quantize.py [--bpw 0.55] [--out quantized]

The other examples start from a model that was made in this way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_littlebit import LittleBitConfig, size_report

MODEL = Path(__file__).parent / "models" / "pycode-13m"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--bpw", type=float, default=0.55)
    parser.add_argument("--out", default="quantized")
    args = parser.parse_args()
    torch.manual_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=LittleBitConfig(bpw=args.bpw))
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(size_report(args.out).table())

    # An import of hf_littlebit is all that loading a packed model needs; the file says the rest.
    packed = AutoModelForCausalLM.from_pretrained(args.out)
    prompt = tokenizer("def read_lines(path):\n", return_tensors="pt")
    text = packed.generate(**prompt, max_new_tokens=60, do_sample=False, repetition_penalty=1.1)
    print(tokenizer.decode(text[0]))


if __name__ == "__main__":
    main()
