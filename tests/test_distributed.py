"""Two processes over gloo give what one gives, and resume exactly: DDP and FSDP2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_littlebit.twins import pack_model

SCRIPT = Path(__file__).with_name("two_processes.py")


def start(out, *options, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, str(SCRIPT), str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[:20000]
    return torch.load(out / "final.pt")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return start(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("options", [(), ("--fsdp",)], ids=["ddp", "fsdp2"])
def test_two_processes_give_what_one_gives(tmp_path, alone, options):
    result = start(tmp_path, *options, processes=2)
    assert alone["same"] and result["same"]  # after resuming from the middle
    assert alone["weights"].keys() == result["weights"].keys()
    for name, value in alone["weights"].items():
        torch.testing.assert_close(result["weights"][name], value, rtol=1e-4, atol=2e-6, msg=name)
    for one, two in zip(alone["history"], result["history"], strict=True):
        for key in ("kd_loss", "hidden_loss", "loss"):
            assert (key in one) == (key in two)
            assert key not in one or one[key] == pytest.approx(two[key], rel=1e-4), key
        if not options:
            for key in ("flipped_since_start", "flipped_since_log"):
                assert one.get(key) == two.get(key)
    # The checkpoint that a sharded run leaves is an ordinary latent model.
    from conftest import load

    model = load(str(tmp_path / "checkpoint-4"))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, result["weights"][name], msg=name)
    pack_model(model).save_pretrained(tmp_path / "packed")
    assert load(str(tmp_path / "packed")).config.quantization_config.format == "packed"
