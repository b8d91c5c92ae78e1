"""Random graphs x random shapes through the whole compiler: equal to eager, bit for bit.

Only a product that ``row-demand`` puts on fewer rows may round differently: BLAS picks its kernel by size.
"""

from __future__ import annotations

import functools

import pytest
import sympy
import torch
import toys
from effort import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

from mosaic_compiler.backend import compile_aten, observing
from mosaic_compiler.ir.sizes import is_readable, parts_of
from mosaic_compiler.ir.values import exact
from mosaic_compiler.lowering.lifetimes import find_lives
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes import trace
from mosaic_compiler.planning.lives import Sizes

shapes = st.tuples(st.integers(2, 9), st.integers(2, 7).map(lambda half: 2 * half))


def assert_same(got: list[torch.Tensor], expected: tuple[torch.Tensor, ...], tolerance: float = 0.0) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def tolerance_of(module: torch.fx.GraphModule) -> float:
    """0, unless a product runs on fewer rows."""
    return 1e-4 if any(d.rows != d.total for d in module.meta.get("row_decisions", ())) else 0.0


@settings(max_examples=examples(20, 100))
@example(toys.Program((("attend", 0, 1),), ((2, "first_row"),)), [(5, 8)], "auto", False)
@example(toys.Program((("pick", 0, 0), ("matmul", 2, 0)), ((3, "first_row"),)), [(5, 8)], "auto", False)
@example(toys.Program((("matmul", 0, 0), ("amax", 2, 0)), ((3, "first_row"),)), [(5, 8)], "auto", False)
@example(toys.Program((("amax", 0, 0), ("write_rows", 2, 0)), ((3, "whole"),)), [(5, 8)], "auto", True)
@example(toys.Program((("causal", 0, 1), ("matmul", 2, 0)), ((3, "last_row"),)), [(5, 8)], "auto", False)
@example(toys.Program((("amax", 0, 0), ("sdpa", 0, 2)), ((3, "whole"),)), [(2, 4)], "auto", False)
@example(toys.Program((("by_rows", 0, 0), ("by_width", 2, 0)), ((3, "whole"),)), [(5, 8), (9, 4)], "auto", False)
@given(
    toys.programs, st.lists(shapes, min_size=1, max_size=3), st.sampled_from(["auto", "size", "naive"]), st.booleans()
)
def test_equals_eager_at_every_shape(program, sizes, placement, poison):
    module = trace(program, *toys.inputs(5, 6, 0))
    step = compile_aten(module, MosaicOptions(placement=placement, poison=poison, disable=("fuse",)))
    tolerance = tolerance_of(step.module)
    for seed, (rows, width) in enumerate(sizes):
        arguments = toys.inputs(rows, width, seed)
        got = step(list(arguments))
        assert_same(got, program(*arguments), tolerance)
        kept = [t.clone() for t in got]
        step(list(toys.inputs(rows, width, seed + 100)))
        assert_same(got, tuple(kept))  # what was returned stays as it was
        plan = step.plan
        assert plan.lower_bound <= plan.height <= plan.naive


@settings(max_examples=examples(10, 50))
@example(toys.Program((("sdpa", 0, 0), ("matmul", 2, 0), ("matmul", 2, 0), ("add", 3, 4)), ((5, "first_row"),)), (2, 4))
@example(toys.Program((("matmul", 0, 0), ("causal", 2, 2), ("matmul", 3, 0)), ((4, "whole"),)), (5, 8))
@given(toys.programs, shapes)
def test_every_pass_output_runs_and_equals(program, shape):
    from mosaic_compiler.passes import run_passes

    seen = []
    module = trace(program, *toys.inputs(5, 6, 0))
    run_passes(module, disable=("fuse",), observe=lambda graph, record: seen.append(graph))
    arguments = toys.inputs(*shape, 1)
    for graph in seen:
        assert_same(list(graph(*[a.clone() for a in arguments])), program(*arguments), tolerance_of(graph))


@settings(max_examples=examples(12, 60))
@example(toys.Program((("amax", 0, 0), ("write_rows", 2, 0)), ((3, "whole"),)), (5, 8))
@given(toys.programs, shapes)
def test_lives_against_an_oracle_that_watches_storages(program, shape):
    """Run the graph node by node on real tensors and see when each storage is touched for the last time."""
    module = trace(program, *toys.inputs(5, 6, 0))
    lives = find_lives(module)
    arguments = toys.inputs(*shape, 2)
    symbols = dict(zip(*_bind_symbols(module, arguments), strict=True))
    buffers = {b.name: b for b in lives.at(Sizes(symbols))}
    values, position, first, last, sizes_of, keep = {}, -1, {}, {}, {}, []
    feed = iter(arguments)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(feed)
            continue
        if node.op == "output":
            returned = {v.untyped_storage().data_ptr() for v in _tensors(_load(node.args[0], values))}
            break
        position += 1
        values[node] = node.target(*_load(node.args, values), **_load(node.kwargs, values))
        keep.append(values[node])  # no storage is freed, so addresses identify storages
        for tensor in _tensors(values[node]):
            pointer = tensor.untyped_storage().data_ptr()
            first.setdefault(pointer, position)
            sizes_of.setdefault(pointer, tensor.untyped_storage().nbytes())
        for tensor in _tensors((_load(node.args, values), values[node])):
            last[tensor.untyped_storage().data_ptr()] = position
    inputs_at = {a.untyped_storage().data_ptr() for a in arguments}
    end = position + 1
    expected = sorted(
        (sizes_of[p], first[p], end if p in returned else last[p] + 1)
        for p in first
        if p not in inputs_at and sizes_of[p]
    )
    found = sorted((b.nbytes, b.start, b.end) for b in buffers.values() if b.kind != "scratch" and b.nbytes)
    assert found == expected


