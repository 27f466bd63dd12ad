"""Files that earlier commits wrote load today, compute the same, and train on: fixtures/bef240f, see the README.md there.

Only public names are used, so that this test stands whatever becomes of the modules behind them.
"""

import json
import pkgutil
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_littlebit import (
    LatentLittleBitLinear,
    LittleBitCallback,
    LittleBitConfig,
    LittleBitTrainer,
    pack_model,
    size_report,
    unpack_model,
)

ROOT = Path(__file__).parent.parent
OLD = ROOT / "tests" / "fixtures" / "bef240f"
THEN = {"hidden_weight": 10 / 2048, "hidden_error": "mean_square"}  # the default of these trainings
MODELS = ["packed-one-path", "packed-two-paths", "packed-experts", "latent"]
TRAININGS = ["training-callback", "training-trainer"]

# The same fp32 sums in another order, as another kernel makes them, move logits of up to 4 by 3e-6 and what a training comes
# to by 6e-7. One wrong sign moves some logit by 5e-3 or more; states of an optimizer at each other's place, by 8e-4 a weight.
LOGITS = {"rtol": 0, "atol": 3e-5}
TRAINED = {"rtol": 1e-5, "atol": 1e-5}


def read_json(file):
    return json.loads(file.read_text(encoding="utf-8"))


def logits(model, tokens):
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def assert_same_tensors(file, other, **tolerance):
    """That two safetensors files hold the same names, shapes, dtypes and, within `tolerance`, numbers."""
    torch.testing.assert_close(load_file(file), load_file(other), **tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_evaluates_to_the_logits_it_had(name):
    expected = load_file(OLD / name / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(OLD / name)
    torch.testing.assert_close(logits(model, expected["input_ids"]), expected["logits"], **LOGITS)
    other = pack_model if name == "latent" else unpack_model
    torch.testing.assert_close(logits(other(model), expected["input_ids"]), expected["logits"], **LOGITS)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_is_saved_again_as_it_was(name, tmp_path):
    AutoModelForCausalLM.from_pretrained(OLD / name).save_pretrained(tmp_path)
    assert_same_tensors(tmp_path / "model.safetensors", OLD / name / "model.safetensors", rtol=0, atol=0)
    now, then = (read_json(folder / "config.json")["quantization_config"] for folder in (tmp_path, OLD / name))
    assert then.items() <= now.items()


@pytest.mark.parametrize("name", MODELS)
def test_the_size_of_a_saved_model_is_read(name, capsys):
    report, expected = size_report(OLD / name).as_dict(), read_json(OLD / name / "size.json")
    ranks = {f"{layer['module']}.{layer['weight']}": layer["ranks"] for layer in report["layers"]}
    assert ranks == expected.pop("ranks")
    assert {key: report[key] for key in expected} == expected
    assert report["measured"] and report["file_bytes"] == (OLD / name / "model.safetensors").stat().st_size
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    littlebit = pkgutil.resolve_name(scripts["littlebit"])
    assert littlebit(["info", str(OLD / name), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report


class Rows(Dataset):
    """The rows of tokens and labels that the old trainings had."""

    def __init__(self):
        self.columns = load_file(OLD / "rows.safetensors")

    def __len__(self):
        return len(self.columns["input_ids"])

    def __getitem__(self, row):
        return {name: values[row] for name, values in self.columns.items()}


def trainer_of(name, output, start):
    """A Trainer as the old training had it, of the dense model that it began with or the latent one it had come to."""
    how = read_json(OLD / name / "how.json")
    dense = AutoModelForCausalLM.from_pretrained(OLD / "dense")
    if start == "dense":
        model, callback = dense, LittleBitCallback(LittleBitConfig(**how["config"]), teacher="self", **THEN)
    else:
        model = AutoModelForCausalLM.from_pretrained(OLD / name / "checkpoint-2")
        callback = LittleBitCallback(teacher=dense, **THEN)
    options = {"args": TrainingArguments(str(output), **how["arguments"]), "train_dataset": Rows()}
    options["callbacks"] = [callback]
    if how["trainer"] == "LittleBitTrainer":
        return LittleBitTrainer(model, calibration=0, **options)
    return Trainer(model, **options)


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_checkpoint_is_a_latent_model(name):
    expected = load_file(OLD / name / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(OLD / name / "checkpoint-2")
    assert isinstance(model.model.layers[0].mlp.up_proj, LatentLittleBitLinear)
    torch.testing.assert_close(logits(model, expected["input_ids"]), expected["logits-2"], **LOGITS)


@pytest.mark.parametrize("start", ["dense", "latent"])
@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_resumes_to_where_it_came_uninterrupted(name, start, tmp_path):
    shutil.copytree(OLD / name / "checkpoint-2", tmp_path / "checkpoint-2")
    trainer = trainer_of(name, tmp_path, start)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    # The shares of flipped signs are left out: a resumed training counts them from where it resumes.
    figures = ("step", "loss", "kd_loss", "hidden_loss", "grad_norm", "learning_rate")
    now = [[entry[figure] for figure in figures] for entry in trainer.state.log_history if "loss" in entry]
    then = [[entry[figure] for figure in figures] for entry in read_json(OLD / name / "history.json")]
    torch.testing.assert_close(torch.tensor(now), torch.tensor(then), **TRAINED)
    assert_same_tensors(
        tmp_path / "checkpoint-4" / "model.safetensors", OLD / name / "latents-4.safetensors", **TRAINED
    )
    # At its end the training packed the model.
    expected = load_file(OLD / name / "expected.safetensors")
    trainer.save_model(tmp_path / "packed")
    assert size_report(tmp_path / "packed").format == "packed"
    torch.testing.assert_close(logits(trainer.model, expected["input_ids"]), expected["logits-4"], **LOGITS)
