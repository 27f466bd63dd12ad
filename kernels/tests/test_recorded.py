"""Recorded launches without a GPU: recorded_cases.py in a process of its own, with the benchmark's driver that does nothing."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("recorded_cases.py")
BENCHMARKS = CASES.parents[1] / "benchmarks"
found = importlib.util.find_spec("triton") is not None
recent = found and tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) >= (3, 7)


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.skipif(not recent, reason="triton is not installed, or is older than 3.7")
def test_the_cases_against_a_driver_that_does_nothing():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(BENCHMARKS), os.environ.get("PYTHONPATH"))))
    options = ("-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(CASES)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=CASES.parent,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
