"""Which whole numbers a tensor can hold, whatever the data: positions that ``topk`` found are below the size that it
looked at.

A mixture of experts masks the rows of experts that do not exist; this says that there are none.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import fx

from mosaic_compiler import ir

aten = torch.ops.aten

Range: TypeAlias = "tuple[int, int]"
"""The least and the largest."""

_POSITIONS: Mapping[Any, int] = {
    aten.topk.default: 1,
    aten.sort.default: 1,
    aten.sort.stable: 1,
    aten.max.dim: 1,
    aten.min.dim: 1,
}
"""Ops with positions along a dim among their results, and which result it is."""
_SORTED = frozenset({aten.sort.default, aten.sort.stable})
_SEARCHES = frozenset({aten.argmax.default, aten.argmin.default, aten.argsort.default, aten.argsort.stable})
_TESTS: Mapping[Any, Callable[[int, int], bool]] = {
    aten.ge.Scalar: operator.ge,
    aten.gt.Scalar: operator.gt,
    aten.le.Scalar: operator.le,
    aten.lt.Scalar: operator.lt,
    aten.eq.Scalar: operator.eq,
    aten.ne.Scalar: operator.ne,
}
_SAME_ELEMENTS = frozenset(
    {
        aten.view.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
        aten.slice.Tensor, aten.permute.default, aten.transpose.int, aten.clone.default, aten.alias.default,
        aten.select.int, aten.index_select.default, aten.index.Tensor, aten.gather.default, aten.flip.default,
    }
)  # fmt: skip


def range_of(node: fx.Node) -> Range | None:
    """Bounds of every element of a tensor of whole numbers; ``None`` where nothing is known."""
    tensor = ir.tensor_of(node)
    if tensor is None or tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        return None
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if source is None or node.op != "call_function":
        return None
    if node.target is operator.getitem:
        if _POSITIONS.get(source.target) == node.args[1]:
            return _positions(source)
        values = source.args[0]
        return range_of(values) if source.target in _SORTED and isinstance(values, fx.Node) else None
    if node.target in _SEARCHES:
        return _positions(node)
    if node.target in _SAME_ELEMENTS:
        return range_of(source)
    if node.target is aten._to_copy.default:
        found, limits = range_of(source), torch.iinfo(tensor.dtype)
        return found if found is not None and limits.min <= found[0] and found[1] <= limits.max else None
    return None


def _positions(search: fx.Node) -> Range | None:
    """Along the dim that is searched, if its size is a number."""
    source, dim = search.args[0], ir.argument(search, "dim")
    tensor = ir.tensor_of(source) if isinstance(source, fx.Node) else None
    if tensor is None or not isinstance(dim, int) or not tensor.dim():
        return None
    size = ir.expr_of(tensor.shape[dim])
    return (0, int(size) - 1) if size.is_Integer else None


def compared(node: fx.Node) -> bool | None:
    """What a comparison with a number is for every element, if that follows from its operand's range."""
    test = _TESTS.get(node.target)
    operand, number = (*node.args, None, None)[:2]
    if test is None or not isinstance(operand, fx.Node) or type(number) is not int:
        return None
    found = range_of(operand)
    if found is None:
        return None
    least, largest = test(found[0], number), test(found[1], number)
    if node.target in (aten.eq.Scalar, aten.ne.Scalar):  # between two that differ from the number it may be equal
        outside = not found[0] <= number <= found[1]
        return least if outside or found[0] == found[1] else None
    return least if least == largest else None
