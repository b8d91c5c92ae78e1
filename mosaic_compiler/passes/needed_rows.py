"""``needed-rows``: logits that the caller of a whole model declares unread become zeros."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.passes.rows import MATMULS
from mosaic_compiler.passes.selectors import Emitter

aten = torch.ops.aten

CHOICES = ("all", "masked", "before_masked")


@dataclass(frozen=True)
class NeededRowsPass:
    """Zero the logits of rows that are not needed, so that ``row-demand`` need not compute them.

    For people who compile a model and keep their own generate loop: the graph alone says that the caller gets all
    logits, and only the caller knows which of them it reads.

    Attributes:
        rows: ``all``; ``masked``: rows of positions that hold the mask token (LLaDA); ``before_masked``: rows in front
            of such positions, and row 0 where position 0 is masked itself (Dream predicts position n from row n - 1).
        mask: the mask token's id.

    Token ids are what looks up rows of an embedding table; logits are the floating-point outputs with one row per
    token and one column per entry of the table (or, if there are none, another width than the table's).

    Requires: the captured graph.  Guarantees: needed rows of the logits, and all other outputs, are the same.
    This is the one pass that changes outputs, and only where it is asked to.

    Before::

        return view(mm(h, head))                                      # logits [B, N, V]

    After::

        needed = unsqueeze(eq(ids, mask), -1)                         # [B, N, 1]
        return where(needed, view(mm(h, head)), 0)
    """

    rows: str = "all"
    mask: int | None = None
    name: ClassVar[str] = "needed-rows"

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        module = ir.copy_graph(module)
        if self.rows != "all":
            found = _find(module.graph)
            if found is not None:
                _Rewriter(module, *found).rewrite(self)
            elif any(node.target in MATMULS for node in module.graph.nodes):
                module.meta["needed_rows_problem"] = (
                    "no output of this graph has one row of logits per token id that the graph looks up: every row "
                    "is computed"
                )
        module.graph.lint()
        module.recompile()
        return module


def _find(graph: fx.Graph) -> tuple[fx.Node, list[fx.Node]] | None:
    """Token ids and logits."""
    floats, lookups = _floats(graph), list(_lookups(graph))
    for as_wide_as_table in (True, False):
        for ids, entries, width in lookups:
            logits = [
                node
                for node in floats
                if _sizes(node)[:-1] == _sizes(ids)
                and (_sizes(node)[-1] == entries if as_wide_as_table else _sizes(node)[-1] != width)
                and ir.is_contiguous(ir.only_tensor(node))
            ]
            if logits:
                return ids, logits
    return None


def settle_sizes(module: fx.GraphModule) -> None:
    """Let Dynamo guard on logits that have one row per token, where the example has and not every call need have.

    ``hidden[:, -logits_to_keep:]`` has all rows while the argument is 0; Dynamo takes it for a symbol.
    """
    environment = ir.fake_mode_of(module).shape_env
    for ids, _, _ in _lookups(module.graph):
        rows = ir.only_tensor(ids).shape
        for node in _floats(module.graph):
            sizes = ir.only_tensor(node).shape[:-1]
            if len(sizes) == len(rows) and list(map(_hint, sizes)) == list(map(_hint, rows)):
                for size, extent in zip(sizes, rows, strict=True):
                    if size == extent:  # a guard from now on; sizes get one name as well
                        difference = sympy.expand(ir.expr_of(size) - ir.expr_of(extent))
                        for symbol in difference.free_symbols - ir.expr_of(extent).free_symbols:
                            (value,) = sympy.solve(difference, symbol)
                            environment._set_replacement(symbol, value, "one row of logits per token")


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _floats(graph: fx.Graph) -> list[fx.Node]:
    """Outputs with floating-point numbers."""
    results, _ = torch.utils._pytree.tree_flatten(graph.output_node().args[0])
    tensors = {node: ir.tensor_of(node) for node in results if isinstance(node, fx.Node)}
    return [node for node, tensor in tensors.items() if tensor is not None and tensor.is_floating_point()]


def _lookups(graph: fx.Graph) -> Iterator[tuple[fx.Node, Any, Any]]:
    """Indices into tables that follow from an input, with the entries and the width of the table."""
    for node in graph.nodes:
        if node.target is aten.embedding.default:
            table, ids = node.args[:2]
            if _is_given(ids):
                yield ids, *_sizes(table)


def _is_given(ids: fx.Node) -> bool:
    """An input, perhaps in another form."""
    while ids.op == "call_function" and len(ids.all_input_nodes) >= 1 and (ir.is_view(ids) or _is_copy(ids)):
        ids = ids.all_input_nodes[0]
    return ids.op == "placeholder"


def _is_copy(node: fx.Node) -> bool:
    return node.target in (aten.clone.default, aten._to_copy.default)


def _sizes(node: fx.Node) -> list[Any]:
    return [ir.expr_of(size) for size in ir.only_tensor(node).shape]


class _Rewriter(Emitter):
    def __init__(self, module: fx.GraphModule, ids: fx.Node, logits: list[fx.Node]) -> None:
        super().__init__(module)
        self.ids, self.logits = ids, logits

    def rewrite(self, given: NeededRowsPass) -> None:
        output = self.graph.output_node()
        with self.graph.inserting_before(output):
            needed = self.emit(aten.eq.Scalar, self.ids, given.mask)
            if given.rows == "before_masked":
                needed = self._in_front(needed)
            needed = self.emit(aten.unsqueeze.default, needed, -1)
            replaced = {}
            for node in self.logits:
                self.origin, tensor = node, ir.only_tensor(node)
                zero = self.emit(aten.full.default, [], 0, dtype=tensor.dtype, device=tensor.device, pin_memory=False)
                replaced[node] = self.emit(aten.where.self, needed, node, zero)
        output.args = fx.node.map_arg(output.args, lambda node: replaced.get(node, node))

    def _in_front(self, masked: fx.Node) -> fx.Node:
        """bool [..., N]: the next position is masked; of position 0 also: it is masked itself."""
        last = ir.only_tensor(masked).dim() - 1
        first = self.emit(aten.slice.Tensor, masked, last, 0, 1)
        following = self.emit(aten.slice.Tensor, masked, last, 1)
        none = self.emit(aten.zeros_like.default, first)
        following = self.emit(aten.cat.default, [following, none], last)
        rest = self.emit(aten.zeros_like.default, self.emit(aten.slice.Tensor, masked, last, 1))
        return self.emit(aten.bitwise_or.Tensor, following, self.emit(aten.cat.default, [first, rest], last))
