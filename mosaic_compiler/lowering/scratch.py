"""Bytes that a node allocates while it runs and frees before it returns (formulas: ``book/scratch.py``)."""

from __future__ import annotations

import sympy
from torch import fx

from mosaic_compiler import book
from mosaic_compiler.ir.clusters import cluster_of
from mosaic_compiler.kernels import cluster_form


def scratch_bytes(node: fx.Node) -> sympy.Expr:
    """Scratch of one node in bytes, as an expression in the graph's symbols."""
    if (cluster := cluster_of(node)) is not None:
        return cluster_form.scratch_bytes(cluster)
    formula = book.entry(node).scratch
    return sympy.Integer(0) if formula is None else formula(node)
