"""Which versions of vLLM the plugin was tested with, and what is said where another one has moved what it needs.

vLLM promises its plugins the entry point and `register_quantization_config`. The classes that a quantization method is made
of are imported from where they are, which a release may change.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["TESTED", "explain_layout", "installed"]

TESTED = "0.32"  # the minor version that `make test-vllm` installs


def installed() -> str:
    """The version of the vLLM that is running, "unknown" before it is imported."""
    return str(getattr(sys.modules.get("vllm"), "__version__", "unknown"))


@contextmanager
def explain_layout() -> Iterator[None]:
    """Turn an import that fails because vLLM lacks a module or a name into an ImportError that says which version has it.

    What other packages lack is reported as it is.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        module = error.name if isinstance(error, ImportError) else getattr(error.obj, "__name__", None)
        if (module or "").partition(".")[0] != "vllm":
            raise
        raise ImportError(
            f"{error}: vLLM {installed()} is installed, and this hf-littlebit serves packed models with vLLM {TESTED}; "
            f"pip install 'vllm=={TESTED}.*', or a newer hf-littlebit. To serve without the plugin: load the model with "
            "LittleBitConfig(dequantize=True), save it, and serve the dense one",
            name=module,
        ) from error
