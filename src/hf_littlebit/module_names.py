"""Names of modules, and whom they mean: users name modules in a config, model classes in attributes, files by prefixes.

modules_to_not_convert    a regular expression from the start of a name, or the end of one: "down_proj", ".*lm_head"
module_config             a pattern for the whole name, or the dotted end of one: "*.mlp.*", "layers.0.mlp.up_proj"
_keep_in_fp32_modules     a dotted part of a name: "norm", or "wte.weight"
base_model_prefix         "model.layers.0" in a model with a head is "layers.0" in the model without it
"""

from __future__ import annotations

import fnmatch
import math
import re
import reprlib
from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import Any

EXPRESSION = "re:"  # stands before a regular expression in the lists of other tools

__all__ = ["aliases", "check_globs", "check_pattern", "check_steps", "is_named", "matches", "needs_fp32"]

# A regular expression is tried in as many ways as its repeats and alternatives combine to. Each repeat is counted as 2^5 ways
# (names are short), and all patterns together may take so many:
MOST_STEPS = 2**21
REPEAT = 5
LONGEST, LONGEST_GLOB = 10_000, 500  # characters of a pattern
MOST_PATTERNS = 5_000
# The parts of a pattern that matter here: an escape, a class, the start of a group, its end, "|", and what repeats.
TOKEN = re.compile(
    r"(\\.|\[\^?\]?(?:\\.|[^\]\\])*\])|(\((?:\?(?:[:=!>]|<[=!]|P<\w+>|P=\w+))?)|([)|])|([*+?]|\{\d*,?\d*\})|.", re.S
)


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

    "down_proj", r"model\\.layers\\.\\d+" and "mlp" all mean "model.layers.0.mlp.down_proj". After "re:" stands an expression
    that need only match the start of a name, as in llm-compressor's and compressed-tensors' lists: "re:.*down".
    """
    if pattern.startswith(EXPRESSION):
        expression = re.compile(pattern.removeprefix(EXPRESSION))
        return any(expression.match(name) for name in names)
    boundary = _boundary(pattern)
    return any(name.endswith(pattern) or boundary.match(name) or f".{name}".find(f".{pattern}.") >= 0 for name in names)


@lru_cache(MOST_PATTERNS)
def _boundary(pattern: str) -> re.Pattern[str]:
    """`pattern` from the start of a name up to a dot or its end; kept, since each is asked for every module."""
    return re.compile(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))")


def check_globs(option: str, patterns: Collection[Any]) -> None:
    """Refuse `module_config` patterns that take long to read, or too many of them.

    Raises:
        ValueError: with the limit.
    """
    longest = max((len(pattern) for pattern in patterns if isinstance(pattern, str)), default=0)
    if longest > LONGEST_GLOB or len(patterns) > MOST_PATTERNS:
        raise ValueError(
            f"{option} holds {len(patterns):,} patterns of up to {longest:,} characters; at most {MOST_PATTERNS:,} of "
            f"{LONGEST_GLOB} are read: write shorter or fewer ones"
        )


def check_pattern(option: str, name: Any) -> None:
    """Refuse an entry of `option` that cannot be matched with module names: each becomes part of a regular expression.

    Raises:
        ValueError: for what is no text, or no regular expression by itself, e.g. "*.down_proj".
    """
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"{option} holds {reprlib.repr(name)}; every entry must be a module's name, such as 'down_proj'"
        )
    if len(name) > LONGEST:
        raise ValueError(
            f"{option} holds {reprlib.repr(name)} of {len(name):,} characters; at most {LONGEST:,} are read: list several"
        )
    try:
        pattern = name.removeprefix(EXPRESSION)
        re.compile(pattern)
        re.compile(f"(?:{pattern})")  # as should_convert_module puts it: a flag such as (?i) is valid alone only
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{option} holds {reprlib.repr(name)}, which is no valid regular expression ({error}); write '.*' where any "
            "text may stand, and a backslash before a sign that is meant literally"
        ) from None


def check_steps(option: str, patterns: Iterable[str]) -> None:
    """Refuse `patterns` that could take years to be matched, as "(a+)+$" can, whoever wrote them.

    Raises:
        ValueError: for repeats within repeats, and for too many of them.
    """
    patterns = list(patterns)
    if len(patterns) > MOST_PATTERNS:
        raise ValueError(
            f"{option} holds {len(patterns):,} entries; at most {MOST_PATTERNS:,} are read: write patterns"
        )
    steps = 0.0
    for pattern in patterns:
        steps += 2.0 ** min(_ways(pattern), 1000)
        if steps > MOST_STEPS:
            raise ValueError(
                f"{option} holds {reprlib.repr(pattern)}, which could take too long to match (it repeats what repeats or has "
                "alternatives, or there are too many of these); write simpler patterns, or plain names"
            )


def _ways(pattern: str) -> float:
    """The base-2 logarithm of the number of ways in which `pattern` may be tried on a name, estimated from above."""
    # Of the whole pattern and of every open group: ways inside, number of alternatives.
    open_groups = [[0.0, 1.0]]
    last: list[float] | None = None  # the group that ended right before this token
    for match in TOKEN.finditer(pattern):
        atom, group, sign, repeat = match.groups()
        ended, last = last, None
        if group:
            open_groups.append([0.0, 1.0])
        elif sign == "|":
            open_groups[-1][1] += 1
        elif sign == ")" and len(open_groups) > 1:
            inside, alternatives = open_groups.pop()
            last = [inside + math.log2(alternatives)]
            open_groups[-1][0] += last[0]
        elif repeat == "?":
            open_groups[-1][0] += 1
        elif repeat:
            open_groups[-1][0] += REPEAT if ended is None or ended[0] == 0 else math.inf
        elif atom and re.fullmatch(r"\\[1-9]", atom):
            open_groups[-1][0] += REPEAT  # the text of an earlier group
    return sum(inside + math.log2(alternatives) for inside, alternatives in open_groups)


def needs_fp32(name: str, wanted: Collection[str]) -> bool:
    """True for a module or parameter that the model's own code wants in fp32; `wanted` is what internals/transformers.py finds.

    A dotted part of `name` may stand in `wanted`, or a run of parts: "wo", or "wo.weight".
    """
    parts = name.split(".")
    runs = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
    return any(run in wanted for run in runs)
