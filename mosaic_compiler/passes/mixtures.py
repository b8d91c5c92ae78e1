"""``mixtures``: a mixture of experts becomes one operator, which is row-parallel as a whole."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from mosaic_compiler import book, ir
from mosaic_compiler.book import rows
from mosaic_compiler.ir import ops
from mosaic_compiler.ir.emitter import Emitter
from mosaic_compiler.passes.base import Pass
from mosaic_compiler.planning.mixture import MixtureStep, Program

aten = torch.ops.aten

GROUPED = ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")
"""Products of rows [n, a], group by group, with matrices [groups, a, b]; where groups end says the third operand.  The
second one is what transformers calls where PyTorch's takes no such dtype: a product for each group, and no memory but
the result's."""


@dataclass(frozen=True)
class MixturesPass(Pass):
    """Put the ops of a mixture of experts into one: rows are sorted by expert, multiplied group by group, sorted back.

    No row inside belongs to a row outside, so without this every op there needs all rows.  As a whole it does not:
    found is a sort of experts' numbers, values whose rows stand in its order (rows that are taken by its positions,
    results of grouped products whose groups are its counts, and whatever computes row by row on those), and the way
    back.

    Requires: a canonical graph.  Guarantees: the same results.

    Before::

        order = sort(experts.view(-1)).indices
        h = grouped_mm(x[order // k], w, counts(experts))
        back = index_put(empty, [order], arange(n * k))
        y = h[back].view(n, k, d).sum(1)

    After::

        y = mosaic.mixture([x, experts], [w], program)        # the same ops, as data
    """

    name: ClassVar[str] = "mixtures"

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        found = [region for region in map(_Region.of, _sorts(module.graph)) if region is not None]
        if not found:
            return module
        names = [region.sort.name for region in found]
        module = ir.copy_graph(module)
        emitter = Emitter(module)
        for name in names:
            sort = next(node for node in module.graph.nodes if node.name == name)
            region = _Region.of(sort)
            assert region is not None
            _replace(emitter, region)
        ir.remove_dead_code(module.graph)
        module.graph.lint()
        module.recompile()
        return module


def _sorts(graph: fx.Graph) -> Iterator[fx.Node]:
    for node in graph.nodes:
        if node.target in (aten.sort.default, aten.sort.stable) and len(rows.shape_of(node.args[0])) == 1:
            yield node


def _replace(emitter: Emitter, region: _Region) -> None:
    emitter.origin = region.result
    with emitter.graph.inserting_before(region.result):
        mixed = emitter.emit(ops.mixture, region.rows, region.whole, json.dumps(region.program().written()))
    region.result.replace_all_uses_with(mixed)


def _kinds_of(index: Any, kinds: dict[fx.Node, str]) -> list[str | None]:
    """Of the indices of a pick."""
    return [kinds.get(each) if isinstance(each, fx.Node) else None for each in index]


@dataclass(frozen=True)
class _Rows:
    """A size: so many times the number of rows."""

    times: int | None


