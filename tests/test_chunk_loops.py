"""Chunk loops: equal to the original for every chunk size, sound labels, legal writes, lives and memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_models import Toy, ids, toys

from mosaic_compiler import ir
from mosaic_compiler.backend import compile_aten
from mosaic_compiler.book import FLAT
from mosaic_compiler.errors import BudgetError, InvariantError
from mosaic_compiler.ir.loops import ChunkLoop, loop_of
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes import CanonicalizePass, run_passes, trace
from mosaic_compiler.passes.chunk_loops.labels import Edge, find_labels
from mosaic_compiler.planning.chunks import candidates
from mosaic_compiler.planning.lives import Sizes

PRIMES = (2, 3, 5, 11, 13, 17, 29)
lengths = st.integers(2, 40)


def traced(toy: Toy, batch: int, seed: int = 0):
    """The toy's graph with a symbolic length (and batch, if it is above 1)."""
    weights = toy.weights(seed)
    dims = (1,) if batch == 1 else (0, 1)
    return trace(toy, ids(batch, 19, 0), *weights, dynamic=[dims]), weights


def chunk_sizes(length: int):
    return st.sampled_from([1, 7, *PRIMES, max(length - 1, 1), length, length + 1])


def assert_equal(got, expected):
    """Integers equal; float64 within what another matmul kernel for another number of rows may round."""
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        else:
            assert torch.equal(a, b)


@settings(max_examples=examples(4, 25))
@given(toys, st.sampled_from([1, 1, 2, 3]), st.data())
def test_rewritten_equals_original_for_any_chunk_size(toy, batch, data):
    module, weights = traced(toy, batch)
    rewritten, _ = run_passes(module, disable=("fuse",))
    loops = [part for part in rewritten.modules() if isinstance(part, ChunkLoop)]
    assert loops
    for _ in range(3):
        length = data.draw(lengths)
        given_ids = ids(batch, length, length)
        for loop in loops:
            loop.chunk_rows = data.draw(chunk_sizes(length))
        assert_equal(rewritten(given_ids, *weights), toy(given_ids, *weights))


@settings(max_examples=examples(4, 30))
@given(toys, st.sampled_from([1, 1, 2, 3]), st.booleans(), st.data())
def test_compiled_equals_original_for_any_chunk_size(toy, batch, poison, data):
    module, weights = traced(toy, batch)
    first = data.draw(lengths)
    step = compile_aten(
        module, MosaicOptions(chunk_rows=data.draw(chunk_sizes(first)), poison=poison, disable=("fuse",))
    )
    for length in (first, data.draw(lengths), first):
        given_ids = ids(batch, length, length)
        assert_equal(step([given_ids, *weights]), toy(given_ids, *weights))
    assert not step.fallbacks


# ----------------------------------------------------------------------------------------- labels
def run_nodes(module, arguments, change=None):
    """Values of all nodes; ``change(node, value)`` may replace any of them on the way."""
    values = {}
    feed = iter(arguments)
    for node in module.graph.nodes:
        if node.op == "output":
            break
        if node.op == "placeholder":
            values[node] = next(feed)
        elif node.op == "get_attr":
            values[node] = getattr(module, node.target)
        else:
            args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
        if change is not None:
            values[node] = change(node, values[node])
    return values


def other_rows_changed(before, after, layout, batch, row):
    """Whether any row but ``row`` of a value differs; ``layout`` says which dims are rows."""
    if FLAT in layout:
        dim = layout.index(FLAT)
        length = before.shape[dim] // batch
        keep = torch.tensor([i for i in range(before.shape[dim]) if i % length != row])
    else:
        dim = layout.index(max(label for label in layout if label is not None))
        keep = torch.tensor([i for i in range(before.shape[dim]) if i != row])
    return not torch.equal(before.index_select(dim, keep), after.index_select(dim, keep))


