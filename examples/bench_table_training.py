"""Whether an embedding and an output head are better trained dense and packed at the end, or packed first and frozen.

    python examples/bench_table_training.py examples/models/pycode-13m --data examples/data/pycode_train.txt \\
        --text examples/data/pycode_eval.txt

Every way starts from the same factors and sees the same batches; the dense model is the teacher. Printed is the loss on held-out
text over the dense model's, in nats per token, for a tied table and for two.
"""

import argparse
import copy
import json
import tempfile

import torch
from bench_tables import save_untied, tables_config
from hf_littlebit.kernels import quantize_table, unpack_table
from tabulate import tabulate
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_littlebit import LittleBitConfig, latent_model
from hf_littlebit.load.tables import pack_tables, table_modules
from hf_littlebit.train.callback import LittleBitCallback
from hf_littlebit.train.data import text_blocks
from hf_littlebit.train.documents import read_texts
from hf_littlebit.train.trainer import LEARNING_RATE, LittleBitTrainer

WAYS = (("trained, then packed", 16), ("packed first, frozen", 8), ("packed first, frozen", 4))


def as_packed(model: torch.nn.Module, bits: int, trainer: Trainer) -> float:
    """The held-out loss with the weights of the trained embedding and head in so many bits; they stay as they are."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    kept = [module.weight.data for module in modules]
    rounded = [unpack_table(*quantize_table(weight, bits)) for weight in kept]
    for module, weight in zip(modules, rounded, strict=True):
        module.weight.data = weight
    loss = trainer.evaluate()["eval_loss"]
    for module, weight in zip(modules, kept, strict=True):
        module.weight.data = weight
    return loss


def losses(bits: int, dense: torch.nn.Module, latent: torch.nn.Module, data: dict, steps: int) -> dict:
    """{bits: the held-out loss over the dense model's} of one training; a dense table's in 16, 8 and 4 bits."""
    model = copy.deepcopy(latent)
    if bits != 16:
        pack_tables(model, tables_config(bits, 1.0))
    for table in table_modules(model).values():
        table.holder().like.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            save_strategy="no",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            seed=0,
        )
        start = Trainer(dense, options, eval_dataset=data["eval_dataset"]).evaluate()["eval_loss"]
        callback = LittleBitCallback(teacher=dense, pack=False)
        trainer = LittleBitTrainer(model, options, callbacks=[callback], calibration=0, **data)
        trainer.train()
        found = {bits: trainer.evaluate()["eval_loss"] - start}
        if bits == 16:
            found |= {few: as_packed(model, few, trainer) - start for few in (8, 4)}
    return found


def main() -> None:
    """Train every way, tied and untied."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a dense model with a tied table")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--text", required=True, help="held out")
    parser.add_argument("--bpw", type=float, default=0.55)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = {
        "train_dataset": text_blocks(read_texts(args.data), tokenizer, 256),
        "eval_dataset": text_blocks(read_texts([args.text]), tokenizer, 512, max_blocks=16),
    }
    rows = []
    with tempfile.TemporaryDirectory() as untied:
        save_untied(args.model, untied)
        for kind, where in (("one, tied", args.model), ("two", untied)):
            dense = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
            latent = latent_model(copy.deepcopy(dense), LittleBitConfig(args.bpw), progress=False)
            for way, bits in WAYS:
                found = losses(bits, dense, latent, data, args.steps)
                rows += [(kind, way, few, f"{excess:.4f}") for few, excess in found.items()]
                print(json.dumps(rows[-len(found) :]), flush=True)
    columns = ["tables", "way", "bits", "loss over the dense model's"]
    print(tabulate(rows, columns, "github", disable_numparse=True))


if __name__ == "__main__":
    main()
