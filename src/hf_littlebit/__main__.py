"""python -m hf_littlebit MODULE [ARGS ...]: run another program with the "littlebit" method registered.

python -m hf_littlebit transformers.cli.transformers serve ...
python -m hf_littlebit lm_eval --model hf --model_args pretrained=DIR ...
"""

from __future__ import annotations

import runpy
import sys
import traceback
from typing import NoReturn

import hf_littlebit  # noqa: F401  (registers the method)


def main() -> None:
    """Run sys.argv[1] as `python -m` would, with the rest of the arguments.

    What `runpy` says of a module that it cannot run ends in one line; an error inside of the module is the module's own.
    """
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return
    if not sys.argv[1:] or not sys.argv[1]:
        _refuse("no module to run; give one, as in: python -m hf_littlebit MODULE [ARGS ...]")
    del sys.argv[0]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except ImportError as error:
        # An error of runpy comes from its lines alone; with one of the module, lines of other files are in between.
        frames = traceback.extract_tb(error.__traceback__)[1:]
        if any(frame.filename != runpy.run_module.__code__.co_filename for frame in frames):
            raise
        _refuse(f"{error}; give a module as after python -m, such as lm_eval")


def _refuse(reason: str) -> NoReturn:
    print(f"hf_littlebit: error: {reason}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
