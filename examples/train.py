"""Distil the bundled model into 0.55 bits per weight, pack it, load it again and generate.

    python examples/train.py [--steps 60] [--data FILE ... | self] [--out trained]

What a person who fine-tunes with transformers already has to add is the callback. More steps, larger batches and more text
make a better model; `--data self` trains on text that the dense model writes, which takes longer. More options and file
formats: `littlebit train --help`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_littlebit import LittleBitCallback, LittleBitConfig, LittleBitTrainer, sample_blocks, text_blocks

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "models" / "pycode-13m"))
    parser.add_argument("--data", nargs="+", default=[str(HERE / "data" / "pycode_train.txt")])
    parser.add_argument("--bpw", type=float, default=0.55)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--out", default="trained")
    args = parser.parse_args()
    torch.manual_seed(0)

    def read(files: list[str]) -> list[str]:
        return [Path(file).read_text(encoding="utf-8") for file in files]

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if args.data == ["self"]:
        train = sample_blocks(model, tokenizer, 4 * args.steps, args.length, cache=args.out)
    else:
        train = text_blocks(read(args.data), tokenizer, args.length)
    held_out = text_blocks(read([str(HERE / "data" / "pycode_eval.txt")]), tokenizer, args.length, max_blocks=16)
    # An ordinary Trainer takes the callback as well, with one learning rate for all parameters.
    trainer = LittleBitTrainer(
        model,
        TrainingArguments(
            f"{args.out}/checkpoints",
            max_steps=args.steps,
            per_device_train_batch_size=4,
            learning_rate=2e-4,  # of a plain Trainer: 5e-4
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 20,
            eval_strategy="steps",
            eval_steps=max(1, args.steps // 2),
            eval_on_start=True,
            logging_steps=max(1, args.steps // 5),
            report_to=[],
        ),
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=[LittleBitCallback(LittleBitConfig(bpw=args.bpw), teacher="self")],
    )
    trainer.train()
    trainer.save_model(args.out)
    if not trainer.is_world_process_zero():
        return
    tokenizer.save_pretrained(args.out)

    packed = AutoModelForCausalLM.from_pretrained(args.out)
    prompt = tokenizer("def read_lines(path):\n", return_tensors="pt")
    text = packed.generate(**prompt, max_new_tokens=60, do_sample=False, repetition_penalty=1.1)
    print(tokenizer.decode(text[0]))


if __name__ == "__main__":
    main()
