"""Which tensors provably hold one value everywhere (``ones``, ``expand(full)``, ``a & True``)."""

from __future__ import annotations

import math
import struct
from typing import TypeAlias

import torch
from torch import fx

from mosaic_compiler import book, ir
from mosaic_compiler.passes.ranges import compared

aten = torch.ops.aten

Scalar: TypeAlias = "bool | int | float"


def constant_of(node: fx.Node) -> Scalar | None:
    """The value that every element of ``node`` has, or ``None`` where that is not proven.

    The answer is of the tensor's own kind: True/False for boolean tensors.
    """
    value = _constant(node)
    tensor = ir.tensor_of(node)
    return None if value is None or tensor is None else _held(value, tensor.dtype)


def _held(value: Scalar, dtype: torch.dtype) -> Scalar | None:
    """A number as a dtype holds it: whole numbers wrap around, small ones become 0; ``None`` where nobody can say."""
    if dtype == torch.bool:
        return bool(value)
    if dtype.is_complex or not math.isfinite(value):
        return None
    if dtype.is_floating_point:
        code = {torch.float64: "d", torch.float32: "f", torch.bfloat16: "f", torch.float16: "e"}.get(dtype)
        if code is None:
            return None
        try:
            packed = struct.pack(code, float(value))
        except OverflowError:
            return None
        if dtype == torch.bfloat16:  # float32 without the lower half, rounded to even
            bits = int.from_bytes(packed, "little")
            bits += 0x7FFF + (bits >> 16 & 1)
            packed = (bits & 0xFFFF0000).to_bytes(4, "little")
        held: float = struct.unpack(code, packed)[0]
        return held if math.isfinite(held) else None
    if int(value) != value:
        return None
    limits = torch.iinfo(dtype)
    return (int(value) - limits.min) % (1 << limits.bits) + limits.min


def _constant(node: fx.Node) -> Scalar | None:
    if node.op != "call_function":
        return None
    known = book.entry(node)
    if known.fill is not None:
        value = node.args[int(known.fill[3:])] if isinstance(known.fill, str) else known.fill
        return value if isinstance(value, (bool, int, float)) else None
    first = node.args[0] if node.args else None
    if (known.takes_elements or known.family == "copy") and isinstance(first, fx.Node):
        return constant_of(first)
    if known.logic == "not" and isinstance(first, fx.Node):
        value = constant_of(first)
        return not value if isinstance(value, bool) else None
    if known.logic:
        return _absorb(node, absorbing=known.logic == "or")
    if (answer := compared(node)) is not None:
        return answer
    if node.target is aten.where.self and all(isinstance(a, fx.Node) for a in node.args):
        condition, yes, no = (constant_of(a) for a in node.args)  # type: ignore[arg-type]
        if condition is not None:
            return yes if condition else no
        return yes if yes == no else None
    return None


def _absorb(node: fx.Node, *, absorbing: bool) -> bool | None:
    """Boolean ``and`` (absorbing False) or ``or`` (absorbing True) of two nodes."""
    values = [constant_of(a) if isinstance(a, fx.Node) else None for a in node.args]
    tensor = ir.tensor_of(node)
    if tensor is None or tensor.dtype != torch.bool:
        return None
    if any(value is absorbing for value in values):
        return absorbing
    return (not absorbing) if all(value is (not absorbing) for value in values) else None
