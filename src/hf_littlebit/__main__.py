"""python -m hf_littlebit MODULE [ARGS ...]: run another program with the "littlebit" method registered.

python -m hf_littlebit transformers.cli.transformers serve ...
python -m hf_littlebit lm_eval --model hf --model_args pretrained=DIR ...
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import runpy
import sys

import hf_littlebit  # noqa: F401  (registers the method)


def main() -> None:
    """Run sys.argv[1] as `python -m` would, with the rest of the arguments; errors inside it are its own."""
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return
    module = sys.argv[1] if len(sys.argv) > 1 else ""
    refusal = _refusal(module)
    if refusal:
        print(f"hf_littlebit: error: {refusal}", file=sys.stderr)
        sys.exit(2)
    del sys.argv[0]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _refusal(module: str) -> str | None:
    """Why `module` cannot be run, or None. Its packages are imported to find out, as `python -m` does."""
    if not module:
        return "no module to run; give one, as in: python -m hf_littlebit MODULE [ARGS ...]"
    if module == "__main__" or module.endswith(".py") or not all(part.isidentifier() for part in module.split(".")):
        return f"{module!r} is no module's name, such as lm_eval; write it as after python -m"
    found = _find(module)
    if found is None:
        return f"no module named {module!r}; install the package that provides it"
    if found.submodule_search_locations is not None and _find(f"{module}.__main__") is None:
        return f"{module!r} is a package that cannot be run (it has no __main__); name one of its modules"
    get_code = getattr(found.loader, "get_code", None)
    if found.submodule_search_locations is None and (get_code is None or get_code(module) is None):
        return f"{module!r} is built in or compiled, so it cannot be run; name a module that is a Python program"
    return None


def _find(module: str) -> importlib.machinery.ModuleSpec | None:
    """The spec of `module`, or None if it, or a package it is in, does not exist."""
    try:
        return importlib.util.find_spec(module)
    except ModuleNotFoundError as error:
        # A package that exists but lacks something that it imports says so itself.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        return None


if __name__ == "__main__":
    main()
