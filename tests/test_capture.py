"""Masks that are always true disappear before an attention kernel is chosen; which floats are constants."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import mosaic_compiler
from mosaic_compiler import capture
from mosaic_compiler.backend import observing
from mosaic_compiler.true_masks import drop_true_masks


def positions(q):
    return torch.arange(q.shape[2], device=q.device)


def rows(q):
    return (positions(q) + 0)[None, None, :, None]


def ones(q):
    return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)


def written(write):
    """A mask of ones, written by a function that may return another one."""

    def mask(q):
        made = ones(q)
        return made if (found := write(made)) is None else found

    return mask


def set_corner(mask):
    mask[:3, 3:] = False


def set_through_a_view(mask):
    mask.t()[3:].fill_(False)


def set_before_it_is_viewed(mask):
    view = mask[None, None].expand(1, 1, -1, -1)
    mask.tril_()
    return view


def and_in_place(mask):
    mask &= torch.ones_like(mask).tril()
    return mask


def written_out(mask):
    torch.logical_and(mask, torch.ones_like(mask).tril(), out=mask)


def moved(q, by):
    rows = torch.arange(q.shape[2])
    rows += by
    return (rows >= 0).expand(q.shape[2], -1)


def doubled(q):
    rows = torch.arange(q.shape[2])
    rows += rows
    return (rows >= 0).expand(q.shape[2], -1)


def doubled_often(q):
    rows = torch.arange(q.shape[2])
    for _ in range(40):
        rows = rows + rows
    return (rows >= 0).expand(q.shape[2], -1)


MASKS = {
    "added to itself in place": (doubled, False),
    "added to itself often": (doubled_often, False),
    "set": (written(set_corner), False),
    "set through a view": (written(set_through_a_view), False),
    "set before it is viewed": (written(set_before_it_is_viewed), False),
    "tril_": (written(torch.Tensor.tril_), False),
    "and in place": (written(and_in_place), False),
    "out=": (written(written_out), False),
    "logical_and, other=": (lambda q: torch.logical_and(ones(q), other=ones(q).tril()), False),
    "logical_and of ones": (lambda q: torch.logical_and(input=ones(q), other=ones(q)), True),
    "full, fill_value=": (lambda q: torch.full(size=(q.shape[2], q.shape[2]), fill_value=True), True),
    "full of False": (lambda q: torch.full((q.shape[2], q.shape[2]), fill_value=False).logical_not(), False),
    "full_like": (lambda q: torch.full_like(ones(q), fill_value=True), True),
    "new_ones": (lambda q: ones(q).new_ones(q.shape[2], q.shape[2]), True),
    "arange, end=": (lambda q: (torch.arange(end=q.shape[2]) >= 0).expand(q.shape[2], -1), True),
    "arange, start=": (lambda q: (torch.arange(start=0, end=q.shape[2]) >= 0).expand(q.shape[2], -1), True),
    "ge, other=": (lambda q: torch.ge(torch.arange(q.shape[2]), other=0).expand(q.shape[2], -1), True),
    "method ge": (lambda q: torch.arange(q.shape[2]).ge(other=0).expand(q.shape[2], -1), True),
    "moved up in place": (lambda q: moved(q, 2), True),
    "moved down in place": (lambda q: moved(q, -1), False),
    "wraps around": (lambda q: (torch.arange(q.shape[2], dtype=torch.int8) + 124 >= 0).expand(q.shape[2], -1), False),
    "bidirectional": (lambda q: (rows(q) >= 0).expand(q.shape[0], -1, q.shape[2], q.shape[2]), True),
    "shifted": (lambda q: (rows(q) + 2 >= 1).expand(q.shape[0], -1, q.shape[2], q.shape[2]), True),
    "ones": (lambda q: torch.ones(q.shape[2], q.shape[2], dtype=torch.bool), True),
    "and": (lambda q: (rows(q) >= 0) & torch.ones(1, 1, 1, q.shape[2], dtype=torch.bool), True),
    "not all": (lambda q: (rows(q) >= 1).expand(q.shape[0], -1, q.shape[2], q.shape[2]), False),
    "negative start": (lambda q: (torch.arange(-1, q.shape[2] - 1) >= 0).expand(q.shape[2], -1), False),
    "difference": (lambda q: positions(q)[:, None] - positions(q)[None] >= 0, False),
    "causal": (lambda q: torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(), False),
}


TRUE = {"wraps around", "full of False", "added to itself in place", "added to itself often"}
"""Masks that are true everywhere, which is not provable."""


@pytest.mark.parametrize("name", MASKS)
def test_mask(name):
    mask, dropped = MASKS[name]
    seen = []

    def step(q):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask(q))

    def spy(module, inputs):
        before = len(module.graph.nodes)
        drop_true_masks(module)
        seen.append(len(module.graph.nodes) < before)
        return module.forward

    q = torch.randn(2, 3, 9, 8)
    with torch.no_grad():
        expected, unmasked = step(q), F.scaled_dot_product_attention(q, q, q)
        assert torch.allclose(torch.compile(step, backend=spy, dynamic=True)(q), expected, atol=1e-6)
        report = mosaic_compiler.explain(step, q)
    assert seen == [dropped]
    torch.testing.assert_close(report.result, expected, equal_nan=True)
    assert dropped or name in TRUE or not torch.allclose(expected, unmasked, equal_nan=True)
    assert not dropped or not [b for b in report.plan.buffers if b.shape[-2:] == (9, 9)]


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scaling, self.factor, self.temperature = 0.25, 1.5, 0.0

    def forward(self, x):
        q = x.view(1, 2, -1, 8) * self.factor
        if self.temperature > 0:  # a float that only a condition asks for
            q = q / self.temperature
        return F.scaled_dot_product_attention(q, q, q, scale=self.scaling)


def test_a_scale_is_a_constant_before_anything_else_is_traced(monkeypatch):
    from mosaic_compiler import backend

    traced, compiled = [], []
    original = backend.drop_true_masks
    monkeypatch.setattr(backend, "drop_true_masks", lambda module: traced.append(1) or original(module))
    module, x = Scaled().eval(), torch.randn(6 * 16)
    step = torch.compile(module, backend="mosaic", dynamic=True, options={"disable": ("fuse",)})
    with torch.no_grad(), backend.observing(compiled.append):
        assert torch.equal(step(x), module(x))
        assert len(traced) == 1, "AOTAutograd traced, and then Dynamo began again"
        module.factor = 2.5  # arithmetic: an input, as with any other backend
        assert torch.equal(step(x), module(x))
        assert len(compiled) == 1
        module.temperature = 0.5
        assert torch.equal(step(x), module(x))
    assert len(compiled) == 2


class Outer(torch.nn.Module):
    """A model around the modules that hold its floats."""

    def __init__(self):
        super().__init__()
        self.scaled = torch.nn.ModuleList([Scaled(), Scaled()])
        self.sharpness = 2.0

    def forward(self, x):
        for inner in self.scaled:
            x = inner(x).flatten()
        return x * self.sharpness


def test_floats_of_inner_modules_are_constants_until_they_change(monkeypatch):
    monkeypatch.setattr(capture, "_settled", {})
    module, x, compiled = Outer().eval(), torch.randn(6 * 16), []
    step = torch.compile(module, backend="mosaic", dynamic=True, options={"disable": ("fuse",)})

    def floats():
        """Inputs of the graph that was compiled last."""
        values = [node.meta["val"] for node in compiled[-1].captured.graph.find_nodes(op="placeholder")]
        return sum(isinstance(value, torch.Tensor) and value.dtype == torch.float64 for value in values)

    with torch.no_grad(), observing(compiled.append):
        assert torch.equal(step(x), module(x))
        assert (len(compiled), floats()) == (1, 1)  # sharpness: what steps have themselves may differ from call to call
        module.sharpness = 3.0
        assert torch.equal(step(x), module(x))
        assert len(compiled) == 1
        for factor in (2.5, 3.5, 4.5):
            module.scaled[1].factor = factor
            assert torch.equal(step(x), module(x))
        assert (len(compiled), floats()) == (2, 2)  # it was found to change
        module.scaled[0].factor = 1.25
        assert torch.equal(step(x), module(x))
        assert (len(compiled), floats()) == (3, 3)


def test_two_models_of_one_architecture_have_constants_of_their_own():
    """A float that another model has otherwise is no reason to pass it in every step."""
    x, found = torch.randn(6 * 16), []
    for factor in (2.0, 3.0, 2.0):
        module = Outer().eval()
        module.scaled[1].factor = factor
        step = torch.compile(module, backend="mosaic", dynamic=True, options={"disable": ("fuse",)})
        with torch.no_grad(), observing(found.append):
            assert torch.equal(step(x), module(x))
    inputs = [len(step.captured.graph.find_nodes(op="placeholder")) for step in found]
    assert len(inputs) >= 2, "the third may be the first again"
    assert len(set(inputs)) == 1


def test_nan_and_infinite_floats_of_inner_modules():
    module, x = Outer().eval(), torch.randn(6 * 16)
    step = torch.compile(module, backend="mosaic", dynamic=True, options={"disable": ("fuse",)})
    with torch.no_grad():
        for factor in (float("nan"), float("inf"), -0.0, 0.0, 1.5):
            module.scaled[0].factor = factor
            torch.testing.assert_close(step(x), module(x), equal_nan=True, rtol=0, atol=0)


def test_writes_that_nobody_reads_stay_where_a_mask_is_dropped():
    """Seed 288 of the fuzzer."""

    def step(q, ids):
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
        seen = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        ids.neg_()
        ids[1:].add_(5)
        return seen, ids * 2

    q, mine, theirs = torch.randn(1, 2, 9, 8), torch.arange(9), torch.arange(9)
    with torch.no_grad():
        got = torch.compile(step, backend="mosaic", dynamic=True)(q, mine)
        torch.testing.assert_close(got, step(q, theirs))
    assert torch.equal(mine, theirs)


def test_a_mask_that_repeats_the_queries_stays():
    """It has more batches than the queries, and so has the result."""

    def step(q):
        mask = torch.ones(2, 1, q.shape[2], q.shape[2], dtype=torch.bool)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    q = torch.randn(1, 2, 9, 8)
    with torch.no_grad():
        try:
            expected = step(q)
        except RuntimeError:
            return  # this version of PyTorch does not broadcast them
        assert torch.compile(step, backend="mosaic", dynamic=True)(q).shape == expected.shape
