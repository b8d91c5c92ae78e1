"""``Emitter``: adds nodes to a graph, with what they return and where they come from."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from mosaic_compiler.compat.symbols import new_number
from mosaic_compiler.compat.tensors import symbolic_kernel
from mosaic_compiler.ir.graphs import BINDS, fake_mode_of
from mosaic_compiler.ir.sizes import UnreadableSizeError, parts_of, size_sources
from mosaic_compiler.ir.values import (
    argument_value,
    expr_of,
    is_contiguous,
    layout_of,
    memory_order,
    tensor_of,
    value_of,
)

aten = torch.ops.aten


class Emitter:
    """Adds nodes with metadata and the provenance of the node that is being rewritten (``origin``)."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.graph = module.graph
        self.mode = fake_mode_of(module)
        self.origin: fx.Node | None = None

    def bare(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call without metadata about its result."""
        node = self.graph.call_function(target, args, kwargs)
        if self.origin is not None:
            node.meta = {k: v for k, v in self.origin.meta.items() if k in ("stack_trace", "nn_module_stack")}
        return node

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call with metadata.  ``reshape`` becomes a view, or a copy and a view."""
        if target is aten.reshape.default:
            return self._emit_reshape(*args)
        node = self.bare(target, *args, **kwargs)
        assert isinstance(target, OpOverload)
        fake_args, fake_kwargs = fx.node.map_arg((args, kwargs), value_of)
        with self.mode:
            node.meta["val"] = symbolic_kernel(target)(*fake_args, **fake_kwargs)
        return node

    def emit_getitem(self, source: fx.Node, index: Any) -> fx.Node:
        """One result of a call with several."""
        node = self.bare(operator.getitem, source, index)
        node.meta["val"] = value_of(source)[index]
        return node

    def propagate(self, changed: set[fx.Node]) -> None:
        """Metadata behind nodes whose layout is another one now."""
        changed = set(changed)
        for node in self.graph.nodes:
            if node.op != "call_function" or not changed.intersection(node.all_input_nodes):
                continue
            before = layout_of(value_of(node))
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value_of)
            with self.mode:
                node.meta["val"] = symbolic_kernel(node.target)(*args, **kwargs)
            if layout_of(value_of(node)) != before:
                changed.add(node)

    def bind_number(self, node: fx.Node) -> Any:
        """A new symbol for the number that a node of the prologue gives."""
        node.meta[BINDS], number = new_number(self.mode.shape_env, f"number_of_{node.name}", 13)
        node.meta["val"] = number
        return number

    def arithmetic(self, combine: Any, left: Any, right: Any) -> Any:
        """What ``combine`` makes of two sizes, each an int or a node."""
        if isinstance(left, int) and isinstance(right, int):
            return combine(left, right)
        node = self.bare(combine, left, right)
        node.meta["val"] = combine(*map(argument_value, (left, right)))
        return node

    def combined(self, expr: sympy.Expr, size: Callable[[sympy.Expr], Any]) -> fx.Node:
        """A size computed from others, each of which ``size`` gives as an int or a node.

        Raises:
            UnreadableSizeError: if nobody knows how.
        """
        parts = parts_of(expr)
        if parts is None:
            raise UnreadableSizeError(f"cannot read the size {expr} off the inputs")
        combine, exprs = parts
        result, *rest = map(size, exprs)
        for factor in rest:
            result = self.arithmetic(combine, result, factor)
        assert isinstance(result, fx.Node)
        return result

    def permuted(self, source: fx.Node, order: Sequence[int]) -> fx.Node:
        """With dims in another order; itself where it is the same one."""
        return source if [*order] == [*range(len(order))] else self.emit(aten.permute.default, source, [*order])

    def densely(self, source: fx.Node, order: Sequence[int]) -> fx.Node:
        """A copy that is dense, with its dims in memory in an order."""
        front = self.emit(aten.clone.default, self.permuted(source, order), memory_format=torch.contiguous_format)
        return self.permuted(front, [order.index(dim) for dim in range(len(order))])

    def laid_out(self, source: fx.Node, order: Sequence[int]) -> fx.Node:
        """With its dims in memory in an order; itself where they are."""
        tensor = tensor_of(source)
        assert tensor is not None
        return source if memory_order(tensor) == [*order] else self.densely(source, order)

    def _emit_reshape(self, source: fx.Node, shape: Sequence[Any]) -> fx.Node:
        tensor = tensor_of(source)
        assert tensor is not None
        # Asking the fake tensor whether the strides allow a view would be answered for the sizes of the
        # example, not for all sizes.
        if not is_contiguous(tensor):
            source = self.emit(aten.clone.default, source, memory_format=torch.contiguous_format)
        return self.emit(aten.view.default, source, list(shape))


class SizeEmitter(Emitter):
    """Reads sizes off the inputs too, each of them once.

    Attributes:
        front: the node that they are read in front of: by default the first one that is no input.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.front = next(node for node in self.graph.nodes if node.op != "placeholder")
        self.sources = size_sources(self.graph)
        self._sizes: dict[sympy.Expr, Any] = {}

    def size(self, expr: sympy.Expr) -> Any:
        """A size as an argument: an int, or a node that reads it off the inputs.

        Raises:
            UnreadableSizeError: if it cannot be told from them.
        """
        expr = sympy.sympify(expr)
        if expr.is_Integer:
            return int(expr)
        if expr not in self._sizes:
            with self.graph.inserting_before(self.front):
                self._sizes[expr] = self._emit_size(expr)
        return self._sizes[expr]

    def know(self, number: Any, node: fx.Node) -> None:
        """A size that a node says."""
        self._sizes[expr_of(number)] = node

    def _emit_size(self, expr: sympy.Expr) -> fx.Node:
        if expr in self.sources:
            node, dim = self.sources[expr]
            return node if dim is None else self.emit(aten.sym_size.int, node, dim)
        return self.combined(expr, self.size)