@settings(max_examples=examples(6, 25))
@given(toys, st.sampled_from([1, 1, 3]), st.integers(3, 12), st.data())
def test_labels_are_sound(toy, batch, length, data):
    """Change row i of one labelled value: whatever is reached over ROW edges only changes in row i only."""
    module, weights = traced(toy, batch)
    module = CanonicalizePass()(module)
    labels = find_labels(module.graph)
    assert labels.of
    sources = [node for node in labels.of if len(labels.of[node]) == 1 and ir.tensor_of(node).dtype.is_floating_point]
    source = data.draw(st.sampled_from(sources))
    row = data.draw(st.integers(0, length - 1))
    reached = {source}
    for node in module.graph.nodes:
        edges = labels.edges(node) if node in labels.of else []
        touched = [kind for operand, kind, _ in edges if operand in reached]
        if touched and all(kind is Edge.ROW for kind in touched):
            reached.add(node)
    arguments = [ids(batch, length, 1), *weights]

    def change(node, value):
        if node is not source:
            return value
        layout, value = labels.layout(node), value.clone()
        dim = layout.index(FLAT) if FLAT in layout else layout.index(max(x for x in layout if x is not None))
        step = length if FLAT in layout else value.shape[dim]
        value.index_fill_(dim, torch.arange(row, value.shape[dim], step), 3.5)
        return value

    before, after = run_nodes(module, arguments), run_nodes(module, arguments, change)
    inputs_of_full = {
        user for node in reached for user in node.users if user not in reached and user.op == "call_function"
    }
    tainted = set(inputs_of_full)
    for node in module.graph.nodes:
        if tainted.intersection(node.all_input_nodes):
            tainted.add(node)
    for node in reached - tainted:
        layouts = labels.of[node]
        pairs = (
            zip(before[node], after[node], layouts, strict=False)
            if len(layouts) > 1
            else [(before[node], after[node], layouts[0])]
        )
        for a, b, layout in pairs:
            if layout is not None and isinstance(a, torch.Tensor):
                assert not other_rows_changed(a, b, layout, batch, row), (node, source)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_batch_entries_that_are_rows_attend_to_their_own_keys(chunk):
    """One position each; or positions in front, as ``nn.MultiheadAttention`` has them."""

    def one_position(x, w):  # [B, 1, D]
        q, k, v = ((x @ w[i]).view(-1, 1, 2, 4).transpose(1, 2) for i in range(3))
        return (F.scaled_dot_product_attention(q, k.repeat(1, 1, 3, 1), v.repeat(1, 1, 3, 1)) + k).flatten(1) @ w[3]

    def in_front(x, w):  # [N, B, D]
        q, k, v = ((x @ w[i]).view(x.shape[0], -1, 4).transpose(0, 1) for i in range(3))
        attended = torch.bmm(torch.softmax(torch.bmm(q, k.mT), -1), v)
        return attended.transpose(0, 1).reshape(-1, 8) @ w[3]

    w = torch.randn(4, 8, 8)
    options = {"chunk_rows": chunk, "poison": True, "disable": ("fuse",)}
    for f, shapes in ((one_position, [(7, 1, 8), (4, 1, 8)]), (in_front, [(7, 3, 8), (5, 2, 8), (2, 5, 8)])):
        fast = torch.compile(f, backend="mosaic", dynamic=True, options=options)
        for shape in shapes:
            x = torch.randn(shape)
            torch.testing.assert_close(fast(x, w), f(x, w), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunks_of_what_is_negated_or_conjugated_when_it_is_read(chunk):
    def negated(x, w):
        x = torch._neg_view(x)
        return (x @ w) @ x.t(), x.sin() @ w

    def conjugated(x, w):
        z = torch.view_as_complex(x.view(-1, 4, 2)).conj()
        return (z @ w[:4].to(z.dtype)).real @ w, z.imag @ w[:4]

    options = {"chunk_rows": chunk, "poison": True, "disable": ("fuse",)}
    w = torch.randn(8, 8)
    for f in (negated, conjugated):
        fast = torch.compile(f, backend="mosaic", dynamic=True, options=options)
        for rows in (7, 4):
            x = torch.randn(rows, 8)
            for got, expected in zip(fast(x, w), f(x, w), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_an_op_without_a_rule_needs_all_rows_and_is_named():
    def f(x, w):
        y = x @ w
        return torch.cumsum(y, 0) @ w

    module, _ = run_passes(trace(f, torch.randn(9, 6), torch.randn(6, 6), dynamic=[(0,)]), disable=("fuse",))
    assert any("cumsum" in op for _, op, _ in module.meta["unruled"])
    x, w = torch.randn(11, 6), torch.randn(6, 6)
    for loop in (part for part in module.modules() if isinstance(part, ChunkLoop)):
        loop.chunk_rows = 4
    torch.testing.assert_close(module(x, w), f(x, w))


# ---------------------------------------------------------------------------------------- structure
def test_a_transformer_layer_is_two_loops_and_layers_share_their_bodies():
    module, weights = traced(Toy(layers=4), 1)
    rewritten, _ = run_passes(module, disable=("fuse",))
    calls = [node for node in rewritten.graph.nodes if loop_of(node) is not None]
    assert len(calls) == 8
    assert len({node.target for node in calls}) <= 5
    step = compile_aten(module, MosaicOptions(chunk_rows=5, disable=("fuse",)))
    step([ids(1, 33, 0), *weights])
    names = {b.name: b for b in step.plan.buffers}
    wide = [b for b in names.values() if b.kind == "arena" and 33 in b.shape and b.nbytes > 33 * 8 * 2]
    assert all(b.nbytes == 33 * WIDTH_BYTES for b in wide), wide  # x, K and V, nothing else
    assert max(sum(b.start <= p < b.end for b in wide) for p in range(len(step.plan.schedule))) == 3


WIDTH_BYTES = 16 * 8


def test_grouped_query_heads_are_stored_once():
    module, weights = traced(Toy(kv_heads=1), 1)
    step = compile_aten(module, MosaicOptions(chunk_rows=5, disable=("fuse",)))
    step([ids(1, 33, 0), *weights])
    keys = [b for b in step.plan.buffers if b.kind == "arena" and b.shape == (1, 1, 33, 4)]
    assert keys
    assert not [b for b in step.plan.buffers if b.shape == (1, 4, 33, 4)]


def test_a_window_mask_exists_for_one_chunk_only():
    module, weights = traced(Toy(window=3), 1)
    step = compile_aten(module, MosaicOptions(chunk_rows=5, disable=("fuse", "visible-keys")))
    step([ids(1, 33, 0), *weights])
    assert not [b for b in step.plan.buffers if list(b.shape).count(33) > 1]
    assert [b for b in step.plan.buffers if 5 in b.shape and 33 in b.shape]


def test_random_draws_keep_their_order():
    def f(x, w):
        a = x @ w
        b = a + torch.rand_like(a)
        return torch.relu(b @ w) + torch.rand_like(b)

    step = compile_aten(
        trace(f, torch.randn(9, 6), torch.randn(6, 6), dynamic=[(0,)]), MosaicOptions(chunk_rows=4, disable=("fuse",))
    )
    x, w = torch.randn(11, 6), torch.randn(6, 6)
    torch.manual_seed(5)
    expected = f(x, w)
    torch.manual_seed(5)
    torch.testing.assert_close(step([x, w])[0], expected)


# ------------------------------------------------------------------------------------------ writes
def illegal(edit):
    """Apply an edit to a loop that overwrites its operand, and verify."""

    class Broken:
        name = "broken"

        def __call__(self, module):
            module = ir.copy_graph(module)
            edit(module)
            module.recompile()
            return module

    def f(x, w):
        h = torch.cumsum(x @ w, 0)
        y = h + torch.relu(h @ w) @ w
        return torch.cumsum(y, 0) @ w

    module, _ = run_passes(trace(f, torch.randn(9, 6), torch.randn(6, 6), dynamic=[(0,)]), disable=("fuse",))
    with pytest.raises(InvariantError, match=r"broken.*in-place"):
        run_passes(module, passes=[Broken()])


def writers(module):
    return [
        n for n in module.graph.nodes if loop_of(n) is not None and any(o.into is not None for o in loop_of(n).outputs)
    ]


def test_a_residual_is_written_in_place():
    def f(x, w):
        h = torch.cumsum(x @ w, 0)
        return torch.cumsum(h + torch.relu(h @ w) @ w, 0)

    module, _ = run_passes(trace(f, torch.randn(9, 6), torch.randn(6, 6), dynamic=[(0,)]), disable=("fuse",))
    assert len(writers(module)) == 1


def test_overwriting_what_is_read_later_is_refused():
    def read_again(module):
        node = writers(module)[0]
        written = node.args[next(o.into for o in loop_of(node).outputs if o.into is not None)]
        output = module.graph.output_node()
        with module.graph.inserting_before(output):
            again = module.graph.call_function(torch.ops.aten.relu.default, (written,))
            again.meta["val"] = written.meta["val"]
            last = output.args[0][0] if isinstance(output.args[0], (tuple, list)) else output.args[0]
            both = module.graph.call_function(torch.ops.aten.add.Tensor, (last, again))
            both.meta["val"] = last.meta["val"]
        output.args = ((both,),) if isinstance(output.args[0], (tuple, list)) else (both,)

    illegal(read_again)


def test_reading_rows_after_they_were_overwritten_is_refused():
    def late(module):
        node = writers(module)[0]
        loop = loop_of(node)
        body = ir.copy_graph(loop.body)
        output = body.graph.output_node()
        index = next(i for i, o in enumerate(loop.outputs) if o.into is not None)
        source = [n for n in body.graph.nodes if n.op == "placeholder"][1 + loop.outputs[index].into]
        with body.graph.inserting_before(output):
            again = body.graph.call_function(torch.ops.aten.relu.default, (source,))
            again.meta["val"] = source.meta["val"]
        body.recompile()
        changed = loop.with_body(body)
        module.add_submodule(node.target, changed)
        node.meta["loop"] = changed

    illegal(late)


# ------------------------------------------------------------------------------------------ budgets
@settings(max_examples=examples(4, 12))
@given(toys, st.integers(40, 700), st.floats(0, 1))
@pytest.mark.slow
def test_a_budget_is_obeyed_with_the_largest_chunks(toy, length, share):
    module, weights = traced(toy, 1)
    step = compile_aten(module, MosaicOptions(disable=("fuse",)))
    arguments = [ids(1, length, 0), *weights]
    step(arguments)
    sizes = Sizes({step.planner.tokens: length})
    evaluation = step.planner.model.at(sizes)
    least, most = evaluation.peak(evaluation.smallest()), evaluation.peak(evaluation.rows)
    budget = int(least + share * (most - least))
    limited = compile_aten(module, MosaicOptions(memory_budget=budget, disable=("fuse",)))
    assert_equal(limited(arguments), toy(*arguments))
    plan = limited.plan
    assert plan.workspace <= budget
    sizes = Sizes({limited.planner.tokens: length})
    evaluation, chunks = limited.planner.model.at(sizes), limited.planner.plan(sizes, budget).chunks
    for symbol, size in chunks.items():
        if size < length:
            larger = min(option for option in candidates(length) if option > size)
            assert evaluation.peak({**chunks, symbol: larger}) > budget - (plan.height - plan.lower_bound)
    for loop in plan.loops:
        assert (loop.chunk == length) == (loop.reason == "fits without chunks")


@pytest.mark.slow
def test_measured_memory_stays_within_the_budget():
    from mosaic_compiler.report.measure import _cpu_peak
    from mosaic_compiler.runtime.pools import pool_for

    toy = Toy(layers=3)
    module, weights = traced(toy, 1)
    arguments = [ids(1, 4096, 0), *weights]
    for budget in ("3.2MiB", "4MiB", "6MiB"):
        step = compile_aten(module, MosaicOptions(memory_budget=budget, disable=("fuse",)))
        step(arguments)
        outputs, allocated = _cpu_peak(lambda step=step: step(arguments))
        returned = sum(t.numel() * t.element_size() for t in outputs)
        measured = allocated - returned + pool_for(torch.device("cpu")).reserved()
        assert measured <= step.options.memory_budget
        assert any(loop.chunk < 4096 for loop in step.plan.loops) or budget == "6MiB"


def test_a_budget_above_the_peak_chunks_nothing():
    toy = Toy()
    module, weights = traced(toy, 1)
    step = compile_aten(module, MosaicOptions(memory_budget="1GiB", disable=("fuse",)))
    step([ids(1, 500, 0), *weights])
    assert not step.plan.loops  # the flat graph: nothing is computed again
    with_loops = step.planner.plan(Sizes({step.planner.tokens: 500}), 1 << 30).plan
    assert all(loop.chunk == loop.rows for loop in with_loops.loops)


def test_too_small_a_budget_is_an_error_that_says_what_fits():
    toy = Toy()
    module, weights = traced(toy, 1)
    step = compile_aten(module, MosaicOptions(memory_budget="1500KB", disable=("fuse",)))
    small = [ids(1, 64, 0), *weights]
    step(small)
    with pytest.raises(BudgetError) as error:
        step([ids(1, 60_000, 0), *weights])
    assert error.value.needed > error.value.budget == 1_500_000
    assert 64 < error.value.longest < 60_000
    assert "bottleneck" in str(error.value)
    assert_equal(step(small), toy(*small))  # the arena and the process stay usable
    step([ids(1, error.value.longest * 99 // 100, 0), *weights])


@pytest.mark.parametrize("count", [0, 1, 5, 127, 128, 129, 1000, 4096, 100_003])
def test_candidate_chunks(count):
    found = candidates(count)
    assert found[0] == count
    assert list(found) == sorted(set(found), reverse=True)
    assert all(size % 128 == 0 or size == count or size < 128 for size in found)
    assert not count or found[-1] == 1


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
@pytest.mark.parametrize("is_known", [True, False])
def test_causal_attention_is_chunked_where_it_is_known_what_queries_see(chunk, is_known):
    """A causal query's keys depend on where it stands among all of them: an op that is not told so is not chunked, but
    what is around it."""
    from torch.nn.functional import scaled_dot_product_attention

    def f(x, w, out):
        q, k, v = ((x @ part).view(-1, 2, 8).transpose(0, 1).unsqueeze(0) for part in w)
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.relu(y.squeeze(0).transpose(0, 1).reshape(x.shape) @ out) @ out.t()

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(23, 16, generator=generator, dtype=torch.float64)
    w = torch.randn(3, 16, 16, generator=generator, dtype=torch.float64)
    out = torch.randn(16, 48, generator=generator, dtype=torch.float64)
    disable = ("fuse",) if is_known else ("fuse", "visible-keys")
    step = compile_aten(trace(f, x, w, out, dynamic=[(0,)]), MosaicOptions(chunk_rows=chunk, disable=disable))
    assert_equal(step([x, w, out]), (f(x, w, out),))
    ops = [op for loop in step.plan.loops for op in loop.ops]
    assert ops.count("mm") == 5, "the products run in loops"
    assert ("attention" in ops) == is_known


def test_a_part_of_a_table_that_a_guard_makes_as_long_as_the_rows():
    """``min(64, N)`` rows are N of them, by a guard that no expression says."""

    def f(x, table, w):
        return torch.relu((torch.relu(x @ w) * table[: min(64, x.shape[0])]) @ w)

    x, table, w = torch.randn(12, 16), torch.randn(64, 16), torch.randn(16, 16)
    compiled = torch.compile(f, backend="mosaic", dynamic=True, options={"chunk_rows": 5, "disable": ("fuse",)})
    for n in (12, 9, 64):
        rows = x[:1].repeat(n, 1)
        torch.testing.assert_close(compiled(rows, table, w), f(rows, table, w))


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_two_streams_are_overwritten_by_one_loop(chunk):
    """The verifier tells what is read of one stream later from what is read of the other."""

    def f(x, y, w):
        x, y = x.cumsum(0), y.cumsum(0)
        for _ in range(2):
            x, y = x + torch.relu(y @ w), y + torch.relu(x @ w)
            x = x + torch.softmax((x @ w) @ (y @ w).t(), -1) @ (y @ w)
        return x, y

    inputs = [torch.randn(19, 8, dtype=torch.float64), torch.randn(19, 8, dtype=torch.float64)]
    inputs.append(torch.randn(8, 8, dtype=torch.float64) / 8)
    options = MosaicOptions(chunk_rows=chunk, disable=("fuse",), poison=True)
    step = compile_aten(trace(f, *inputs, dynamic=[(0,), (0,)]), options)
    assert_equal(step(inputs), f(*inputs))


def test_a_size_that_cannot_be_computed_leaves_the_graph_without_loops_and_is_named(monkeypatch):
    from mosaic_compiler.ir.sizes import UnreadableSizeError
    from mosaic_compiler.passes import chunk_loops

    def unreadable(self, expr):
        raise UnreadableSizeError(str(expr))

    toy = Toy()
    module, weights = traced(toy, 2)
    options = MosaicOptions(chunk_rows=4, disable=("fuse",))
    assert compile_aten(module, options).lives.chunks
    monkeypatch.setattr(chunk_loops._Rewriter, "_emit_number", unreadable)
    step = compile_aten(module, options)
    assert not step.lives.chunks
    assert len(step.module.meta["unruled"]) == 1
    given_ids = ids(2, 11, 0)
    assert_equal(step([given_ids, *weights]), toy(given_ids, *weights))
