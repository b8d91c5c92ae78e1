"""Hand-written ``out=`` overloads and in-place twins of operators, as far as their entries trust them.

Not all are the functional op, written somewhere else: some use their destination as scratch (``binary_cross_entropy``,
with a mean), some lay it out anew (``max_unpool2d``), some read operands as if they were contiguous
(``native_batch_norm``), and ``mul_.Scalar`` rounds its number to bfloat16 first.  So an op's own overload is used if
the op is pointwise, or its entry says so; all others allocate their results.  ``tests/test_out_overloads.py`` holds
this against every sample that PyTorch has of them.
"""

from __future__ import annotations

import functools

import torch
from torch._ops import OpOverload

from mosaic_compiler import ir
from mosaic_compiler.book.entry import open_book


def _has_trusted_out(op: OpOverload) -> bool:
    trusted = open_book().of(op).trusted
    if trusted is None:
        return op.namespace == "aten" and torch.Tag.pointwise in op.tags
    return trusted


def trusted_ops() -> dict[OpOverload, str]:
    """All ops whose entries say so, with ``out`` or ``in place``."""
    ways = {op: "out" if known.trusted else "in place" if known.trusted_twin else "" for op, known in open_book()}
    return {op: way for op, way in ways.items() if way}


def _signature(op: OpOverload, *, outs: bool) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in op._schema.arguments if outs or not a.is_out]


def native_out(op: OpOverload) -> tuple[OpOverload, tuple[str, ...]] | None:
    """The hand-written ``out=`` overload of a functional op and the names of its out arguments."""
    return _hand_written_out(op) if _has_trusted_out(op) else None


@functools.cache
def _hand_written_out(op: OpOverload) -> tuple[OpOverload, tuple[str, ...]] | None:
    for candidate in ir.overloads_of(op):
        names = tuple(a.name for a in candidate._schema.arguments if a.is_out)
        if not names or torch.Tag.generated in candidate.tags:
            continue
        if any(a.is_out and str(a.type) != "Tensor" for a in candidate._schema.arguments):
            continue  # a list of tensors
        if _signature(candidate, outs=False) == _signature(op, outs=True):
            return candidate, names
    return None


@functools.cache
def without_out(op: OpOverload) -> OpOverload:
    """``aten.mul.Tensor`` for ``aten.mul.out``: what is computed, written nowhere.  Other ops: themselves."""
    if any(a.is_out for a in op._schema.arguments):
        for candidate in ir.overloads_of(op):
            if _signature(candidate, outs=True) == _signature(op, outs=False):
                return candidate
    return op


def inplace_twin(op: OpOverload) -> OpOverload | None:
    """``aten.relu_.default`` for ``aten.relu.default``: same arguments, first one written."""
    return _hand_written_twin(op) if open_book().of(op).trusted_twin else None


@functools.cache
def _hand_written_twin(op: OpOverload) -> OpOverload | None:
    namespace, _, name = op._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), f"{name}_", None)
    twin = getattr(packet, op._overloadname, None) if packet is not None else None
    if twin is None or torch.Tag.generated in twin.tags:
        return None
    same = _signature(twin, outs=True) == _signature(op, outs=True)
    return twin if same and twin._schema.arguments[0].is_write else None
