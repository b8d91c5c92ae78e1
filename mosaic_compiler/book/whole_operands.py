"""Row rules of what reads keys, or experts, whole: attention and mixtures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.book.entry import Answer, Layout, Operand, Space
from mosaic_compiler.book.rows import ChunkSpace, aligned, is_taken_in_part, shape_of


def attention_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    """Query rows are independent; keys and values are needed whole.  Queries of different batch entries
    meet different keys, so rows must not span the batch (or heads); where batch entries are rows, keys and values have
    the same rows.  What a causal query sees depends on where it stands among all of them."""
    labels = (*layout, None) if output == 1 else layout
    if ir.argument(node, "is_causal") is not False:
        return None
    masks = [ir.argument(node, "attn_mask") or ir.argument(node, "attn_bias")]
    return _attended(node, output, labels, masks, space)


def interval_attention_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    """As of attention; the runs of keys that queries see are their own."""
    return _attended(node, output, layout, node.args[3:6], space)


def coded_attention_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    """As of attention of runs of keys; codes and the own keys of some rows are needed whole."""
    found = _attended(node, output, layout, node.args[8:11], space)
    if found is None:
        return None
    query, key, _, *masks = found
    theirs = key.layout and (key.layout[0],)
    whole: list[Any] = list(node.args[1:8])
    return [query, *(Operand(part, theirs and theirs + (None,) * (len(shape_of(part)) - 1)) for part in whole), *masks]


def _attended(node: fx.Node, output: int, labels: Layout, masks: Sequence[Any], space: Space) -> Answer:
    """``masks``: [entries, heads, queries, keys], each of which may be 1."""
    query, key, value = node.args[:3]
    if output > 1 or len(labels) != 4 or labels[1] is not None or labels[3] is not None:
        return None
    if labels[0] is not None and not isinstance(space, ChunkSpace):
        return None
    theirs: Layout | None = None
    if is_taken_in_part(labels[0], space):
        theirs = (labels[0], None, None, None)
        if labels != theirs:
            return None
    operands = [Operand(query, labels), Operand(key, theirs), Operand(value, theirs)]  # type: ignore[arg-type]
    operands += [
        Operand(mask, aligned(mask, (labels[0], None, labels[2], None))) for mask in masks if isinstance(mask, fx.Node)
    ]
    return operands


def mixture_rows(node: fx.Node, output: int, layout: Layout, space: Space) -> Answer:
    """A mixture of experts: each row of the result needs the same rows of some operands, and others whole."""
    parts, whole = node.args[:2]
    if any(label is not None for label in layout[1:]):
        return None
    found = [Operand(part, (layout[0], *[None] * (len(shape_of(part)) - 1))) for part in parts]  # type: ignore[union-attr, arg-type]
    return found + [Operand(part, None) for part in whole]  # type: ignore[union-attr, arg-type]
