"""`littlebit train`: from a dense model and a text to a packed model, and its refusals."""

import json
import shutil

import pytest
import torch
from extras import needs
from families import load
from safetensors import safe_open

from hf_littlebit import LittleBitConfig, LittleBitLinear
from hf_littlebit.command.cli import main
from hf_littlebit.report.size import size_report
from hf_littlebit.train.callback import LittleBitCallback
from hf_littlebit.train.distill import HIDDEN_WEIGHT


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "story.txt"
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    file.write_text(story * 60)
    return str(file)


def run(*words):
    return main(["train", *map(str, words)])


@needs("matplotlib")
def test_from_text_to_packed(tmp_path, capsys, stories, text):
    out = tmp_path / "out"
    words = [stories, "--bpw", 2, "--init", "dual_svid", "--data", text, "--out", out, "--length", 32, "--cpu"]
    words += ["--dtype", "bfloat16"]
    assert run(*words, "--steps", 20, "--batch-size", 4, "--save-steps", 10) == 0
    report = json.loads((out / "training.json").read_text())
    evaluations = [entry["eval_loss"] for entry in report["history"] if "eval_loss" in entry]
    steps = [entry["step"] for entry in report["history"] if "eval_loss" in entry]
    assert steps[:6] == [0, 4, 8, 12, 16, 20] and evaluations[-1] < evaluations[0]
    assert report["perplexity"]["packed"] == pytest.approx(torch.tensor(evaluations[-1]).exp().item(), rel=1e-3)
    assert (out / "training.png").stat().st_size > 10_000
    model = load(str(out))
    assert any(isinstance(module, LittleBitLinear) for module in model.modules()) and model.config.use_cache
    with safe_open(out / "model.safetensors", "pt") as file:  # as in the dense model, not as in the training
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys() if "embed" in name or "norm" in name}  # noqa: SIM118
    assert dtypes == {"BF16"}
    assert size_report(str(out)).total_bytes == size_report(stories, LittleBitConfig(2.0, "dual_svid")).total_bytes
    printed = capsys.readouterr().out
    assert "dense" in printed and "before training" in printed and f"saved to {out}" in printed
    assert run(*words) == 2 and "holds a model already" in capsys.readouterr().err


