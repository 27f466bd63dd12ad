"""What a wheel holds, that it works without the source tree, and `python -m hf_littlebit`."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from hf_littlebit.__main__ import main as run_with_plugin

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


@pytest.mark.subprocess
def test_wheel_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "hf_littlebit").rglob("*.py")}
    expected |= {f"hf_littlebit/kernels/{p.name}" for p in (ROOT / "kernels" / "torch-ext" / "littlebit").glob("*.py")}
    expected |= {"optimum/commands/register/register_littlebit.py", "hf_littlebit/py.typed"}
    assert expected <= names
    # An __init__.py in these folders would hide optimum's own packages; `kernels` belongs to the Hub's library.
    assert not {"optimum/__init__.py", "optimum/commands/__init__.py", "optimum/commands/register/__init__.py"} & names
    assert not any(name.startswith(("kernels/", "tests/", "examples/")) for name in names)
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.subprocess
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
    assert "LittleBitLinear" in done.stdout.splitlines(), done.stdout + done.stderr
    assert done.stdout.count(str(tmp_path / "site")) == 2


@pytest.mark.subprocess
def test_version_is_one(wheel):
    import hf_littlebit

    assert "version" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert wheel.name.split("-")[1] == hf_littlebit.__version__
    assert f"## [{hf_littlebit.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
@pytest.mark.subprocess
def test_running_another_program_with_the_plugin(tmp_path):
    (tmp_path / "other.py").write_text(
        "import sys\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m\n"
        "print(__name__, sys.argv[1:], 'littlebit' in m)\n"
    )
    done = run(sys.executable, "-m", "hf_littlebit", "other", "--flag", "x", cwd=tmp_path)
    assert done.stdout.split("\n")[0] == "__main__ ['--flag', 'x'] True", done.stderr
    done = run(sys.executable, "-m", "hf_littlebit", "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("python -m hf_littlebit MODULE")


@pytest.mark.subprocess
def test_what_cannot_be_run_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "program.py").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for arguments, words in (
        ([], "no module to run"),
        ([""], "no module to run"),
        (["json"], "'json' is a package and cannot be directly executed"),
        (["transformers"], "'transformers' is a package and cannot be directly executed"),
        (["empty"], "'empty' is a package"),
        (["sys"], "No code object available for sys"),
        (["no_such"], "No module named no_such"),
        (["no_such.part"], "No module named 'no_such'"),
        (["json.no_such"], "No module named json.no_such"),
        (["program.part"], "'program.part'"),
        (["program.py"], "Try using 'program' instead of 'program.py' as the module name"),
        (["./program"], "Relative module names not supported"),
        ([".program"], "Relative module names not supported"),
        (["__main__"], "__main__"),
        (["-c"], "No module named -c"),
    ):
        monkeypatch.setattr(sys, "argv", ["hf_littlebit", *arguments])
        with pytest.raises(SystemExit) as exit:
            run_with_plugin()
        out, err = capsys.readouterr()
        assert exit.value.code == 2 and out == "", arguments
        assert err.startswith("hf_littlebit: error: ") and words in err and err.count("\n") == 1, arguments
        assert "such as lm_eval" in err or "as in: python -m hf_littlebit" in err, arguments
    done = run(sys.executable, "-m", "hf_littlebit", "json", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "a package and cannot" in done.stderr


@pytest.mark.parametrize(
    "content, kind",
    [
        ("import no_such_dependency", ModuleNotFoundError),
        ("raise ValueError('mine')", ValueError),
        ("1 +", SyntaxError),
    ],
)
@pytest.mark.parametrize("file", ["program.py", "package/__main__.py", "package/__init__.py"])
def test_a_program_keeps_its_own_errors(tmp_path, monkeypatch, content, kind, file):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / file).write_text(content)
    for name in ("program", "package", "package.__main__"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["hf_littlebit", file.split("/")[0].removesuffix(".py")])
    with pytest.raises(kind) as error:
        run_with_plugin()
    where = error.value.filename if kind is SyntaxError else str(error.traceback[-1].path)
    assert where == str(tmp_path / file)


def test_registering_twice_changes_nothing():
    import importlib

    import hf_littlebit

    importlib.reload(hf_littlebit)
    assert hf_littlebit.LittleBitConfig(0.5).bpw == 0.5


@pytest.mark.subprocess
def test_importing_does_not_load_a_model_stack_twice():
    """The import is light enough for a command line: no compiler, no trainer, no data sets."""
    code = (
        "import sys, hf_littlebit\n"
        "print([m for m in ('datasets', 'transformers.trainer', 'matplotlib', 'torch._inductor.compile_fx') if m in sys.modules])"
    )
    done = run(sys.executable, "-c", code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
