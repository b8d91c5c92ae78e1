"""Attention over given keys and new ones behind them, without a copy of either."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_compiler.backend import observing
from mosaic_compiler.passes.base import trace
from mosaic_compiler.passes.canonicalize import CanonicalizePass
from mosaic_compiler.passes.split_attention import SplitAttentionPass
from mosaic_compiler.passes.verifier import Verifier

aten = torch.ops.aten


def attend(x, keys, values, *, groups=1, scale=None, order=False):
    """[B, M, D] new rows, and what is kept of [B, H / g, N, d] -> [B, M, D]."""
    heads, depth = keys.shape[1] * groups, keys.shape[3]
    query = x.repeat(1, 1, groups).view(*x.shape[:2], heads, depth).transpose(1, 2)
    new = x.view(*x.shape[:2], keys.shape[1], depth).transpose(1, 2)
    key, value = torch.cat([keys, new], 2), torch.cat([values, new.sin()], -2)
    if order:
        key, value = torch.cat([new, keys], 2), torch.cat([new.sin(), values], 2)
    seen = F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=groups > 1)
    return seen.transpose(1, 2).flatten(2)


def given_of(batch, rows, kept, seed, heads=2, depth=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, rows, heads * depth), (batch, heads, kept, depth), (batch, heads, kept, depth)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 2 for shape in shapes]


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(2, 9), st.integers(2, 40)), min_size=1, max_size=3),
    st.sampled_from([1, 2]),
    st.sampled_from([None, 0.3]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 99),
)
def test_parts_are_attended_to_where_they_are(batch, lengths, groups, scale, dtype, seed):
    def function(*operands):
        return attend(*operands, groups=groups, scale=scale)

    module = CanonicalizePass()(trace(function, *given_of(batch, 5, 7, 0, dtype=dtype), dynamic=[(1,), (2,), (2,)]))
    result = SplitAttentionPass()(module)
    Verifier(module).check(result, "split-attention")
    assert aten.cat.default not in {node.target for node in result.graph.nodes}
    exact = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    for rows, kept in lengths:
        operands = given_of(batch, rows, kept, seed, dtype=dtype)
        got = result(*operands)
        torch.testing.assert_close(got, function(*operands), atol=exact, rtol=exact)
        assert got.stride() == module(*operands).stride()


def test_parts_that_others_read_or_that_nobody_gave_stay_together():
    def returned(x, keys, values):
        new = x.unflatten(-1, (2, 8)).transpose(1, 2)
        key = torch.cat([keys, new], 2)
        return F.scaled_dot_product_attention(new, key, torch.cat([values, new], 2)), key

    def made(x, keys, values):
        return attend(x, keys * 2, values)

    def masked(x, keys, values):
        new = x.unflatten(-1, (2, 8)).transpose(1, 2)
        key = torch.cat([keys, new], 2)
        mask = torch.arange(key.shape[2]) % 3 != 1
        mask = mask[None, None, None].expand(x.shape[0], 1, x.shape[1], -1)
        return F.scaled_dot_product_attention(new, key, torch.cat([values, new], 2), attn_mask=mask)

    def in_front(*operands):
        return attend(*operands, order=True)

    def promoted(x, keys, values):
        return attend(x, keys.bfloat16(), values.bfloat16())

    for function in (returned, made, masked, in_front, promoted):
        module = CanonicalizePass()(trace(function, *given_of(1, 5, 7, 0)))
        assert SplitAttentionPass()(module) is module


@pytest.mark.parametrize("rows", [None, 3])
def test_no_copy_of_what_is_kept_is_planned(rows):
    steps = []
    options = {"disable": ("fuse",), **({} if rows is None else {"chunk_rows": rows, "poison": True})}
    compiled = torch.compile(lambda *operands: attend(*operands), backend="mosaic", dynamic=True, options=options)
    with torch.no_grad(), observing(steps.append):
        for kept in (33, 70):
            operands = given_of(2, 11, kept, kept)
            torch.testing.assert_close(compiled(*operands), attend(*operands), atol=1e-5, rtol=1e-5)
    assert len(steps) == 1
    plan = steps[0].outline.plan_for(4096, 1.0, None).plan
    made = [buffer for buffer in plan.buffers if not buffer.is_given and 4096 in buffer.shape]
    assert not [buffer.describe() for buffer in made if "cat" in buffer.op]
