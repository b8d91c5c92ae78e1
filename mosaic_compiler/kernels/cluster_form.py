"""What a kernel has to know of a cluster: operands and destinations in terms of symbols of its own.

Two clusters of equal form (layers, models, graphs) share a kernel, whatever their graphs call the sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from mosaic_compiler import book, ir
from mosaic_compiler.compat.symbols import ShapeEnv, new_number, size_of
from mosaic_compiler.compat.tracing import FakeTensorMode
from mosaic_compiler.ir.clusters import Cluster
from mosaic_compiler.ir.keys import structural_key
from mosaic_compiler.kernels.coordinates import Coordinates
from mosaic_compiler.kernels.layouts import Layouts
from mosaic_compiler.planning.facts import KernelFacts, Layout, Source

_HINT = {"cuda": 4096, "cpu": 512}
"""Sizes that kernels are tuned for: rows of a chunk."""

_WIDE_ROW = 1 << 16
"""Elements per row (a vocabulary) from which a GPU's kernel has 64-bit indices from the start: one compilation for all
lengths, at the same speed (a softmax over 8,192 x 152,064 took 12.2 ms on an H100 either way)."""


class ClusterForm:
    """A cluster's operands and destinations in terms of symbols of its own: own0, own1, ... in order of appearance.

    Attributes:
        symbols: its symbols, each for a size that is read off the arguments.
        facts: what its kernel has to know of it.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        graph = cluster.body.graph
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        results: Any = graph.output_node().args[0]
        self.operands = len(placeholders)
        self.values = [ir.value_of(node) for node in placeholders]
        self.outs = [ir.only_tensor(node) for node, into in zip(results, cluster.into, strict=True) if into is None]
        self.device = ir.only_tensor(results[0]).device
        values = (*self.values, *self.outs, *(ir.tensors_of(node) for node in graph.nodes))
        sizes = dict.fromkeys(ir.expr_of(number) for value in values for number in _all_numbers(value))
        self._coordinates = Coordinates(self._readable(), sizes)
        self.symbols = list(self._coordinates.readers)
        missing = self._coordinates.missing
        tensors = [value for value in (*self.values, *self.outs) if isinstance(value, torch.Tensor)]
        self.facts = KernelFacts(
            operands=self.operands,
            symbols=tuple(self.symbols),
            sources=tuple(self._coordinates.readers.values()),
            layouts=tuple(
                Layout(str(v.dtype), tuple(map(self.own, v.shape)), tuple(map(self.own, strides)))
                if isinstance(v, torch.Tensor)
                else None
                for v, strides in (
                    *((v, _strides(v, v.stride()) if isinstance(v, torch.Tensor) else ()) for v in self.values),
                    *((out, _strides(out, ir.own_strides(out))) for out in self.outs),
                )
            ),
            has_wide_rows=self.device.type == "cuda"
            and any(math.prod(s for s in tensor.shape if isinstance(s, int)) >= _WIDE_ROW for tensor in tensors),
            problem=f"no operand says what {', '.join(sorted(map(str, missing)))} is" if missing else "",
            device=str(self.device),
        )
        self.layouts = Layouts(self.facts)

    def own(self, size: Any) -> sympy.Expr:
        """A size of the cluster's graph in the form's symbols."""
        return self._coordinates.of(ir.expr_of(size))

    def _readable(self) -> dict[sympy.Expr, Source]:
        """The sizes that stand in the arguments, and where each is read first."""
        found: dict[sympy.Expr, Source] = {}
        for index, value in enumerate((*self.values, *self.outs)):
            if isinstance(value, torch.Tensor):
                for dim, (size, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
                    found.setdefault(ir.expr_of(size), Source("size", index, dim))
                    if ir.expr_of(size) != 1:
                        found.setdefault(ir.expr_of(stride), Source("stride", index, dim))
            elif ir.is_symbolic_number(value):
                found.setdefault(ir.expr_of(value), Source("number", index))
        return found

    def key(self) -> Any:
        """Equal for clusters that the same kernel can run."""
        nodes = self.cluster.body.graph.nodes
        index = {node: number for number, node in enumerate(nodes)}

        def layout(node: fx.Node) -> Any:
            return self._renamed(ir.layout_of(ir.value_of(node)))

        return self.cluster.into, structural_key(nodes, lambda _: index.__getitem__, layout)

    def _renamed(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._renamed(item) for item in value)
        return self.own(value) if isinstance(value, sympy.Expr) else value

    def _tensors(self) -> list[tuple[torch.Tensor, list[Any]]]:
        """Operands and destinations that are tensors, with their strides."""
        operands = [value for value in self.values if isinstance(value, torch.Tensor)]
        pairs = [(value, _strides(value, value.stride())) for value in operands]
        return pairs + [(out, _strides(out, ir.own_strides(out))) for out in self.outs]

    # ---------------------------------------------------------------------------------------- compiling
    def examples(self, hint: int | None) -> tuple[FakeTensorMode, list[Any]]:
        """Symbols, then tensors, as fakes of a mode of their own."""
        environment = ShapeEnv()
        mode = FakeTensorMode(shape_env=environment)
        hints: dict[sympy.Symbol, int] = {}
        names: dict[sympy.Symbol, sympy.Symbol] = {}
        numbers: list[Any] = []
        for own in self.symbols:
            size = self._hint(len(hints)) if hint is None else hint
            symbol, made = new_number(environment, f"mosaic_{own}", size)
            names[own], hints[symbol] = symbol, size
            numbers.append(made)

        def number(value: Any) -> Any:
            expr = self.own(value).xreplace(names)
            if expr.is_Integer:
                return int(expr)
            return size_of(environment, expr, int(expr.xreplace(hints)))

        def tensor(value: torch.Tensor, strides: Sequence[Any]) -> torch.Tensor:
            shape, stride = [number(size) for size in value.shape], [number(step) for step in strides]
            made = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
            return made if _is_aligned(value, strides) else torch.as_strided(made, shape, stride, 1)

        self._number = number
        with mode:
            tensors = [tensor(value, strides) for value, strides in self._tensors()]
        self.hints = {own: hints[names[own]] for own in self.symbols}
        return mode, [*numbers, *tensors]

    def sample(self, most: int) -> list[Any] | None:
        """Symbols, then tensors of zeros, of at most so many bytes; ``None`` if there is no such size for all symbols.

        Zeros are row numbers that exist, too.
        """
        offsets = [int(not _is_aligned(tensor, strides)) for tensor, strides in self._tensors()]
        for rows in (2**power for power in range(12, 1, -1)):
            values = [rows + 8 * i for i in range(len(self.symbols))]
            layouts = [layout for layout in self.layouts.at(values) if layout is not None]
            if any(number < 1 for _, shape, _ in layouts for number in shape):
                return None
            if sum(span(shape, strides) * dtype.itemsize for dtype, shape, strides in layouts) > most:
                continue
            return values + [
                torch.zeros(at + span(shape, strides), dtype=dtype, device=self.device).as_strided(shape, strides, at)
                for at, (dtype, shape, strides) in zip(offsets, layouts, strict=True)
            ]
        return None

    def _hint(self, position: int) -> int:
        return _HINT.get(self.device.type, _HINT["cuda"]) + 8 * position

    def function(self) -> Callable[..., tuple[()]]:
        """The cluster as a function of symbols and tensors, that writes its results into the last ones.

        A result is written as soon as it is known, and read from there: written at the end, it would get memory of its
        own as well.
        """
        graph = self.cluster.body.graph
        results: Any = graph.output_node().args[0]

        def run(*arguments: Any) -> tuple[()]:
            tensors = iter(arguments[len(self.symbols) :])
            operands = [next(tensors) if isinstance(v, torch.Tensor) else self._number(v) for v in self.values]
            places = {
                result: next(tensors) if into is None else operands[into]
                for result, into in zip(results, self.cluster.into, strict=True)
            }
            given = iter(operands)
            values: dict[fx.Node, Any] = {}
            for node in graph.nodes:
                if node.op == "placeholder":
                    values[node] = next(given)
                elif node.op == "call_function":
                    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
                    values[node] = node.target(*args, **kwargs)
                    if node in places:
                        values[node] = places[node].copy_(values[node])
            return ()

        return run


def span(shape: Sequence[Any], strides: Sequence[Any]) -> Any:
    """Elements from the first to the last one in memory, of a tensor that has some."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))


def spans_of(cluster: Cluster) -> frozenset[sympy.Expr]:
    """What decides about the width of a kernel's indices: elements of its tensors, and how far they lie apart."""
    results: Any = cluster.body.graph.output_node().args[0]
    placeholders = [node for node in cluster.body.graph.nodes if node.op == "placeholder"]
    tensors = [value for node in (*placeholders, *results) if isinstance(value := ir.value_of(node), torch.Tensor)]
    layouts = [[list(map(ir.expr_of, part)) for part in (tensor.shape, tensor.stride())] for tensor in tensors]
    return frozenset(sympy.expand(n) for shape, strides in layouts for n in (sympy.prod(shape), span(shape, strides)))


def _is_aligned(tensor: torch.Tensor, strides: Sequence[Any]) -> bool:
    """Every slice of rows of it begins at a multiple of 16 bytes (storages do)."""
    outer = [ir.expr_of(stride) for stride, size in zip(strides, tensor.shape, strict=True) if ir.expr_of(size) != 1]
    largest = max(outer, key=ir.magnitude, default=sympy.Integer(16))
    numbers = (largest * tensor.dtype.itemsize / 16, ir.expr_of(tensor.storage_offset()) * tensor.dtype.itemsize / 16)
    return all(sympy.sympify(number).is_integer is True for number in numbers)


def _all_numbers(value: Any) -> list[Any]:
    """What a cluster depends on: sizes, and the strides of more than one element."""
    if isinstance(value, tuple):
        return [number for item in value for number in _all_numbers(item)]
    if not isinstance(value, torch.Tensor):
        return [] if value is None else [value]
    strides = [step for size, step in zip(value.shape, value.stride(), strict=True) if ir.expr_of(size) != 1]
    return [*value.shape, *strides, value.storage_offset()]


def _strides(tensor: torch.Tensor, given: Sequence[Any]) -> list[Any]:
    """Strides with those of single elements (they may be a longer tensor's) as if they were dense."""
    strides, dense = list(given), 1
    for dim in reversed(range(tensor.dim())):
        if ir.expr_of(tensor.shape[dim]) == 1:
            strides[dim] = dense
        dense = strides[dim] * tensor.shape[dim]
    return strides


def scratch_bytes(cluster: Cluster) -> sympy.Expr:
    """What a cluster's kernel may allocate while it runs: some numbers per row for each of its reductions."""
    total: sympy.Expr = sympy.Integer(0)
    for node in cluster.body.graph.nodes:
        known = book.entry(node)
        if known.fused_scratch and not book.is_small_sum(node):
            tensor = ir.only_tensor(node)
            elements = sympy.prod([ir.expr_of(size) for size in tensor.shape])
            if known.family == "norm":  # results as large as the operand: per row of it
                elements /= ir.expr_of(tensor.shape[-1])
            total += known.fused_scratch * elements
    return sympy.expand(total)
