"""``canonicalize``: one spelling for each thing, and nothing that does no work."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from mosaic_compiler import book, ir
from mosaic_compiler.passes.base import Pass
from mosaic_compiler.passes.canonicalize.attention_spelling import drop_relayout, drop_true_mask, fold_repeated_heads
from mosaic_compiler.passes.canonicalize.common_subexpressions import merge_common_subexpressions
from mosaic_compiler.passes.canonicalize.rewriter import Rewriter
from mosaic_compiler.passes.canonicalize.written_slices import join_written_slices
from mosaic_compiler.passes.constants import constant_of

aten = torch.ops.aten
prims = torch.ops.prims


@dataclass(frozen=True)
class CanonicalizePass(Pass):
    """Remove what does no work and give every operation one form.

    - dead code and common subexpressions (never random draws, writes, or results that escape);
    - views and slices that change nothing, additions of integer 0, copies to the same dtype;
    - ``_unsafe_view`` -> ``view``, ``prims.convert_element_type`` -> ``_to_copy``, ``mul.Scalar`` -> ``mul.Tensor``,
      ``embedding`` -> ``index_select``;
    - matrix products over a single element -> ``mul``;
    - ``cat`` of one tensor with empty ones (an empty key/value cache): that tensor;
    - memory that is written slice by slice, all of it: ``cat`` of the slices;
    - copies that only reorder the memory of an attention's keys or values;
    - attention masks that are provably all-true (or all-zero), and fills under masks that are all-false, removed;
    - keys and values repeated for grouped-query attention: the attention kernels that take fewer
      key/value heads than query heads get the un-repeated ones.

    Requires: a functional ATen graph with fake-tensor metadata.
    Guarantees: same outputs, bit for bit; metadata stays true.

    Before::

        a = x[:, 0:9223372036854775807]
        e = embedding(w, ids)
        b = mm(a, t(w)); c = mm(a, t(w)); dead = exp(c)
        return b + c

    After::

        e = view(index_select(w, 0, view(ids, [-1])), ...)      (dead here, so gone too)
        b = mm(x, t(w))
        return b + b
    """

    name: ClassVar[str] = "canonicalize"

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        module = ir.copy_graph(module)
        rewriter = Rewriter(module)
        for node in list(module.graph.nodes):
            if node.op == "call_function" and isinstance(node.target, OpOverload):
                for rule in _RULES:
                    if rule(rewriter, node):
                        break
        merge_common_subexpressions(module.graph)
        ir.remove_dead_code(module.graph)
        module.graph.lint()
        module.recompile()
        return module


# ---------------------------------------------------------------------------------------- rules
def _drop_noop_view(rewriter: Rewriter, node: fx.Node) -> bool:
    """``view(x, x.shape)``, ``x[:]``, ``detach(x)``: x itself."""
    if not ir.is_view(node) or ir.tensor_of(node) is None:
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = ir.tensor_of(source), ir.tensor_of(node)
    if before is None or after is None or not ir.same_layout(before, after):
        return False
    if ir.expr_of(before.storage_offset()) != ir.expr_of(after.storage_offset()):
        return False
    if ir.is_returned(node) and (ir.is_returned(source) or source.op in ("placeholder", "get_attr")):
        return False  # callers get two tensors, and may resize one
    rewriter.replace(node, source)
    return True


def _drop_noop_copy(rewriter: Rewriter, node: fx.Node) -> bool:
    """A copy with the same dtype and layout, when nobody could tell it from its source."""
    if not book.is_copy(node):
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = ir.tensor_of(source), ir.tensor_of(node)
    if before is None or after is None or not ir.same_layout(before, after):
        return False
    if not rewriter.may_share(node, source):
        return False
    rewriter.replace(node, source)
    return True


def _drop_add_zero(rewriter: Rewriter, node: fx.Node) -> bool:
    """Integer ``x + 0``: x.  (Floating point keeps it: -0.0 + 0 is 0.0.)"""
    if node.target is not aten.add.Tensor or not isinstance(node.args[1], int) or node.args[1] != 0:
        return False
    source = node.args[0]
    before, after = ir.tensor_of(source) if isinstance(source, fx.Node) else None, ir.tensor_of(node)
    if before is None or after is None or before.dtype.is_floating_point or before.dtype.is_complex:
        return False
    assert isinstance(source, fx.Node)
    if not ir.same_layout(before, after) or not rewriter.may_share(node, source):
        return False
    rewriter.replace(node, source)
    return True


def _spell_unsafe_view(rewriter: Rewriter, node: fx.Node) -> bool:
    if node.target is not aten._unsafe_view.default:
        return False
    node.target = aten.view.default
    return True


def _spell_convert(rewriter: Rewriter, node: fx.Node) -> bool:
    if node.target is not prims.convert_element_type.default:
        return False
    source, dtype = node.args
    node.target, node.args, node.kwargs = aten._to_copy.default, (source,), {"dtype": dtype}
    return True


def _spell_squeeze(rewriter: Rewriter, node: fx.Node) -> bool:
    """``squeeze`` of the dims that have size 1 for every length.  The others do not go where there is one row by
    chance: the last of a loop, say."""
    if node.target not in (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims):
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = ir.only_tensor(source), ir.only_tensor(node)
    given: Any = range(before.dim()) if node.target is aten.squeeze.default else node.args[1]
    dims = sorted({dim % max(before.dim(), 1) for dim in ((given,) if isinstance(given, int) else given)})
    gone = [dim for dim in dims if dim < before.dim() and ir.expr_of(before.shape[dim]) == 1]
    if len(gone) != before.dim() - after.dim():
        return False  # a size that only the data knows
    if gone:
        node.target, node.args = aten.squeeze.dims, (source, gone)
    else:
        rewriter.replace(node, source)
    return not gone


def _spell_as_strided(rewriter: Rewriter, node: fx.Node) -> bool:
    """``as_strided`` of a view -> of what it is a view of: it counts from where the storage begins, and a loop that
    keeps the view would give it a storage of its own."""
    if not isinstance(node.target, OpOverload) or not ir.reads_storage(node.target):
        return False
    view = node.args[0]
    assert isinstance(view, fx.Node)
    offset = ir.argument(node, "storage_offset")
    if offset is None:
        offset = ir.expr_of(ir.only_tensor(view).storage_offset())
        if not offset.is_Integer:
            return False
    source = view
    while (base := ir.alias_base(source)) is not None and ir.is_view(source) and ir.tensor_of(base) is not None:
        if ir.lazy_bits(ir.only_tensor(base)) != ir.lazy_bits(ir.only_tensor(view)):
            break
        source = base
    is_scatter = node.target is aten.as_strided_scatter.default  # its result has the layout of the operand
    if source is view or is_scatter or ir.only_tensor(source).dtype != ir.only_tensor(node).dtype:
        return False
    if isinstance(offset, sympy.Integer):
        offset = int(offset)
    size, stride = ir.argument(node, "size"), ir.argument(node, "stride")
    rewriter.replace(node, rewriter.put(node, node.target, source, size, stride, offset))
    return True


def _spell_scalar_product(rewriter: Rewriter, node: fx.Node) -> bool:
    """``mul.Scalar`` -> ``mul.Tensor``, which has an ``out=``."""
    if node.target is not aten.mul.Scalar:
        return False
    node.target = aten.mul.Tensor
    return True


def _spell_embedding(rewriter: Rewriter, node: fx.Node) -> bool:
    """``embedding(w, ids)`` -> ``index_select(w, 0, ids.view(-1)).view(*ids.shape, D)``: has an ``out=``."""
    if node.target is not aten.embedding.default:
        return False
    weight, indices = node.args[0], node.args[1]
    assert isinstance(weight, fx.Node)
    assert isinstance(indices, fx.Node)
    ids, out = ir.tensor_of(indices), ir.tensor_of(node)
    assert ids is not None
    assert out is not None
    if ids.dim() == 0:
        return False
    if not ir.is_contiguous(ids):
        indices = rewriter.put(node, aten.clone.default, indices, memory_format=torch.contiguous_format)
    if ids.dim() > 1:
        indices = rewriter.put(node, aten.view.default, indices, [-1])
    rows = rewriter.put(node, aten.index_select.default, weight, 0, indices)
    if ids.dim() > 1:
        shape = [_size(rewriter, node, node.args[1], dim) for dim in range(ids.dim())]
        shape.append(_size(rewriter, node, weight, 1))
        rows = rewriter.put(node, aten.view.default, rows, shape)
    rewriter.replace(node, rows)
    return True


def _size(rewriter: Rewriter, origin: fx.Node, tensor: Any, dim: int) -> Any:
    """A size as a graph argument: a plain int, or a ``sym_size`` node for a symbolic one."""
    value = ir.tensor_of(tensor)
    assert value is not None
    size = value.shape[dim]
    return rewriter.put(origin, aten.sym_size.int, tensor, dim) if ir.is_symbolic_number(size) else size


def _spell_masked_select(rewriter: Rewriter, node: fx.Node) -> bool:
    """``masked_select(x, m)`` with a mask of x's own shape -> ``x[m]``: one spelling for picking by a mask."""
    if node.target is not aten.masked_select.default:
        return False
    source, mask = node.args
    assert isinstance(source, fx.Node)
    assert isinstance(mask, fx.Node)
    before, chosen = ir.tensor_of(source), ir.tensor_of(mask)
    assert before is not None
    assert chosen is not None
    if not before.dim() or [ir.expr_of(s) for s in before.shape] != [ir.expr_of(s) for s in chosen.shape]:
        return False
    node.target, node.args = aten.index.Tensor, (source, [mask])
    return True


