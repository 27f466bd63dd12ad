"""Which wing of the package may import which, and that no file imports itself by way of others.

    kernels, compat, internals, module_names, placement, weight_reads, model_parts, ranks, budget <- layers
    layers <- initialize <- option_rules <- config <- weight_plan <- plan <- generate <- load
    load <- train | report | engines <- command, and train <- refinement <- command

A wing imports itself and what stands left of it; train, report and engines do not import each other. An import inside a function
counts, and so does one for types alone. Besides the wings:

- compat, which says how versions of transformers differ, and internals, where the private doors of other packages are,
  import nothing of the package, so that everything may use them.
- placement (where a model computes that accelerate keeps elsewhere), module_names (whom a name means) and weight_reads (which
  layers' weights a model's code reads) know of modules only, and import nothing of it either; model_parts (what is a router, a
  tower, a head) reads a model with them.
- ranks and budget are arithmetic on numbers: of the package they know the kernels' file format, and no module.
- generate stands below load, because a model that was loaded is given its faster generation at once; it needs no plan.
- __init__ and __main__ stand above all: __init__ also joins what may not import each other (the model card, a report, to
  the quantizer).
- kernels are published on their own (tests/test_packaging.py, kernels/tests/test_hub.py): they import themselves alone.

Private names of transformers, torch, accelerate and DeepSpeed are used in internals/ and nowhere else, as far as the text of
a file shows it: by importing one, by writing `something._name` where `something` is not self, cls or super(), or by giving
"_name" to getattr and its like. A name that a class or module of this package defines is ours, wherever it is used.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent / "src" / "hf_littlebit"
FLOORS = [
    {"kernels", "compat", "internals"},
    {"module_names", "placement", "weight_reads", "ranks"},
    {"model_parts", "budget"},
    {"layers"},
    {"initialize"},
    {"option_rules"},
    {"config"},
    {"weight_plan"},
    {"plan"},
    {"generate"},
    {"load"},
    {"train", "report", "engines"},
    {"refinement"},
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


OURS = {"self", "cls"}
# Methods that the standard library documents although their names begin with "_", and operators of torch.ops.aten, whose names
# are those of a table and not of Python's.
DOCUMENTED = {"_asdict", "_make", "_replace", "_fields", "_local_scalar_dense", "_to_copy"}
ASKING = {"getattr", "hasattr", "setattr", "delattr"}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.AST) -> set[str]:
    """Private names that a file gives to its own functions, classes, variables, and attributes of self."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_ours(node.value):
            found.add(node.attr)
    return {name for name in found if private(name)}


def _is_ours(value: ast.AST) -> bool:
    """Whether an attribute is asked of the object itself: self, cls, or super()."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "super":
        return True
    return isinstance(value, ast.Name) and value.id in OURS


def doors(tree: ast.AST, ours: set[str]) -> list[tuple[int, str]]:
    """[(line, private name of another package)] in a file; `ours` are names that are not another package's."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, part) for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [(node.lineno, name) for name in names]
        elif isinstance(node, ast.Attribute) and not _is_ours(node.value):
            found.append((node.lineno, node.attr))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ASKING:
            constants = [value.value for value in node.args[1:2] if isinstance(value, ast.Constant)]
            found += [(node.lineno, str(name)) for name in constants]
    return [(line, name) for line, name in found if private(name) and name not in ours]


def test_private_names_of_other_packages_are_used_in_internals_alone():
    trees = {parts: ast.parse(path.read_text()) for parts, path in FILES.items() if parts[0] != "internals"}
    ours = DOCUMENTED.union(*map(defined, trees.values()))
    found = [f"{'/'.join(parts)}.py:{line} {name}" for parts, tree in trees.items() for line, name in doors(tree, ours)]
    assert not found, "give each a function in internals/: " + ", ".join(found)


def test_private_names_are_found_in_every_form():
    code = """
import torch._dynamo, torch.utils._python_dispatch as d
from torch._C import x
from transformers.utils import _is_package_available
torch._C.y()
model._weights = []
getattr(model, "_hooks", None)
self._own = other._own = 1
super()._apply(fn)
model.__dict__
"""
    tree = ast.parse(code)
    assert sorted(name for _, name in doors(tree, defined(tree))) == sorted(
        ["_dynamo", "_python_dispatch", "_C", "_is_package_available", "_C", "_weights", "_hooks"]
    )


def test_a_wing_is_imported_for_nothing_but_its_files():
    for parts, path in FILES.items():
        if parts[-1] == "__init__" and len(parts) > 1:
            (docstring,) = ast.parse(path.read_text()).body
            assert isinstance(docstring, ast.Expr), path
