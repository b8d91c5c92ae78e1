"""Sizes that can be read off a step's inputs, and ops that are told sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.passes import rows
from mosaic_compiler.passes.rows import Layout

aten = torch.ops.aten

SHAPED = frozenset({aten.view.default, aten.expand.default, aten.full.default})
"""Ops with an explicit shape argument; compaction writes it anew."""


def is_readable(size: sympy.Expr, sources: Mapping[sympy.Expr, Any]) -> bool:
    """A number, a size of the inputs, or a sum or product of such."""
    if size.is_Integer or size in sources:
        return True
    return bool(size.is_Mul or size.is_Add) and all(is_readable(part, sources) for part in size.args)


def can_resize(node: fx.Node, layout: Layout, sources: Mapping[sympy.Expr, Any]) -> bool:
    """Whether the op can be called with another number of rows: the feature sizes of its shape argument must be
    numbers or readable off the inputs."""
    if node.target not in SHAPED:
        return True
    sizes = [ir.expr_of(s) for label, s in zip(layout, rows.shape_of(node), strict=True) if label is None]
    return all(is_readable(size, sources) for size in sizes)


def size_sources(graph: fx.Graph) -> dict[sympy.Expr, tuple[fx.Node, int | None]]:
    """Where a symbolic size can be read off the inputs: a SymInt placeholder, or a dim of a tensor."""
    sources: dict[sympy.Expr, tuple[fx.Node, int | None]] = {}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        if isinstance(ir.value_of(node), torch.SymInt):
            sources.setdefault(ir.expr_of(ir.value_of(node)), (node, None))
    for node in placeholders:
        tensor = ir.tensor_of(node)
        for dim, size in enumerate(tensor.shape if tensor is not None else ()):
            sources.setdefault(ir.expr_of(size), (node, dim))
    return sources
