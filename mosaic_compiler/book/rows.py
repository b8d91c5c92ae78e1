"""Row rules: which rows of its operands an operation needs for some rows of its result.

A *row space* is the tuple of sizes whose index combinations are the rows, such as ``(N,)`` or ``(B, N)``.  A
*layout* labels each dim of a tensor: ``0 .. k-1`` is that dim of the space, :data:`FLAT` is all of them
merged (``B * N``), ``None`` is a feature dim.  Dims of size 1 are never labelled: they broadcast.

    x [B, N, D]      (0, 1, None)          x.view(B * N, D)        (FLAT, None)
    q [B, H, N, d]   (0, None, 1, None)    cos [1, N, d]           (None, 1, None)

:func:`operand_layouts` answers, for one node and the layout of its result, what each tensor operand has to
provide: a layout (the same rows: a ROW edge) or ``None`` (all of it: a FULL edge).  An op without a rule
gives no answer, which means: all rows of everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from mosaic_compiler import ir
from mosaic_compiler.book.entry import FLAT, Answer, Label, Layout, Operand, Space, entry

aten = torch.ops.aten


class ChunkSpace(tuple[sympy.Expr, ...]):
    """A space whose rows are taken in runs along the last dim, each run with all entries of the dims before it.

    A run of ``(B, N)`` is [B, c], so ops may mix batch entries' rows as long as N is kept apart: attention,
    whose queries of different batch entries meet different keys, can be called on [B, H, c, d].
    """

    __slots__ = ()


def operand_layouts(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    """What ``node`` needs of its operands for some rows of its ``output``-th result.

    Returns one :class:`Operand` per tensor operand (in order, repeats included), or ``None`` if the op
    has no rule or mixes rows, or if an operand's rows are not known to be as many (sizes equal by a guard only).
    """
    if node.op != "call_function" or not isinstance(node.target, OpOverload) or ir.is_random(node):
        return None
    if ir.mutated_arguments(node):
        return None
    rule = entry(node).rows
    answer = rule(node, output, layout, space) if rule is not None else None
    return answer if answer is not None and all(_has_extents(operand, space) for operand in answer) else None


def _has_extents(operand: Operand, space: Space) -> bool:
    return operand.layout is None or all(
        label is None or _is_extent(ir.expr_of(size), label, space)
        for label, size in zip(operand.layout, shape_of(operand.node), strict=True)
    )


def _is_extent(size: sympy.Expr, label: int, space: Space) -> bool:
    extent = sympy.prod(space) if label == FLAT else space[label]
    return bool(size == extent or sympy.expand(size - extent) == 0)


def is_labelled(layout: Layout) -> bool:
    return any(label is not None for label in layout)


def leading_layout(tensor: torch.Tensor, dims: int) -> tuple[Layout, Space]:
    """The layout whose rows are the first ``dims`` dims, and its space; dims of size 1 are left out."""
    labels: list[Label] = []
    space: list[sympy.Expr] = []
    for index, size in enumerate(tensor.shape):
        extent = ir.expr_of(size)
        if index < dims and extent != 1:
            labels.append(len(space))
            space.append(extent)
        else:
            labels.append(None)
    return tuple(labels), tuple(space)


# ------------------------------------------------------------------------------------------ helpers
def shape_of(node: Any) -> torch.Size:
    return ir.only_tensor(node).shape


def row_bytes(node: fx.Node, layout: Layout, *, unknown: int) -> int:
    """Bytes of one row of a single result; sizes that are not numbers count as ``unknown``."""
    tensor = ir.only_tensor(node)
    features = [ir.expr_of(size) for label, size in zip(layout, tensor.shape, strict=True) if label is None]
    return tensor.dtype.itemsize * int(sympy.prod([size if size.is_Integer else unknown for size in features]))


def normal_dim(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def aligned(operand: fx.Node, layout: Layout) -> Layout:
    """The layout of a broadcast operand of a pointwise op: aligned at the last dim, 1-sized dims free."""
    shape = shape_of(operand)
    skip = len(layout) - len(shape)
    return tuple(None if ir.expr_of(size) == 1 else layout[skip + dim] for dim, size in enumerate(shape))


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [operand for operand in _operands(node) if ir.tensor_of(operand) is not None]


def _operands(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, dict(node.kwargs)), found.append)
    return found


def _full(nodes: Sequence[Any]) -> list[Operand]:
    return [Operand(node, None) for node in nodes if isinstance(node, fx.Node)]


# -------------------------------------------------------------------------------------------- rules
def pointwise_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    return [Operand(operand, aligned(operand, layout)) for operand in _tensors(node)]


def same_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    """One tensor operand with the result's own dims."""
    return [Operand(operand, layout) for operand in _tensors(node)]


