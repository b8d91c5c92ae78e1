"""``needed-rows``: logits that the caller of a whole model declares unread become zeros."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from mosaic_compiler import book, ir
from mosaic_compiler.compat.symbols import hint_of, replace_symbol
from mosaic_compiler.compat.tracing import tree_flatten
from mosaic_compiler.ir.emitter import Emitter
from mosaic_compiler.ir.notes import STATIC_INPUTS, UNMET_ROWS
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes.base import Machine, Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class NeededRowsPass(Pass):
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

    @classmethod
    def of(cls, options: MosaicOptions, machine: Machine) -> NeededRowsPass:
        """As the options of the same names say."""
        return cls(options.needed_rows, options.mask_token_id)

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        if self.rows == "all":
            return module
        module = ir.copy_graph(module)
        found = _find(module)
        problem = found if isinstance(found, str) else _Rewriter(module, *found).rewrite(self)
        if problem and any(book.is_matmul(node) for node in module.graph.nodes):
            UNMET_ROWS.write(module, f"{problem}: every row is computed")
        module.graph.lint()
        module.recompile()
        return module


@dataclass(frozen=True)
class _Lookup:
    """Rows of an embedding table that an input says.

    Attributes:
        ids: the row numbers.
        given: the input that they come from.
        entries, width: of the table.
    """

    ids: fx.Node
    given: fx.Node
    entries: Any
    width: Any


def _find(module: fx.GraphModule) -> tuple[fx.Node, list[fx.Node]] | str:
    """Token ids and logits, or why they cannot be told."""
    floats, lookups = _floats(module.graph), list(_lookups(module))
    for as_wide_as_table in (True, False):
        found: dict[fx.Node, tuple[fx.Node, list[fx.Node]]] = {}
        for lookup in lookups:
            logits = [
                node
                for node in floats
                if _sizes(node)[:-1] == _sizes(lookup.ids)
                and _may_be_logits(node, lookup, as_wide_as_table)
                and ir.is_contiguous(ir.only_tensor(node))
            ]
            if logits:
                found.setdefault(lookup.given, (lookup.ids, logits))
        if len(found) > 1:
            names = " or ".join(given.name for given in found)
            return f"which input holds the token ids, {names}, cannot be told from their use"
        if found:
            return next(iter(found.values()))
    return "no output of this graph has one row of logits per token id that the graph looks up"


def token_ids_of(module: fx.GraphModule) -> int | None:
    """Which input holds token ids, by its position: the one that rows of a table are looked up by, if that is one."""
    given = {lookup.given for lookup in _lookups(module)}
    placeholders = module.graph.find_nodes(op="placeholder")
    return placeholders.index(given.pop()) if len(given) == 1 else None


def _may_be_logits(node: fx.Node, lookup: _Lookup, as_wide_as_table: bool) -> bool:
    columns = _sizes(node)[-1]
    return bool(columns == lookup.entries if as_wide_as_table else columns != lookup.width)


def settle_sizes(module: fx.GraphModule) -> None:
    """Let Dynamo guard on logits that have one row per token, where the example has and not every call need have.

    ``hidden[:, -logits_to_keep:]`` has all rows while the argument is 0; Dynamo takes it for a symbol k, and the rows
    for N + k.  With the guard that they are N, k is 0.  Sizes that differ by more than a symbol are left alone.
    """
    mode = ir.fake_mode_of(module)
    for lookup in _lookups(module) if mode is not None else ():
        rows = ir.only_tensor(lookup.ids).shape
        for node in _floats(module.graph):
            sizes = ir.only_tensor(node).shape[:-1]
            logits = any(_may_be_logits(node, lookup, wide) for wide in (True, False))
            if not logits or len(sizes) != len(rows) or None in (hints := [*map(_hint, (*sizes, *rows))]):
                continue
            if hints[: len(sizes)] != hints[len(sizes) :]:
                continue
            for size, extent in zip(sizes, rows, strict=True):
                difference = sympy.expand(ir.expr_of(size) - ir.expr_of(extent))
                lone = [s for s in difference.free_symbols if difference in (s, -s)]
                for symbol in lone if lone and size == extent else ():  # a guard from now on
                    replace_symbol(mode.shape_env, symbol, sympy.Integer(0), "one row of logits per token")


def _hint(size: Any) -> int | None:
    hint = hint_of(size)
    return None if hint is None else int(hint)


def _floats(graph: fx.Graph) -> list[fx.Node]:
    """Outputs with floating-point numbers, and more dims than one."""
    results, _ = tree_flatten(graph.output_node().args[0])
    tensors = {node: ir.tensor_of(node) for node in results if isinstance(node, fx.Node)}
    return [node for node, t in tensors.items() if t is not None and t.is_floating_point() and t.dim() > 1]


def _lookups(module: fx.GraphModule) -> Iterator[_Lookup]:
    """Lookups in tables by what the caller gives."""
    placeholders = module.graph.find_nodes(op="placeholder")
    static = {placeholders[index] for index in STATIC_INPUTS.of(module)}
    for node in module.graph.nodes:
        if node.target is aten.embedding.default:
            table, ids = node.args[:2]
            given = _origin(ids)
            if given.op == "placeholder" and given not in static and ir.tensor_of(given) is not None:
                yield _Lookup(ids, given, *_sizes(table))


def _origin(ids: fx.Node) -> fx.Node:
    """What ids are a view or a copy of."""
    while ids.op == "call_function" and ids.all_input_nodes and (ir.is_view(ids) or book.is_copy(ids)):
        ids = ids.all_input_nodes[0]
    return ids


def _sizes(node: fx.Node) -> list[Any]:
    return [ir.expr_of(size) for size in ir.only_tensor(node).shape]


class _Rewriter(Emitter):
    def __init__(self, module: fx.GraphModule, ids: fx.Node, logits: list[fx.Node]) -> None:
        super().__init__(module)
        self.ids, self.logits = ids, logits

    def rewrite(self, given: NeededRowsPass) -> str:
        """Returns what is in the way, if something is."""
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
                selected = self.emit(aten.where.self, needed, node, zero)
                if ir.layout_of(tensor) != ir.layout_of(ir.value_of(selected)):
                    return f"rows of {node.name} cannot be selected without another layout for some sizes"
                replaced[node] = selected
        output.args = fx.node.map_arg(output.args, lambda node: replaced.get(node, node))
        return ""

    def _in_front(self, masked: fx.Node) -> fx.Node:
        """bool [..., N]: the next position is masked; of position 0 also: it is masked itself."""
        last = ir.only_tensor(masked).dim() - 1
        first = self.emit(aten.slice.Tensor, masked, last, 0, 1)
        following = self.emit(aten.slice.Tensor, masked, last, 1)
        none = self.emit(aten.zeros_like.default, first)
        following = self.emit(aten.cat.default, [following, none], last)
        rest = self.emit(aten.zeros_like.default, self.emit(aten.slice.Tensor, masked, last, 1))
        return self.emit(aten.bitwise_or.Tensor, following, self.emit(aten.cat.default, [first, rest], last))
