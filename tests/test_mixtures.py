"""Mixtures of experts as one op, which is row-parallel: found in the graph, in chunks, for some rows, and expanded."""

from __future__ import annotations

import json

import published_samplers as published
import pytest
import torch
import torch.nn.functional as F
from effort import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kept import Kept
from test_caches import Cached
from test_long_models import model_of as long_model

import mosaic_compiler
from mosaic_compiler import MosaicOptions, Session, explain, ir
from mosaic_compiler.backend import compile_aten, kept_of, observing
from mosaic_compiler.ir import ops
from mosaic_compiler.kernels.mixture import parse
from mosaic_compiler.passes.base import trace
from mosaic_compiler.passes.canonicalize import CanonicalizePass
from mosaic_compiler.passes.expand_mixtures import ExpandMixturesPass
from mosaic_compiler.passes.mixtures import MixturesPass
from mosaic_compiler.passes.verifier import Verifier
from mosaic_compiler.sampling import DenoisingStep

transformers = pytest.importorskip("transformers")

EXPERTS, EACH, WIDTH, INNER = 6, 2, 16, 8
DTYPE = torch.bfloat16


def mixture(x, router, up, down, *, gate=True, weighted=True, back="index_put", counted="histc"):
    """[N, D] -> [N, D], as models write it, with what they do differently."""
    n = x.shape[0]
    weights, experts = torch.softmax((x @ router).float(), -1).topk(EACH)
    flat = experts.reshape(-1)
    numbers, order = torch.sort(flat)
    token = order // EACH
    if counted == "histc":
        counts = torch.histc(numbers.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
    else:
        counts = torch.bincount(numbers, minlength=EXPERTS)
    ends = counts.cumsum(0, dtype=torch.int32)
    h = torch._grouped_mm(x[token], up, ends)
    h = F.silu(h[:, :INNER]) * h[:, INNER:] if gate else h[:, :INNER].relu()
    h = torch._grouped_mm(h, down, ends)
    if weighted:
        h = h * weights.to(h.dtype).reshape(-1)[order].unsqueeze(-1)
    if back == "index_put":
        inverse = torch.empty_like(order).index_put((order,), torch.arange(n * EACH))
    else:
        inverse = torch.argsort(order)
    return h[inverse].view(n, EACH, -1).sum(1)


def operands(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, WIDTH), (WIDTH, EXPERTS), (EXPERTS, WIDTH, 2 * INNER), (EXPERTS, INNER, WIDTH))
    return [(torch.randn(shape, generator=generator) / 2).to(DTYPE) for shape in shapes]


VARIANTS = st.fixed_dictionaries(
    {
        "gate": st.booleans(),
        "weighted": st.booleans(),
        "back": st.sampled_from(["index_put", "argsort"]),
    }
)


