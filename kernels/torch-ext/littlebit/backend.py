"""The environment variable LITTLEBIT_BACKEND: which implementation somebody asks for, and how that is refused or missed.

reference   plain torch everywhere, and the compiled library is not even loaded
cpu         CPU tensors: an error where there is no library       triton   GPUs: an error where there is no triton;
            (GPUs: as if unset)                                            CPU tensors: TRITON_INTERPRET=1 or an error
unset       the library, or triton, if it loads; else plain torch, and one warning, because that unpacks at every call
"""

import os
import warnings

__all__ = ["BACKENDS", "asked", "refusal", "warn"]

VARIABLE = "LITTLEBIT_BACKEND"
BACKENDS = ("reference", "cpu", "triton")


def asked() -> str:
    """The implementation that the variable names, "" where it is unset or empty.

    Raises:
        ValueError: LITTLEBIT_BACKEND holds an unknown name.
    """
    name = os.environ.get(VARIABLE, "")
    if name not in ("", *BACKENDS):
        raise ValueError(f"{VARIABLE}={name!r} is unknown; set it to one of {', '.join(BACKENDS)}, or unset it")
    return name


def refusal(why: str) -> RuntimeError:
    """The error for what was asked for and cannot be had, because of `why`."""
    return RuntimeError(f"{VARIABLE}={asked()}, but {why}; or unset the variable")


def warn(why: str, consequence: str) -> None:
    """Warn, at the line that called the product, that plain torch computes because of `why`."""
    warnings.warn(f"littlebit: {why}. {consequence}; to silence this, set {VARIABLE}=reference.", stacklevel=5)
