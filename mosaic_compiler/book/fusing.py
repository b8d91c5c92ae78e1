"""What the ops of a fused kernel go over (``passes/fuse/grouping.py`` puts those together that go over the same)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.book.entry import Work, entry

MOST_ADDED = 8
"""Elements that a kernel adds one by one, wherever they lie."""


def pointwise(node: fx.Node, device: torch.device) -> Work | None:
    """Each element of the result by itself."""
    return Work(elements_of(ir.only_tensor(node)), None) if ir.alias_base(node) is None else None


def copied(node: fx.Node, device: torch.device) -> Work | None:
    """A copy; one to another device is for the op's own kernel."""
    source, out = ir.tensor_of(node.all_input_nodes[0]), ir.only_tensor(node)
    return Work(elements_of(out), None) if source is not None and source.device == out.device else None


def joined(node: fx.Node, device: torch.device) -> Work | None:
    """``cat`` of a few parts."""
    parts: Any = node.args[0]
    return Work(elements_of(ir.only_tensor(node)), None) if 1 < len(parts) <= 4 else None


def reduced(node: fx.Node, device: torch.device) -> Work | None:
    """A reduction of the last dim, of a width that is a number."""
    source = ir.only_tensor(node.all_input_nodes[0])
    dim = ir.argument(node, "dim")
    if isinstance(dim, Sequence):
        if len(dim) != 1:
            return None
        (dim,) = dim
    if not isinstance(dim, int) or source.dim() == 0 or dim not in (-1, source.dim() - 1):
        return None
    width = ir.expr_of(source.shape[-1])
    if ir.expr_of(source.stride(-1)) != 1 or not width.is_Integer or width == 1:
        return None
    return Work(elements_of(source), width)


def normed(node: fx.Node, device: torch.device) -> Work | None:
    """As large as the operand, with reductions inside; on the CPU, Inductor keeps all exponentials in memory."""
    return None if device.type == "cpu" else reduced(node, device)


def summed(node: fx.Node, device: torch.device) -> Work | None:
    """A sum of a few elements, or a reduction."""
    return Work(elements_of(ir.only_tensor(node)), None) if is_small_sum(node) else reduced(node, device)


def rows_gathered(node: fx.Node, device: torch.device) -> Work | None:
    """``x[rows]``, with whole rows of a dim or more."""
    source, at = ir.only_tensor(node.all_input_nodes[0]), node.args[1]
    if isinstance(at, Sequence):
        fits = len(at) == 1 and _are_numbers(at[0]) and source.dim() > 1
    else:
        fits = bool(at == 0) and _are_numbers(node.args[2]) and source.dim() > 1
    return Work(elements_of(ir.only_tensor(node)), None) if fits else None


def element_gathered(node: fx.Node, device: torch.device) -> Work | None:
    """One element per row, looked up in what a reduction goes over."""
    source, dim, index = node.args[:3]
    assert isinstance(source, fx.Node)
    assert isinstance(index, fx.Node)
    tensor, chosen = ir.only_tensor(source), ir.only_tensor(index)
    if entry(source).family != "norm" or dim not in (-1, tensor.dim() - 1) or ir.expr_of(chosen.shape[-1]) != 1:
        return None
    return Work(elements_of(chosen), None)


def is_small_sum(node: fx.Node) -> bool:
    """A sum over a dim of few elements, other than the last one: kernels add them one by one, as a pointwise op."""
    if entry(node).fused is not summed:
        return False
    source, dims = ir.only_tensor(node.all_input_nodes[0]), node.args[1]
    if not isinstance(dims, Sequence) or len(dims) != 1 or not isinstance(dims[0], int):
        return False
    dim = dims[0] % max(source.dim(), 1)
    size = ir.expr_of(source.shape[dim]) if source.dim() else sympy.Integer(0)
    return dim != source.dim() - 1 and bool(size.is_Integer) and 1 < int(size) <= MOST_ADDED


def _are_numbers(node: Any) -> bool:
    tensor = ir.tensor_of(node) if isinstance(node, fx.Node) else None
    return tensor is not None and tensor.dim() == 1 and tensor.dtype in (torch.int64, torch.int32)


def elements_of(tensor: torch.Tensor) -> sympy.Expr:
    """How many there are, as an expression."""
    return sympy.expand(sympy.prod([ir.expr_of(size) for size in tensor.shape]))
