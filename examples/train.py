"""Train the bundled model to 0.55 bits per weight with the text it writes itself, pack it, load it again, generate.

    python examples/train.py [--steps 100] [--out trained]

What a person who fine-tunes with transformers already has to add is the callback. On two cores 100 steps take a few
minutes; more steps, larger batches and real text (`--data`) make a better model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_littlebit import LittleBitCallback, LittleBitConfig, LittleBitTrainer, sample_blocks, text_blocks
from hf_littlebit.train.data import read_texts
from hf_littlebit.train.trainer import LEARNING_RATE

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "models" / "pycode-13m"))
    parser.add_argument("--data", nargs="+", help="text files, folders or Hub datasets (default: the model's own text)")
    parser.add_argument("--bpw", type=float, default=0.55)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out", default="trained")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if args.data:
        train = text_blocks(read_texts(args.data), tokenizer, args.length)
    else:
        train = sample_blocks(model, tokenizer, 4 * args.steps, args.length, cache=args.out)
    held_out = text_blocks(read_texts([HERE / "data" / "pycode_eval.txt"]), tokenizer, args.length, max_blocks=32)
    # An ordinary Trainer takes the callback as well, with one learning rate for all parameters.
    trainer = LittleBitTrainer(
        model,
        TrainingArguments(
            f"{args.out}/checkpoints",
            max_steps=args.steps,
            per_device_train_batch_size=4,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 20,
            eval_strategy="steps",
            eval_steps=max(1, args.steps // 4),
            eval_on_start=True,
            logging_steps=max(1, args.steps // 10),
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

    packed = AutoModelForCausalLM.from_pretrained(args.out).eval()
    prompt = tokenizer("def read_lines(path):\n", return_tensors="pt")
    text = packed.generate(input_ids=prompt["input_ids"], max_new_tokens=60, do_sample=False, use_cache=True)
    print(tokenizer.decode(text[0]))


if __name__ == "__main__":
    main()