def test_resume_and_self_written_text(tmp_path, capsys, caplog, stories):
    words = [stories, "--bpw", 2, "--init", "dual_svid", "--data", "self", "--blocks", 12, "--length", 16, "--cpu"]
    words += ["--batch-size", 2, "--save-steps", 3, "--seed", 5]
    assert run(*words, "--out", tmp_path / "whole", "--steps", 6) == 0
    whole = load(str(tmp_path / "whole")).state_dict()
    # As a kill while the last checkpoint was written would have left it; an older config.json is no model.
    for name in ("training.json", "model.safetensors", "checkpoints/checkpoint-6/trainer_state.json"):
        (tmp_path / "whole" / name).unlink()
    (tmp_path / "whole" / "checkpoints" / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    capsys.readouterr()
    assert run(*words, "--out", tmp_path / "whole", "--steps", 6) == 2
    assert "add --resume" in capsys.readouterr().err
    for option, value, was in (("--lr", 1e-3, "None"), ("--bpw", 2.5, "'bpw': 2.0"), ("--length", 12, "16")):
        assert run(*words, "--out", tmp_path / "whole", "--steps", 6, "--resume", option, value) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "this work was started with" in error and was in error, error
    assert run(*words, "--out", tmp_path / "whole", "--steps", 6, "--resume") == 0
    assert "checkpoint-6 is passed over" in caplog.text
    again = load(str(tmp_path / "whole")).state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_training_goes_on_with_the_loss_that_it_began_with(tmp_path, monkeypatch, stories, text):
    words = [stories, "--bpw", 2, "--init", "dual_svid", "--data", text, "--length", 16, "--cpu", "--steps", 2]
    words += ["--batch-size", 2, "--blocks", 12, "--out", tmp_path / "out"]
    found = []
    original = LittleBitCallback.__init__

    def spy(self, *args, **options):
        found.append((options["hidden_error"], options["hidden_weight"]))
        original(self, *args, **options)

    monkeypatch.setattr(LittleBitCallback, "__init__", spy)
    assert run(*words) == 0
    options = tmp_path / "out" / "checkpoints" / "options.json"
    kept = json.loads(options.read_text())
    for loss in (kept.pop("the loss"), None):
        options.write_text(json.dumps(kept if loss is None else {**kept, "the loss": loss}))
        for name in ("training.json", "model.safetensors"):
            (tmp_path / "out" / name).unlink()
        assert run(*words, "--resume") == 0
    assert found == [("relative", HIDDEN_WEIGHT)] * 2 + [("mean_square", 10 / 2048)]


@pytest.fixture(scope="module")
def packed(tmp_path_factory, stories):
    folder = tmp_path_factory.mktemp("packed") / "model"
    words = ["quantize", stories, "--bpw", "2", "--init", "dual_svid", "--weights-only", "--base-model", "me/dense"]
    assert main([*words, "--out", str(folder)]) == 0
    return str(folder)


def test_a_packed_model_is_trained_on(tmp_path, capsys, stories, packed, text):
    short = ["--length", 16, "--cpu", "--steps", 6, "--batch-size", 2, "--seed", 3, "--save-steps", 3]
    words = [packed, "--teacher", stories, "--data", text, *short, "--out", tmp_path / "out"]
    assert run(*words) == 0
    report = json.loads((tmp_path / "out" / "training.json").read_text())
    found = report["perplexity"]
    assert list(found) == ["teacher", "before training", "packed"]
    assert found["teacher"] < found["packed"] < found["before training"]
    assert all("kd_loss" in entry for entry in report["history"] if "loss" in entry)
    before, after = load(packed), load(str(tmp_path / "out"))
    assert after.config.quantization_config.to_dict() == before.config.quantization_config.to_dict()
    assert (
        after.dtype == before.dtype
        and size_report(packed).total_bytes == size_report(str(tmp_path / "out")).total_bytes
    )
    # A kill between the last checkpoint and the end costs nothing, and another teacher is another training.
    whole = after.state_dict()
    for name in ("training.json", "model.safetensors", "config.json"):
        (tmp_path / "out" / name).unlink()
    other = load(stories)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    capsys.readouterr()
    assert run(*words, "--resume", "--teacher", tmp_path / "other") == 2
    assert "started with another teacher" in capsys.readouterr().err
    assert run(*words, "--resume") == 0
    again = load(str(tmp_path / "out")).state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_text_that_is_given_and_written(tmp_path, stories, packed, text, monkeypatch):
    seen = []

    def fit(model, arguments, *, train_dataset, eval_dataset, **options):
        seen.append((train_dataset.tokens, eval_dataset.tokens))
        raise ValueError("this is all")

    monkeypatch.setattr("hf_littlebit.train.trainer.LittleBitTrainer", fit)
    for data in ([text], [text, "self"]):
        words = [packed, "--teacher", stories, "--length", 32, "--cpu", "--data", *data, "--out", tmp_path / "out"]
        assert run(*words, "--blocks", 40) == 2
    (alone, held_out), (mixed, same) = seen
    assert len(alone) == 36 and len(mixed) == 36
    rows = {tuple(row) for row in torch.cat([alone, held_out]).tolist()}
    assert sum(tuple(row) in rows for row in mixed.tolist()) == 18 and all(tuple(row) in rows for row in same.tolist())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the dense model with --teacher (it was made of me/dense)"),
        (["--bpw", "2", "--teacher", "self"], "leave out --bpw"),
        (["--init", "admm"], "leave them out to train a quantized model on"),
        (["--teacher", "PACKED"], "is quantized; name the dense model"),
        (["--teacher", "OTHER"], "a vocabulary of 300 tokens"),
        (["--teacher", "DENSE", "--data", "TEXT", "self", "--blocks", "3"], "--blocks is 3; it must be at least 4"),
        (["--no-teacher", "--data", "self"], "would write poor text"),
        (["--teacher", "./nothing"], "./nothing does not exist"),
    ],
)
def test_refusals_of_a_packed_model(tmp_path, capsys, stories, packed, text, words, message):
    shutil.copytree(stories, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    known = {"PACKED": packed, "OTHER": tmp_path / "other", "DENSE": stories, "TEXT": text}
    words = [known.get(word, word) for word in words]
    assert run(packed, "--data", text, "--out", tmp_path / "out", "--cpu", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dense_model_needs_its_bits(tmp_path, capsys, stories, text):
    assert run(stories, "--data", text, "--out", tmp_path / "out") == 2
    assert "--bpw is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps is 0"),
        (["--lr", "2"], "--lr is 2"),
        (["--length", "4096"], "--length is 4096"),
        (["--data", "self", "self"], "names self twice"),
        (["--teacher", "dense", "--no-teacher"], "exclude each other"),
        (["--resume"], "no complete checkpoint to resume"),
        (["--init", "best"], "init is 'best'"),
        (["--format", "latent"], "train packs its result"),
        (["--blocks", "1"], "--blocks is 1"),
        (["--data", "./missing.txt"], "does not exist"),
    ],
)
def test_refusals(tmp_path, capsys, stories, text, words, message):
    assert run(stories, "--bpw", 2, "--data", text, "--out", tmp_path / "out", "--cpu", *words) == 2
    assert message in capsys.readouterr().err