def _split_into_slices(rewriter: Rewriter, node: fx.Node) -> bool:
    """``split(x, size)[i]`` -> ``x[i * size : (i + 1) * size]``, ``unbind(x)[i]`` -> ``x[i]``: one spelling for parts
    of a tensor."""
    if not all(user.target is operator.getitem for user in node.users):
        return False
    if node.target is aten.unbind.int:
        for user in list(node.users):
            rewriter.replace(
                user, rewriter.put(user, aten.select.int, node.args[0], ir.argument(node, "dim"), user.args[1])
            )
        rewriter.graph.erase_node(node)
        return True
    if node.target in (aten.split_with_sizes.default, aten.unsafe_split_with_sizes.default):
        return _parts_into_slices(rewriter, node)
    if node.target not in (aten.split.Tensor, aten.unsafe_split.Tensor):
        return False
    source, size = node.args[:2]
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    for user in list(node.users):
        index = user.args[1]
        assert isinstance(index, int)
        start, end = rewriter.multiple(user, size, index), rewriter.multiple(user, size, index + 1)
        if index == len(ir.tensors_of(node)) - 1:
            end = sys.maxsize  # the last part is what is left
        rewriter.replace(user, rewriter.put(user, aten.slice.Tensor, source, dim, start, end))
    rewriter.graph.erase_node(node)
    return True


