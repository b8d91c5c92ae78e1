"""Sizes that can be read off a step's inputs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import fx

from mosaic_compiler.compat.symbols import FloorDiv, Max, Min, Mod, PythonMod
from mosaic_compiler.ir.values import expr_of, tensor_of, value_of

_FUNCTIONS: dict[type, Callable[[Any, Any], Any]] = {
    FloorDiv: operator.floordiv, Mod: operator.mod, PythonMod: operator.mod, Min: torch.sym_min, Max: torch.sym_max,
}  # fmt: skip


class UnreadableSizeError(Exception):
    """A size that does not follow from those of the inputs by arithmetic of whole numbers."""


def parts_of(size: sympy.Expr) -> tuple[Callable[[Any, Any], Any], tuple[sympy.Expr, ...]] | None:
    """How a size is computed from others, pair by pair from the left; ``None`` if that cannot be said."""
    if size.is_Mul or size.is_Add:
        return operator.mul if size.is_Mul else operator.add, size.args
    if size.is_Pow and size.exp.is_Integer and size.exp > 1:
        return operator.mul, (size.base,) * int(size.exp)
    function = _FUNCTIONS.get(type(size))
    return None if function is None else (function, size.args)


def is_readable(size: sympy.Expr, sources: Mapping[sympy.Expr, Any]) -> bool:
    """A number, a size of the inputs, or computed from such."""
    if size.is_Integer or size in sources:
        return True
    parts = parts_of(size)
    return parts is not None and all(is_readable(part, sources) for part in parts[1])


def size_sources(graph: fx.Graph) -> dict[sympy.Expr, tuple[fx.Node, int | None]]:
    """Where a symbolic size can be read off the inputs: a SymInt placeholder, or a dim of a tensor."""
    sources: dict[sympy.Expr, tuple[fx.Node, int | None]] = {}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        if isinstance(value_of(node), torch.SymInt):
            sources.setdefault(expr_of(value_of(node)), (node, None))
    for node in placeholders:
        tensor = tensor_of(node)
        for dim, size in enumerate(tensor.shape if tensor is not None else ()):
            sources.setdefault(expr_of(size), (node, dim))
    return sources
