"""``split-attention``: attention over given keys and new ones behind them reads both where they are."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.ir.emitter import SizeEmitter
from mosaic_compiler.passes.base import Pass

aten = torch.ops.aten

CPU = aten._scaled_dot_product_flash_attention_for_cpu.default
FLASH = aten._scaled_dot_product_flash_attention.default
EFFICIENT = aten._scaled_dot_product_efficient_attention.default
CUDNN = aten._scaled_dot_product_cudnn_attention.default
_OPTIONS = ("attn_mask", "attn_bias", "is_causal", "dropout_p")


@dataclass(frozen=True)
class SplitAttentionPass(Pass):
    """Attend to the parts of a ``cat`` one by one, and weigh the results by their sums of exponentials.

    A cache that somebody else keeps is an input; models put their new keys behind it, and so copy it in every step, in
    every layer.  With the log of each part's sum of exponentials, l and m, the whole is ``sigmoid(l - m)`` of the first
    part's result and the rest of the second's.

    Requires: canonical form.  Guarantees: the same result, up to the rounding of another attention kernel; parts of a
    ``cat`` that is read by others, or made of nothing that is given, stay together.

    Before::

        out = attention(q, cat([k0, k], 2), cat([v0, v], 2))      # k0 and v0 are inputs

    After::

        first, l = attention(q, k0, v0)
        second, m = attention(q, k, v)
        share = sigmoid(l - m)
        out = first * share + second * (1 - share)
    """

    name: ClassVar[str] = "split-attention"

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        if not any(_parts(node) for node in module.graph.nodes):
            return module
        module = ir.copy_graph(module)
        emitter = SizeEmitter(module)
        for node in list(module.graph.nodes):
            if (parts := _parts(node)) is not None:
                _split(emitter, node, parts)
        ir.remove_dead_code(module.graph)
        module.graph.lint()
        module.recompile()
        return module


def _parts(node: fx.Node) -> list[tuple[fx.Node, fx.Node]] | None:
    """Keys and values of the two parts, if there are two, and the first is given."""
    if node.target not in (CPU, FLASH, EFFICIENT, CUDNN):
        return None
    if any(ir.argument(node, name) for name in _OPTIONS):
        return None
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        return None
    _, key, value = node.args[:3]
    keys, values = _joined(key, node), _joined(value, node)
    if keys is None or values is None or not (_is_given(keys[0]) and _is_given(values[0])):
        return None
    pairs = list(zip(keys, values, strict=True))
    lengths = [[ir.expr_of(ir.only_tensor(part).shape[2]) for part in pair] for pair in pairs]
    return pairs if any(one == other for one, other in lengths) else None  # one pair, then both: the sums are equal


def _joined(operand: Any, reader: fx.Node) -> list[fx.Node] | None:
    """The two parts of a ``cat`` along keys that nobody else reads."""
    if operand.target is not aten.cat.default or any(user is not reader for user in operand.users):
        return None
    parts: Any = operand.args[0]
    if ir.argument(operand, "dim") not in (2, -2) or len(parts) != 2:
        return None
    dtype = ir.only_tensor(operand).dtype
    return list(parts) if all(ir.only_tensor(part).dtype == dtype for part in parts) else None


def _is_given(node: fx.Node) -> bool:
    while ir.is_view(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node.op in ("placeholder", "get_attr")


def _split(emitter: SizeEmitter, node: fx.Node, parts: Sequence[tuple[fx.Node, fx.Node]]) -> None:
    emitter.origin = node
    out = ir.tensors_of(node)[0]
    assert out is not None
    scale = node.kwargs.get("scale")
    with emitter.graph.inserting_before(node):
        (first, one), (second, two) = (_attended(emitter, node, *part, scale) for part in parts)
        share = emitter.emit(aten.sigmoid.default, emitter.emit(aten.sub.Tensor, one, two))
        share = emitter.emit(aten.unsqueeze.default, share, -1)
        wide = [_as(emitter, result, ir.only_tensor(share).dtype) for result in (first, second)]
        step = emitter.emit(aten.mul.Tensor, emitter.emit(aten.sub.Tensor, *wide), share)
        merged = _as(emitter, emitter.emit(aten.add.Tensor, wide[1], step), out.dtype)
        merged = emitter.laid_out(merged, ir.memory_order(out))
    for user in list(node.users):
        user.replace_all_uses_with(merged, propagate_meta=False)


def _as(emitter: SizeEmitter, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if ir.only_tensor(node).dtype == dtype else emitter.emit(aten._to_copy.default, node, dtype=dtype)


def _attended(emitter: SizeEmitter, node: fx.Node, key: fx.Node, value: fx.Node, scale: Any) -> tuple[fx.Node, fx.Node]:
    """The result of one part, and the log of its sums of exponentials [B, H, M]."""
    query = node.args[0]
    assert isinstance(query, fx.Node)
    named = {} if scale is None else {"scale": scale}
    if node.target is EFFICIENT:
        found = emitter.emit(EFFICIENT, query, key, value, None, True, **named)
    elif node.target is CUDNN:
        found = emitter.emit(FLASH, query, key, value, **named)
    else:
        found = emitter.emit(node.target, query, key, value, **named)
    out, sums = (emitter.emit_getitem(found, index) for index in (0, 1))
    if node.target is EFFICIENT:  # whose sums are padded
        rows = emitter.size(ir.expr_of(ir.only_tensor(query).shape[2]))
        sums = emitter.emit(aten.slice.Tensor, sums, 2, 0, rows)
    return out, sums
