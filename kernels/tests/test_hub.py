"""kernels/ as a kernel repository of the Hugging Face Hub: its description parses, it loads, and its code keeps the rules."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SOURCES = sorted((REPOSITORY / "torch-ext" / "littlebit").glob("*.py"))


def has_kernels() -> bool:
    # Asked by its distribution's name: the folder tested here is itself importable as `kernels` from the project's root.
    try:
        return bool(importlib.metadata.version("kernels"))
    except importlib.metadata.PackageNotFoundError:
        return False


needs_kernels = pytest.mark.skipif(not has_kernels(), reason="the package `kernels` is not installed")


def test_the_description_agrees_with_the_folder():
    general = tomllib.loads((REPOSITORY / "build.toml").read_text())["general"]
    metadata = json.loads((REPOSITORY / "torch-universal" / "metadata.json").read_text())
    assert (REPOSITORY / "torch-ext" / general["name"] / "__init__.py").exists()
    assert [general[key] for key in ("name", "version", "license")] == [
        metadata[k] for k in ("name", "version", "license")
    ]


@needs_kernels
def test_the_description_parses():
    from kernels._rust import Build

    assert [str(backend) for backend in Build.open(REPOSITORY).general.backends] == [
        "cpu",
        "cuda",
        "rocm",
        "xpu",
    ]


@pytest.mark.subprocess
@needs_kernels
@pytest.mark.parametrize("plugin", [False, True])
def test_it_loads_as_a_local_kernel(plugin):
    """By itself, and next to the installed plugin, whose compiled operators it then shares."""
    code = f"""
from pathlib import Path
import torch
from kernels import get_local_kernel
if {plugin}:
    import hf_littlebit.kernels
    hf_littlebit.kernels.cpu.load()
k = get_local_kernel(Path({str(REPOSITORY)!r}))
print(k.__file__, k.FORMAT_VERSION)
signs = torch.randn(40, 24)
words, tail = k.pack_signs(signs)
u, u_tail = k.pack_signs(torch.ones(24, 7))
ones = torch.ones(1, 7), torch.ones(24), torch.ones(1, 40)
y = k.littlebit_linear(torch.ones(3, 40), u, u_tail, words, tail, *ones, None, [24])
torch.testing.assert_close(y, torch.where(signs < 0, -1.0, 1.0).sum().expand(3, 7))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "torch-universal" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_sources_need_only_torch_and_python_3_9(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            continue
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            top = name.split(".")[0]
            assert top in ("torch", "triton") or top in sys.stdlib_module_names, f"{path.name} imports {name}"
    # Two versions in one process would define an operator twice. What is registered for the compiled library's operators
    # comes and goes with it, and a second copy uses the first one's.
    used = set(re.findall(r"torch\.library\.(\w+)|(?:\b)(custom_op|triton_op)\b", path.read_text()))
    assert used <= ({("register_fake", "")} if path.name == "cpu.py" else set())