@settings(max_examples=examples(6, 24))
@given(VARIANTS, st.lists(st.integers(2, 40), min_size=1, max_size=3), st.integers(0, 99))
def test_a_mixture_is_one_op_and_its_ops_again(how, lengths, seed):
    def function(*given):
        return mixture(*given, **how)

    module = CanonicalizePass()(trace(function, *operands(9), dynamic=[(0,)]))
    mixed = MixturesPass()(module)
    Verifier(module).check(mixed, "mixtures")
    assert [node.target for node in mixed.graph.nodes].count(ops.mixture) == 1
    assert not [node for node in mixed.graph.nodes if "grouped" in str(node.target)]
    again = ExpandMixturesPass()(mixed)
    Verifier(mixed).check(again, "expand-mixtures")
    assert len([node for node in again.graph.nodes if "grouped" in str(node.target)]) == 2
    for length in lengths:
        given = operands(length, seed)
        expected = function(*given)
        for graph in (mixed, again):
            torch.testing.assert_close(graph(*given), expected, atol=0, rtol=0)
        some = torch.randperm(length)[: max(1, length // 2)]
        node = next(node for node in mixed.graph.nodes if node.target is ops.mixture)
        assert node.args[2] == json.dumps(parse(node.args[2]).written())
        part = [given[0][some], *given[1:]]
        torch.testing.assert_close(mixed(*part), expected[some], atol=2e-2, rtol=2e-2)


@settings(max_examples=examples(3, 12))
@example({"gate": False, "weighted": True, "back": "index_put"}, 1, EXPERTS, True, False)  # as many rows as experts
@given(VARIANTS, st.sampled_from([1, 3, 8]), st.integers(2, 40), st.booleans(), st.booleans())
def test_in_chunks(how, chunk, length, is_fixed, poison):
    """Of any length, and of one that is fixed."""

    def function(x, router, up, down, w):
        return mixture((x @ w).relu(), router, up, down, **how) @ w

    w = torch.eye(WIDTH, dtype=DTYPE)
    traced, dynamic = (length, ()) if is_fixed else (9, (0,))
    module = trace(function, *operands(traced), w, dynamic=[dynamic, *[()] * 4])
    step = compile_aten(module, MosaicOptions(chunk_rows=chunk, poison=poison, disable=("fuse",)))
    given = [*operands(length, chunk), w]
    torch.testing.assert_close(step(given)[0], function(*given), atol=3e-2, rtol=3e-2)
    assert "mixture" in [op for loop in step.plan.loops for op in loop.ops]


def test_what_is_no_mixture_stays():
    """Somebody reads what is inside; another order; rows that mix."""

    def reads_inside(x, router, up, down):
        y = mixture(x, router, up, down)
        return y, torch.sort((x @ router).topk(EACH).indices.reshape(-1))[1]

    def wrong_way_back(x, router, up, down):
        n = x.shape[0]
        numbers, order = torch.sort((x @ router).topk(EACH).indices.reshape(-1))
        ends = torch.histc(numbers.float(), bins=EXPERTS, min=0, max=EXPERTS - 1).cumsum(0, dtype=torch.int32)
        h = torch._grouped_mm(x[order // EACH], up, ends)
        return h[order].view(n, EACH, -1).sum(1)

    def mixes_rows(x, router, up, down):
        n = x.shape[0]
        numbers, order = torch.sort((x @ router).topk(EACH).indices.reshape(-1))
        ends = torch.histc(numbers.float(), bins=EXPERTS, min=0, max=EXPERTS - 1).cumsum(0, dtype=torch.int32)
        h = torch._grouped_mm(x[order // EACH], up, ends)
        h = h - h.mean(0, keepdim=True)
        return h[torch.argsort(order)].view(n, EACH, -1).sum(1)

    for function, count in ((reads_inside, 1), (wrong_way_back, 0), (mixes_rows, 0)):
        module = CanonicalizePass()(trace(function, *operands(9), dynamic=[(0,)]))
        result = MixturesPass()(module)
        assert [node.target for node in result.graph.nodes].count(ops.mixture) <= count
        given = operands(13, 1)
        torch.testing.assert_close(result(*given), module(*given), atol=0, rtol=0)


def model_of(kind, dtype=torch.float32):
    config = {
        "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 64, "num_experts": 6, "num_experts_per_tok": 2, "is_causal": False,
        "experts_implementation": "grouped_mm",
    }  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        if kind == "olmoe":
            made = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**config))
        else:
            made = transformers.Qwen3MoeForCausalLM(
                transformers.Qwen3MoeConfig(**config, moe_intermediate_size=16, head_dim=16)
            )
    finally:
        torch.set_default_dtype(torch.float32)
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", [pytest.param("olmoe", marks=pytest.mark.slow), "qwen3"])
def test_caches_hold_for_mixtures(kind):
    """Keys and values are cut, and nothing else; steps for some rows equal an independent implementation."""
    model, steps = model_of(kind), []
    ids = torch.randint(4, 64, (2, 19), generator=torch.Generator().manual_seed(1))
    oracle = Kept(lambda given: model(given).logits)
    with torch.no_grad(), observing(steps.append), Session(model) as session:
        torch.testing.assert_close(session.full(ids).logits, oracle.full(ids), atol=1e-4, rtol=1e-4)
        for number in range(4):
            ids = ids.clone()
            ids[:, 3 * number] = 5 + number
            rows = torch.tensor([3 * number, 18 - number, 7])
            got = session.reuse(ids, rows).logits
            expected = oracle.reuse(rows.expand(2, -1), ids)
            torch.testing.assert_close(got[:, rows], expected[:, rows], atol=1e-4, rtol=1e-4)
    kept = kept_of(steps[-1].captured, steps[-1].options)
    assert len(kept.cut.values) == 4
    widths = [ir.only_tensor(value).numel() for value in kept.cut.values]
    assert len(set(map(str, widths))) == 1


@pytest.mark.slow
def test_the_last_layers_experts_are_computed_for_rows_that_are_read():
    model = model_of("olmoe")
    step = DenoisingStep(model, 3)
    ids = torch.randint(4, 64, (1, 40))
    ids[:, 30:] = 3
    window, count = torch.ones_like(ids, dtype=torch.bool), torch.tensor([2])
    with torch.no_grad():
        compiled = torch.compile(step, backend="mosaic", dynamic=True)
        assert torch.equal(compiled(ids, window, count), step(ids, window, count))
        said = str(explain(step, ids, window, count))
    assert "mixture_default_1" in said.partition("rows computed")[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["olmoe", "qwen3", "deepseek"])
@pytest.mark.parametrize(
    ("policy", "refresh"), [("prefix", "block"), ("dual", "block"), ("dual", 3), ("delayed", "never")]
)
def test_policies_on_mixtures_equal_their_reference(kind, policy, refresh):
    """As those of other models do (see ``test_caches.py``), id for id."""
    model = long_model("deepseek_v2", is_causal=False) if kind == "deepseek" else model_of(kind)
    prompt = torch.randint(6, 64, (2, 13), generator=torch.Generator().manual_seed(3))
    options = {"gen_length": 12, "block_length": 6, "steps": 8, "mask_token_id": 5, "bidirectional": True}
    got = mosaic_compiler.generate(model, prompt, **options, cache=policy, cache_refresh=refresh)
    blocks = [slice(13, 19), slice(19, 25)]
    cached = Cached(lambda ids: model(ids, use_cache=False).logits, policy, refresh, blocks, 4)
    expected = published.llada(cached, prompt, steps=8, gen_length=12, block_length=6, mask_id=5)
    assert torch.equal(got.sequences, expected)
    assert got.steps_by_kind == cached.kinds
    assert cached.kinds["reuse"] > 0


def test_ties_and_experts_without_rows():
    """All experts are as good, or one takes every row: what the routing says, as it says it."""

    def function(x, router, up, down):
        return mixture(x, router, up, down)

    module = CanonicalizePass()(trace(function, *operands(9), dynamic=[(0,)]))
    mixed = MixturesPass()(module)
    assert [node.target for node in mixed.graph.nodes].count(ops.mixture) == 1
    x, router, up, down = operands(17, 3)
    one_sided = torch.zeros_like(router)
    one_sided[:, 2] = 50.0
    for each in ((x, torch.zeros_like(router), up, down), (x.abs(), one_sided, up, down)):
        torch.testing.assert_close(mixed(*each), function(*each), atol=0, rtol=0)
