"""What nodes produce, under fake tensors: values, sizes as expressions, layouts."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx

from mosaic_compiler.compat.symbols import FloorDiv, expression_of


def value_of(node: fx.Node) -> Any:
    """What the node produces under fake tensors: a FakeTensor, SymInt, number, or tuple of them."""
    return node.meta.get("val")


def argument_value(given: Any) -> Any:
    """What an argument of a call stands for: a node's value, or a number itself."""
    return value_of(given) if isinstance(given, fx.Node) else given


def tensors_of(node: fx.Node) -> tuple[torch.Tensor | None, ...]:
    """The node's outputs, one entry each; ``None`` where an output is not a tensor."""
    value = value_of(node)
    if isinstance(value, (tuple, list)):
        return tuple(v if isinstance(v, torch.Tensor) else None for v in value)
    return (value if isinstance(value, torch.Tensor) else None,)


def has_tensors(node: fx.Node) -> bool:
    """Some of what a node returns are tensors (of others, a size can be had without the value)."""
    return any(tensor is not None for tensor in tensors_of(node))


def tensor_of(node: fx.Node) -> torch.Tensor | None:
    """The node's single tensor output, or ``None``."""
    value = value_of(node)
    return value if isinstance(value, torch.Tensor) else None


def only_tensor(node: fx.Node) -> torch.Tensor:
    """The tensor of a node that is known to have just one."""
    tensor = tensor_of(node)
    assert tensor is not None, f"{node} is no single tensor"
    return tensor


def is_symbolic_number(value: object) -> bool:
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def expr_of(size: Any) -> sympy.Expr:
    """The sympy expression of an int or SymInt, after the shape environment's replacements."""
    if is_symbolic_number(size):
        return exact(expression_of(size))
    return sympy.Integer(size) if type(size) is int else sympy.sympify(size)


@functools.lru_cache(maxsize=1 << 14)
def exact(expr: sympy.Expr) -> sympy.Expr:
    """Without floor divisions that leave no remainder: ``(s**2)//s``, as fake kernels write the length of ``[s, s]``
    rows that were flat, is ``s``."""
    if not expr.has(FloorDiv):
        return expr

    def divided(base: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
        numerator, denominator = sympy.cancel(base / divisor).as_numer_denom()
        return numerator if denominator == 1 else FloorDiv(base, divisor)

    return expr.replace(FloorDiv, divided)


def own_strides(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Strides of a result in storage of its own, where no two elements share a place.

    Some fake kernels copy the strides of an expanded operand (0), which no real kernel does.
    """
    pairs = list(zip(tensor.shape, tensor.stride(), strict=True))
    if all(expr_of(stride) != 0 or expr_of(size) == 1 for size, stride in pairs):
        return tuple(tensor.stride())
    return tuple(math.prod(tensor.shape[dim + 1 :]) for dim in range(tensor.dim()))


def storage_extent(tensor: torch.Tensor) -> sympy.Expr:
    """Bytes from the first to the last element of a result in storage of its own; 0 where a size is 0.

    A dense tensor of ``[rows, D]`` float32 has ``4 * rows * D``.
    """
    last: sympy.Expr = sympy.Integer(0)
    for size, stride in zip(tensor.shape, own_strides(tensor), strict=True):
        extent = expr_of(size)
        if extent == 0:
            return sympy.Integer(0)
        last += (extent - 1) * expr_of(stride)
    return sympy.expand((last + 1) * tensor.dtype.itemsize)


def lazy_bits(tensor: torch.Tensor) -> str:
    """How a tensor's memory differs from its values: they are to be conjugated (``conj``) or negated (``neg``) when
    they are read, as ``x.conj()`` and ``x.conj().imag`` of a complex x are.  PyTorch's own ops know; kernels that read
    raw memory do not."""
    return " ".join(name for name, is_set in (("conj", tensor.is_conj()), ("neg", tensor.is_neg())) if is_set)


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, device, sizes, strides and lazy bits, compared as expressions (so no guard is added)."""
    if a.dtype != b.dtype or a.device != b.device or a.dim() != b.dim() or lazy_bits(a) != lazy_bits(b):
        return False
    pairs = zip((*a.shape, *a.stride()), (*b.shape, *b.stride()), strict=True)
    return all(expr_of(x) == expr_of(y) for x, y in pairs)


def layout_of(value: Any) -> Any:
    """Comparable description of what a node produces; strides of sizes 0 and 1 do not count."""
    if isinstance(value, (tuple, list)):
        return tuple(layout_of(item) for item in value)
    if isinstance(value, torch.Tensor):
        sizes = tuple(expr_of(size) for size in value.shape)
        strides = tuple(
            None if size in (0, 1) else expr_of(stride) for size, stride in zip(sizes, value.stride(), strict=True)
        )
        kind = " ".join(filter(None, (str(value.dtype), lazy_bits(value))))
        return (kind, str(value.device), sizes, strides, expr_of(value.storage_offset()))
    if is_symbolic_number(value) or isinstance(value, (int, float)):
        return expr_of(value)
    return repr(value)


def equal_layouts(a: Any, b: Any) -> bool:
    """Whether two :func:`layout_of` describe the same for every value of the symbols.

    Expressions that sympy does not bring to one form, such as ``s**2 // s`` and ``s``, are compared at some values.
    """
    if a == b:
        return True
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(equal_layouts, a, b))
    if not (isinstance(a, sympy.Basic) and isinstance(b, sympy.Basic)):
        return False
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    return all(
        a.xreplace(values) == b.xreplace(values)
        for start in (2, 7, 64, 333, 1009, 4099)
        if (values := {symbol: sympy.Integer(start + 97 * i) for i, symbol in enumerate(symbols)})
    )


def is_contiguous(tensor: torch.Tensor) -> bool:
    """Row-major without gaps, for every value of the symbols."""
    expected: sympy.Expr = sympy.Integer(1)
    for size, stride in reversed(list(zip(tensor.shape, tensor.stride(), strict=True))):
        extent = expr_of(size)
        if extent != 1 and sympy.expand(expr_of(stride) - expected) != 0:
            return False
        expected = expected * extent
    return True


def magnitude(expr: sympy.Expr) -> int:
    """Its value where every symbol is a large number: to compare sizes and strides by."""
    return int(expr.xreplace({symbol: sympy.Integer(1009) for symbol in expr.free_symbols}))


def memory_order(tensor: torch.Tensor) -> list[int]:
    """Dims from the largest stride to the smallest; dims of size 1 stay where they are."""
    strides = [magnitude(expr_of(stride)) for stride in tensor.stride()]
    wide = [dim for dim, size in enumerate(tensor.shape) if expr_of(size) != 1]
    ranked = iter(sorted(wide, key=lambda dim: -strides[dim]))
    return [next(ranked) if dim in wide else dim for dim in range(tensor.dim())]


def free_symbols(node: fx.Node) -> set[sympy.Symbol]:
    """Symbols in the sizes, strides and offsets of everything the node produces."""
    found: set[sympy.Symbol] = set()
    for number in numbers_in(value_of(node)):
        if is_symbolic_number(number):
            found |= expr_of(number).free_symbols
    return found


def numbers_in(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield from value.shape
        yield from value.stride()
        yield value.storage_offset()
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from numbers_in(item)
    else:
        yield value
