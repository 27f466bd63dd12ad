"""`littlebit train` under `accelerate launch`, two processes on a CPU, with every config in examples/configs/accelerate."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from extras import needs
from families import ROOT, load
from test_distributed import DEEPSPEED

CONFIGS = ROOT / "examples" / "configs" / "accelerate"
SCRIPT = Path(__file__).with_name("launched.py")


def launch(config, stories, out, *words):
    """The finished process of one `littlebit train`; DeepSpeed's way to a CPU needs no --cpu (launched.py)."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{config}.yaml", SCRIPT]
    command += ["train", stories, "--bpw", 2, "--init", "dual_svid", "--data", "self", "--blocks", 24, "--length", 16]
    command += ["--out", out, "--steps", 4, "--save-steps", 2, "--batch-size", 2, "--accumulate", 2, *words]
    command += [] if config.startswith("zero") else ["--cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
    return subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True, timeout=200)


def report_of(done, out):
    """What the first process wrote, once it is clear that it alone wrote and printed."""
    assert done.returncode == 0, done.stderr[-20000:]
    assert done.stdout.count("saved to") == done.stdout.count("before training") == 1
    assert (
        len(list(out.glob("checkpoints/self-*"))) == 1
        and (out / "training.png").exists()
        and (out / "tokenizer.json").exists()
    )
    return json.loads((out / "training.json").read_text())


@pytest.fixture(scope="module")
def ddp(tmp_path_factory, stories):
    out = tmp_path_factory.mktemp("ddp") / "out"
    return out, report_of(launch("ddp", stories, out), out)


def check(report, reference):
    """Both trainings went the same way."""
    assert report["perplexity"]["dense"] == pytest.approx(reference["perplexity"]["dense"], rel=1e-5)
    assert report["perplexity"]["packed"] == pytest.approx(reference["perplexity"]["packed"], rel=1e-2)
    assert report["tokens_per_step"] == reference["tokens_per_step"] == 2 * 2 * 2 * 16
    for key in ("loss", "kd_loss", "eval_loss"):
        one, two = (
            {entry["step"]: entry[key] for entry in each["history"] if key in entry} for each in (report, reference)
        )
        assert one == pytest.approx(two, rel=1e-3), key


@needs("matplotlib")
@pytest.mark.slow
@pytest.mark.subprocess
def test_ddp_and_resume(ddp, stories):
    out, whole = ddp
    dense = launch("ddp", stories, out)
    assert dense.returncode != 0 and "holds a model already" in dense.stderr
    for name in ("config.json", "model.safetensors", "training.json"):  # as a kill after step 2 would have left it
        (out / name).unlink()
    shutil.rmtree(out / "checkpoints" / "checkpoint-4")
    check(report_of(launch("ddp", stories, out, "--resume"), out), whole)


@needs("matplotlib")
@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.parametrize(
    "config", ["fsdp2", pytest.param("zero2", marks=DEEPSPEED), pytest.param("zero3", marks=DEEPSPEED)]
)
def test_other_engines(tmp_path, ddp, stories, config):
    report = report_of(launch(config, stories, tmp_path), tmp_path)
    check(report, ddp[1])
    model = load(str(tmp_path))
    assert model.config.quantization_config.format == "packed" and model.config.use_cache


@pytest.mark.parametrize(
    ("config", "engine"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")]
)
def test_accelerate_reads_the_configs(config, engine):
    """Its parser refuses keys that it does not know; those within a section, only the engines' own would."""
    read = load_config_from_file(str(CONFIGS / f"{config}.yaml"))
    assert read.distributed_type == engine and read.num_processes == 2 and not read.use_cpu
    sections = {"fsdp2": read.fsdp_config, "zero2": read.deepspeed_config, "zero3": read.deepspeed_config}
    for key, value in sections.get(config, {}).items():
        assert value is not None and key.startswith(("fsdp_", "zero", "gradient_", "offload_"))
    if config.startswith("zero"):
        assert read.deepspeed_config["zero_stage"] == int(config[4])
