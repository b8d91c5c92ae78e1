"""Loop bodies: the nodes of a loop, called again on chunks of rows.

A chunk has the rank of the original; its row dim has the symbolic chunk size c, a flat dim B * c::

    q [B, H, N, d], space (B, N)   ->   [B, H, c, d]          h [B * N, D]   ->   [B * c, D]

Loops that differ only in what they are given (the layers of a model) share one body.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from mosaic_compiler import book, ir
from mosaic_compiler.book import FLAT, Layout, Space, rows
from mosaic_compiler.compat.symbols import new_number
from mosaic_compiler.ir.emitter import Emitter
from mosaic_compiler.ir.keys import structural_key
from mosaic_compiler.ir.loops import ChunkLoop, LoopOutput
from mosaic_compiler.passes.chunk_loops.labels import Labels
from mosaic_compiler.passes.chunk_loops.regions import Contents, Operand, Region

aten = rows.aten

_HINT = 1009
"""An example of a chunk size; a prime, so that no other size is equal to it by accident."""


@dataclass(frozen=True)
class Built:
    """A loop, the outer values that it is called with, and its nodes' names by the nodes they come from.

    ``operands`` are tensors with the layout they are sliced along, then sizes (ints or nodes).
    """

    loop: ChunkLoop
    operands: tuple[Operand, ...]
    sizes: tuple[fx.Node, ...]
    copies: dict[fx.Node, str]


class BodyFactory:
    """Builds bodies, one per structure.

    Args:
        module: the graph that loops are cut out of.
        number: gives the outer node (or int) for a size.
    """

    def __init__(self, module: fx.GraphModule, labels: Labels, number: Callable[[sympy.Expr], Any]) -> None:
        self.module, self.labels, self.number = module, labels, number
        self.mode = ir.fake_mode_of(module)
        self._known: dict[Any, tuple[ChunkLoop, tuple[sympy.Expr, ...], list[str]]] = {}

    def build(self, region: Region, contents: Contents) -> Built:
        """The loop for a region; one that was built before if the structure is the same."""
        key = self._structure(region, contents)
        if key not in self._known:
            body = _Body(self, region, contents, *self._chunk_size())
            self._known[key] = body.finish(), tuple(body.numbers), [body.copies[node].name for node in contents.nodes]
        loop, sizes, names = self._known[key]
        copies = dict(zip(contents.nodes, names, strict=True))
        return Built(loop, tuple(contents.operands()), tuple(map(self.number, sizes)), copies)

    def split_rows(self, tensor: torch.Tensor, layout: Layout, space: Space) -> tuple[torch.Tensor, int]:
        """The tensor with its rows in a dim of their own (a flat dim is split), and that dim."""
        if FLAT not in layout:
            return tensor, layout.index(len(space) - 1)
        dim = layout.index(FLAT)
        shape = list(tensor.shape)
        shape[dim : dim + 1] = [ir.argument_value(self.number(size)) for size in space]
        with self.mode:
            return tensor.view(shape), dim + 1

    def _structure(self, region: Region, contents: Contents) -> Any:
        """Everything that a body is made from, in a comparable form."""
        index = {node: i for i, node in enumerate(contents.nodes)}
        operands = contents.operands()

        def reference(node: fx.Node) -> Callable[[fx.Node], Any]:
            queue = iter(contents.sources[node])

            def named(operand: fx.Node) -> Any:
                if not ir.has_tensors(operand):
                    return "size", ir.expr_of(ir.value_of(operand))
                source = next(queue)
                return index[source] if isinstance(source, fx.Node) else ("operand", operands[source])

            return named

        inner = structural_key(contents.nodes, reference, lambda node: (self.labels.of[node], _layout(node)))
        results = tuple(index[node] for node in region.outputs)
        return tuple(region.space), results, inner, tuple((o.layout, _layout(o.value)) for o in operands)

    def _chunk_size(self) -> tuple[sympy.Symbol, torch.SymInt]:
        """A new symbol for a chunk size."""
        return new_number(self.mode.shape_env, f"chunk_rows_{len(self._known)}", _HINT)


def _layout(node: fx.Node) -> str:
    return str([(str(t.dtype), t.shape, t.stride()) if t is not None else None for t in ir.tensors_of(node)])


class _Body(Emitter):
    """One body under construction."""

    def __init__(
        self, factory: BodyFactory, region: Region, contents: Contents, symbol: sympy.Symbol, size: torch.SymInt
    ) -> None:
        super().__init__(factory.module)
        self.factory, self.region, self.contents = factory, region, contents
        self.space, self.symbol, self.size = region.space, symbol, size
        self.graph = fx.Graph()
        self.rows = self._input("rows", size)
        self.dims: list[int | None] = []
        self.numbers: dict[sympy.Expr, fx.Node] = {}
        self._operands = {operand: self._operand(operand) for operand in contents.operands()}
        self._last_input = list(self.graph.nodes)[-1]
        self._entered: dict[Operand, fx.Node] = {}
        self._flat: fx.Node | None = None
        self.copies: dict[fx.Node, fx.Node] = {}
        for node in contents.nodes:
            self.origin = node
            self.copies[node] = self._copy(node)

    def _input(self, name: str, value: Any) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    # -------------------------------------------------------------------------------------- operands
    def _operand(self, operand: Operand) -> fx.Node:
        tensor, name = ir.tensor_of(operand.value), f"operand_{len(self.dims)}"
        assert tensor is not None
        if operand.layout is None:
            self.dims.append(None)
            return self._input(name, tensor)
        tensor, dim = self.factory.split_rows(tensor, operand.layout, self.space)
        shape: list[Any] = list(tensor.shape)
        shape[dim] = self.size
        self.dims.append(dim)
        with self.mode:
            return self._input(
                name, torch.empty_strided(shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            )

    def _enter(self, operand: Operand) -> fx.Node:
        """An operand as the body's ops expect it: dense, and flat again where it was flat.  A slice of something
        whose rows are its outermost dim is dense already; other slices are copied."""
        node = self._operands[operand]
        if operand.layout is None:
            return node
        if operand not in self._entered:
            tensor, dim = ir.tensor_of(node), self.dims[list(self._operands).index(operand)]
            assert tensor is not None
            assert dim is not None
            order = ir.memory_order(tensor)
            outer = [d for d in order[: order.index(dim)] if ir.expr_of(tensor.shape[d]) != 1]
            if any(ir.expr_of(tensor.stride(d)) != 0 for d in outer):
                node = self.densely(node, order)
            if FLAT in operand.layout:
                node = self.emit(aten.view.default, node, self._shape(operand.value, operand.layout))
            self._entered[operand] = node
        return self._entered[operand]

    # ----------------------------------------------------------------------------------------- nodes
    def _copy(self, node: fx.Node) -> fx.Node:
        if node.target is operator.getitem:
            source, index = node.args
            return self.emit_getitem(self.copies[source], index)  # type: ignore[index]
        queue = iter(self.contents.sources[node])

        def replace(operand: fx.Node) -> Any:
            if ir.tensor_of(operand) is None:
                return self._number(ir.expr_of(ir.value_of(operand)))
            source = next(queue)
            return self.copies[source] if isinstance(source, fx.Node) else self._enter(source)

        args: Any = node.args
        position = book.entry(node).shape_at
        if position is not None:
            shape = self._shape(node, self.factory.labels.layout(node))
            args = (*args[:position], *([shape] * (position < len(args))), *args[position + 1 :])
            args = tuple(a if a is shape else fx.node.map_arg(a, replace) for a in args)
        else:
            args = fx.node.map_arg(args, replace)
        return self.emit(node.target, *args, **fx.node.map_arg(dict(node.kwargs), replace))

    def _shape(self, node: fx.Node, layout: Layout) -> list[Any]:
        """The sizes of a chunk, as arguments."""
        tensor, last = ir.tensor_of(node), len(self.space) - 1
        assert tensor is not None
        return [
            self._flat_rows() if label == FLAT else self.rows if label == last else self._number(ir.expr_of(size))
            for label, size in zip(layout, tensor.shape, strict=True)
        ]

    def _flat_rows(self) -> fx.Node:
        """B * c."""
        if self._flat is None:
            self._flat = self.arithmetic(operator.mul, self._number(self.space[0]), self.rows)
        assert self._flat is not None
        return self._flat

    def _number(self, expr: sympy.Expr) -> Any:
        """A size that is not the chunk's: an int, or an input of the body."""
        expr = sympy.sympify(expr)
        if expr.is_Integer:
            return int(expr)
        if expr not in self.numbers:
            with self.graph.inserting_after(self._last_input):
                self._last_input = self._input(f"size_{len(self.numbers)}", ir.value_of(self.factory.number(expr)))
            self.numbers[expr] = self._last_input
        return self.numbers[expr]

    # ---------------------------------------------------------------------------------------- result
    def finish(self) -> ChunkLoop:
        """Return chunks with their rows in a dim of their own."""
        results, outputs = [], []
        for node in self.region.outputs:
            self.origin = node
            copy, layout, tensor = self.copies[node], self.factory.labels.layout(node), ir.tensor_of(node)
            assert tensor is not None
            split, dim = self.factory.split_rows(tensor, layout, self.space)
            if FLAT in layout:
                sizes = [self.rows if d == dim else self._number(ir.expr_of(s)) for d, s in enumerate(split.shape)]
                copy = self.emit(aten.view.default, copy, sizes)
            results.append(copy)
            outputs.append(LoopOutput(dim, tuple(ir.memory_order(split))))
        output = self.graph.output(tuple(results))
        output.meta["val"] = tuple(ir.value_of(node) for node in results)
        body = ir.graph_module(self.factory.module, self.graph)
        return ChunkLoop(body, (*self.dims, *[None] * len(self.numbers)), outputs, self.symbol)
