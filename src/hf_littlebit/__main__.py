"""python -m hf_littlebit MODULE [ARGS ...]: run another program with the "littlebit" method registered.

python -m hf_littlebit transformers.cli.transformers serve ...
python -m hf_littlebit lm_eval --model hf --model_args pretrained=DIR ...
"""

from __future__ import annotations

import importlib.util
import runpy
import sys

import hf_littlebit  # noqa: F401  (registers the method)


def main() -> None:
    """Run sys.argv[1] as `python -m` would, with the rest of the arguments."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(0 if len(sys.argv) > 1 else 2)
    module = sys.argv[1]
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        sys.exit(f"hf_littlebit: no module named {module!r}; install the package that provides it")
    del sys.argv[0]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