def along_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    """softmax, sort, cumsum, topk, gather, scatter: independent for each index off the dim."""
    dim = ir.argument(node, "dim")
    shape = shape_of(node.args[0])
    if not isinstance(dim, int) or not shape or layout[normal_dim(dim, len(shape))] is not None:
        return None
    for operand in _tensors(node):
        other = shape_of(operand)
        if len(other) != len(shape):
            return None
        for label, size, expected in zip(layout, other, _shape_at(node, output), strict=True):
            if label is not None and ir.expr_of(size) != ir.expr_of(expected):
                return None
    return [Operand(operand, layout) for operand in _tensors(node)]


def _shape_at(node: fx.Node, output: int) -> torch.Size:
    tensor = ir.tensors_of(node)[output]
    assert tensor is not None
    return tensor.shape


def reduction_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rank = len(shape_of(source))
    dims = ir.argument(node, "dim")
    if dims is None or dims == []:
        return None
    reduced = {normal_dim(dim, rank) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}
    if ir.argument(node, "keepdim"):
        if any(layout[dim] is not None for dim in reduced):
            return None
        return [Operand(source, layout)]
    rest = iter(layout)
    return [Operand(source, tuple(None if dim in reduced else next(rest) for dim in range(rank)))]


def mm_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    left, right = node.args[0], node.args[1]
    if layout[1] is not None:
        return None
    return [Operand(left, (layout[0], None)), Operand(right, None)]  # type: ignore[arg-type]


def addmm_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    bias, left, right = node.args[:3]
    if layout[1] is not None:
        return None
    assert isinstance(bias, fx.Node)
    return [Operand(bias, aligned(bias, layout)), Operand(left, (layout[0], None)), Operand(right, None)]  # type: ignore[arg-type]


def bmm_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    """Rows of a product are rows of its left operand; where each of the products is a row of its own, of both."""
    left, right = node.args[0], node.args[1]
    if layout[2] is not None:
        return None
    if is_taken_in_part(layout[0], space):
        return None if layout[1] is not None else [Operand(left, layout), Operand(right, layout)]  # type: ignore[arg-type]
    if layout[0] is not None and not isinstance(space, ChunkSpace):
        return None
    return [Operand(left, layout), Operand(right, None)]  # type: ignore[arg-type]


def is_taken_in_part(label: Label, space: Space) -> bool:
    """A run of rows has some of this dim's indices (of other dims it has all)."""
    return label in (FLAT, len(space) - 1)


def layer_norm_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    source, normalized = node.args[0], ir.argument(node, "normalized_shape")
    rank = len(shape_of(source))
    labels = layout[:rank]
    if any(label is not None for label in labels[rank - len(normalized) :]):
        return None
    return [Operand(source, labels), *_full([ir.argument(node, "weight"), ir.argument(node, "bias")])]  # type: ignore[arg-type]


def view_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    labels = view_layout(shape_of(node), layout, shape_of(source), space)
    return None if labels is None else [Operand(source, labels)]


def view_layout(shape: Sequence[Any], layout: Layout, other: Sequence[Any], space: Space) -> Layout | None:
    """The layout of the same elements under another shape, or ``None`` if rows and features mix."""
    ours = [(dim, ir.expr_of(size)) for dim, size in enumerate(shape) if ir.expr_of(size) != 1]
    theirs = [(dim, ir.expr_of(size)) for dim, size in enumerate(other) if ir.expr_of(size) != 1]
    result: list[Label] = [None] * len(other)
    i = j = 0
    while i < len(ours) and j < len(theirs):
        mine, yours = [ours[i]], [theirs[j]]
        a, b = ours[i][1], theirs[j][1]
        i, j = i + 1, j + 1
        while sympy.expand(a - b) != 0:
            _, denominator = sympy.fraction(sympy.cancel(a / b))
            if denominator == 1 and j < len(theirs):
                yours.append(theirs[j])
                b, j = b * theirs[j][1], j + 1
            elif i < len(ours):
                mine.append(ours[i])
                a, i = a * ours[i][1], i + 1
            else:
                return None
        labels = [layout[dim] for dim, _ in mine]
        if not any(label is not None for label in labels):
            continue
        if len(mine) == len(yours) == 1:
            result[yours[0][0]] = labels[0]
        elif labels == [FLAT] and tuple(size for _, size in yours) == space:
            for label, (dim, _) in enumerate(yours):
                result[dim] = label
        elif len(yours) == 1 and labels == list(range(len(space))):
            result[yours[0][0]] = FLAT
        else:
            return None
    if any(layout[dim] is not None for dim, _ in ours[i:]):
        return None
    return tuple(result)


