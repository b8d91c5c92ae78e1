"""``reorder``: the order with the lowest bound, never a worse one, and the same results."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mosaic_compiler
from mosaic_compiler.lowering.lifetimes import find_lives
from mosaic_compiler.passes import trace
from mosaic_compiler.passes.reorder import ReorderPass
from mosaic_compiler.passes.verifier import Verifier
from mosaic_compiler.planning.buffers import lower_bound
from mosaic_compiler.planning.lives import Sizes


def bound(module, n):
    lives = find_lives(module)
    return lower_bound(b for b in lives.at(Sizes(dict.fromkeys(lives.symbols, n))) if b.kind != "scratch")


def wide_then_narrow(x):
    a, b, c = torch.exp(x), torch.cos(x), torch.sin(x)
    return a.sum(0) + b.sum(0) + c.sum(0)


def test_large_values_are_read_before_the_next_is_made():
    x = torch.randn(64, 8)
    module = trace(wide_then_narrow, x, dynamic=[(0,)])
    result = ReorderPass()(module)
    assert torch.equal(result(x), wide_then_narrow(x))
    assert bound(result, 64) <= bound(module, 64) // 2
    (decision,) = result.meta["orders"]
    assert decision.chosen != "program"
    assert min(decision.estimates.values()) == decision.estimates[decision.chosen] < decision.estimates["program"]


def test_the_program_keeps_its_order_where_no_other_is_better():
    def f(x):
        return torch.exp(x).sum(0) + torch.cos(x).sum(0)

    module = trace(f, torch.randn(64, 8))
    result = ReorderPass()(module)
    assert [n.name for n in result.graph.nodes] == [n.name for n in module.graph.nodes]
    assert result.meta["orders"][0].chosen == "program"


def test_random_draws_keep_their_order():
    def f(x):
        a, b = torch.rand_like(x), torch.rand_like(x)
        return (b * x).sum(0), (a - x).sum(0)

    module = trace(f, torch.randn(64, 8))
    result = ReorderPass()(module)
    torch.manual_seed(0)
    expected = module(torch.ones(64, 8))
    torch.manual_seed(0)
    assert all(map(torch.equal, result(torch.ones(64, 8)), expected))


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("esam"), st.integers(0, 30), st.integers(0, 30)), min_size=2, max_size=14))
def test_never_higher_than_before(steps):
    """Random graphs of wide values and narrow sums: the estimate is the planner's, and results stay."""

    def f(x):
        values = [x]
        for op, i, j in steps:
            a, b = values[i % len(values)], values[j % len(values)]
            if op == "e":
                values.append(torch.exp(a * 0.1))
            elif op == "s":
                values.append(a.sum(-1, keepdim=True))
            elif op == "a":
                values.append(a + b)
            else:
                values.append(torch.relu(a) * b)
        return values[-1], values[-2]

    x = torch.randn(32, 16)
    module = trace(f, x, dynamic=[(0,)])
    result = ReorderPass()(module)
    Verifier(module).check(result, "reorder")
    assert all(map(torch.equal, result(x), f(x)))
    estimates = result.meta["orders"][0].estimates
    assert estimates["program"] >= min(estimates.values())
    assert bound(result, 4096) <= bound(module, 4096)


def test_explain_names_the_order_and_its_estimates():
    report = mosaic_compiler.explain(wide_then_narrow, torch.randn(64, 8), disable=("chunk-loops", "fuse"))
    assert "order of step: " in str(report)
    assert report.graphs[0].orders[0].chosen != "program"
