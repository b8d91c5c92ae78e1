"""``chunk-loops``: what is computed row by row runs in chunks of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.book import FLAT
from mosaic_compiler.ir.emitter import Emitter
from mosaic_compiler.ir.loops import ChunkLoop
from mosaic_compiler.ir.notes import UNRULED
from mosaic_compiler.ir.sizes import UnreadableSizeError, size_sources
from mosaic_compiler.passes.base import Pass
from mosaic_compiler.passes.chunk_loops.labels import Labels, find_labels
from mosaic_compiler.passes.chunk_loops.loop_bodies import BodyFactory
from mosaic_compiler.passes.chunk_loops.regions import Operand, Region, Regions, contents_of, find_regions

aten = torch.ops.aten


@dataclass(frozen=True)
class ChunkLoopsPass(Pass):
    """Cut the graph into loops over rows; only what must exist at full length leaves a loop.

    ``labels.py`` finds out which values have rows and which edges need just the same rows,
    ``regions.py`` decides what is materialised and which loop computes it, ``loop_bodies.py``
    builds the bodies.  Each loop is a submodule with a symbolic chunk size (``mosaic_compiler/ir/loops.py``); run
    with all rows in one chunk it does what the graph did before, plus the cheap values it computes again.

    Requires: a canonical graph without writes inside (``in-place`` comes later).
    Guarantees: the same outputs for every chunk size; random draws and writes to inputs in the same order.

    Before (N rows)::

        k = mm(x, wk);  v = mm(x, wv);  q = mm(x, wq)
        y = attention(q, k, v)
        return mm(relu(mm(y, w1)), w2)

    After::

        k, v = chunk_loop_0(x, wk, wv)             # rows: mm(x[c], wk), mm(x[c], wv)
        z = chunk_loop_1(x, wq, k, v, w1, w2)      # rows: mm(relu(mm(attention(mm(x[c], wq), k, v), w1)), w2)
        return z
    """

    name: ClassVar[str] = "chunk-loops"

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        labels = find_labels(module.graph)
        regions = find_regions(module.graph, labels)
        result = ir.copy_graph(module)
        unruled = tuple(node for node in labels.unruled if _reads_matrix(node, labels))
        if regions.loops:
            rewriter = _Rewriter(module, labels, regions)
            try:
                result = rewriter.rewrite()
            except _KnotError as knot:
                unruled += (knot.node,)
            except UnreadableSizeError:
                unruled += (rewriter.origin or regions.loops[0].outputs[0],)
        UNRULED.write(result, tuple((node.name, str(node.target), ir.provenance(node)) for node in unruled))
        result.graph.lint()
        result.recompile()
        return result


def _reads_matrix(node: fx.Node, labels: Labels) -> bool:
    """It reads a matrix of rows (not just a number per row), which has to exist for it."""
    return any(
        tensor is not None and sum(ir.expr_of(size) != 1 for size in tensor.shape) > 1
        for operand in node.all_input_nodes
        if operand in labels.of
        for tensor in ir.tensors_of(operand)
    )


class _KnotError(Exception):
    """Random draws in the order of the graph and loops depend on each other in a circle."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(node.name)
        self.node = node


