"""What values the options of a LittleBitConfig may have, each with the words in which another one is refused.

A rule looks at one value; what options say together is for the config to check.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

from .initialize.factorize import INITS
from .kernels.packing import FORMAT_VERSION
from .module_names import check_globs
from .ranks import RANK_MULTIPLE

__all__ = [
    "CONVERTED_DTYPES",
    "CONVERTED_RULES",
    "FORMATS",
    "LAYER_OPTIONS",
    "MAX_BPW",
    "RULES",
    "Rule",
    "check_module_config",
    "check_ranks",
    "check_version",
]

FORMATS = ("packed", "latent")
SCALE_DTYPES = ("bfloat16", "float16")
CONVERTED_DTYPES = (*SCALE_DTYPES, "float32")  # of scales that come from another program
TABLE_BITS = (16, 8, 4)
MAX_BPW = 16.0
LAYOUT_NAME = re.compile(r"[\w.-]{1,64}")
LAYER_OPTIONS = ("bpw", "init", "residual", "kv_factor")  # that a module may override


class Rule(NamedTuple):
    """What values one option may have."""

    fits: Callable[[Any], bool]
    remedy: str
    optional: bool = (
        False  # None stands for a choice that is made elsewhere; the override of one module must say a value
    )

    def check(self, name: str, value: Any) -> None:
        """Refuse a `value` that does not fit, under the `name` that the user knows the option by.

        Raises:
            ValueError: with the value and the remedy.
        """
        if not self.fits(value):
            raise ValueError(f"{name} is {reprlib.repr(value)}; {self.remedy}")


def _is_integer(value: Any, smallest: int, largest: float = math.inf) -> bool:
    """True for an integer of at least `smallest` and at most `largest`; True and False are none, unlike in Python."""
    return isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= largest


def _are_ranks(value: Any) -> bool:
    """True for a list of one rank per path."""
    fits = isinstance(value, list | tuple) and len(value) > 0
    return fits and all(_is_integer(rank, RANK_MULTIPLE) and rank % RANK_MULTIPLE == 0 for rank in value)


def _number(largest: float, advice: str) -> Rule:
    def fits(value: Any) -> bool:
        # No comparison with NaN is true, so it is refused here as well.
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= largest

    return Rule(fits, f"it must be a number above 0 and at most {largest:g} ({advice})", optional=True)


def _integer(smallest: int, largest: int, optional: bool = False) -> Rule:
    remedy = f"it must be an integer from {smallest} to {largest}"
    return Rule(lambda value: _is_integer(value, smallest, largest), remedy, optional)


def _choice(choices: tuple[str, ...]) -> Rule:
    return Rule(lambda value: isinstance(value, str) and value in choices, f"choose one of {', '.join(choices)}")


def _instance(types: type | tuple[type, ...], what: str) -> Rule:
    return Rule(lambda value: isinstance(value, types), f"it must be {what}", optional=True)


# kernels/table.py has the layouts of 8 and 4 bits; 16 leaves a table as the model has it.
_table_bits = Rule(lambda value: _is_integer(value, 1) and value in TABLE_BITS, "it must be 16 (not quantized), 8 or 4")

RULES = {
    "bpw": _number(MAX_BPW, "0.1 to 1 is what the method is for"),
    "init": _choice(INITS),
    "residual": Rule(
        lambda value: value is None or isinstance(value, bool),
        "it must be True (two paths), False (one) or None (choose)",
    ),
    "kv_factor": _number(64.0, "4 is the paper's choice for grouped-query models"),
    "modules_to_not_convert": _instance((list, tuple), "a list of module names, or None"),
    "text_only": Rule(lambda value: isinstance(value, bool), "it must be True or False"),
    "module_config": _instance(dict, "a dict of name pattern -> options"),
    "ranks": _instance(dict, "a dict of name pattern -> list of ranks, one per path"),
    "format": _choice(FORMATS),
    "seed": _integer(0, 2**63 - 1),
    "steps": _integer(1, 100_000, optional=True),
    "refit_rounds": _integer(0, 100_000, optional=True),
    "scale_dtype": _choice(SCALE_DTYPES),
    "embedding_bits": _table_bits,
    "head_bits": _table_bits,
    "svd_device": _instance(str, "a device name such as 'cpu' or 'cuda', or None"),
    "workers": _integer(1, 1024),
    "dequantize": Rule(lambda value: isinstance(value, bool), "it must be True or False"),
    "share_inputs": _instance(bool, "True, False, or None (on a GPU alone)"),
    "base_model": _instance(str, "a Hub id, or None"),
    "converted_from": Rule(
        lambda value: isinstance(value, str) and bool(LAYOUT_NAME.fullmatch(value)), "it must be a layout's name", True
    ),
}
# Those of a model whose layers another program made.
CONVERTED_RULES = {**RULES, "scale_dtype": _choice(CONVERTED_DTYPES)}


def check_module_config(overrides: dict[Any, Any]) -> None:
    """Refuse overrides {name pattern: {option: value}} of which one is none, or has another value than the option may have.

    Raises:
        ValueError: with the first of them.
    """
    check_globs("module_config", overrides)
    for pattern, options in overrides.items():
        if not isinstance(pattern, str) or not pattern or not isinstance(options, dict) or not options:
            raise ValueError(
                f"module_config entry {pattern!r}: {reprlib.repr(options)} must map a name pattern to a dict of options, "
                "e.g. {'*.down_proj': {'bpw': 1.0}}"
            )
        for option, value in options.items():
            if option not in LAYER_OPTIONS:
                raise ValueError(
                    f"module_config[{pattern!r}]: unknown option {option!r}; a module can override "
                    f"{', '.join(LAYER_OPTIONS)}"
                )
            RULES[option].check(f"module_config[{pattern!r}]: {option}", value)


def check_ranks(given: dict[Any, Any]) -> None:
    """Refuse {name pattern: ranks} where one is no list of ranks.

    Raises:
        ValueError: with the first such entry.
    """
    for pattern, ranks in given.items():
        if not isinstance(pattern, str) or not pattern or not _are_ranks(ranks):
            raise ValueError(
                f"ranks entry {pattern!r}: {reprlib.repr(ranks)} must map a name pattern to a list of ranks, one per path, "
                f"each a multiple of {RANK_MULTIPLE}, e.g. {{'*.down_proj': [64]}}"
            )


def check_version(quant_method: Any, version: Any) -> None:
    """Refuse a config of another method, or of a format that this version does not read.

    Raises:
        ValueError: with the value and what to do.
    """
    if quant_method != "littlebit":
        raise ValueError(
            f"quant_method is {quant_method!r}, but LittleBitConfig reads only 'littlebit'; "
            "load this checkpoint with the library that wrote it"
        )
    if not _is_integer(version, 1):
        raise ValueError(f"format_version is {version!r}; it must be an integer from 1 to {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"this checkpoint has format version {version}, newer than {FORMAT_VERSION}, the latest that this "
            "hf-littlebit reads; upgrade with: pip install -U hf-littlebit"
        )
