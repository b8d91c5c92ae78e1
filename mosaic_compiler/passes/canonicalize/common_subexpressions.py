"""Equal pure operations become one; ``canonicalize`` does it last."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from mosaic_compiler import ir

aten = torch.ops.aten


# ------------------------------------------------------------------------ common subexpressions
def _hashable(value: Any) -> Any:
    """A key that tells 1, 1.0, True, -0.0 and 0.0 apart; NaN equals itself."""
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _hashable(value[key])) for key in sorted(value))
    if isinstance(value, float):
        return (float, value.hex() if math.isfinite(value) else repr(value))
    if ir.is_symbolic_number(value):
        return (type(value), ir.expr_of(value))
    return (type(value), value)


def merge_common_subexpressions(graph: fx.Graph) -> None:
    """Keep the first of equal pure nodes.  Escaping or written storage is left alone: callers may
    write one of two returned tensors, and must not see it in the other."""
    storage = ir.StorageMap(graph)
    pinned = ir.escaping_roots(graph, storage) | ir.written_roots(graph, storage)
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or ir.has_effect(node):
            continue
        if not isinstance(node.target, OpOverload) and node.target is not operator.getitem:
            continue
        if any(root in pinned for root in storage.roots(node)) and not ir.is_view(node):
            continue
        key = (node.target, _hashable(node.args), _hashable(dict(node.kwargs)))
        known = first.setdefault(key, node)
        if known is not node and not (ir.is_returned(known) and ir.is_returned(node)):
            node.replace_all_uses_with(known, propagate_meta=False)
            graph.erase_node(node)
