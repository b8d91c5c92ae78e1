"""What attentions read whole, as ``[batch, heads, rows, depth]``: where keys can be chosen, and codes read."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.book import rows
from mosaic_compiler.ir import ops
from mosaic_compiler.passes.split_attention import CPU, CUDNN, EFFICIENT, FLASH
from mosaic_compiler.passes.state.coding import Coding, coding_of
from mosaic_compiler.passes.state.cut import Cut, find_cut, layers_of
from mosaic_compiler.planning.precisions import precision_at
from mosaic_compiler.planning.selection import Selection


@dataclass(frozen=True)
class Attended:
    """One attention, and what it reads whole.

    Attributes:
        node: it.
        parts: keys and values [B, G, N, d].
        codings: how those are written.
    """

    node: fx.Node
    parts: tuple[fx.Node, fx.Node]
    codings: tuple[Coding, ...] = ()

    def key_nbytes(self, selection: Selection) -> sympy.Expr:
        """Bytes of one chosen key: of its position, for each head or for the layer, and of its parts, unless all keys
        are kept."""
        entries, heads, length, _ = map(ir.expr_of, rows.shape_of(self.parts[0]))
        parts = [coding.nbytes(part) for part, coding in zip(self.parts, self.codings, strict=True)]
        positions = 8 * entries * (heads if selection.sets == "head" else 1)
        return positions + (sympy.cancel(sympy.Add(*parts) / length) if selection.evicts else 0)

    @property
    def scale(self) -> Any:
        """Of its scores."""
        return self.node.args[6] if self.node.target is ops.interval_attention else self.node.kwargs.get("scale")

    def bounds(self, more: Sequence[Any]) -> Sequence[Any]:
        """First and last keys that queries see, and which of those count: of what the attention takes behind keys and
        values; ``None`` each where it sees all."""
        return more[:3] if self.node.target is ops.interval_attention else (None, None, None)

    @property
    def order(self) -> Sequence[int]:
        """Of its result's dims in memory."""
        result = ir.tensors_of(self.node)[0]
        assert result is not None
        return ir.memory_order(result)

    @property
    def reads_codes(self) -> bool:
        """Keys and values have codes and scales, and nothing but the result is asked for."""
        is_one = len({coding.precision for coding in self.codings}) == 1
        has_scales = is_one and all(coding.has_scales for coding in self.codings)
        return has_scales and all(user.args[1] == 0 for user in self.node.users if user.target is operator.getitem)


def attended_in(cut: Cut, precision: str | None) -> tuple[list[Attended], str]:
    """The attentions whose keys and values a graph keeps, and why keys cannot be chosen for them, if so."""
    found: list[Attended] = []
    for layer, node in layers_of(cut):
        each, problem = _attended(node, cut, precision_at(precision, layer))
        if each is None:
            return [], problem
        found.append(each)
    return found, ""


def cut_for(graph: fx.Graph, precision: str | None) -> Cut:
    """The cut of a canonical graph; where codes are kept, what attentions read is kept as they read it, so that they
    can read codes."""
    cut = find_cut(graph)
    if precision is None or cut.problem:
        return cut
    kept_as = dict(cut.kept_as)
    for layer, node in layers_of(cut):
        each, _ = _attended(node, cut, precision_at(precision, layer))
        for part in each.parts if each is not None and each.reads_codes else ():
            value = kept_as[part]
            is_alone = sum(other is value for other in kept_as.values()) == 1
            if is_alone and _numbers(part) == _numbers(value):
                kept_as[part] = part
    values = set(kept_as.values())
    order = tuple(node for node in graph.nodes if node in values)
    return replace(cut, values=order, kept_as=tuple(kept_as.items()))


def reading_codes(cut: Cut, precision: str | None, codings: Mapping[fx.Node, Coding]) -> dict[fx.Node, Attended]:
    """The attentions of such a cut that read codes of what is kept, as that is written (another layer may have said
    how)."""
    kept = set(cut.values)
    layers = layers_of(cut) if precision is not None else ()
    each = [_attended(node, cut, precision_at(precision, layer))[0] for layer, node in layers]
    return {
        one.node: one
        for one in each
        if one is not None and one.reads_codes and kept.issuperset(one.parts)
        if one.codings == tuple(codings[part] for part in one.parts)
    }


def _attended(node: fx.Node, cut: Cut, precision: str | None) -> tuple[Attended | None, str]:
    operands = [operand for operand, _ in cut.kept_as]
    if node.target not in (CPU, FLASH, EFFICIENT, CUDNN, ops.interval_attention):
        return None, f"{node.name} ({node.target}) reads all rows of what it takes, and is no attention"
    named = ("attn_mask", "attn_bias", "is_causal", "dropout_p")
    if node.target is not ops.interval_attention and any(ir.argument(node, name) for name in named):
        return None, f"the mask of {node.name} is no run of keys, so that nothing can be chosen of them"
    parts, codings = [], []
    for operand in node.args[1:3]:
        assert isinstance(operand, fx.Node)
        if operand not in operands or operand not in cut.inside or not _lies_as_it_should(operand, cut):
            return None, f"{operand.name}, which {node.name} reads, is no [batch, heads, rows, depth] that is computed"
        coding, problem = coding_of(operand, precision, 3, int(ir.only_tensor(operand).shape[3]))
        if problem:
            return None, problem
        parts.append(operand)
        codings.append(coding)
    return Attended(node, (parts[0], parts[1]), tuple(codings)), ""


def _lies_as_it_should(value: fx.Node, cut: Cut) -> bool:
    expected = (0, None, 1, None) if len(cut.space) > 1 else (None, None, 0, None)
    entries, _, _, depth = map(ir.expr_of, rows.shape_of(value))
    is_one = len(cut.space) > 1 or entries == 1
    return cut.labels.layout(value) == expected and is_one and depth.is_Integer


def _numbers(value: fx.Node) -> sympy.Expr:
    return sympy.prod([ir.expr_of(size) for size in rows.shape_of(value)])
