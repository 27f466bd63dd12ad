"""What test_distributed.py starts: a short training, resumed once, by one process or by two that share the batch.

    python two_processes.py OUT                                       alone, batches of 4
    torchrun --nproc_per_node=2 two_processes.py OUT                  DDP over gloo, batches of 2 each
    torchrun --nproc_per_node=2 two_processes.py OUT fsdp             FSDP2 over gloo, or fsdp_shards for saved shards
    torchrun --nproc_per_node=2 two_processes.py OUT zero2            DeepSpeed over gloo, or zero3, zero3_shards

Writes OUT/final.pt: the latents' state dict, the logged figures, and whether resuming from the middle gave the same.
"""

import faulthandler
import os
import sys
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import build
from test_training import CONFIG, Rows
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from hf_littlebit.training import LittleBitCallback

WORLD = int(os.environ.get("WORLD_SIZE", 1))


def shard_on_cpu() -> None:
    """accelerate runs DDP, without a word, where FSDP is asked for on a CPU."""
    plain = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        self.distributed_type = DistributedType.FSDP  # every time: each new reference to the state resets it
        if fsdp_plugin is not None:
            self._shared_state["fsdp_plugin"] = fsdp_plugin

    AcceleratorState.__init__ = init


def deepspeed_on_cpu() -> None:
    """accelerate takes each process for the only one where DeepSpeed is asked for on a CPU."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first; gloo does without


def options(engine: str) -> dict[str, Any]:
    """What TrainingArguments gets for `engine`."""
    if engine.startswith("fsdp"):
        kind = "SHARDED_STATE_DICT" if engine.endswith("shards") else "FULL_STATE_DICT"
        layers = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        return {"use_cpu": True, "fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": kind, **layers}}
    if engine.startswith("zero"):
        stage = {"stage": int(engine[4]), "stage3_gather_16bit_weights_on_model_save": not engine.endswith("shards")}
        # Small models fit under the threshold for parameters that are not partitioned at all.
        stage |= {"stage3_param_persistence_threshold": 0} if stage["stage"] == 3 else {}
        sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
        return {"deepspeed": {"zero_optimization": stage, "gradient_clipping": "auto", **dict.fromkeys(sizes, "auto")}}
    return {"use_cpu": True}


def train(out: str, engine: str, resume: str | None = None) -> Trainer:
    arguments = TrainingArguments(
        out,
        per_device_train_batch_size=4 // WORLD,
        max_steps=4,
        save_steps=2,
        logging_steps=2,
        learning_rate=0.05,
        optim="adamw_torch",
        adam_epsilon=1e-2,  # far above the gradients: without it Adam turns rounding into steps of full size
        report_to=[],
        disable_tqdm=True,
        **options(engine),
    )
    callback = LittleBitCallback(CONFIG, teacher="self", pack=False)
    trainer = Trainer(model=build("llama"), args=arguments, train_dataset=Rows(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    first = next(trainer.model.parameters())
    assert isinstance(first, DTensor) == engine.startswith("fsdp") and hasattr(first, "ds_id") == ("zero3" in engine)
    return trainer


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The whole weights, gathered."""
    parts = [value for value in trainer.model.parameters() if hasattr(value, "ds_id")]
    if parts:
        import deepspeed
    with deepspeed.zero.GatheredParameters(parts) if parts else nullcontext():
        values = trainer.model.state_dict()
        return {
            name: value.full_tensor() if isinstance(value, DTensor) else value.clone() for name, value in values.items()
        }


def main() -> None:
    out, engine = sys.argv[1], "".join(sys.argv[2:])
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(150, exit=True)  # processes that wait for each other end with their stacks
    if engine.startswith("fsdp"):
        shard_on_cpu()
    if engine.startswith("zero"):
        deepspeed_on_cpu()
    trainer = train(out, engine)
    weights, history = state(trainer), trainer.state.log_history
    again = state(train(out, engine, os.path.join(out, "checkpoint-2")))
    same = all(torch.equal(weights[name], again[name]) for name in weights)
    if trainer.is_world_process_zero():
        torch.save({"weights": weights, "history": history, "same": same}, os.path.join(out, "final.pt"))
    if dist.is_initialized():
        # Taking gloo down beside a live DDP reducer hangs now and then; what was to be shown is on disk.
        dist.barrier()
        os._exit(0)


if __name__ == "__main__":
    main()
