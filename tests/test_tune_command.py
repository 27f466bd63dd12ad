"""`littlebit tune`: what it asks the tuner for, what it prints, and its errors on a machine without a GPU."""

import json
from types import SimpleNamespace

import pytest
import torch
from hf_littlebit.kernels import candidates, gpu, tuner, tuning
from test_cli import FAST, fails

from hf_littlebit import LittleBitConfig
from hf_littlebit.command.cli import main
from hf_littlebit.command.tune_command import layers_and_groups
from hf_littlebit.report.size import size_report


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """A machine that says that it has a GPU, whose tuner writes down what it is asked for and finds something."""
    calls = []

    def tune(layers, groups, batches, dtype, gradient, folder, seconds, say):
        calls.append(SimpleNamespace(**locals()))
        say("round 1")
        path = (folder or tuning.user_folder()) / "gpu.json"
        few, tiles = tuning.Few(32, 8, 2, 32, 4, 2), tuning.Tiles(64, 16, 4, 3, 2, 64, 16, 4, 3, 1, 2, 2)
        one = candidates.Case("few 64x64 8", (64, 32), 64, ((8,), (8, 8)), 4, dtype, False)
        many = candidates.Case("tiles 64x64 8 16 1 gradient", (64,), 64, ((8,),), 16, dtype, True)
        return tuner.Result(path, [tuner.Found(one, few, 6.0, 4.0), tuner.Found(many, tiles, 9.0, 9.0)])

    monkeypatch.setenv("LITTLEBIT_TILES", str(tmp_path / "tiles"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "load", lambda: True)
    monkeypatch.setattr(tuner, "tune", tune)
    return calls


def test_what_is_measured_and_printed(on_a_gpu, stories, tmp_path, capfd):
    command = ["tune", stories, *FAST, "--tokens", "1", "64", "--gradient", "--seconds", "30"]
    assert main([*command, "--dtype", "float16"]) == 0
    (call,) = on_a_gpu
    expected = layers_and_groups(size_report(stories, LittleBitConfig(4.0, "dual_svid")).layers)
    assert (call.layers, call.groups) == expected and len(set(call.layers)) == len(call.layers)
    assert (call.batches, call.dtype, call.gradient, call.seconds) == ([1, 64], torch.float16, True, 30)
    assert call.folder is None
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert lines[2].split()[:3] == ["64+32", "x", "64"] and lines[2].split()[-3:] == ["6.0", "4.0", "1.50"]
    assert "1 to 4" in lines[2] and "gradient" in lines[3]
    assert lines[-1] == f"saved to {tmp_path / 'tiles' / 'gpu.json'}"
    assert err == "round 1\n"  # and no note: this folder is the one that is read


def test_json_and_another_folder(on_a_gpu, stories, tmp_path, capfd):
    assert main(["tune", stories, *FAST, "--json", "--out", str(tmp_path / "out")]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert found["file"] == str(tmp_path / "out" / "gpu.json")
    assert [row["after_us"] for row in found["found"]] == [4.0, 9.0] and found["found"][0]["tiles"]["columns_one"] == 32
    assert f"LITTLEBIT_TILES={tmp_path / 'out'}" in err
    # The dtype is the model's own, and every number of tokens is one of the default's.
    assert on_a_gpu[0].dtype == torch.float32 and on_a_gpu[0].batches == [1, 16, 64, 512]


def test_groups_are_those_that_read_one_input(stories):
    layers, groups = layers_and_groups(size_report(stories, LittleBitConfig(4.0, "dual_svid")).layers)
    assert [len(outs) for outs, *_ in groups] == [3, 2]  # q, k and v; gate and up, of all layers once
    for outs, into, ranks in groups:
        assert all((out, into, some) in layers for out, some in zip(outs, ranks, strict=True))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--tokens", "0"], 2, "--tokens is 0; it must be at least 1"),
        (["--seconds", "0"], 2, "--seconds is 0; it must be above 0"),
        (["--out", "FILE"], 2, "is a file; give a folder"),
        ([], 1, "torch finds no CUDA or ROCm GPU here"),
    ],
)
def test_errors_come_before_any_work(arguments, code, words, monkeypatch, tmp_path, capfd):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").write_text("")
    arguments = [str(tmp_path / "file") if argument == "FILE" else argument for argument in arguments]
    # A model that does not exist: it would be an error of its own, were it looked for.
    found, line = fails(["tune", "nowhere/config.json", *arguments], capfd)
    assert found == code and words in line


def test_without_triton_the_error_names_the_remedy(monkeypatch, capfd):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "load", lambda: False)
    code, line = fails(["tune", "nowhere/config.json"], capfd)
    assert code == 1 and "pip install triton" in line


def test_a_dense_model_needs_bits(on_a_gpu, stories, capfd):
    code, line = fails(["tune", stories], capfd)
    assert code == 2 and "--bpw" in line and not on_a_gpu
