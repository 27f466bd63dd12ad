"""Two processes over gloo give what one gives, resume exactly, and leave what can be packed: DDP, FSDP2, ZeRO-2 and -3."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from extras import needs
from families import equal_states, load, logits

from hf_littlebit.command.cli import main
from hf_littlebit.load.convert import pack_model

pytestmark = [pytest.mark.slow, pytest.mark.subprocess]

SCRIPT = Path(__file__).with_name("two_processes.py")
DEEPSPEED = needs("deepspeed")


def start(out, *options, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, str(SCRIPT), str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[:20000]
    return torch.load(out / "final.pt")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    return out, start(out)


@pytest.fixture(
    scope="module",
    params=[
        "ddp",
        "fsdp",
        pytest.param("zero2", marks=DEEPSPEED),
        pytest.param("zero3", marks=DEEPSPEED),
    ],
)
def together(request, tmp_path_factory):
    """(folder, result) of the trainings that two processes share, on one engine after the other."""
    out = tmp_path_factory.mktemp(request.param)
    return out, start(out, *[request.param][request.param == "ddp" :], processes=2)


def test_two_processes_give_what_one_gives(alone, together):
    (_, one), (_, two) = alone, together
    assert one["same"] and two["same"]  # after resuming from the middle
    assert one["weights"].keys() == two["weights"].keys()
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-4, atol=2e-6, msg=name)
    for first, second in zip(one["history"], two["history"], strict=True):
        for key in ("kd_loss", "hidden_loss", "loss"):
            assert (key in first) == (key in second)
            assert key not in first or first[key] == pytest.approx(second[key], rel=1e-4), key
        for key in ("flipped_since_start", "flipped_since_log"):
            assert first.get(key) == second.get(key)


@pytest.mark.parametrize("name", ["packed", "plain"])
def test_save_model_packs(alone, together, name):
    expected, model = load(str(alone[0] / name)), load(str(together[0] / name))
    assert model.config.quantization_config.format == "packed"
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-3, atol=1e-4)


def test_pack_command(alone, together, capsys):
    """The last checkpoint, whatever it is made of, packs to the weights that the training ended with."""
    (reference, _), (out, result) = alone, together
    assert main(["pack", str(out / "checkpoint-4"), "--out", str(out / "exported")]) == 0
    captured = capsys.readouterr()
    assert f"saved to {out / 'exported'}" in captured.out and "Processing" not in captured.out
    expected = load(str(reference / "checkpoint-4"))
    expected.load_state_dict(result["weights"])
    packed = load(str(out / "exported"))
    assert packed.config.quantization_config.format == "packed"
    equal_states(packed, pack_model(expected))


def test_gathered_checkpoint_is_an_ordinary_model(together):
    model = load(str(together[0] / "whole" / "checkpoint-2"))
    assert model.config.quantization_config.format == "latent"
