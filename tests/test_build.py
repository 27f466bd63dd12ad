"""The wheel with the compiled CPU kernel, built without torch, and the wheel without a compiler."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.subprocess]

ROOT = Path(__file__).parent.parent
LIBRARY = "hf_littlebit/kernels/liblittlebit_cpu.so"


def build(folder, **variables):
    """(wheel, build log) of a copy of the source tree."""
    source = folder / "source"
    for name in ("src", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", "tests", "benchmarks")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.cfg", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(source),
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-v",
    ]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl")), done.stdout + done.stderr


def load(wheel, folder, code):
    zipfile.ZipFile(wheel).extractall(folder / "site")
    code = f"import sys; sys.path.insert(0, 'site')\nimport hf_littlebit.kernels as k\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_wheel_with_the_library_is_built_without_torch_and_serves_every_python(tmp_path):
    # As in an isolated build, where there is no torch.
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "torch.py").write_text("raise ImportError('no torch while building')")
    wheel, log = build(tmp_path, PYTHONPATH=str(tmp_path / "without"))
    assert LIBRARY in zipfile.ZipFile(wheel).namelist(), log
    assert "-py3-none-" in wheel.name and "any" not in wheel.name
    done = load(wheel, tmp_path, "print(k.cpu.LIBRARY, k.cpu.load(), k.cpu.select())")
    assert str(tmp_path / "site") in done.stdout and " True " in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("compiler", ["/no/such/compiler", shutil.which("false")])
def test_a_wheel_without_a_compiler_works_and_says_so(compiler, tmp_path):
    wheel, log = build(tmp_path, CC=compiler, CXX=compiler)
    assert log.count("the compiled CPU kernel was not built") == 1, log
    names = zipfile.ZipFile(wheel).namelist()
    assert LIBRARY not in names and "hf_littlebit/kernels/cpu.py" in names and wheel.name.endswith("-py3-none-any.whl")
    product = "k.littlebit_linear(one, bits[:0].int(), bits, None, bits, one, one[0], one, None, [1])"
    code = (
        f"import torch\none, bits = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8)\n{product}\nprint({product})"
    )
    done = load(wheel, tmp_path, code)
    assert done.stdout.strip() == "tensor([[1.]])" and done.stderr.count("there is no compiled CPU kernel") == 1, (
        done.stderr
    )
    assert "install a C++ compiler" in done.stderr
