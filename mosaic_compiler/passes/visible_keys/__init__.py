"""``visible-keys``: attention is told which run of keys each query sees, instead of a mask for all pairs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from mosaic_compiler import book, ir
from mosaic_compiler.compat.symbols import FloorDiv, Max, Min
from mosaic_compiler.ir import ops
from mosaic_compiler.ir.emitter import SizeEmitter
from mosaic_compiler.ir.sizes import UnreadableSizeError
from mosaic_compiler.passes.base import Pass
from mosaic_compiler.passes.visible_keys.formulas import Element, OpaqueError
from mosaic_compiler.passes.visible_keys.intervals import ENTRY, KEY, Visibility, visibility_of
from mosaic_compiler.planning.reach import QUERY

aten = torch.ops.aten

__all__ = ["VisibleKeysPass", "hides_keys", "visible"]


@dataclass(frozen=True)
class VisibleKeysPass(Pass):
    """Replace masks whose arithmetic says that each query sees a run of keys: causal, block by block, windows, and
    any of these with keys that are left out (padding).  Nothing of [N, N] is left of them.

    A mask that is something else stays as it is.

    Requires: a canonical graph.  Guarantees: the same results, but for the order in which keys are summed up.

    Before::

        block = arange(n) // 32
        attention(q, k, v, mask=where(block[:, None] >= block[None, :], 0, -inf))

    After::

        last = arange(n) // 32 * 32 + 32                    # [1, 1, n, 1]
        mosaic.interval_attention(q, k, v, None, last, None, scale)
    """

    name: ClassVar[str] = "visible-keys"

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        seen = {node: what for node in module.graph.nodes if (what := visible(node)) is not None}
        if not seen:
            return module
        names = {node.name: what for node, what in seen.items()}
        module = ir.copy_graph(module)
        rewriter = _Rewriter(module)
        for node in list(module.graph.nodes):
            if node.name in names:
                rewriter.rewrite(node, names[node.name])
        ir.remove_dead_code(module.graph)
        module.graph.lint()
        module.recompile()
        return module


def hides_keys(graph: fx.Graph) -> bool:
    """Some attention is causal, or has a mask: it might be that rows do not see all others."""
    attentions = [node for node in graph.nodes if book.is_attention(node)]
    return any(_mask_of(node) is not None or ir.argument(node, "is_causal") for node in attentions)


def _mask_of(node: fx.Node) -> Any:
    return ir.argument(node, "attn_mask") or ir.argument(node, "attn_bias") or ir.argument(node, "last")


def visible(node: fx.Node) -> Visibility | None:
    """What the queries of a masked (or causal) attention see; ``None`` for other nodes, and where that is no run of
    keys, or a mask for all queries alike says it already."""
    if not book.is_attention(node) or node.target is ops.interval_attention:
        return None
    if ir.argument(node, "dropout_p") or any(user.args[1] != 0 for user in node.users):
        return None
    mask = _mask_of(node)
    sizes = [[ir.expr_of(size) for size in ir.only_tensor(operand).shape] for operand in node.args[:3]]  # type: ignore[arg-type]
    (entries, _, queries, depth), (_, _, keys, _), (*_, value_depth) = sizes
    if depth != value_depth:
        return None
    if ir.argument(node, "is_causal"):
        return Visibility(last=QUERY + 1) if mask is None and queries == keys else None
    if not isinstance(mask, fx.Node):
        return None
    rows = ir.only_tensor(mask).shape[-2:-1]
    if not rows or ir.expr_of(rows[0]) == 1:
        return None
    try:
        found = visibility_of(mask, queries, keys, entries)
    except OpaqueError:
        return None
    return found if all(_is_told(element, keys) for element in found.only) else None


def _is_told(element: Element, keys: sympy.Expr) -> bool:
    """Keys that count, as a tensor that has one place for each of them, and perhaps for each entry."""
    sizes = [ir.expr_of(size) for size in ir.only_tensor(element.node).shape]
    places = [at for at in element.index if at in (ENTRY, KEY)]
    others = [at for at in element.index if at not in (ENTRY, KEY)]
    is_whole = KEY in places and sizes[element.index.index(KEY)] == keys
    return is_whole and len(set(places)) == len(places) and all(at.is_Integer and at >= 0 for at in others)


class _Rewriter(SizeEmitter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self._device = ir.main_device_of(module)
        self._bounds: dict[Any, fx.Node] = {}
        self._values: dict[tuple[sympy.Expr, sympy.Expr], Any] = {}

    def rewrite(self, node: fx.Node, seen: Visibility) -> None:
        """Another attention in place of a node, whose result nobody reads then."""
        if seen.sees_all:
            _drop_mask(node)
            return
        query, key, value = node.args[:3]
        assert isinstance(query, fx.Node)
        queries = ir.expr_of(ir.only_tensor(query).shape[2])
        self.origin = node
        result = ir.tensors_of(node)[0]
        assert result is not None
        scale = ir.argument(node, "scale")
        with self.graph.inserting_before(node):
            try:
                first, last = (self._bound(number, queries) for number in (seen.first, seen.last))
            except UnreadableSizeError:
                return
            only = self._counting(seen.only)
            attended = self.emit(
                ops.interval_attention, query, key, value, first, last, only, scale, ir.memory_order(result)
            )
        for user in list(node.users):
            user.replace_all_uses_with(attended)
        if ir.layout_of(ir.value_of(attended)) != ir.layout_of(result):
            self.propagate({attended})

    # ---------------------------------------------------------------------------------------- bounds
    def _bound(self, number: sympy.Expr | None, queries: sympy.Expr) -> fx.Node | None:
        """int64 [1, 1, M, 1] (or 1 for all queries): an expression of their positions."""
        if number is None:
            return None
        if (number, queries) not in self._bounds:
            at = self._value(number, queries)
            if not isinstance(at, fx.Node) or ir.tensor_of(at) is None:
                at = self.emit(aten.full.default, [1, 1, 1, 1], at, dtype=torch.int64, device=self._device)
            self._bounds[number, queries] = at
        return self._bounds[number, queries]

    def _value(self, number: sympy.Expr, queries: sympy.Expr) -> Any:
        """A tensor [1, 1, M, 1], or a size where positions have no part in it."""
        if QUERY not in number.free_symbols:
            return self.size(number)
        if number == QUERY:
            if (QUERY, queries) not in self._values:
                at = self.emit(aten.arange.default, self.size(queries), device=self._device, pin_memory=False)
                for dim in (0, 0, 3):
                    at = self.emit(aten.unsqueeze.default, at, dim)
                self._values[QUERY, queries] = at
            return self._values[QUERY, queries]
        if (number, queries) in self._values:
            return self._values[number, queries]
        combine, parts = self._parts(number)
        result, *rest = (self._value(part, queries) for part in parts)
        for part in rest:
            result = combine(result, part)
        self._values[number, queries] = result
        return result

    def _parts(self, number: sympy.Expr) -> tuple[Callable[[Any, Any], Any], tuple[sympy.Expr, ...]]:
        if number.is_Add:
            return self._add, number.args
        if number.is_Mul:
            return self._multiply, number.args
        if isinstance(number, FloorDiv):
            return lambda a, b: self.emit(aten.floor_divide.default, a, b), number.args
        if isinstance(number, (Max, Min)):
            return (self._larger if isinstance(number, Max) else self._smaller), number.args
        raise UnreadableSizeError(str(number))

    def _add(self, a: Any, b: Any) -> Any:
        return self._arithmetic(aten.add.Tensor, operator.add, a, b)

    def _multiply(self, a: Any, b: Any) -> Any:
        return self._arithmetic(aten.mul.Tensor, operator.mul, a, b)

    def _larger(self, a: Any, b: Any) -> Any:
        return self._extreme(aten.maximum.default, aten.clamp_min.default, torch.sym_max, a, b)

    def _smaller(self, a: Any, b: Any) -> Any:
        return self._extreme(aten.minimum.default, aten.clamp_max.default, torch.sym_min, a, b)

    def _arithmetic(self, target: Any, plain: Any, a: Any, b: Any) -> Any:
        if not _is_tensor(a):
            a, b = b, a
        return self.emit(target, a, b) if _is_tensor(a) else self.arithmetic(plain, a, b)

    def _extreme(self, of_two: Any, limit: Any, plain: Any, a: Any, b: Any) -> Any:
        if _is_tensor(a) and _is_tensor(b):
            return self.emit(of_two, a, b)
        return self._arithmetic(limit, plain, a, b)

    # ------------------------------------------------------------------------------ keys that count
    def _counting(self, elements: tuple[Element, ...]) -> fx.Node | None:
        """bool [1 or B, 1, 1, N]"""
        if not elements:
            return None
        if elements not in self._bounds:
            result, *rest = map(self._places, elements)
            for other in rest:
                result = self.emit(aten.bitwise_and.Tensor, result, other)
            self._bounds[elements] = result
        return self._bounds[elements]

    def _places(self, element: Element) -> fx.Node:
        node = next(found for found in self.graph.nodes if found.name == element.node.name)
        index = list(element.index)
        for dim in reversed(range(len(index))):
            if index[dim] not in (ENTRY, KEY):
                node = self.emit(aten.select.int, node, dim, int(index.pop(dim)))
        if index == [KEY, ENTRY]:
            node = self.emit(aten.transpose.int, node, 0, 1)
        for _ in range(4 - len(index)):
            node = self.emit(aten.unsqueeze.default, node, len(index) - 1 if ENTRY in index else 0)
        return self.emit(aten.bitwise_not.default, node) if element.is_negated else node


def _drop_mask(node: fx.Node) -> None:
    """A mask that hides nothing, whatever the sizes are."""
    assert isinstance(node.target, OpOverload)
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name in ("attn_mask", "attn_bias"):
            if position < len(node.args):
                node.update_arg(position, None)
            else:
                node.update_kwarg(argument.name, None)


def _is_tensor(given: Any) -> bool:
    return isinstance(given, fx.Node) and ir.tensor_of(given) is not None
