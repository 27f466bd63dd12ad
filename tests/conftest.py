"""Fixtures: the two real models, and saved random ones of every covered family (families.py)."""

import pytest
import torch
from families import ROOT, build


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def stories() -> str:
    """stories260K: a real Llama of 0.26 M parameters."""
    return str(ROOT / "tests" / "models" / "stories260K")


@pytest.fixture(scope="session")
def pycode() -> str:
    """pycode-13m: a real Llama of 13 M parameters, the one that `make demo` uses."""
    return str(ROOT / "examples" / "models" / "pycode-13m")


@pytest.fixture(scope="session")
def family_dir(tmp_path_factory):
    """name of a family -> folder of a saved random dense model of it (made once)."""
    made: dict[str, str] = {}

    def make(family: str) -> str:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            build(family).save_pretrained(folder)
            made[family] = str(folder)
        return made[family]

    return make
