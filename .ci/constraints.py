"""Prints a pip constraints file for `make constraints`.

    python .ci/constraints.py             the versions that the running Python has installed, a line a package
    python .ci/constraints.py --lowest    the lower bounds of pyproject.toml, a line a package

A constraint takes effect only where its package is installed anyway, so a line for a package that some platform or Python
version does without is harmless there. What a torch for GPUs requires in exact versions is left out (Triton, CUDA's
libraries): a pin of another version would contradict it.
"""

import argparse
import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent
OWN = "hf-littlebit"
COMES_WITH_TORCH = re.compile(r"(pytorch-)?triton\b|nvidia-|cuda-")


def normalized(name: str) -> str:
    """The one spelling of a package's name that all indexes know."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Each installed package and its version, without a local tag such as +cpu, which only one index may have."""
    found = {normalized(one.metadata["Name"]): one.version.partition("+")[0] for one in distributions()}
    return {name: found[name] for name in sorted(found) if name != OWN and not COMES_WITH_TORCH.match(name)}


def lowest() -> dict[str, str]:
    """Each package with a lower bound in pyproject.toml, extras included; the highest bound where there are several."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds: dict[str, str] = {}
    for requirement in sum(project["optional-dependencies"].values(), project["dependencies"]):
        name, _, bound = requirement.partition(">=")
        if bound:
            bounds[normalized(name)] = max(bounds.get(normalized(name), "0"), bound, key=_as_numbers)
    return bounds


def _as_numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description="print a pip constraints file")
    parser.add_argument("--lowest", action="store_true", help="lower bounds instead of what is installed")
    pins = lowest() if parser.parse_args().lowest else installed()
    print("# Written by `make constraints`.")
    for name, version in pins.items():
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()
