"""Which tensors provably hold one value everywhere (``ones``, ``expand(full)``, ``a & True``)."""

from __future__ import annotations

import math
import struct
from typing import TypeAlias

import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.passes.ranges import compared

aten = torch.ops.aten

Scalar: TypeAlias = "bool | int | float"

_FILLED: dict[object, Scalar] = {
    aten.ones.default: 1,
    aten.ones_like.default: 1,
    aten.new_ones.default: 1,
    aten.zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.new_zeros.default: 0,
}
_FILL_ARGUMENT = {
    aten.full.default: 1,
    aten.full_like.default: 1,
    aten.new_full.default: 2,
    aten.scalar_tensor.default: 0,
}
_SAME_VALUE = frozenset(
    {
        aten.view.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
        aten.slice.Tensor,
        aten.permute.default, aten.transpose.int, aten.clone.default, aten._to_copy.default, aten.alias.default,
        aten.select.int,
    }
)  # fmt: skip


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
    if node.target in _FILLED:
        return _FILLED[node.target]
    if node.target in _FILL_ARGUMENT:
        value = node.args[_FILL_ARGUMENT[node.target]]
        return value if isinstance(value, (bool, int, float)) else None
    first = node.args[0] if node.args else None
    if node.target in _SAME_VALUE and isinstance(first, fx.Node):
        return constant_of(first)
    if node.target in (aten.logical_not.default, aten.bitwise_not.default) and isinstance(first, fx.Node):
        value = constant_of(first)
        return not value if isinstance(value, bool) else None
    if node.target in (aten.bitwise_and.Tensor, aten.logical_and.default):
        return _absorb(node, absorbing=False)
    if node.target in (aten.bitwise_or.Tensor, aten.logical_or.default):
        return _absorb(node, absorbing=True)
    if (known := compared(node)) is not None:
        return known
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
