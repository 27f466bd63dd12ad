"""What a training step costs: forward and backward of a latent model against the dense one of the same shape.

    python examples/experiments/step_speed.py [--hidden 1024] [--tokens 512] [--bf16] [--out step_speed.json]

Random weights, cross-entropy alone (a teacher costs both the same), steps of the two interleaved. A line of JSON for every
bits per weight: seconds of the fastest and the median step of each, the median ratio of neighbouring steps by the clock and by
processor time (which other work on the machine disturbs less; on a GPU the clock counts), and the bytes of parameters,
gradients and Adam's state.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_littlebit import LittleBitConfig, latent_model
from hf_littlebit.report.bench.machine import machine


def step(model: torch.nn.Module, tokens: torch.Tensor, bf16: bool) -> tuple[float, float]:
    """(seconds, processor seconds) of one forward and backward."""
    start = time.perf_counter(), time.process_time()
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=bf16):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    if tokens.is_cuda:
        torch.cuda.synchronize()
    model.zero_grad()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--bpw", type=float, nargs="+", default=[0.55])
    parser.add_argument("--paths", type=int, choices=(1, 2), default=1)
    parser.add_argument("--repeat", type=int, default=12)
    parser.add_argument("--bf16", action="store_true", help="autocast; weights stay fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file to add the results to")
    args = parser.parse_args()
    device = args.device
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 128,
        num_key_value_heads=args.hidden // 128,
        vocab_size=512,
        max_position_embeddings=args.tokens,
    )
    torch.manual_seed(0)
    dense = LlamaForCausalLM(config).train().to(device)
    tokens = torch.randint(0, 512, (1, args.tokens), device=device)
    for bpw in args.bpw:
        latent = LlamaForCausalLM(copy.deepcopy(config)).train().to(device)  # the method is noted in its config
        # The shape of the default, ADMM's single path, without its work.
        paths = LittleBitConfig(bpw=bpw, init="dual_svid", residual=args.paths == 2)
        latent_model(latent, paths, progress=False)
        for _ in range(2):
            step(dense, tokens, args.bf16), step(latent, tokens, args.bf16)
        times = [(step(dense, tokens, args.bf16), step(latent, tokens, args.bf16)) for _ in range(args.repeat)]
        state = [16 * sum(value.numel() for value in model.parameters()) for model in (dense, latent)]
        result = {key: value for key, value in vars(args).items() if key != "out"}
        result |= {
            "bpw": bpw,
            "dense_s": min(one[0] for one, _ in times),
            "latent_s": min(two[0] for _, two in times),
            "dense_median_s": statistics.median(one[0] for one, _ in times),
            "latent_median_s": statistics.median(two[0] for _, two in times),
            "ratio": statistics.median(two[0] / one[0] for one, two in times),
            "processor_ratio": statistics.median(two[1] / one[1] for one, two in times),
            "dense_state_bytes": state[0],
            "latent_state_bytes": state[1],
            "machine": machine(device),
        }
        if args.out is not None:
            known = json.loads(args.out.read_text()) if args.out.exists() else []
            args.out.write_text(json.dumps([*known, result], indent=1) + "\n")
        print(json.dumps(result), flush=True)
        del latent


if __name__ == "__main__":
    main()
