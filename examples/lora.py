"""Train a PEFT LoRA adapter on the packed bundled model, save it, and load it again onto the packed model.

    python examples/lora.py [--packed quantized] [--steps 20] [--out adapter]

The packed weights stay as they are: only the adapter is trained, and only the adapter is saved. Needs `pip install peft`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_littlebit import LittleBitConfig, perplexity, text_blocks

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "models" / "pycode-13m"), help="the dense model")
    parser.add_argument("--packed", help="folder of a packed model (default: --model, quantized now)")
    parser.add_argument("--bpw", type=float, default=0.55)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out", default="adapter")
    args = parser.parse_args()
    torch.manual_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    packed = f"{args.out}/packed"
    if args.packed:
        packed = args.packed
    else:
        config = LittleBitConfig(bpw=args.bpw)
        AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config).save_pretrained(packed)
    train = text_blocks([(HERE / "data" / "pycode_train.txt").read_text(encoding="utf-8")], tokenizer, args.length)
    held_out = (HERE / "data" / "pycode_eval.txt").read_text(encoding="utf-8")

    def measure(model) -> float:
        return perplexity(model, tokenizer, held_out, length=args.length, max_blocks=8).perplexity

    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    before = measure(model)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.print_trainable_parameters()
    arguments = TrainingArguments(
        f"{args.out}/checkpoints",
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        logging_steps=max(1, args.steps // 5),
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    Trainer(adapted, arguments, train_dataset=train).train()
    adapted.save_pretrained(args.out)

    # The adapter's folder holds none of the packed weights; it is put onto a packed model that was loaded afresh.
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32), args.out)
    print(f"perplexity of the packed model: {before:.1f}, with the adapter: {measure(again):.1f}")


if __name__ == "__main__":
    main()
