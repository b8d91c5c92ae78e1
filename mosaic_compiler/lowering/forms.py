"""How each node gets its result: as a view, into a given buffer, in place, or opaquely.

This is where an ATen operator's calling convention is decided, once, for planning and for running.

- ``DESTINATION``: the result is written into a buffer that the plan places in the arena.  A native
  ``out=`` overload is used where there is one that is the functional op (``book/overloads.py``).  Generated ``out=``
  overloads (tagged ``torch.Tag.generated``) compute functionally and then copy, so they are never used.
- ``OPAQUE``: the op allocates its own outputs (SDPA, random numbers, layer norm); the plan counts
  them as transients.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx
from torch._ops import OpOverload

from mosaic_compiler import book, ir
from mosaic_compiler.book import inplace_twin, native_out
from mosaic_compiler.ir.clusters import cluster_of
from mosaic_compiler.ir.loops import loop_of
from mosaic_compiler.kernels import ops as _own_operators  # noqa: F401  (their entries and what runs)
from mosaic_compiler.planning.lowered import Kind


@dataclass(frozen=True)
class Form:
    """How a node gets its result; ``way``: who writes into its destination (see :class:`LoweredOp`)."""

    kind: Kind
    way: str = ""


def _way(node: fx.Node) -> str:
    """Who can write a node's result into a destination; empty: nobody, it allocates."""
    op, known = node.target, book.entry(node)
    assert isinstance(op, OpOverload)
    if known.write is not None:
        return "entry" if known.can_write(node) else ""
    if known.is_accounted:
        return ""
    native = native_out(op)
    if native is not None and len(native[1]) == len(ir.tensors_of(node)):
        return "out"
    twin = inplace_twin(op)
    first = node.args[0] if node.args else None
    out = ir.tensor_of(node)
    if twin is not None and out is not None and isinstance(first, fx.Node):
        source = ir.tensor_of(first)
        if source is not None and source.dtype == out.dtype:
            return "twin"
    return ""


def form_of(node: fx.Node, main_device: torch.device) -> Form:
    """Classify a node (not a placeholder or output).

    A tensor on another device than ``main_device``, or with a data-dependent size, is opaque: its
    bytes cannot be placed in this arena's plan.
    """
    if node.op == "get_attr":
        return Form(Kind.CONSTANT)
    if loop_of(node) is not None:
        return Form(Kind.LOOP)
    if cluster_of(node) is not None:
        return Form(Kind.DESTINATION, "kernel")
    outputs = ir.tensors_of(node)
    if not ir.has_tensors(node):
        effect = ir.has_effect(node)
        return Form(Kind.OPAQUE if effect or not _computable(node) else Kind.NUMBER)
    if not isinstance(node.target, OpOverload):
        return Form(Kind.NUMBER if node.target is operator.getitem else Kind.OPAQUE)
    if ir.mutated_arguments(node):
        return Form(Kind.MUTATION)
    if ir.is_view(node):
        return Form(Kind.VIEW)
    if ir.alias_base(node) is not None or ir.has_unbacked(node):
        return Form(Kind.OPAQUE)
    if any(t is None or t.device != main_device or t.layout != torch.strided for t in outputs):
        return Form(Kind.OPAQUE)
    way = _way(node)
    return Form(Kind.DESTINATION, way) if way else Form(Kind.OPAQUE)


def _computable(node: fx.Node) -> bool:
    """A symbolic number whose value follows from the sizes of the inputs."""
    value = ir.value_of(node)
    if isinstance(value, (bool, int, float)):
        return True
    return ir.is_symbolic_number(value) and not ir.has_unbacked(node)
