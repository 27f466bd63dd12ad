"""What test_distributed.py starts: short trainings, by one process or by two that share the batch; one is resumed.

    python two_processes.py OUT                                 alone, batches of 4
    torchrun --nproc_per_node=2 two_processes.py OUT            DDP over gloo, batches of 2 each
    torchrun --nproc_per_node=2 two_processes.py OUT fsdp       FSDP2 over gloo
    torchrun --nproc_per_node=2 two_processes.py OUT zero2      DeepSpeed over gloo; or zero3

Writes OUT/final.pt: the latents' state dict, the logged figures, and whether resuming from the middle gave the same.
"""

import faulthandler
import os
import sys
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from families import build
from test_training import CONFIG, Rows
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from hf_littlebit.train.callback import LittleBitCallback
from hf_littlebit.train.distributed import is_partitioned
from hf_littlebit.train.trainer import LATENT_FACTOR, SCALE_FACTOR, LittleBitTrainer

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


def resume_on_cpu() -> None:
    """transformers before 5.18 loads the optimizer's state of several processes onto "cpu:0", which torch does not know."""
    if transformers.__version__ < "5.18":
        torch.serialization.register_package(
            100, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
        )


def options(engine: str, gathered: bool) -> dict[str, Any]:
    """What TrainingArguments gets for `engine`; `gathered`: sharded weights are put together before they are saved."""
    if engine == "fsdp":
        state_dict_type = "FULL_STATE_DICT" if gathered else "SHARDED_STATE_DICT"
        layers = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        return {
            "use_cpu": True,
            "fsdp": True,
            "fsdp_config": {"version": 2, "state_dict_type": state_dict_type, **layers},
        }
    if engine in ("zero2", "zero3"):
        zero: dict[str, Any] = {"stage": int(engine[4])}
        if engine == "zero3":
            # At 0 all parameters are partitioned, however small.
            zero |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": gathered}
        sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
        return {"deepspeed": {"zero_optimization": zero, "gradient_clipping": "auto", **dict.fromkeys(sizes, "auto")}}
    return {"use_cpu": True}


def arguments(out: str, engine: str, gathered: bool, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        out,
        per_device_train_batch_size=4 // WORLD,
        save_steps=2,
        logging_steps=2,
        optim="adamw_torch",
        adam_epsilon=1e-2,  # far above the gradients: without it Adam turns rounding into steps of full size
        report_to=[],
        disable_tqdm=True,
        **options(engine, gathered),
        **more,
    )


def train(out: str, engine: str, resume: str | None = None) -> Trainer:
    model = build("llama")
    args = arguments(out, engine, gathered=False, max_steps=4, learning_rate=0.05)
    teacher: Any = "self"
    if resume and engine == "zero3":
        teacher = LlamaForCausalLM.from_pretrained(os.path.join(out, "dense"))
        assert is_partitioned(teacher.parameters())  # while it was loaded
    callback = LittleBitCallback(CONFIG, teacher, pack=False)
    trainer = Trainer(model=model, args=args, train_dataset=Rows(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    first = next(trainer.model.parameters())
    assert isinstance(first, DTensor) == (engine == "fsdp") and hasattr(first, "ds_id") == (engine == "zero3")
    return trainer


def train_and_pack(out: str, engine: str) -> None:
    """OUT/packed by LittleBitTrainer, OUT/plain by a Trainer whose engine gathers, from OUT/whole/checkpoint-2."""
    short: dict[str, Any] = {"max_steps": 2, "learning_rate": 0.004, "lr_scheduler_type": "constant"}
    args = arguments(out, engine, gathered=False, weight_decay=0.1, save_strategy="no", **short)
    trainer: Trainer = LittleBitTrainer(
        build("llama"), args, config=CONFIG, teacher="self", calibration=0, train_dataset=Rows()
    )
    trainer.train()
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {
        0.004,
        0.004 * LATENT_FACTOR,
        0.004 * SCALE_FACTOR,
    }
    trainer.save_model(os.path.join(out, "packed"))
    args = arguments(os.path.join(out, "whole"), engine, gathered=True, **short)
    callback = LittleBitCallback(CONFIG, teacher="self")
    trainer = Trainer(model=build("llama"), args=args, train_dataset=Rows(), callbacks=[callback])
    trainer.train()
    trainer.save_model(os.path.join(out, "plain"))


def refused(out: str, engine: str) -> None:
    """Weight decay on latents is found in every engine's optimizer."""
    args = arguments(out, engine, gathered=False, max_steps=2, weight_decay=0.1)
    trainer = Trainer(model=build("llama"), args=args, train_dataset=Rows(), callbacks=[LittleBitCallback(CONFIG)])
    try:
        trainer.train()
    except ValueError as error:
        assert "weight decay 0.1 would pull latents" in str(error), error
    else:
        raise AssertionError("weight decay on latents was let through")


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
    resume_on_cpu()
    if engine == "fsdp":
        shard_on_cpu()
    if engine.startswith("zero"):
        deepspeed_on_cpu()
    if not int(os.environ.get("RANK", 0)):
        build("llama").save_pretrained(os.path.join(out, "dense"))
    trainer = train(out, engine)
    weights, history = state(trainer), trainer.state.log_history
    again = state(train(out, engine, os.path.join(out, "checkpoint-2")))
    train_and_pack(out, engine)
    refused(out, engine)
    same = all(torch.equal(weights[name], again[name]) for name in weights)
    if trainer.is_world_process_zero():
        torch.save({"weights": weights, "history": history, "same": same}, os.path.join(out, "final.pt"))
    if dist.is_initialized():
        # Taking gloo down beside a live DDP reducer hangs now and then; what was to be shown is on disk.
        dist.barrier()
        os._exit(0)


if __name__ == "__main__":
    main()
