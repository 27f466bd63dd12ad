"""The C++ kernel without torch (littlebit_cpu/check.cpp): under sanitizers, and for another processor."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.subprocess]

SOURCE = Path(__file__).parents[1] / "littlebit_cpu"
SOURCES = [str(path) for path in SOURCE.glob("*.cpp") if not path.name.endswith("binding.cpp")]


@pytest.mark.skipif(shutil.which("g++") is None or not SOURCES, reason="needs g++ and the C++ source")
def test_nothing_is_touched_past_the_end(tmp_path):
    """Address and undefined-behaviour sanitizers over odd shapes (a short run of `make asan`)."""
    flags = ["-std=c++17", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread", "-w"]
    build = subprocess.run(
        ["g++", *flags, *SOURCES, "-o", str(tmp_path / "check")], capture_output=True, text=True, check=False
    )
    if "cannot find" in build.stderr:
        pytest.skip("the compiler has no sanitizer libraries")
    assert build.returncode == 0, build.stderr
    done = subprocess.run([str(tmp_path / "check"), "8"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "generic" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64") and SOURCES),
    reason="needs aarch64-linux-gnu-g++, qemu-aarch64 and the C++ source",
)
def test_neon_in_emulation(tmp_path):
    """As `make neon`, shorter."""
    flags = ["-std=c++17", "-O2", "-static", "-pthread", "-w"]
    subprocess.run(["aarch64-linux-gnu-g++", *flags, *SOURCES, "-o", str(tmp_path / "check")], check=True)
    done = subprocess.run(["qemu-aarch64", str(tmp_path / "check"), "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "neon" in done.stdout, done.stdout + done.stderr
