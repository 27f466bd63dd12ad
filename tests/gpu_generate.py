"""Tokens per second of plain `generate` on a GPU, of four layers of Llama2-7B's width: run by hand, on a machine with a GPU.

    python tests/gpu_generate.py [--layers 4] [--bpw 0.1] [--new 128] [--compile] [--json FILE]

Dense and packed, as transformers does it (dynamic cache, eager) and with the decode step as a graph; with --compile also by
torch.compile, which takes a while. Before the speeds: the graph's tokens and logits against those of eager code on a static
cache, which have to be the same. One line per figure, so that what is there when the time is up is of use.
"""

import argparse
import json
import statistics
import time

import torch
import transformers
from transformers import CompileConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from hf_littlebit import LittleBitConfig, fast_generate
from hf_littlebit.load.meta_model import empty_model
from hf_littlebit.plan import plan_model
from hf_littlebit.report.bench.random_weights import random_state

EAGER = {"cache_implementation": "dynamic"}
STATIC = {"cache_implementation": "static", "disable_compile": True}
FULL = {"return_dict_in_generate": True, "output_logits": True}


class Times:
    """A streamer that notes when each token is there."""

    def __init__(self):
        self.at = []

    def put(self, value):
        torch.cuda.synchronize()
        self.at.append(time.perf_counter())

    def end(self):
        pass


def build(layers, bpw):
    """A random model on the GPU; dense without `bpw`."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
    config = LlamaConfig(
        **sizes, num_hidden_layers=layers, max_position_embeddings=4096, architectures=["LlamaForCausalLM"]
    )
    skeleton = empty_model(config)
    method = None
    if bpw is not None:
        quantization = LittleBitConfig(bpw=bpw)
        method = plan_model(skeleton, quantization), quantization
    state = random_state(skeleton, torch.bfloat16, method)
    if method is not None:
        config.quantization_config = method[1].to_dict()
    model = (
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=torch.bfloat16).to("cuda").eval()
    )
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--bpw", type=float, default=0.1)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "transformers": transformers.__version__}
    found |= {"layers": args.layers, "bpw": args.bpw, "prompt": args.prompt, "new": args.new}

    def say(name, value):
        found[name] = value
        print(f"{name:48} {value}", flush=True)
        if args.json:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump(found, file, indent=2)

    for name in list(found):
        say(name, found[name])
    tokens = torch.randint(3, 32000, (1, args.prompt), generator=torch.Generator().manual_seed(0)).cuda()
    mask = torch.ones_like(tokens)

    def generate(model, **options):
        return model.generate(tokens, attention_mask=mask, max_new_tokens=args.new, **options)

    def measure(model, name, **options):
        rounds = []
        for index in range(args.rounds + 1):
            times = Times()
            torch.cuda.synchronize()
            generate(model, streamer=times, **options)
            start, first, *_, last = times.at
            steps = [1e3 * (b - a) for a, b in zip(times.at[1:], times.at[2:], strict=False)]
            if index == 0:
                say(f"{name}: ms of the first five steps", [round(step, 1) for step in steps[:5]])
            else:
                rounds.append(((args.new - 1) / (last - first), 1e3 * (first - start), statistics.median(steps)))
        speed, prefill, step = (statistics.median(values) for values in zip(*rounds, strict=True))
        say(f"{name}: tokens per second, decode", round(speed, 1))
        say(f"{name}: ms per token, median", round(step, 3))
        say(f"{name}: ms to the first token", round(prefill, 2))

    def same(model, name):
        a = generate(model, **STATIC, **FULL)
        for turn in ("first", "second"):
            b = generate(model, cache_implementation="static", **FULL)
            logits = torch.stack(a.logits) - torch.stack(b.logits)
            equal = torch.equal(a.sequences, b.sequences)
            say(f"{name}: {turn} generate, tokens equal / largest |logits|", [equal, logits.abs().max().item()])
        graphs = model.get_compiled_call.graphs
        say(
            f"{name}: recorded / why not",
            [
                sum(g.replay is not None for h in graphs._homes for g in h.graphs.values()),
                sorted(graphs._told),
            ],
        )

    packed = build(args.layers, args.bpw)
    same(packed, "packed")
    vars(packed).pop("_previous_max_cache_length", None)
    measure(packed, "packed, static cache and graph (plain generate)")
    kind = "static" if "_previous_max_cache_length" in vars(packed) else "dynamic"
    say("packed: cache that plain generate made", kind)
    measure(packed, "packed, dynamic cache, eager", **EAGER)
    dense = build(args.layers, None)
    measure(dense, "dense, dynamic cache, eager", **EAGER)
    fast_generate(dense)
    same(dense, "dense")
    measure(dense, "dense, static cache and graph")
    if args.compile:
        measure(packed, "packed, static cache, compiled", cache_implementation="static", compile_config=CompileConfig())
        measure(dense, "dense, static cache, compiled", cache_implementation="static", compile_config=CompileConfig())


if __name__ == "__main__":
    main()
