"""The examples do what they say. Each is run as a person runs it: in a process of its own, on the bundled model."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from extras import needs

pytestmark = [pytest.mark.slow, pytest.mark.subprocess]

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*command, **environment) -> str:
    """What `command` prints, once it has succeeded."""
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """The folder that examples/quantize.py writes, and what it prints."""
    folder = tmp_path_factory.mktemp("quantize") / "out"
    return folder, run(sys.executable, EXAMPLES / "quantize.py", "--out", folder)


def test_quantize(quantized):
    folder, printed = quantized
    assert (folder / "model.safetensors").stat().st_size < 5_010_000  # the README's 5.00 MB
    assert re.search(r"bits per weight, real +0\.549", printed) and "def read_lines(path):" in printed


def test_evaluate(quantized):
    printed = run(sys.executable, EXAMPLES / "evaluate.py", "--packed", quantized[0])
    found = {name: float(value) for name, value in re.findall(r"\| (\w+) +\| +([\d.]+) \|", printed)}
    assert found["dense"] < found["packed"] < 1.4 * found["dense"]
    assert "file size" in printed


@needs("peft")
def test_lora(quantized, tmp_path):
    printed = run(sys.executable, EXAMPLES / "lora.py", "--packed", quantized[0], "--out", tmp_path)
    before, after = (float(value) for value in re.findall(r": (\d+\.\d)\b", printed.splitlines()[-1]))
    assert after < before
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"adapter_model.safetensors"}


def test_bench_tables(pycode):
    script, config = EXAMPLES / "bench_tables.py", Path(pycode) / "config.json"
    text = EXAMPLES / "data" / "pycode_eval.txt"
    options = ("--text", text, "--length", 128, "--blocks", 4, "--apart")
    printed = run(sys.executable, script, "quality", pycode, *options)
    found = re.findall(r"^\| (\d+) +\| (\d+) +\| ([\w ]+?) +\| ([\d.]+) +\|[^|]*\| ([\d.-]+)", printed, re.MULTILINE)
    values = {(int(bits), int(head), kind): float(value) for bits, head, kind, value, _ in found}
    dense = values[16, 16, "as it is"]
    weights, products = "for the weights", "for the products"
    assert values[8, 8, weights] == pytest.approx(dense, rel=0.01) and values[4, 4, weights] < 1.3 * dense
    assert values[4, 4, products] < values[4, 4, weights] and values[16, 4, products] < values[16, 4, weights]
    # The two alone: each costs something, neither as much as both, and each takes half of the bytes.
    assert dense < min(values[4, 16, weights], values[16, 4, weights])
    assert max(values[4, 16, weights], values[16, 4, weights]) < values[4, 4, weights]
    sizes = {(int(bits), int(head)): float(size) for bits, head, kind, _, size in found if kind == weights}
    assert sizes[4, 16] == sizes[16, 4] == pytest.approx(sizes[4, 4] / 2, abs=0.1)
    printed = run(sys.executable, script, "speed", config, "--bpw", 1, "--rounds", 1, "--new", 4)
    assert [line.split()[1] for line in printed.splitlines()[-3:]] == ["16", "8", "4"]


def test_train(tmp_path):
    options = ("--steps", 8, "--length", 64, "--out", tmp_path)
    printed = run(sys.executable, EXAMPLES / "train.py", *options)
    losses = [float(value) for value in re.findall(r"'eval_loss': '?([\d.]+)", printed)]
    assert losses[-1] < losses[0]
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format"] == "packed"
    assert "def read_lines(path):" in printed


@needs("fastapi", "uvicorn", "openai")
@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_serve(quantized, free_port):
    printed = run("bash", EXAMPLES / "serve.sh", quantized[0], PYTHON=sys.executable, PORT=str(free_port))
    answer = json.loads(printed.splitlines()[-1])
    assert answer["choices"][0]["text"].strip() and answer["usage"]["completion_tokens"] == 40


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_serve_says_what_is_missing(tmp_path):
    python = tmp_path / "python"
    code = "import transformers.utils.import_utils as u; u.is_serve_available = lambda: False; exec(__import__('sys').argv[1])"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$2"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", EXAMPLES / "serve.sh", tmp_path],
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith('pip install "transformers[serving]"')


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_the_sweep_over_model_classes():
    """A class that is quantized, one whose code reads weights itself, and one without linear layers."""
    names = ["LlamaForCausalLM", "MambaForCausalLM", "GPT2LMHeadModel"]
    *lines, counts = run(sys.executable, EXAMPLES / "experiments" / "sweep.py", *names).splitlines()
    rows = {row["class"]: row for row in map(json.loads, lines)}
    assert [rows[name]["verdict"] for name in names] == ["ok", "ok", "refused"] and counts == "ok: 2, refused: 1"
    assert rows["LlamaForCausalLM"]["kept"] == {} and rows["LlamaForCausalLM"]["error"] < 1e-5
    assert any("reads their weight" in reason for reason in rows["MambaForCausalLM"]["kept"])
