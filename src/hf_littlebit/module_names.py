"""Names of modules, and whom they mean: users name modules in a config, model classes in attributes, files by prefixes.

modules_to_not_convert    a regular expression from the start of a name, or the end of one: "down_proj", ".*lm_head"
module_config             a pattern for the whole name, or the dotted end of one: "*.mlp.*", "layers.0.mlp.up_proj"
_keep_in_fp32_modules     a dotted part of a name: "norm", or "wte.weight"
base_model_prefix         "model.layers.0" in a model with a head is "layers.0" in the model without it
"""

from __future__ import annotations

import fnmatch
import re
import reprlib
from collections.abc import Collection, Iterable
from typing import Any

__all__ = ["aliases", "check_pattern", "is_named", "matches", "needs_fp32"]


def aliases(name: str, prefix: str) -> tuple[str, ...]:
    """`name`, and what the same thing is called in a model with a head, or in one without.

    With the `prefix` "model", a model's `base_model_prefix`, "model.norm.weight" is also called "norm.weight".
    """
    if not prefix:
        return (name,)
    return (name, name.removeprefix(f"{prefix}.") if name.startswith(f"{prefix}.") else f"{prefix}.{name}")


def matches(pattern: str, name: str) -> bool:
    """True if a `module_config` pattern is for the module called `name`."""
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def is_named(names: Iterable[str], pattern: str) -> bool:
    """True if `pattern` is the ending of one of `names`, matches one from its start up to a dot, or names a module around it.

    "down_proj", r"model\\.layers\\.\\d+" and "mlp" all mean "model.layers.0.mlp.down_proj".
    """
    boundary = re.compile(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))")
    return any(name.endswith(pattern) or boundary.match(name) or f".{name}".find(f".{pattern}.") >= 0 for name in names)


def check_pattern(option: str, name: Any) -> None:
    """Refuse an entry of `option` that cannot be matched with module names: each becomes part of a regular expression.

    Raises:
        ValueError: for what is no text, or no regular expression by itself, e.g. "*.down_proj".
    """
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"{option} holds {reprlib.repr(name)}; every entry must be a module's name, such as 'down_proj'"
        )
    try:
        re.compile(name)
        re.compile(f"(?:{name})")  # as should_convert_module puts it: a flag such as (?i) is valid alone only
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{option} holds {reprlib.repr(name)}, which is no valid regular expression ({error}); write '.*' where any "
            "text may stand, and a backslash before a sign that is meant literally"
        ) from None


def needs_fp32(name: str, wanted: Collection[str]) -> bool:
    """True for a module or parameter that the model's own code wants in fp32; `wanted` is what internals/transformers.py finds.

    A dotted part of `name` may stand in `wanted`, or a run of parts: "wo", or "wo.weight".
    """
    parts = name.split(".")
    runs = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
    return any(run in wanted for run in runs)