class _Rewriter(Emitter):
    """Writes the new graph: loops, and what stays outside of them, each as soon as it is needed."""

    def __init__(self, module: fx.GraphModule, labels: Labels, regions: Regions) -> None:
        super().__init__(module)
        self.old, self.labels, self.regions = module, labels, regions
        self.position = {node: i for i, node in enumerate(module.graph.nodes)}
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self._inputs = size_sources(module.graph)
        self._old_numbers = {
            ir.expr_of(ir.value_of(node)): node
            for node in reversed(module.graph.nodes)
            if isinstance(ir.value_of(node), torch.SymInt)
        }
        self._numbers: dict[sympy.Expr, Any] = {}
        self._splits: dict[Operand, fx.Node] = {}
        self._names: dict[ChunkLoop, str] = {}
        self._busy: set[int] = set()
        self._effects = [node for node in module.graph.nodes if node.op == "call_function" and ir.has_effect(node)]
        self.factory = BodyFactory(module, labels, self.number)

    def rewrite(self) -> fx.GraphModule:
        for node in self.old.graph.nodes:
            if node.op == "placeholder":
                self._keep(node)
        items: list[tuple[int, fx.Node | Region]] = [
            (self.position[node], node)
            for node in self.old.graph.nodes
            if node.op in ("call_function", "get_attr") and node not in self.regions.inside
        ]
        items += [(self.position[loop.outputs[-1]], loop) for loop in self.regions.loops]
        for _, item in sorted(items, key=lambda pair: pair[0]):
            if isinstance(item, Region):
                self._value(item.outputs[0])
            else:
                self._value(item)
        old = self.old.graph.output_node()
        output = self.graph.output(fx.node.map_arg(old.args[0], self._value))
        output.meta = dict(old.meta)
        ir.remove_dead_code(self.graph)
        result = ir.graph_module(_Attributes(self.old, {n: loop for loop, n in self._names.items()}), self.graph)
        result.meta = dict(self.old.meta)
        return result

    # --------------------------------------------------------------------------------------- outside
    def _value(self, node: fx.Node) -> fx.Node:
        """The new graph's node for a value that exists at full length."""
        if node not in self.values:
            token = id(self.regions.of.get(node, node))
            if token in self._busy:
                raise _KnotError(node)
            self._busy.add(token)
            if node in self.regions.of:
                self._loop(self.regions.of[node])
            elif isinstance(ir.value_of(node), torch.SymInt) and self.regions.inside.intersection(node.all_input_nodes):
                self.values[node] = self.number(ir.expr_of(ir.value_of(node)))
            else:
                self._keep(node)
            self._busy.discard(token)
        return self.values[node]

    def _keep(self, node: fx.Node) -> None:
        if node in self._effects:  # they stay in order, and behind all that comes before a write
            for other in self._effects[: self._effects.index(node)]:
                self._value(other)
        for operand in node.all_input_nodes:
            self._value(operand)
        self.values[node] = self.graph.node_copy(node, lambda operand: self.values[operand])
        self.values[node].meta = dict(node.meta)

    def number(self, expr: sympy.Expr) -> Any:
        """A size as an int, or as a node of the new graph."""
        expr = sympy.sympify(expr)
        if expr.is_Integer:
            return int(expr)
        if expr not in self._numbers:
            self._numbers[expr] = self._emit_number(expr)
        return self._numbers[expr]

    def _emit_number(self, expr: sympy.Expr) -> fx.Node:
        if expr in self._inputs:
            node, dim = self._inputs[expr]
            return self.values[node] if dim is None else self.emit(aten.sym_size.int, self.values[node], dim)
        known = self._old_numbers.get(expr)
        if known is not None and not self.regions.inside.intersection(known.all_input_nodes):
            return self._value(known)
        for node in self.old.graph.nodes:  # for example the number of rows that a nonzero found
            sizes = (
                []
                if node in self.regions.inside
                else [ir.expr_of(s) for t in ir.tensors_of(node) if t is not None for s in t.shape]
            )
            if ir.tensor_of(node) is not None and expr in sizes:
                return self.emit(aten.sym_size.int, self._value(node), sizes.index(expr))
        return self.combined(expr, self.number)

    # ------------------------------------------------------------------------------------------ loops
    def _loop(self, region: Region) -> None:
        contents = contents_of(region, self.regions, self.labels, self.position)
        for operand in contents.operands():
            self._value(operand.value)
        built = self.factory.build(region, contents)
        self.origin = region.outputs[-1]
        tensors = [self._operand(operand, region) for operand in built.operands]
        name = self._names.setdefault(built.loop, f"chunk_loop_{len(self._names)}")
        node = self.graph.call_module(name, (*tensors, *built.sizes))
        node.meta = {k: v for k, v in self.origin.meta.items() if k in ("stack_trace", "nn_module_stack")}
        node.meta["loop"] = built.loop
        node.meta["origins"] = {copy: ir.provenance(original) for original, copy in built.copies.items()}
        splits = [
            self.factory.split_rows(ir.only_tensor(output), self.labels.layout(output), region.space)[0]
            for output in region.outputs
        ]
        node.meta["val"] = tuple(splits)
        for index, output in enumerate(region.outputs):
            self.origin = output
            result = self.emit_getitem(node, index)
            if FLAT in self.labels.layout(output):
                shape = [self.number(ir.expr_of(size)) for size in ir.only_tensor(output).shape]
                result = self.emit(aten.view.default, result, shape)
            self.values[output] = result

    def _operand(self, operand: Operand, region: Region) -> fx.Node:
        """What the loop is called with: a flat dim is split, so that rows have a dim of their own."""
        value = self.values[operand.value]
        if operand.layout is None or FLAT not in operand.layout:
            return value
        if operand not in self._splits:
            split, _ = self.factory.split_rows(ir.only_tensor(operand.value), operand.layout, region.space)
            shape = [self.number(ir.expr_of(size)) for size in split.shape]
            self._splits[operand] = self.emit(aten.view.default, value, shape)
        return self._splits[operand]


class _Attributes(torch.nn.Module):
    """The attributes of a graph module, and loops beside them (``fx.GraphModule`` copies what it needs)."""

    def __init__(self, module: fx.GraphModule, loops: dict[str, ChunkLoop]) -> None:
        super().__init__()
        for node in module.graph.nodes:
            if node.op == "get_attr":
                setattr(self, str(node.target), getattr(module, str(node.target)))
        for name, loop in loops.items():
            self.add_module(name, loop)
