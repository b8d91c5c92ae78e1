"""State: what is found to be kept, and that steps for some rows equal an independent implementation of them."""

from __future__ import annotations

import pytest
import torch
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import Kept
from toy_models import Toy, ids, toys

from mosaic_compiler import ir
from mosaic_compiler.backend import _kinds_of
from mosaic_compiler.ir.notes import STATIC_INPUTS
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes import CanonicalizePass, Verifier, run_passes, trace
from mosaic_compiler.passes.state import KeepStatePass, ReuseStatePass, find_cut
from mosaic_compiler.passes.verifier.legal_writes import illegal_writes
from mosaic_compiler.runtime.state import Block


def traced(toy: Toy, batch: int, weights: list[torch.Tensor]) -> torch.fx.GraphModule:
    dynamic = [(0, 1) if batch > 1 else (1,)]
    module = trace(toy, ids(batch, 13, 0), *weights, dynamic=dynamic)
    STATIC_INPUTS.write(module, tuple(range(1, 1 + len(weights))))
    return module


rows_in = st.lists(st.floats(0, 0.999), min_size=1, max_size=6)
"""Rows as shares of the length: for sequences of any length, unsorted, some twice."""


def at_rows(result: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    index = rows.reshape(*rows.shape, *[1] * (result.dim() - 2)).expand(*rows.shape, *result.shape[2:])
    return result.gather(1, index)


schedules = given(
    toy=toys,
    batch=st.integers(1, 3),
    length=st.integers(2, 24),
    chunk=st.sampled_from([None, 1, 3, 8]),
    poison=st.booleans(),
    steps=st.lists(st.tuples(st.booleans(), st.lists(rows_in, min_size=3, max_size=3), st.integers(0, 3)), max_size=4),
    seed=st.integers(0, 9),
)


@settings(max_examples=examples(2, 8))
@schedules
def test_any_schedule_of_steps_equals_an_independent_one(toy, batch, length, chunk, poison, steps, seed):
    """Full and reuse steps in any order, with any rows for each sequence, ids that change in between, in chunks."""
    check_schedule(toy, batch, length, chunk, poison, steps, seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=200)
@schedules
def test_many_schedules(toy, batch, length, chunk, poison, steps, seed):
    check_schedule(toy, batch, length, chunk, poison, steps, seed)


def check_schedule(toy, batch, length, chunk, poison, steps, seed):
    weights = toy.weights(seed)
    module = traced(toy, batch, weights)
    kinds = _kinds_of(module, MosaicOptions(chunk_rows=chunk, poison=poison))
    assert not kinds.problem
    block, oracle = Block(kinds), Kept(lambda tokens: toy(tokens, *weights))
    tokens = ids(batch, length, seed)
    for expected, got in zip(oracle.full(tokens), block.keep([tokens, *weights]), strict=True):
        torch.testing.assert_close(got, expected)
    for is_full, shares, changes in steps:
        for number in range(changes):
            tokens = tokens.clone()
            tokens[:, (7 * number + seed) % length] = (seed + number) % 23
        if is_full:
            expected, got = oracle.full(tokens), block.keep([tokens, *weights])
        else:
            most = max(map(len, shares[:batch]))
            numbers = [[int(share * length) for share in (each * most)[:most]] for each in shares[:batch]]
            rows = torch.tensor(numbers)
            expected = [at_rows(part, rows) for part in oracle.reuse(rows, tokens)]
            got = [at_rows(part, rows) for part in block.run_rows([tokens, *weights], rows)]
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)
    block.release()


@settings(max_examples=examples(2, 8))
@given(toy=toys, batch=st.integers(1, 2), seed=st.integers(0, 9))
def test_graphs_of_both_kinds_run_in_plain_pytorch_and_are_verified(toy, batch, seed):
    weights = toy.weights(seed)
    canonical, _ = run_passes(traced(toy, batch, weights), passes=[CanonicalizePass()])
    cut = find_cut(canonical.graph)
    assert len(cut.values) == 2 * toy.layers
    full, reuse = KeepStatePass()(canonical), ReuseStatePass()(canonical)
    for module in (full, reuse):
        Verifier(module).check(run_passes(module)[0], "all")
    tokens = ids(batch, 13, seed)
    expected = canonical(tokens, *weights)
    results = full(tokens, *weights, *[torch.empty(0)] * len(cut.values))
    for one, other in zip(results, expected, strict=False):
        assert torch.equal(one, other)
    rows = torch.tensor([[3, 1, 12, 3]] * batch)
    state = [part.clone() for part in results[len(expected) :]]
    again = reuse(tokens, *weights, rows, *state)
    for one, other in zip(again, expected, strict=True):
        torch.testing.assert_close(at_rows(one, rows), at_rows(other, rows))
    for one, other in zip(state, results[len(expected) :], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("batch", [1, 2])
def test_old_state_is_not_read_behind_a_write(batch):
    """A pass that moved a read of state behind the rows that replace it would be caught."""
    weights = Toy().weights(0)
    canonical, _ = run_passes(traced(Toy(), batch, weights), passes=[CanonicalizePass()])
    graph = ReuseStatePass()(canonical).graph
    assert not list(illegal_writes(graph, ir.StorageMap(graph)))
    state = next(node for node in graph.nodes if ir.STATE_MEMORY in node.meta)
    output = graph.output_node()
    with graph.inserting_before(output):
        late = graph.call_function(torch.ops.aten.sum.default, (state,))
        late.meta["val"] = torch.empty(())
    problems = list(illegal_writes(graph, ir.StorageMap(graph)))
    assert len(problems) == 1
    assert f"overwrites {state.name}, which sum_default reads later" in problems[0].replace(late.name, "sum_default")


@pytest.mark.slow
def test_who_reads_rows_that_are_not_computed_is_named():
    """A mean over all rows of the logits is not what it says in a step for some rows; a choice by a mask is."""
    weights = Toy().weights(0)

    def mean(tokens, *given):
        return Toy(result="logits")(tokens, *given)[0].mean(1)

    def chosen(tokens, *given):
        logits = Toy(result="logits")(tokens, *given)[0]
        return torch.where(tokens == 3, logits.argmax(-1), tokens)

    for function, names in ((mean, ["uncomputed-rows"]), (chosen, [])):
        module = trace(function, ids(1, 13, 0), *weights, dynamic=[(1,)])
        STATIC_INPUTS.write(module, tuple(range(1, 1 + len(weights))))
        kinds = _kinds_of(module, MosaicOptions(disable=("fuse",)))
        assert [fallback.name for fallback in kinds.reuse.fallbacks] == names


def test_a_graph_that_mixes_rows_in_the_middle_keeps_nothing():
    """Rows behind a mean over the sequence cannot be computed from some rows."""
    weights = Toy().weights(0)

    def mixing(tokens, *given):
        table, *rest, head = given
        x = torch.nn.functional.embedding(tokens, table)
        x = Toy().block(x, *rest[:9])
        x = x - x.mean(1, keepdim=True)
        return Toy().block(x, *rest[9:18]) @ head.t()

    module = trace(mixing, ids(1, 13, 0), *weights, dynamic=[(1,)])
    kinds = _kinds_of(module, MosaicOptions())
    assert not kinds.keeps
    assert "needs all rows of what it reads" in kinds.why
    assert "follows" in kinds.why
