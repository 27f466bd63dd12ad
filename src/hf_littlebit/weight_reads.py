"""Which layers' weights the code of a model reads, instead of only calling the layer.

    time_step = self.dt_proj.weight @ time_step                    Mamba
    hidden = hidden.to(self.wo.weight.dtype)                       LongT5, and many that were written after T5
    block.attention.output.weight.div_(2**n)                       RWKV, in a loop over its blocks

A packed layer's `.weight` holds bits, so such code fails or computes with them. No list of classes would stay complete, so
the source is read: every method of every class that holds linear layers, without those that fill or resize weights. A read
counts wherever it may be reached; a branch does not count where its condition is false for this module by its own plain
attributes (`self.pretraining_tp > 1`). Only asking for the device is harmless.
"""

from __future__ import annotations

import ast
import inspect
import operator
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

__all__ = ["read_weights"]

# Methods that run on the dense model only, before anything is packed or when its sizes change.
BEFORE = re.compile(r"__init__$|_*init_|reset_parameters$|_*(re)?tie_|.*resize|initialize|set_|extra_repr$")
HARMLESS = {"device", "is_meta", "is_cuda", "requires_grad"}
PLAIN = (bool, int, float, str, type(None))
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Lt: operator.lt,
    ast.LtE: operator.le, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip


class _Unknown:
    """What the value of an expression is when only a forward can tell."""


class Read(NamedTuple):
    """One `something.weight` in a class's code.

    Attributes:
        path: names and indices from the module to the layer, None for any index: ("blocks", None, "fc2").
        own: whether the path begins at `self`; else at something unknown, whose descendants are meant.
        guards: conditions around it, each with whether it must hold.
    """

    path: tuple[str | None, ...]
    own: bool
    guards: tuple[tuple[ast.expr, bool], ...]


def read_weights(model: nn.Module) -> set[str]:
    """Names of the `nn.Linear` layers of `model` whose weight other modules' code reads; unreadable code says nothing."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found: set[str] = set()
    for name, module in model.named_modules():
        reads = _reads(type(module))  # type: ignore[arg-type]  # a class is hashable
        prefix = f"{name}." if name else ""
        within = [each[len(prefix) :] for each in names if each.startswith(prefix) and each != name] if reads else []
        for read in reads:
            pattern = r"\.".join(r"[^.]+" if part is None else re.escape(part) for part in read.path)
            meant = re.compile(pattern if read.own else rf"(?:.*\.)?{pattern}")
            layers = [each for each in within if meant.fullmatch(each)]
            if layers and not any(_value(guard, module) is (not needed) for guard, needed in read.guards):
                found.update(prefix + each for each in layers)
    return found


@cache
def _reads(owner: type) -> tuple[Read, ...]:
    """The reads in all methods that instances of `owner` have."""
    found: list[Read] = []
    seen: set[str] = set()
    for each in owner.__mro__:
        if each in (nn.Module, object) or each.__module__ == "transformers.modeling_utils":
            continue
        node = _classes(inspect.getmodule(each)).get(each.__qualname__)
        for method in node.body if node is not None else ():
            if isinstance(method, ast.FunctionDef) and method.name not in seen and not BEFORE.match(method.name):
                seen.add(method.name)
                found.extend(_in_statements(method.body, ()))
    return tuple(found)


@cache
def _classes(module: Any) -> dict[str, ast.ClassDef]:
    """{qualified name: its syntax tree} of all classes in a module's file; none where there is no source."""
    try:
        tree = ast.parse(Path(inspect.getsourcefile(module) or "").read_text(encoding="utf-8"))
    except (TypeError, OSError, SyntaxError, ValueError):
        return {}
    found: dict[str, ast.ClassDef] = {}

    def collect(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                found[prefix + child.name] = child
                collect(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef):
                collect(child, f"{prefix}{child.name}.<locals>.")
            else:
                collect(child, prefix)

    collect(tree, "")
    return found


def _in_statements(nodes: list[Any], guards: tuple[tuple[ast.expr, bool], ...]) -> Iterator[Read]:
    for node in nodes:
        yield from _in_node(node, guards)


def _in_node(node: ast.AST, guards: tuple[tuple[ast.expr, bool], ...]) -> Iterator[Read]:
    if isinstance(node, ast.If | ast.IfExp):
        yield from _in_node(node.test, guards)
        body, orelse = (node.body, node.orelse) if isinstance(node, ast.If) else ([node.body], [node.orelse])
        yield from _in_statements(body, (*guards, (node.test, True)))
        yield from _in_statements(orelse, (*guards, (node.test, False)))
        return
    if isinstance(node, ast.Attribute) and node.attr in HARMLESS and getattr(node.value, "attr", "") == "weight":
        return
    read = _as_read(node, guards)
    if read is not None:
        yield read
    yield from _in_statements(list(ast.iter_child_nodes(node)), guards)


def _as_read(node: ast.AST, guards: tuple[tuple[ast.expr, bool], ...]) -> Read | None:
    """What `node` reads if it is `something.weight` or `getattr(something, "weight")`."""
    if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
        holder: ast.expr = node.value
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "getattr"
        and len(node.args) > 1
        and isinstance(node.args[1], ast.Constant)
        and node.args[1].value == "weight"
    ):
        holder = node.args[0]
    else:
        return None
    path: list[str | None] = []
    while not isinstance(holder, ast.Name):
        if isinstance(holder, ast.Attribute):
            path.append(holder.attr)
        elif isinstance(holder, ast.Subscript):
            index = holder.slice.value if isinstance(holder.slice, ast.Constant) else None
            path.append(None if index is None or str(index).startswith("-") else str(index))
        else:
            break  # a call, whose result is unknown
        holder = holder.value
    own = isinstance(holder, ast.Name) and holder.id == "self"
    # Of a variable's own weight nothing is known: it may be an embedding, or an argument.
    return Read(tuple(reversed(path)), own, guards) if path else None


def _value(node: ast.expr, module: nn.Module) -> Any:
    """What a condition is for `module` as far as its own plain attributes say, else _Unknown; it runs no code of the model."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        value = _value(node.operand, module)
        return value if value is _Unknown else not value
    if isinstance(node, ast.BoolOp):
        values = [_value(each, module) for each in node.values]
        decisive = isinstance(node.op, ast.Or)
        if any(value is not _Unknown and bool(value) is decisive for value in values):
            return decisive
        return _Unknown if _Unknown in values else not decisive
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        left, right = _value(node.left, module), _value(node.comparators[0], module)
        if _Unknown in (left, right):
            return _Unknown
        try:
            return COMPARISONS[type(node.ops[0])](left, right)
        except TypeError:
            return _Unknown
    value = _attribute(node, module)
    return value if isinstance(value, PLAIN) else _Unknown


def _attribute(node: ast.expr, module: nn.Module) -> Any:
    """The object that `self.a.b` is, by what the objects hold themselves; _Unknown for `self.training`, which changes."""
    if isinstance(node, ast.Name) and node.id == "self":
        return module
    if not isinstance(node, ast.Attribute) or node.attr == "training":
        return _Unknown
    holder = _attribute(node.value, module)
    return _Unknown if holder is _Unknown else getattr(holder, "__dict__", {}).get(node.attr, _Unknown)
