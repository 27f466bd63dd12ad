"""`littlebit` on a CPU under `accelerate launch` with any of examples/configs/accelerate, which are made for GPUs."""

import faulthandler
import os
import sys

import torch.distributed as dist
from two_processes import deepspeed_on_cpu, resume_on_cpu, shard_on_cpu

from hf_littlebit.command.cli import main

if __name__ == "__main__":
    faulthandler.dump_traceback_later(150, exit=True)
    resume_on_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        deepspeed_on_cpu()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    code = main(sys.argv[1:])
    sys.stdout.flush()
    if dist.is_initialized() and not code:
        dist.barrier()
        os._exit(0)  # as in two_processes.py
    sys.exit(code)
