"""What a wheel holds, that it works without the source tree, and `python -m hf_littlebit`."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy, so that no build folder appears in the source tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("src", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(source / "dist"))
    done = run(sys.executable, "-m", "pip", "wheel", str(source), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((source / "dist").glob("*.whl"))


def test_wheel_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"hf_littlebit/{path.name}" for path in (ROOT / "src" / "hf_littlebit").glob("*.py")}
    expected |= {f"hf_littlebit/kernels/{p.name}" for p in (ROOT / "kernels" / "torch-ext" / "littlebit").glob("*.py")}
    expected |= {"optimum/commands/register/register_littlebit.py"}
    assert expected <= names
    # An __init__.py in these folders would hide optimum's own packages; `kernels` belongs to the Hub's library.
    assert not {"optimum/__init__.py", "optimum/commands/__init__.py", "optimum/commands/register/__init__.py"} & names
    assert not any(name.startswith(("kernels/", "tests/", "examples/")) for name in names)
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_works_away_from_the_source(wheel, stories, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, 'site')\n"
        "import hf_littlebit, hf_littlebit.kernels as k\n"
        "from transformers import AutoModelForCausalLM as M\n"
        f"m = M.from_pretrained({stories!r}, quantization_config=hf_littlebit.LittleBitConfig(2, init='dual_svid'))\n"
        "m.save_pretrained('out'); print(type(M.from_pretrained('out').model.layers[0].mlp.up_proj).__name__)\n"
        "print(hf_littlebit.__file__, k.__file__)"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.stdout.startswith("LittleBitLinear"), done.stdout + done.stderr
    assert done.stdout.count(str(tmp_path / "site")) == 2


def test_version_is_one():
    import hf_littlebit

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == hf_littlebit.__version__


def test_running_another_program_with_the_plugin(tmp_path):
    (tmp_path / "other.py").write_text(
        "import sys\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m\n"
        "print(__name__, sys.argv[1:], 'littlebit' in m)\n"
    )
    done = run(sys.executable, "-m", "hf_littlebit", "other", "--flag", "x", cwd=tmp_path)
    assert done.stdout.split("\n")[0] == "__main__ ['--flag', 'x'] True", done.stderr
    for arguments, status, text in (
        ([], 2, ""),
        (["--help"], 0, "python -m hf_littlebit"),
        (["no_such"], 1, "no_such"),
    ):
        done = run(sys.executable, "-m", "hf_littlebit", *arguments, cwd=tmp_path)
        assert done.returncode == status and text in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_registering_twice_changes_nothing():
    import importlib

    import hf_littlebit

    importlib.reload(hf_littlebit)
    assert hf_littlebit.LittleBitConfig(0.5).bpw == 0.5


def test_importing_does_not_load_a_model_stack_twice():
    """The import is light enough for a command line: no compiler, no trainer, no data sets."""
    code = (
        "import sys, hf_littlebit\n"
        "print([m for m in ('datasets', 'transformers.trainer', 'matplotlib', 'torch._inductor.compile_fx') if m in sys.modules])"
    )
    done = run(sys.executable, "-c", code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
