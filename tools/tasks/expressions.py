"""Expressions of several operations, and their evaluation step by step.

arithmetic.py asks for their value at once (hard), thinking.py with the steps written down.
"""

from __future__ import annotations

import random

_PRECEDENCE = {"+": 1, "-": 1, "*": 2}
_MAX_VALUE = 9999
_MAX_LEAF = 99

Node = int | tuple[str, "Node", "Node"]


def value(node: Node) -> int:
    if isinstance(node, int):
        return node
    operator, left, right = node
    a, b = value(left), value(right)
    return a + b if operator == "+" else a - b if operator == "-" else a * b


def text(node: Node, least: int = 0) -> str:
    """With no more parentheses than needed.

    Args:
      least: precedence below which the expression goes in parentheses.
    """
    if isinstance(node, int):
        return str(node)
    operator, left, right = node
    mine = _PRECEDENCE[operator]
    # Equal precedence on the right: a - (b - c).
    inner = f"{text(left, mine)} {operator} {text(right, mine + 1)}"
    return f"({inner})" if mine < least else inner


def canonical(node: Node) -> str:
    """The same for expressions that differ in the order of terms or factors alone."""
    if isinstance(node, int):
        return str(node)
    operator, left, right = node
    sides = [canonical(left), canonical(right)]
    if operator != "-":
        sides.sort()
    return f"({sides[0]}{operator}{sides[1]})"


def draw(rng: random.Random, operations: int) -> Node:
    """An expression whose every part is from 0 to 9,999; one factor of a product has one digit."""
    while True:
        node = _draw(rng, operations)
        if node is not None:
            return node


def _draw(rng: random.Random, operations: int) -> Node | None:
    if operations == 0:
        return rng.randint(1, rng.choice((9, _MAX_LEAF)))
    operator = rng.choice("++--*")
    if operator == "*":
        big, small = _draw(rng, operations - 1), rng.randint(2, 9)
        if big is None:
            return None
        node: Node = (operator, big, small) if rng.random() < 0.6 else (operator, small, big)
    else:
        on_left = rng.randrange(operations)
        left, right = _draw(rng, on_left), _draw(rng, operations - 1 - on_left)
        if left is None or right is None:
            return None
        node = (operator, left, right)
    return node if 0 <= value(node) <= _MAX_VALUE else None


def steps(node: Node) -> list[str]:
    """The expression, then what it becomes operation by operation, down to its value."""
    lines = [text(node)]
    while not isinstance(node, int):
        node = _reduced(node)
        lines.append(text(node))
    return lines


def _reduced(node: Node) -> Node:
    """With the first operation done whose operands are both numbers."""
    if isinstance(node, int):
        return node
    operator, left, right = node
    if not isinstance(left, int):
        return operator, _reduced(left), right
    if not isinstance(right, int):
        return operator, left, _reduced(right)
    return value(node)
