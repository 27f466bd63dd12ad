"""The compiled library: finding it, loading it, doing without it, and what it needs of torch."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_littlebit.kernels import cpu, reference

SOURCE = Path(__file__).parents[1] / "littlebit_cpu"
built = pytest.mark.skipif(not cpu.LIBRARY.exists(), reason="the compiled CPU kernel is not built")
compiler = pytest.mark.skipif(shutil.which("g++") is None or not SOURCE.exists(), reason="needs g++ and the C++ source")


def python(code, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


PRODUCT = """
import pathlib, warnings, torch, hf_littlebit.kernels as k
k.cpu.LIBRARY = pathlib.Path({library!r})
byte, one = torch.zeros(1, 1, dtype=torch.uint8), torch.ones(1, 1)
parts = (torch.zeros(0, 1, dtype=torch.int32), byte, None, byte, one, one[0], one)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    assert not hasattr(torch.ops.hf_littlebit_cpu, "linear")
    print([k.littlebit_linear(one, *parts, None, [1]).item() for _ in range(2)])
    print([str(w.message) for w in seen], k._backend(one).__name__)
"""
ABSENT = str(cpu.LIBRARY.with_name("absent.so"))


@pytest.mark.slow
@pytest.mark.subprocess
def test_without_the_library_one_warning_and_the_reference():
    done = python(PRODUCT.format(library=ABSENT), LITTLEBIT_BACKEND="")
    assert done.stdout.startswith("[1.0, 1.0]"), done.stderr
    assert done.stdout.count("absent.so is missing") == 1 and "LITTLEBIT_BACKEND=reference" in done.stdout
    assert done.stdout.rstrip().endswith(reference.__name__)
    done = python(PRODUCT.format(library=ABSENT), LITTLEBIT_BACKEND="reference")
    assert "missing" not in done.stdout and done.stdout.rstrip().endswith(reference.__name__), done.stderr
    errors = (
        ("cpu", "RuntimeError: LITTLEBIT_BACKEND=cpu, but there is no"),
        (
            "quick",
            "ValueError: LITTLEBIT_BACKEND='quick' is unknown; set it to one of reference, cpu, triton, or unset it",
        ),
    )
    for backend, text in errors:
        done = python(PRODUCT.format(library=ABSENT), LITTLEBIT_BACKEND=backend)
        assert done.returncode != 0 and text in done.stderr, done.stderr
    calls = (
        "k.cpu.select()",
        "k.cpu.products(one, [k.PackedLayer(*parts, None, [1])])",
        "k.cpu.products(one, [k.PackedLayer(*parts, None, [1])], True)",
    )
    for call in calls:
        done = python(f"{PRODUCT.format(library=ABSENT)}\n{call}", LITTLEBIT_BACKEND="reference")
        assert "RuntimeError: there is no compiled CPU kernel" in done.stderr and "compiler" in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.subprocess
@built
def test_the_backend_is_chosen_once():
    code = PRODUCT.format(library=str(cpu.LIBRARY))
    code += "import os; os.environ['LITTLEBIT_BACKEND'] = 'nonsense'; k.littlebit_linear(one, *parts, None, [1])\n"
    code += "print(k._choice())"
    for backend, module in (("reference", reference), ("", cpu), ("cpu", cpu)):
        done = python(code, LITTLEBIT_BACKEND=backend)
        assert module.__name__ in done.stdout.splitlines()[-1], done.stdout + done.stderr


@pytest.mark.subprocess
@built
def test_a_second_copy_of_the_package_shares_the_operators(tmp_path):
    """Defining the operators again would end the process."""
    shutil.copytree(cpu.LIBRARY.parent, tmp_path / "copy")
    code = (
        "import sys, importlib.util as u, hf_littlebit.kernels as k\nprint(k.cpu.load(), k.cpu.select())\n"
        f"spec = u.spec_from_file_location('second', {str(tmp_path / 'copy' / '__init__.py')!r})\n"
        "second = u.module_from_spec(spec); sys.modules['second'] = second; spec.loader.exec_module(second)\n"
        "print(second.cpu.LIBRARY != k.cpu.LIBRARY, second.cpu.load(), second.cpu.select())"
    )
    done = python(code)
    assert done.returncode == 0 and done.stdout.splitlines()[1].startswith("True True "), done.stdout + done.stderr


@pytest.mark.subprocess
def test_a_library_that_does_not_load_is_named(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    done = python(PRODUCT.format(library=str(broken)), LITTLEBIT_BACKEND="")
    assert f"{broken} does not load" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.subprocess
@built
def test_it_is_loaded_at_the_first_product_and_then_called_by_the_dispatcher():
    done = python(PRODUCT.format(library=str(cpu.LIBRARY)), LITTLEBIT_BACKEND="")
    assert done.stdout.rstrip().endswith(f"[] {cpu.__name__}"), done.stdout + done.stderr
    code = (
        "import torch, hf_littlebit\nfrom hf_littlebit import LittleBitLinear\n"
        "m = LittleBitLinear(40, 33, [8, 16]).requires_grad_(False)\nfor p in m.parameters(): p.zero_()\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print(has('hf_littlebit::linear', 'CPU')); m(torch.ones(1, 40)); print(has('hf_littlebit::linear', 'CPU'))\n"
        "y = torch.compile(m, fullgraph=True, backend='aot_eager')(torch.ones(3, 40)); print(tuple(y.shape))\n"
    )
    done = python(code, LITTLEBIT_BACKEND="cpu")
    assert done.stdout.split("\n")[:3] == ["False", "True", "(3, 33)"], done.stdout + done.stderr


@pytest.mark.subprocess
@built
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_the_library_needs_no_python():
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(cpu.LIBRARY)], capture_output=True, text=True, check=True
    )
    assert " aoti_torch_library_init_impl" in symbols.stdout
    assert not [
        line for line in symbols.stdout.splitlines() if line.split()[-1].startswith(("Py", "_Py", "_ZN2at", "_ZN3c10"))
    ]


@pytest.mark.subprocess
@compiler
def test_torch_is_declared_as_its_own_headers_do(tmp_path):
    """C functions that are declared twice with different types do not compile."""
    include = Path(torch.__file__).parent / "include"
    code = (
        "#include <torch/csrc/stable/c/shim.h>\n#include <torch/csrc/inductor/aoti_torch/c/shim.h>\n"
        '#include "torch_abi.h"\n{wrong}\nstatic_assert(littlebit::kTorch == TORCH_TARGET_VERSION);'
    )
    for wrong in ("", 'extern "C" AOTITorchError aoti_torch_get_dim(AtenTensorHandle, int32_t*);'):
        (tmp_path / "both.cpp").write_text(code.format(wrong=wrong))
        flags = [
            "-std=c++17",
            "-fsyntax-only",
            f"-I{include}",
            f"-I{SOURCE}",
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
        ]
        done = subprocess.run(["g++", *flags, str(tmp_path / "both.cpp")], capture_output=True, text=True, check=False)
        assert (done.returncode != 0) == bool(wrong), done.stderr
    declared = set(
        re.findall(r"\b((?:aoti_)?torch_\w+)\(", (SOURCE / "torch_abi.h").read_text().split("namespace littlebit")[0])
    )
    theirs = "".join(
        (include / "torch/csrc" / name).read_text() for name in ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h")
    )
    assert declared and all(re.search(rf"\b{name}\(", theirs) for name in declared)


def test_no_source_needs_torch_to_compile():
    assert not [path.name for path in SOURCE.iterdir() if re.search(r"#include\s*[<\"]torch/", path.read_text())]
