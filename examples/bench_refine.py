"""Seconds of a refinement by block, from a config alone: a model of two random blocks is refined, and the rest extrapolated.

    python examples/bench_refine.py --config examples/configs/llama-3.2-1b.json --bpw 0.55 --tokens 8192 --threads 2

The passes over the text take a time that grows with its tokens, and factoring one that does not; so a few thousand tokens say what
many take. The first block is left out, which warms up. cpu seconds, all threads together, are what a busy machine hardly changes.
The distillation at the end is not measured here. Memory is that of the work beside the two blocks, on Linux. The last
line is one JSON object with every figure.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_littlebit import LittleBitConfig, Recipe, refine
from hf_littlebit.report.bench.machine import machine
from hf_littlebit.train import cpu_attention

ROWS = 256  # tokens in a row
FULL = 65_536  # tokens of the default recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="config.json, or a folder with one")
    parser.add_argument("--bpw", type=float, default=0.55)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", help="that computes (default: a GPU if there is one)")
    parser.add_argument("--torch-attention", action="store_true", help="keep torch's on a CPU, to compare with")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.torch_attention:
        cpu_attention.LONGEST = 0
    config = AutoConfig.from_pretrained(args.config)
    layers, config.num_hidden_layers = config.num_hidden_layers, 2
    config.vocab_size = min(config.vocab_size, 4096)  # embeddings have no part in this
    config.pad_token_id = None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tokens = torch.randint(config.vocab_size, (args.tokens // ROWS, ROWS), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(distillation=None)
        model_bytes = psutil.Process().memory_info().rss
        refine(model, LittleBitConfig(bpw=args.bpw), tokens, recipe=recipe, folder=folder, device=args.device)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - model_bytes
        figures = json.loads((Path(folder) / "done.json").read_text())[1]
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = {
        "machine": machine(device),
        "threads": args.threads,
        "tokens": args.tokens,
        "bpw": args.bpw,
        "blocks": layers,
    }
    print(f"{'phase':<10}{'seconds':>9}{'cpu':>9}{f'  model at {FULL:,} tokens, hours':>34}")
    for what, (seconds, cpu) in figures["seconds"].items():
        grows = 1.0 if what == "factor" else FULL / args.tokens
        hours = seconds * grows * layers / 3600
        print(f"{what:<10}{seconds:>9.1f}{cpu:>9.1f}{hours:>34.2f}")
        found[what] = {"seconds": seconds, "cpu": cpu, "hours": hours}
    print(f"memory beside the model: {memory / 1e9:.1f} GB")
    found["memory beside the model"] = memory
    print(json.dumps(found))


if __name__ == "__main__":
    main()
