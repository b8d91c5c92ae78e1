"""Structural keys: equal for regions of graphs that do the same with whatever they are given.

Loop bodies, clusters and kernels that are equal are built once and shared; so are graphs that are kept on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx


def structural_key(
    nodes: Iterable[fx.Node],
    reference: Callable[[fx.Node], Callable[[fx.Node], Any]],
    description: Callable[[fx.Node], Any],
    target: Callable[[fx.Node], str] = lambda node: str(node.target),
) -> tuple[Any, ...]:
    """What these nodes compute, as one comparable value.

    Args:
        reference: for a node, how each of its operands (in the order of its arguments) is named.
        description: what else has to be equal for a node, such as its layout.
        target: what it calls.
    """
    parts = []
    for node in nodes:
        named = reference(node)

        def token(operand: fx.Node, named: Callable[[fx.Node], Any] = named) -> Any:
            return _Token(named(operand))

        arguments = fx.node.map_arg((node.args, dict(node.kwargs)), token)
        parts.append((node.op, target(node), repr(arguments), description(node)))
    return tuple(parts)


class _Token:
    """Prints as what it stands for, inside of ``repr`` of arguments (which tells 1, 1.0 and True apart)."""

    def __init__(self, what: Any) -> None:
        self.what = what

    def __repr__(self) -> str:
        return f"%{self.what!r}"