def _parts_into_slices(rewriter: Rewriter, node: fx.Node) -> bool:
    """``split(x, [a, b])[1]`` -> ``x[a : a + b]``, where sizes are numbers."""
    source, given = node.args[:2]
    assert isinstance(given, (list, tuple))
    sizes = [size for size in given if type(size) is int]
    if len(sizes) != len(given):
        return False
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    for user in list(node.users):
        index = user.args[1]
        assert isinstance(index, int)
        start = sum(sizes[:index])
        end = start + sizes[index]
        rewriter.replace(user, rewriter.put(user, aten.slice.Tensor, source, dim, start, end))
    rewriter.graph.erase_node(node)
    return True


def _drop_masked_nothing(rewriter: Rewriter, node: fx.Node) -> bool:
    """``masked_fill`` with a mask that is False everywhere: its operand."""
    if node.target not in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return False
    source, mask = node.args[:2]
    if not isinstance(source, fx.Node) or not isinstance(mask, fx.Node) or constant_of(mask) is not False:
        return False
    if not ir.same_layout(ir.only_tensor(source), ir.only_tensor(node)) or not rewriter.may_share(node, source):
        return False
    rewriter.replace(node, source)
    return True


def _spell_outer_product(rewriter: Rewriter, node: fx.Node) -> bool:
    """``bmm`` over one element (rotary angles: frequencies x positions) -> ``mul``: the same products, without a
    sum, and with row i depending on position i only."""
    if node.target not in (aten.bmm.default, aten.mm.default):
        return False
    left, right = node.args
    assert isinstance(left, fx.Node)
    tensor = ir.tensor_of(left)
    if tensor is None or not tensor.dtype.is_floating_point or ir.expr_of(tensor.shape[-1]) != 1:
        return False
    rewriter.replace(node, rewriter.put(node, aten.mul.Tensor, left, right))
    return True


def _drop_empty_cat(rewriter: Rewriter, node: fx.Node) -> bool:
    """``cat([empty, x])``, as a key/value cache does it that has seen nothing: x in a dense layout."""
    if node.target is not aten.cat.default:
        return False
    parts: Any = node.args[0]
    full = [part for part in parts if not _is_empty(part)]
    if len(full) != 1:
        return False
    source, out = full[0], ir.only_tensor(node)
    if ir.only_tensor(source).dtype != out.dtype or not ir.is_contiguous(out):
        return False
    copy = rewriter.put(node, aten.clone.default, source, memory_format=torch.contiguous_format)
    rewriter.replace(node, copy)
    _drop_noop_copy(rewriter, copy)
    return True


def _is_empty(node: fx.Node) -> bool:
    return any(ir.expr_of(size) == 0 for size in ir.only_tensor(node).shape)


_RULES: Sequence[Callable[[Rewriter, fx.Node], bool]] = (
    _drop_noop_view,
    _drop_noop_copy,
    _drop_add_zero,
    _spell_unsafe_view,
    _spell_convert,
    _spell_scalar_product,
    _spell_squeeze,
    _spell_as_strided,
    _spell_embedding,
    _spell_masked_select,
    _split_into_slices,
    _drop_empty_cat,
    join_written_slices,
    drop_true_mask,
    _drop_masked_nothing,
    drop_relayout,
    fold_repeated_heads,
    _spell_outer_product,
)
