"""Heads in vocabulary tiles: the same answers without the logits."""

from __future__ import annotations

import pytest
import torch
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

import mosaic_compiler
from mosaic_compiler.backend import compile_aten
from mosaic_compiler.kernels.head_statistics import apply_steps, head_statistics_
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes import trace
from mosaic_compiler.report.measure import _cpu_peak


def statistics(hidden, weight, bias, steps, tile, top):
    rows = hidden.shape[0]
    results = [
        torch.empty(rows), torch.empty(rows, dtype=torch.int64), torch.empty(rows), torch.empty(rows),
        torch.empty(rows, top), torch.empty(rows, top, dtype=torch.int64),
    ]  # fmt: skip
    head_statistics_(results, hidden, weight, bias, steps, tile)
    return results


@given(
    st.integers(0, 6), st.integers(3, 40), st.integers(3, 50),
    st.sampled_from(["", "div:3.0,tanh,mul:3.0", "mul:-2.0"]), st.booleans(), st.integers(0, 3), st.integers(0, 10**6),
)  # fmt: skip
def test_statistics_equal_those_of_whole_logits(rows, vocabulary, tile, steps, with_bias, top, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 5, generator=generator)
    weight = torch.randn(vocabulary, 5, generator=generator).t()
    bias = torch.randn(vocabulary, generator=generator) if with_bias else None
    logits = apply_steps(hidden @ weight + (bias if with_bias else 0), steps)
    best, where, total, weighted, top_values, top_indices = statistics(hidden, weight, bias, steps, tile, top)
    torch.testing.assert_close(best, logits.amax(-1))
    assert torch.equal(where, logits.argmax(-1))
    torch.testing.assert_close(best + total.log(), logits.logsumexp(-1))
    p = logits.softmax(-1)
    torch.testing.assert_close(weighted / total, (p * logits).sum(-1), rtol=1e-4, atol=1e-4)
    values, indices = logits.topk(top, -1)
    torch.testing.assert_close(top_values, values)
    assert torch.equal(top_indices, indices)


@pytest.mark.parametrize("tile", [1, 2, 3, 4, 7])
def test_ties_and_nan_resolve_as_in_torch_argmax(tile):
    logits = torch.tensor([[1.0, 3, 3, 0, 3], [2, 2, 2, 2, 2], [-1, -2, 5, 5, 0]])
    best, where, *_ = statistics(torch.eye(3), logits, None, "", tile, 0)
    assert torch.equal(where, logits.argmax(-1))
    assert torch.equal(best, logits.amax(-1))
    # torch.mm spreads a NaN over its column, so it is checked in a matrix of one row
    row = torch.tensor([[0, 1, float("nan"), 9, float("nan")]])
    best, where, *_ = statistics(torch.ones(1, 1), row, None, "", tile, 0)
    assert best.isnan().all()
    assert where.tolist() == row.argmax(-1).tolist()


def everything(hidden, weight, ids):
    logits = torch.tanh((hidden @ weight.t()) / 5) * 5
    probability = torch.softmax(logits, -1)
    token = logits.argmax(-1)
    chosen = probability.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    entropy = -(probability * torch.log_softmax(logits, -1)).sum(-1)
    top = torch.topk(probability, 2, -1)[0]
    confidence, index = probability.max(-1)
    masked = ids == 3
    return (
        torch.where(masked, token, ids),
        torch.where(masked, chosen, -1.0),
        torch.where(masked, entropy, 0.0),
        torch.where(masked, top[..., 0] - top[..., 1], 0.0),
        torch.where(masked, confidence, 0.0),
        torch.where(masked, index, 0),
    )


@settings(max_examples=examples(6, 24))
@given(st.sampled_from([1, 3]), st.integers(2, 9), st.integers(1, 30), st.sampled_from([0.0, 0.5, 1.0]), st.booleans())
def test_a_head_with_every_reader(batch, length, tile, share, poison):
    def inputs(n):
        ids = torch.where(torch.rand(batch, n) < share, 3, 5)
        return torch.randn(batch, n, 8), torch.randn(21, 8), ids

    step = compile_aten(
        trace(everything, *inputs(6)), MosaicOptions(vocabulary_tile=tile, poison=poison, disable=("fuse",))
    )
    assert any("head_statistics" in str(node.target) for node in step.module.graph.nodes)
    arguments = inputs(length)
    for got, expected in zip(step(list(arguments)), everything(*arguments), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not [b for b in step.plan.buffers if len(b.shape) > 1 and b.shape[-1] == 21]


@pytest.mark.parametrize(
    "reader",
    [
        lambda x: (x.argmax(-1), x),  # logits returned
        lambda x: (x.argmax(-1), x.sort(-1)[1]),  # a reader that needs whole rows
        lambda x: (x.argmax(0),),  # over tokens
        lambda x: (torch.softmax(x, -1).gather(-1, torch.zeros_like(x[:, :1], dtype=torch.int64)),),  # not the argmax
    ],
)
def test_other_readers_keep_the_head_whole(reader):
    def f(h, w):
        return reader(h @ w.t())

    arguments = torch.randn(4, 8), torch.randn(21, 8)
    step = compile_aten(trace(f, *arguments), MosaicOptions(vocabulary_tile=4, disable=("fuse",)))
    assert not any("head_statistics" in str(node.target) for node in step.module.graph.nodes)
    for got, expected in zip(step(list(arguments)), f(*arguments), strict=True):
        assert torch.equal(got, expected)


def test_scratch_is_accounted():
    def f(h, w):
        x = h @ w.t()
        return x.argmax(-1), torch.softmax(x, -1).amax(-1), torch.topk(x, 3, -1)[1]

    arguments = [torch.randn(900, 32), torch.randn(5000, 32)]
    step = compile_aten(trace(f, *arguments), MosaicOptions(vocabulary_tile=500, disable=("fuse",)))
    step(arguments)
    _, peak = _cpu_peak(lambda: step(arguments))
    assert peak <= max(step.plan.outside) + 4096


@pytest.mark.parametrize("tile", [0, -5, True, "8k"])
def test_bad_tiles(tile):
    with pytest.raises(mosaic_compiler.MosaicError, match="vocabulary_tile"):
        MosaicOptions(vocabulary_tile=tile, disable=("fuse",))