def _load(value, values):
    return torch.fx.node.map_arg(value, lambda n: values[n])


def _tensors(value):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _bind_symbols(module, arguments):
    from mosaic_compiler.runtime.symbols import reader_of, symbol_readings

    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    readings = symbol_readings(module, placeholders, ())
    return [reading.symbol for reading in readings], [reader_of(reading)(arguments) for reading in readings]


@settings(max_examples=8)
@given(toys.programs, shapes, st.integers(0, 1))
def test_input_mutation_through_torch_compile(program, shape, which):
    def mutating(a, b, w):
        outputs = program(a, b, w)
        (a, b)[which].add_(outputs[0].sum())
        (a, b)[which][:, 0].mul_(2)
        return outputs

    torch._dynamo.reset()
    compiled = torch.compile(mutating, backend="mosaic", dynamic=True, fullgraph=True, options={"poison": True})
    mine, theirs, steps = toys.inputs(*shape, 3), toys.inputs(*shape, 3), []
    with torch.no_grad(), observing(steps.append):
        got, expected = compiled(*mine), mutating(*theirs)
    tolerance = max(tolerance_of(step.module) for step in steps)
    assert_same(list(got), expected, tolerance)
    assert_same(list(mine), theirs, tolerance)


@pytest.mark.parametrize("poison", [False, True])
def test_random_numbers_are_those_of_eager(poison):
    def f(x):
        return torch.rand_like(x) + x, torch.bernoulli(x.sigmoid()), torch.randn(x.shape[0])

    compiled = torch.compile(f, backend="mosaic", dynamic=True, options={"poison": poison})
    x = torch.randn(5, 4)
    torch.manual_seed(0)
    expected = f(x)
    torch.manual_seed(0)
    with torch.no_grad():
        assert_same(list(compiled(x)), expected)


n, m = sympy.symbols("n m", integer=True, positive=True)


@pytest.mark.parametrize(
    "size",
    [
        n, sympy.Integer(3), n * m + 1, n**3, FloorDiv(n, 2), FloorDiv(n * m, 3), Mod(n, 5), 2 * Min(n, m),
        Max(n, m - 1), 2 * FloorDiv(n - 1, 2) + 2,
    ],
    ids=str,
)  # fmt: skip
@given(st.integers(2, 300), st.integers(2, 300))
def test_sizes_are_computed_from_the_inputs(size, first, second):
    """Computed pair by pair, a size has the value that sympy gives it."""
    inputs = {n: first, m: second}

    def value(expr):
        if expr in inputs or expr.is_Integer:
            return int(inputs.get(expr, expr))
        combine, parts = parts_of(expr)
        return functools.reduce(combine, map(value, parts))

    assert is_readable(size, inputs)
    assert value(size) == size.xreplace({n: sympy.Integer(first), m: sympy.Integer(second)})
    assert not is_readable(size + sympy.Symbol("u0"), inputs)


@pytest.mark.parametrize(
    ("size", "simple"),
    [
        (FloorDiv(n**2, n), n), (FloorDiv(n * m, m) + 1, n + 1), (FloorDiv(4 * n, 2), 2 * n),
        (FloorDiv(n + 1, 2), FloorDiv(n + 1, 2)), (n - FloorDiv(n + 1, 2), n - FloorDiv(n + 1, 2)),
        (FloorDiv(6 * n, 4), FloorDiv(3 * n, 2)), (FloorDiv(FloorDiv(n, 2) * m, m), FloorDiv(n, 2)),
        (FloorDiv(n * m + n, m + 1), n), (FloorDiv(n, n + 1), FloorDiv(n, n + 1)),
    ],
    ids=str,
)  # fmt: skip
@given(st.integers(2, 300), st.integers(2, 300))
def test_exact_floor_divisions_are_spelt_without(size, simple, first, second):
    inputs = {n: sympy.Integer(first), m: sympy.Integer(second)}
    assert exact(size) == simple
    assert exact(size).xreplace(inputs) == size.xreplace(inputs)
