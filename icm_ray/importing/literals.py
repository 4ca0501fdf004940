"""Values that a Python file spells out, read from its syntax tree and never by running it."""

import ast
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

MAX_ITEMS = 10_000
"""As many adapters as a recipe may have."""


class NotLiteral(Exception):
    """A value that the file does not spell out."""


def constants_of(tree: ast.AST) -> dict[str, ast.expr]:
    """Return the value of every name that is set once and not touched afterwards."""
    bound: Counter[str] = Counter()
    values: dict[str, ast.expr] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound[node.id] += 1
        elif isinstance(node, ast.arg):
            bound[node.arg] += 1
        elif isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.value, ast.Name):
            # names.append(...), names[0] = ...: what the name holds may have changed.
            reads = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load)
            bound[node.value.id] += 0 if reads else 2
        elif isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
            if isinstance(target, ast.Name):
                values[target.id] = node.value
    return {name: value for name, value in values.items() if bound[name] == 1}


def value_of(node: ast.expr, constants: Mapping[str, ast.expr]) -> Any:
    """Return what a literal says: text, numbers and their arithmetic, lists, names set once."""
    match node:
        case ast.Constant():
            return node.value
        case ast.List() | ast.Tuple():
            return [value_of(item, constants) for item in node.elts]
        case ast.Name() if node.id in constants:
            # One step, no more: names of names could double a list at every step.
            return value_of(constants[node.id], {})
        case ast.UnaryOp(op=ast.USub()):
            return -number(value_of(node.operand, constants))
        case ast.BinOp(op=ast.Mult(), left=ast.List(elts=items)):
            times = value_of(node.right, constants)
            if type(times) is int and 0 <= times * len(items) <= MAX_ITEMS:
                return value_of(node.left, constants) * times
        case ast.BinOp(op=ast.Div()):
            above, below = (number(value_of(n, constants)) for n in (node.left, node.right))
            if below:
                return above / below
    raise NotLiteral


def number(value: Any) -> float:
    """Return `value` as a finite float; NotLiteral if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NotLiteral
    try:
        found = float(value)
    except OverflowError:
        raise NotLiteral from None
    if not math.isfinite(found):
        raise NotLiteral
    return found
