"""Builds the API reference for `make docs`: a page of every public name, from its docstring.

    python .ci/reference.py [--out build/docs]

Public are the names in `hf_littlebit.__all__`, and the methods and properties without an underscore that their classes add, or
take from a class of the package that has no page of its own.
It fails where one of them has no docstring, where an `Args:` section names what is no argument, and at every warning of the
generator, pdoc.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hf_littlebit

ARGS = re.compile(r"^Args:\n((?:(?: .*)?\n?)*)", re.MULTILINE)
ARGUMENT = re.compile(r"^ {4}([\w, *]+)(?: \(.*?\))?:", re.MULTILINE)


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Each public name of `module`, and what it names: first those in `__all__`, after a class also what it adds."""
    for name in module.__all__:
        found = getattr(module, name)
        yield name, found
        if inspect.isclass(found):
            for part, value in {**taken(module, found), **vars(found)}.items():
                if not part.startswith("_") and (inspect.isroutine(value) or isinstance(value, property)):
                    yield f"{name}.{part}", getattr(found, part)


def taken(module: ModuleType, found: type) -> dict[str, Any]:
    """What a public class takes from classes of the package that are not public."""
    inside = [one for one in found.__mro__[1:] if one.__module__.startswith(f"{module.__name__}.")]
    return {
        part: value
        for one in reversed(inside)
        if one.__name__ not in module.__all__
        for part, value in vars(one).items()
        if not part.startswith("_")
    }


def docstring(thing: Any) -> str:
    """The docstring of `thing` as it was written; a method may leave it to the method that it overrides.

    A dataclass without a docstring is given its signature as one, which does not count.
    """
    if not inspect.isclass(thing):
        return inspect.getdoc(thing) or ""
    written = inspect.cleandoc(vars(thing).get("__doc__") or "")
    return "" if written.startswith(f"{thing.__name__}(") else written


def faults(module: ModuleType) -> list[str]:
    """What is wrong with the docstrings of `module`, a sentence each."""
    found = []
    for name, thing in public(module):
        text = docstring(thing)
        if not text:
            found.append(f"{name} has no docstring.")
        section = ARGS.search(text)
        if section and callable(thing):
            names = {word.strip(" *") for line in ARGUMENT.findall(section[1]) for word in line.split(",")}
            for wrong in sorted(names - set(inspect.signature(thing).parameters)):
                found.append(f"{name} has no argument {wrong!r}, which its docstring explains.")
    return found


def build(out: Path) -> None:
    """Write the pages to `out`.

    Raises:
        Warning: any warning of pdoc, such as a type that cannot be resolved.
    """
    import pdoc

    for name in hf_littlebit.__all__:  # some are imported when first asked for, and pdoc reads the module's dictionary
        found = getattr(hf_littlebit, name)
        setattr(hf_littlebit, name, found)
        if inspect.isclass(found):  # pdoc has no place for what is inherited from a class without a page
            for part, value in taken(hf_littlebit, found).items():
                if part not in vars(found):
                    setattr(found, part, value)
    pdoc.render.configure(docformat="google", show_source=False, footer_text=f"hf-littlebit {hf_littlebit.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc("hf_littlebit", r"!hf_littlebit\..*", output_directory=out)


def main() -> None:
    """Check, then build."""
    parser = argparse.ArgumentParser(description="build the API reference")
    parser.add_argument("--out", type=Path, default=Path("build/docs"))
    out = parser.parse_args().out
    if found := faults(hf_littlebit):
        sys.exit("\n".join(found))
    build(out)
    print(f"API reference: {out / 'hf_littlebit.html'}")


if __name__ == "__main__":
    main()
