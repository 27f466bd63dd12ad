"""`littlebit pack` on what a single process leaves, and its refusals; test_distributed.py has the engines' checkpoints."""

import json
import os
import shutil

import pytest
import torch
import torch.distributed.checkpoint
from families import equal_states, load
from test_distributed import DEEPSPEED
from test_training import CONFIG, Rows, arguments, build
from transformers import LlamaConfig, LlamaForCausalLM

from hf_littlebit.command.cli import main
from hf_littlebit.load.convert import factor_modules, latent_model, pack_model
from hf_littlebit.train.distributed import check_weights
from hf_littlebit.train.export import WHOLE
from hf_littlebit.train.trainer import LittleBitTrainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of the checkpoint after the last step, folder of the packed model)."""
    out = tmp_path_factory.mktemp("trained")
    args = arguments(out, save_strategy="steps", save_steps=4)
    trainer = LittleBitTrainer(build("llama"), args, config=CONFIG, calibration=0, train_dataset=Rows())
    trainer.train()
    trainer.save_model(str(out / "packed"))
    return out / "checkpoint-4", out / "packed"


def pack(*words):
    return main(["pack", *map(str, words)])


def test_last_checkpoint_is_what_was_packed(tmp_path, trained, stories, capsys):
    checkpoint, packed = trained
    assert pack(checkpoint, "--out", tmp_path, "--tokenizer", stories) == 0
    assert "bits per weight, real" in capsys.readouterr().out and (tmp_path / "tokenizer.json").exists()
    equal_states(load(str(tmp_path)), load(str(packed)))
    assert pack(checkpoint, "--out", tmp_path) == 2 and "--overwrite" in capsys.readouterr().err
    assert pack(checkpoint, "--out", tmp_path, "--overwrite", "--dtype", "bfloat16") == 0
    assert load(str(tmp_path)).model.embed_tokens.weight.dtype == torch.bfloat16


def test_whole_state_of_accelerate_alone(tmp_path, trained):
    checkpoint, packed = trained
    folder = tmp_path / "state"
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    torch.save(load(str(checkpoint)).state_dict(), folder / WHOLE)
    assert pack(folder, "--out", tmp_path / "out") == 0
    equal_states(load(str(tmp_path / "out")), load(str(packed)))


def test_sixteen_bit_latents(tmp_path):
    """DeepSpeed with bf16 saves latents so: the signs are theirs, and they train on in fp32."""
    model = latent_model(build("llama"), CONFIG)
    state = {name: value.bfloat16() for name, value in model.state_dict().items()}
    model.hf_quantizer = None
    model.save_pretrained(tmp_path, state_dict=state)
    again = load(str(tmp_path))
    layer = again.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == layer.scale_in.dtype == torch.float32
    one, two = (factor_modules(pack_model(each)) for each in (again, model))
    for name in two:
        equal_states(one[name], two[name])


class _Harmful:
    """What a pickle may hold: a call, made while it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("zero", marks=DEEPSPEED)])
def test_no_code_of_a_checkpoint_runs(tmp_path, trained, capsys, engine):
    shutil.copy(trained[0] / "config.json", tmp_path)
    harmful = {"optimizer_state_dict": _Harmful(tmp_path / "made")}
    if engine == "fsdp":
        torch.save(harmful, tmp_path / WHOLE)
    else:
        (tmp_path / "latest").write_text("global_step4")
        (tmp_path / "global_step4").mkdir()
        torch.save({}, tmp_path / "global_step4" / "mp_rank_00_model_states.pt")
        torch.save(harmful, tmp_path / "global_step4" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert pack(tmp_path, "--out", tmp_path / "out") == 2
    assert "cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "made").exists() and not (tmp_path / "out").exists()


def test_refusals(tmp_path, trained, stories, capsys):
    checkpoint, packed = trained

    def refused(source, message, *words):
        assert pack(source, "--out", tmp_path / "out", *words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists()

    refused(tmp_path / "missing", "is no folder here")
    refused(checkpoint.parent, f"holds 1 checkpoints; give one of them, e.g. {checkpoint}")
    refused(tmp_path, "holds no config.json")
    refused(stories, "is of a dense model")
    refused(packed, "is packed already")
    shutil.copy(checkpoint / "config.json", tmp_path)
    refused(tmp_path, "but no weights")
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    refused(tmp_path, "pytorch_model_fsdp_0 cannot be read")
    (tmp_path / "pytorch_model_fsdp_0").rmdir()
    refused(checkpoint, "no tokenizer that can be used", "--tokenizer", tmp_path)
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": "many"}))
    refused(tmp_path, "describes no model")
    assert pack(checkpoint, "--out", checkpoint, "--overwrite") == 2
    assert "is the checkpoint itself" in capsys.readouterr().err


def test_shards_without_a_file(tmp_path, trained, capsys):
    """As a copy from one of two machines leaves them; torch reports it by an error that is no Exception."""
    shards = tmp_path / "pytorch_model_fsdp_0"
    shutil.copy(trained[0] / "config.json", tmp_path)
    state = {f"model.{name}": value for name, value in load(str(trained[0])).state_dict().items()}
    torch.distributed.checkpoint.save(state, checkpoint_id=shards, no_dist=True)
    assert pack(tmp_path, "--out", tmp_path / "whole") == 0
    equal_states(load(str(tmp_path / "whole")), load(str(trained[1])))
    next(shards.glob("*.distcp")).unlink()
    assert pack(tmp_path, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "FileNotFoundError" in error and "files of some processes may be missing" in error


@DEEPSPEED
def test_zero_without_its_files(tmp_path, trained, capsys):
    shutil.copy(trained[0] / "config.json", tmp_path)
    (tmp_path / "latest").write_text("global_step4")
    assert pack(tmp_path, "--out", tmp_path / "out") == 2
    assert "files of some processes may be missing" in capsys.readouterr().err


def test_zero_without_deepspeed(tmp_path, trained, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "deepspeed.runtime.fp16.loss_scaler", None)
    shutil.copy(trained[0] / "config.json", tmp_path)
    (tmp_path / "latest").write_text("global_step4")
    assert pack(tmp_path, "--out", tmp_path / "out") == 1
    assert "pip install deepspeed" in capsys.readouterr().err


def test_models_that_an_engine_emptied(tmp_path):
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig(**build("llama").config.to_diff_dict()))
    for model, teacher, name in ((empty, None, "model"), (build("llama"), empty, "teacher")):
        with pytest.raises(ValueError, match=f"the {name} has no weights in this process.*cpu_ram_efficient_loading"):
            check_weights(model, teacher)
    with pytest.raises(ValueError, match="the teacher has no weights"):
        LittleBitTrainer(build("llama"), arguments(tmp_path), config=CONFIG, teacher=empty, train_dataset=Rows())
    model = build("llama")
    model.lm_head.weight.ds_id = 0  # as ZeRO-3 marks what it has partitioned
    with pytest.raises(ValueError, match="before TrainingArguments are made"):
        check_weights(model, None)


def test_optimizer_of_a_deepspeed_config(tmp_path):
    trainer = LittleBitTrainer(build("llama"), arguments(tmp_path), config=CONFIG, train_dataset=Rows())
    trainer.optimizer = type("DummyOptim", (), {})()  # of accelerate, which transformers puts in its place
    with pytest.raises(ValueError, match="take `optimizer` out of it"):
        trainer.create_optimizer()
