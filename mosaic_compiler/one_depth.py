"""Attention whose values have another depth than its keys (DeepSeek's) gets one depth, before AOTAutograd.

    attend(query [.., M, 192], key [.., N, 192], value [.., N, 128])
    ->  attend(query, key, pad(value, 192))[.., :128]                     zeros give zeros

AOTAutograd picks the attention kernel while it traces.  The fast ones want one depth; for two it falls back to scores
[H, M, N], op by op: quadratic memory, and nothing that could be kept from step to step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from mosaic_compiler.compat.tensors import scaled_dot_product_attention

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def give_one_depth(module: fx.GraphModule) -> fx.GraphModule:
    """Pad the shallower operands of the graph's attention calls with zeros (in place)."""
    found = [node for node in module.graph.nodes if node.target is scaled_dot_product_attention]
    changed = [node for node in found if _pad(node)]
    if changed:
        module.recompile()
    return module


def _pad(node: fx.Node) -> bool:
    """Whether there was something to pad."""
    given: dict[str, Any] = {**dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}
    depths = [_depth(given.get(name)) for name in _NAMES[:3]]
    of_query, of_key, of_value = depths
    if of_query is None or of_query != of_key or of_value is None or of_value == of_key:
        return False
    depth = max(of_key, of_value)
    with node.graph.inserting_before(node):
        for name, own in zip(_NAMES, depths, strict=False):
            assert own is not None
            if own < depth:
                given[name] = node.graph.call_function(torch.nn.functional.pad, (given[name], (0, depth - own)))
    if given.get("scale") is None:
        given["scale"] = 1 / math.sqrt(of_key)
    node.args, node.kwargs = (), given
    if of_value < depth:
        with node.graph.inserting_after(node):
            narrow = node.graph.call_function(torch.narrow, (node, -1, 0, of_value))
        node.replace_all_uses_with(narrow, delete_user_cb=lambda user: user is not narrow)
        narrow.meta = dict(node.meta)
        _lay_out(narrow)
    return True


def _lay_out(narrow: fx.Node) -> None:
    """As eager's result lies in memory: somebody may take a view of it."""
    value = narrow.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return
    swapped = value.dim() > 2 and not value.is_contiguous() and value.transpose(-3, -2).is_contiguous()
    if not swapped and not value.is_contiguous():
        return
    graph, at = narrow.graph, narrow
    with graph.inserting_after(narrow):
        steps = ["transpose", "contiguous", "transpose"] if swapped else ["contiguous"]
        made = [graph.call_method(step, ()) for step in reversed(steps)][::-1]
    narrow.replace_all_uses_with(made[-1])
    for call in made:
        call.args = (at, -3, -2) if call.target == "transpose" else (at,)
        at = call
    made[-1].meta = dict(narrow.meta)


def _depth(operand: Any) -> int | None:
    value = operand.meta.get("example_value") if isinstance(operand, fx.Node) else None
    if not isinstance(value, torch.Tensor) or not value.dim():
        return None
    size = value.shape[-1]
    return size if isinstance(size, int) else None
