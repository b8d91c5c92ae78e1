"""How ``canonicalize`` spells attention: no masks that hide nothing, repeated heads, or copies of keys and values."""

from __future__ import annotations

import torch
from torch import fx
from torch._ops import OpOverload

from mosaic_compiler import book, ir
from mosaic_compiler.passes.canonicalize.rewriter import Rewriter
from mosaic_compiler.passes.constants import constant_of

aten = torch.ops.aten


def drop_true_mask(rewriter: Rewriter, node: fx.Node) -> bool:
    """An attention mask that is True (or, as a bias, 0) everywhere changes nothing."""
    name = book.entry(node).mask
    if name is None:
        return False
    assert isinstance(node.target, OpOverload)
    arguments = node.target._schema.arguments
    position = next(i for i, a in enumerate(arguments) if a.name == name)
    positional = position < len(node.args)
    mask = node.args[position] if positional else node.kwargs.get(name)
    if not isinstance(mask, fx.Node):
        return False
    value, tensor = constant_of(mask), ir.tensor_of(mask)
    assert tensor is not None
    if value is None or (value is not True if tensor.dtype == torch.bool else value != 0):
        return False
    if positional:
        node.update_arg(position, None)
    else:
        node.update_kwarg(name, None)
    return False  # other rules may still apply to this node


def fold_repeated_heads(rewriter: Rewriter, node: fx.Node) -> bool:
    """``attention(q, repeat(k), repeat(v))`` -> ``attention(q, k, v)`` where the kernel groups heads."""
    if not book.entry(node).groups_heads:
        return False
    key, value = node.args[1], node.args[2]
    assert isinstance(key, fx.Node)
    assert isinstance(value, fx.Node)
    short_key, short_value = _unrepeated(key), _unrepeated(value)
    if short_key is None or short_value is None:
        return False
    shapes = [ir.tensor_of(short_key), ir.tensor_of(short_value)]
    if shapes[0] is None or shapes[1] is None or shapes[0].shape[1] != shapes[1].shape[1]:
        return False
    node.update_arg(1, short_key)
    node.update_arg(2, short_value)
    return False


def _unrepeated(node: fx.Node) -> fx.Node | None:
    """k of ``view(clone(expand(unsqueeze(k, 2), [B, H, n, N, D])), [B, H * n, N, D])``, else ``None``."""
    if node.target is not aten.view.default:
        return None
    spread = node.args[0]
    if isinstance(spread, fx.Node) and spread.target is aten.clone.default:
        spread = spread.args[0]
    if not isinstance(spread, fx.Node) or spread.target is not aten.expand.default:
        return None
    unsqueeze = spread.args[0]
    if not isinstance(unsqueeze, fx.Node) or unsqueeze.target is not aten.unsqueeze.default:
        return None
    source = unsqueeze.args[0]
    if unsqueeze.args[1] not in (2, -3) or not isinstance(source, fx.Node):
        return None
    inner, wide, outer = ir.tensor_of(source), ir.tensor_of(spread), ir.tensor_of(node)
    if inner is None or wide is None or outer is None or inner.dim() != 4 or outer.dim() != 4:
        return None
    same = [ir.expr_of(inner.shape[i]) == ir.expr_of(outer.shape[i]) for i in (0, 2, 3)]
    heads = ir.expr_of(wide.shape[1]) == ir.expr_of(inner.shape[1])
    return source if all(same) and heads else None


def drop_relayout(rewriter: Rewriter, node: fx.Node) -> bool:
    """``attention(q, k.contiguous(), v.contiguous())``: the kernels read keys and values in any layout."""
    if not book.is_attention(node):
        return False
    for position in (1, 2):
        copy = node.args[position]
        if not isinstance(copy, fx.Node) or copy.target is not aten.clone.default:
            continue
        source = copy.args[0]
        assert isinstance(source, fx.Node)
        before = ir.only_tensor(source)
        if ir.expr_of(before.stride(-1)) == 1 and not rewriter.is_pinned(source):
            node.update_arg(position, source)
    return False
