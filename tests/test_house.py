"""Which wing of the package may import which, and that no file imports itself by way of others.

    kernels, compat <- layers <- initialize <- config <- plan <- generate <- load <- train | report <- command

A wing imports itself and what stands left of it; train and report do not import each other. An import inside a function
counts, and so does one for types alone. Besides the wings:

- compat, which says how versions of transformers differ, imports nothing of the package, so that everything may use it.
- generate stands below load, because a model that was loaded is given its faster generation at once; it needs no plan.
- __init__ and __main__ stand above all: __init__ also joins what may not import each other (the model card, a report, to
  the quantizer).
- kernels are published on their own (tests/test_packaging.py, kernels/tests/test_hub.py): they import themselves alone.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent / "src" / "hf_littlebit"
FLOORS = [
    {"kernels", "compat"},
    {"layers"},
    {"initialize"},
    {"config"},
    {"plan"},
    {"generate"},
    {"load"},
    {"train", "report"},
    {"command"},
    {"__init__"},
    {"__main__"},
]
FLOOR = {wing: number for number, wings in enumerate(FLOORS) for wing in wings}
FILES = {path.relative_to(ROOT).with_suffix("").parts: path for path in ROOT.rglob("*.py")}
FILES = {parts: path for parts, path in FILES.items() if parts[0] != "kernels"}
KERNELS = {path.stem: path for path in (ROOT / "kernels").glob("*.py")}


def imports(parts: tuple[str, ...]) -> set[tuple[str, ...]]:
    """The files of the package that a file imports, in whatever place and form; of the kernels, the name alone."""
    found = set()
    for node in ast.walk(ast.parse(FILES[parts].read_text())):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ("hf_littlebit", *parts)[: -node.level] if node.level else ()
            module = tuple(node.module.split(".")) if node.module else ()
            names = [(*base, *module, alias.name) for alias in node.names]
        for name in [name[1:] for name in names if name[0] == "hf_littlebit"]:
            # The last part may be a name in a file: then the file is what precedes it.
            places = [("kernels",)] if name[:1] == ("kernels",) else [name, name[:-1], (*name, "__init__")]
            found.add(next((place for place in places if place in FILES), places[0]))
    return found


def kernel_imports(name: str) -> set[str]:
    """The kernels' files that one of them imports, in whatever place; the package's own file where a name is none of theirs."""
    found = set()
    for node in ast.walk(ast.parse(KERNELS[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"{name} imports from outside of the kernels"
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {each if each in KERNELS else "__init__" for each in names}
    return found


def test_no_wing_imports_upwards():
    for parts in FILES:
        for other in imports(parts):
            assert other[0] in FLOOR, f"{'/'.join(parts)} imports {'.'.join(other)}, which has no place in FLOORS"
            below, same = FLOOR[other[0]] < FLOOR[parts[0]], other[0] == parts[0]
            assert below or same, f"{'/'.join(parts)} imports {'/'.join(other)}, which stands beside or above it"


def test_no_file_imports_itself_by_way_of_others():
    TopologicalSorter({parts: imports(parts) for parts in FILES}).prepare()  # raises CycleError with the circle
    TopologicalSorter({name: kernel_imports(name) for name in KERNELS}).prepare()


def test_a_wing_is_imported_for_nothing_but_its_files():
    for parts, path in FILES.items():
        if parts[-1] == "__init__" and len(parts) > 1:
            (docstring,) = ast.parse(path.read_text()).body
            assert isinstance(docstring, ast.Expr), path
