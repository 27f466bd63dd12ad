"""What test_distributed.py starts: a short training, resumed once, by one process or by two that share the batch.

    python two_processes.py OUT                                       alone, batches of 4
    torchrun --nproc_per_node=2 two_processes.py OUT                  DDP over gloo, batches of 2 each
    torchrun --nproc_per_node=2 two_processes.py OUT --fsdp           FSDP2 over gloo

Writes OUT/final.pt: the latents' state dict, the logged figures, and whether resuming from the middle gave the same.
"""

import faulthandler
import os
import sys

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
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


def train(out: str, fsdp: bool, resume: str | None = None) -> Trainer:
    layers = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    sharding = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT", **layers}}
    arguments = TrainingArguments(
        out,
        per_device_train_batch_size=4 // WORLD,
        max_steps=4,
        save_steps=2,
        logging_steps=2,
        learning_rate=0.05,
        optim="adamw_torch",
        adam_epsilon=1e-2,  # far above the gradients: without it Adam turns rounding into steps of full size
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **(sharding if fsdp else {}),
    )
    callback = LittleBitCallback(CONFIG, teacher="self", pack=False)
    trainer = Trainer(model=build("llama"), args=arguments, train_dataset=Rows(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    if fsdp:
        assert isinstance(next(trainer.model.parameters()), DTensor), "the model is not sharded"
    return trainer


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The whole weights, gathered."""
    values = trainer.model.state_dict()
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value.clone() for name, value in values.items()
    }


def main() -> None:
    out, fsdp = sys.argv[1], "--fsdp" in sys.argv
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(150, exit=True)  # processes that wait for each other end with their stacks
    if fsdp:
        shard_on_cpu()
    trainer = train(out, fsdp)
    weights, history = state(trainer), trainer.state.log_history
    again = state(train(out, fsdp, os.path.join(out, "checkpoint-2")))
    same = all(torch.equal(weights[name], again[name]) for name in weights)
    if trainer.is_world_process_zero():
        torch.save({"weights": weights, "history": history, "same": same}, os.path.join(out, "final.pt"))
    if dist.is_initialized():
        # Taking gloo down beside a live DDP reducer hangs now and then; what was to be shown is on disk.
        dist.barrier()
        os._exit(0)


if __name__ == "__main__":
    main()