def order_of(node: fx.Node, rank: int) -> list[int]:
    """Which dim of its operand each dim of a ``permute``, ``transpose`` or ``t`` is."""
    order = list(range(rank))
    arguments: Any = node.args
    if node.target is aten.permute.default:
        order = [normal_dim(dim, rank) for dim in arguments[1]]
    elif rank > 1:
        first, second = arguments[1:3] if node.target is aten.transpose.int else (0, 1)
        a, b = normal_dim(first, rank), normal_dim(second, rank)
        order[a], order[b] = order[b], order[a]
    return order


def permute_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    labels: list[Label] = [None] * len(layout)
    for position, dim in enumerate(order_of(node, len(layout))):
        labels[dim] = layout[position]
    return [Operand(node.args[0], tuple(labels))]  # type: ignore[arg-type]


def unsqueeze_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    dim = normal_dim(node.args[1], len(layout))  # type: ignore[arg-type]
    return [Operand(node.args[0], layout[:dim] + layout[dim + 1 :])]  # type: ignore[arg-type]


def squeezed_dims(node: fx.Node) -> set[int]:
    """The dims of its operand that a ``squeeze`` takes away."""
    shape = shape_of(node.args[0])
    dims = ir.argument(node, "dim")
    dims = range(len(shape)) if dims is None else dims if isinstance(dims, (list, tuple)) else [dims]
    return {normal_dim(dim, len(shape)) for dim in dims if ir.expr_of(shape[dim]) == 1}


def squeeze_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    gone, rest = squeezed_dims(node), iter(layout)
    dims = range(len(shape_of(node.args[0])))
    return [Operand(node.args[0], tuple(None if dim in gone else next(rest) for dim in dims))]  # type: ignore[arg-type]


def expand_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    return [Operand(node.args[0], aligned(node.args[0], layout))]  # type: ignore[arg-type]


def complex_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    """Pairs of numbers, as complex ones (one dim less) or the other way round."""
    if node.target is aten.view_as_complex.default:
        return [Operand(node.args[0], (*layout, None))]  # type: ignore[arg-type]
    return None if layout[-1] is not None else [Operand(node.args[0], layout[:-1])]  # type: ignore[arg-type]


def slice_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    """A slice of feature dims."""
    dim = normal_dim(ir.argument(node, "dim") or 0, len(layout))
    return None if layout[dim] is not None else [Operand(node.args[0], layout)]  # type: ignore[arg-type]


def pad_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    """A pad of feature dims; the amounts are given from the last dim on, two for each."""
    padded = [len(layout) - 1 - place // 2 for place, pad in enumerate(node.args[1]) if not isinstance(pad, int) or pad]  # type: ignore[arg-type]
    return None if any(layout[dim] is not None for dim in padded) else [Operand(node.args[0], layout)]  # type: ignore[arg-type]


def select_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    """``select`` and ``unbind`` take one index of a feature dim away."""
    dim = normal_dim(ir.argument(node, "dim") or 0, len(layout) + 1)
    return [Operand(node.args[0], (*layout[:dim], None, *layout[dim:]))]  # type: ignore[arg-type]


def cat_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    dim = normal_dim(ir.argument(node, "dim") or 0, len(layout))
    if layout[dim] is not None:
        return None
    parts: Any = node.args[0]
    return [Operand(part, layout) for part in parts]


def stack_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    dim = normal_dim(ir.argument(node, "dim") or 0, len(layout))
    if layout[dim] is not None:
        return None
    parts: Any = node.args[0]
    return [Operand(part, layout[:dim] + layout[dim + 1 :]) for part in parts]


def index_select_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    """A table lookup: the indices are rows, the table is needed whole."""
    table, dim, indices = node.args
    at = normal_dim(dim, len(layout))  # type: ignore[arg-type]
    if any(label is not None for position, label in enumerate(layout) if position != at):
        return None
    return [Operand(table, None), Operand(indices, (layout[at],))]  # type: ignore[arg-type]


def index_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    """A table lookup by numbers in one tensor of any shape."""
    table, indices = node.args
    if len(indices) != 1 or ir.only_tensor(indices[0]).dtype == torch.bool:  # type: ignore[arg-type, index]
        return None
    rank = len(shape_of(indices[0]))  # type: ignore[index]
    rows = [Operand(table, None), Operand(indices[0], layout[:rank])]  # type: ignore[arg-type, index]
    return None if any(label is not None for label in layout[rank:]) else rows


def source_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    """Constants of any shape; a ``*_like`` operand only lends its shape."""
    return [Operand(operand, layout) for operand in _tensors(node) if len(shape_of(operand)) == len(layout)]