@dataclass
class _Region:
    """The ops of one mixture.

    Attributes:
        sort: of the experts' numbers.
        each: how many experts a row has.
        rows, whole: operands of which some rows are needed for some rows, and others.
        inside: the ops, in graph order.
        counts: those of them whose values have an entry per expert; all others have rows in front.
        _tables: operands with an entry per expert, however many rows there are.
        result: the last of them: [N, ...].
    """

    sort: fx.Node
    each: int
    count: Any
    rows: list[fx.Node] = field(default_factory=list)
    whole: list[fx.Node] = field(default_factory=list)
    inside: list[fx.Node] = field(default_factory=list)
    counts: set[fx.Node] = field(default_factory=set)
    _tables: set[Any] = field(default_factory=set)
    result: fx.Node = None  # type: ignore[assignment]

    @classmethod
    def of(cls, sort: fx.Node) -> _Region | None:
        """The mixture that begins with a sort, if it is one."""
        flat = sort.args[0]
        assert isinstance(flat, fx.Node)
        if flat.target is not aten.view.default or ir.argument(sort, "descending"):
            return None
        source = flat.args[0]
        shape = [ir.expr_of(size) for size in rows.shape_of(source)]
        if len(shape) != 2 or not shape[1].is_Integer:
            return None
        region = cls(sort, int(shape[1]), shape[0])
        return region if region._grow() else None

    # ------------------------------------------------------------------------------------- what is what
    def _grow(self) -> bool:
        """Find what belongs to it, in graph order."""
        kinds: dict[fx.Node, str] = {}
        ends: list[fx.Node] = []
        for node in self.sort.graph.nodes:
            if node.op != "call_function":
                continue
            kind = self._kind(node, kinds)
            if kind is not None:
                kinds[node] = kind
                if kind == "pairs":
                    ends.append(node)
        if len(ends) != 1 or not any(str(node.target) in GROUPED for node in kinds):
            return False
        return self._close(kinds, ends[0])

    def _kind(self, node: fx.Node, kinds: dict[fx.Node, str]) -> str | None:
        """``order`` and ``numbers`` (what the sort returns), ``token`` (rows that the order takes), ``counts`` of the
        experts, ``sorted`` (rows in this order), ``back`` (the order that leads back, of a sort or written),
        ``pairs`` (rows in their places)."""
        if node is self.sort:
            return "sort"
        reads = {operand: kinds[operand] for operand in node.all_input_nodes if operand in kinds}
        if not reads:
            return None
        target, first = node.target, node.args[0] if node.args else None
        if target is operator.getitem and first is self.sort:
            return "numbers" if node.args[1] == 0 else "order"
        kind = reads.get(first)  # type: ignore[arg-type]
        if target is aten._to_copy.default and kind == "numbers":
            return "numbers"
        if target is aten.floor_divide.default and kind == "order" and node.args[1] == self.each:
            return "token"
        if target in (aten.histc.default, aten.bincount.default) and kind == "numbers":
            return "counts"
        if target in (aten.cumsum.default, aten._to_copy.default) and kind == "counts":
            return "counts"
        if target is aten.empty_like.default and kind == "order":
            return "memory"
        if target is aten.index_put.default and kind == "memory":
            _, index, numbers = node.args
            return "back" if _kinds_of(index, kinds) == ["order"] and self._is_arange(numbers) else None
        if target in (aten.sort.default, aten.sort.stable) and kind == "order":
            return None if ir.argument(node, "descending") else "resort"
        if target is operator.getitem and kind == "resort":
            return "back" if node.args[1] == 1 else "resorted"
        if target is aten.index.Tensor:
            return self._picked(node, kinds)
        if str(target) in GROUPED:
            is_own = kind == "sorted" and kinds.get(node.args[2]) == "counts" and node.args[1] not in kinds  # type: ignore[arg-type]
            return "sorted" if is_own else None
        return self._by_row(node, reads)

    def _picked(self, node: fx.Node, kinds: dict[fx.Node, str]) -> str | None:
        source, index = node.args
        found = _kinds_of(index, kinds)
        if len(found) != 1:
            return None
        if kinds.get(source) == "sorted":  # type: ignore[arg-type]
            return "pairs" if found == ["back"] else None
        if source in kinds:
            return None
        size = ir.expr_of(rows.shape_of(source)[0])
        if found == ["token"] and size == self.count:
            return "sorted"
        if found == ["order"] and size == self.count * self.each and self._flat_source(source) is not None:
            return "sorted"
        return "sorted" if found == ["numbers"] and size.is_Integer else None

    def _by_row(self, node: fx.Node, reads: dict[fx.Node, str]) -> str | None:
        """Row i of the result needs row i of the operands in the sorted order, and what has no rows."""
        if set(reads.values()) != {"sorted"} or len(ir.tensors_of(node)) != 1 or ir.has_effect(node):
            return None
        size = self.count * self.each
        shape = rows.shape_of(node)
        if not shape or ir.expr_of(shape[0]) != size:
            return None
        layout = (0, *[None] * (len(shape) - 1))
        answer = rows.operand_layouts(node, 0, layout, (size,))
        for operand in answer or ():
            wanted = (0, *[None] * (len(rows.shape_of(operand.node)) - 1))
            is_whole = operand.layout is None or not rows.is_labelled(operand.layout)
            if operand.node in reads and operand.layout != wanted:
                return None
            if operand.node not in reads and not is_whole:
                return None
        return None if answer is None else "sorted"

    def _is_arange(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node.target is aten.arange.default

    def _flat_source(self, node: Any) -> fx.Node | None:
        """[N, k, ...] of which a value of N * k rows is a view."""
        if node.target is not aten.view.default:
            return None
        source = node.args[0]
        shape = [ir.expr_of(size) for size in rows.shape_of(source)]
        rest = [ir.expr_of(size) for size in rows.shape_of(node)][1:]
        return source if shape == [self.count, self.each, *rest] else None

    # ---------------------------------------------------------------------------------- its borders
    def _close(self, kinds: dict[fx.Node, str], end: fx.Node) -> bool:
        """Operands and result; ``False`` if anybody else reads what is inside."""
        result = self._result(end)
        if result is None:
            return False
        path = {end, result}
        path |= {node for node in result.all_input_nodes if end in (node, *node.all_input_nodes)}
        extra: list[Any] = [self.sort.args[0]]
        extra += [node.args[0] for node in kinds if self._takes_pairs(node, kinds)]
        extra += [node.args[2] for node in kinds if node.target is aten.index_put.default]
        inside = {*kinds, *path, *(node for node in extra if isinstance(node, fx.Node))}
        needed = self._needed(result, inside)
        for node in needed - {result}:
            outside = [user for user in node.users if user not in needed and user in self._alive]
            if outside and node not in extra:
                return False
        self.inside = [node for node in self.sort.graph.nodes if node in needed]
        self.counts = {node for node, kind in kinds.items() if kind == "counts"}
        picks = [node for node in kinds if node.target is aten.index.Tensor]
        self._tables = {node.args[0] for node in picks if _kinds_of(node.args[1], kinds) == ["numbers"]}
        self._tables |= {node.args[1] for node in kinds if str(node.target) in GROUPED}
        self.result = result
        return self._take_operands()

    @functools.cached_property
    def _alive(self) -> set[fx.Node]:
        return ir.computed_from([self.sort.graph.output_node()])

    def _takes_pairs(self, node: fx.Node, kinds: dict[fx.Node, str]) -> bool:
        is_pick = node.target is aten.index.Tensor and node.args[0] not in kinds
        return is_pick and _kinds_of(node.args[1], kinds) == ["order"]

    def _needed(self, result: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
        found: set[fx.Node] = set()
        todo = [result]
        while todo:
            node = todo.pop()
            if node in inside and node not in found:
                found.add(node)
                todo += node.all_input_nodes
        return found

    def _result(self, end: fx.Node) -> fx.Node | None:
        """[N, k, ...], or its sum over k, if that is all that anybody reads."""
        users = list(end.users)
        if len(users) != 1 or users[0].target is not aten.view.default:
            return None
        view = users[0]
        shape = [ir.expr_of(size) for size in rows.shape_of(view)]
        if shape[:2] != [self.count, self.each]:
            return None
        users = list(view.users)
        is_sum = len(users) == 1 and users[0].target is aten.sum.dim_IntList
        if is_sum and users[0].args[1] in ([1], [-2]) and len(shape) == 3 and not ir.argument(users[0], "keepdim"):
            return users[0]
        return view

    def _take_operands(self) -> bool:
        """Tensors from outside: with a row for each of the mixture's, or whole; sizes have to be so many rows."""
        members, tables = set(self.inside), self._tables
        for node in self.inside:
            for operand in node.all_input_nodes:
                if operand in members or operand in (*self.rows, *self.whole):
                    continue
                tensor = ir.tensor_of(operand)
                if tensor is None:
                    if self._multiple(operand) is None:
                        return False
                elif tensor.dim() and ir.expr_of(tensor.shape[0]) == self.count and operand not in tables:
                    self.rows.append(operand)
                else:
                    self.whole.append(operand)
        return bool(self.rows) and not any(ir.free_symbols(node) for node in self.whole)

    def _multiple(self, size: fx.Node | int) -> int | None:
        """How many times the number of rows a size is."""
        factor = ir.expr_of(ir.value_of(size) if isinstance(size, fx.Node) else size) / self.count
        return int(factor) if factor.is_Integer else None

    # ------------------------------------------------------------------------------------- as data
    def program(self) -> Program:
        """The ops as data."""
        number = {node: at for at, node in enumerate((*self.rows, *self.whole, *self.inside))}
        roots: dict[fx.Node, fx.Node] = {}
        steps: list[MixtureStep] = []
        last: dict[fx.Node, int] = {}
        size: dict[fx.Node, tuple[int, int]] = {}
        for at, node in enumerate(self.inside):
            base = node.args[0] if ir.is_view(node) or node.target is operator.getitem else None
            root = roots.get(base, base) if isinstance(base, fx.Node) else node
            roots[node] = root
            size[node] = self._bytes(node) if root is node else (0, 0)
            for operand in node.all_input_nodes:
                last[operand] = at
                last[roots.get(operand, operand)] = at
            last.setdefault(node, at)
            last[root] = max(last.get(root, at), at)
            args, kwargs = self._encoded(self._arguments(node), number), self._encoded(dict(node.kwargs), number)
            target = "getitem" if node.target is operator.getitem else str(node.target)
            steps.append(MixtureStep(target, args, kwargs, *size[node]))
        dead: list[tuple[int, ...]] = []
        peaks: list[tuple[int, int]] = []
        live: set[fx.Node] = set()
        for at, node in enumerate(self.inside):
            live.add(node)
            sizes = [size[each] for each in live if each is not self.result]
            scratch = book.entry(node).scratch
            if scratch is not None:
                sizes.append(self._share(scratch(node), of_rows=None))
            peaks.append((sum(a for a, _ in sizes), sum(b for _, b in sizes)))
            gone = [each for each in self.inside[: at + 1] if last[each] <= at and each is not self.result]
            dead.append(tuple(number[each] for each in gone if each in live))
            live -= {each for each in live if last[roots[each]] <= at and last[each] <= at}
        best = [p for p in dict.fromkeys(peaks) if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in peaks)]
        return Program(tuple(steps), tuple(dead), tuple(best))

    def _bytes(self, node: fx.Node) -> tuple[int, int]:
        """Of its results: for each row, and besides."""
        per_row = fixed = 0
        for tensor in ir.tensors_of(node):
            if tensor is None:
                continue
            a, b = self._share(ir.expr_of(tensor.numel()) * tensor.dtype.itemsize, of_rows=node not in self.counts)
            per_row, fixed = per_row + a, fixed + b
        return per_row, fixed

    def _share(self, nbytes: sympy.Expr, *, of_rows: bool | None) -> tuple[int, int]:
        """Bytes for each row, and others; if it is not known which (``None``), those of a fixed number of rows are
        others, so that fewer rows have enough."""
        if of_rows is None:
            of_rows = not nbytes.is_Integer
        return (int((nbytes / self.count).expand()), 0) if of_rows else (0, int(nbytes))

    def _arguments(self, node: fx.Node) -> list[Any]:
        """A node's arguments; sizes in front that are multiples of the rows are so where the length is fixed, too."""
        args: list[Any] = list(node.args)
        if node in self.counts:
            return args
        at = book.entry(node).shape_at
        if at is not None and at < len(args):
            front, *rest = args[at]
            args[at] = [_Rows(self._multiple(front)) if isinstance(front, int) and front >= 0 else front, *rest]
        elif node.target is aten.arange.default and isinstance(args[0], int):
            args[0] = _Rows(self._multiple(args[0]))
        return args

    def _encoded(self, given: Any, number: dict[fx.Node, int]) -> Any:
        if isinstance(given, _Rows):
            return {"n": given.times}
        if isinstance(given, fx.Node):
            return {"v": number[given]} if given in number else {"n": self._multiple(given)}
        if isinstance(given, (list, tuple)):
            return [self._encoded(part, number) for part in given]
        if isinstance(given, dict):
            return {name: self._encoded(part, number) for name, part in given.items()}
        if isinstance(given, torch.device):
            return {"device": ""}
        if isinstance(given, (torch.dtype, torch.layout, torch.memory_format)):
            return {"torch": str(given).removeprefix("torch.")}
        assert given is None or isinstance(given, (bool, int, float, str)), given
        return given
