"""Chosen keys: what is kept equals an independent implementation, and all of it is what is kept without choosing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from allocations import most_allocated
from chosen import Chosen, chosen_of, scores_of
from effort import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kept import closeness
from remote_models import VOCABULARY, DreamLike, LLaDALike, TidyLike
from test_state import at_rows, traced
from toy_models import Toy, ids, toys

import mosaic_compiler
from mosaic_compiler import Session
from mosaic_compiler.backend import _kinds_of, observing
from mosaic_compiler.errors import BudgetError, MissingStateError, OptionsError, StateError
from mosaic_compiler.ir.notes import STATIC_INPUTS
from mosaic_compiler.kernels.key_selection import scratch_bytes, select_keys_
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes import CanonicalizePass, Verifier, run_passes, trace
from mosaic_compiler.passes.state import KeepSelectedPass, ReuseSelectedPass
from mosaic_compiler.planning.ladder import rungs_of
from mosaic_compiler.planning.selection import SCORES, kept_keys, selection_of
from mosaic_compiler.runtime.state import Block

pytestmark = pytest.mark.usefixtures("warm")

MASK = 5
ways = st.sampled_from([(score, sets) for score in SCORES for sets in ("head", "layer") if score != "sparse-dllm"]
                       + [("sparse-dllm", "layer")])  # fmt: skip


def block_of(toy, batch, weights, **options):
    kinds = _kinds_of(traced(toy, batch, weights), MosaicOptions(disable=("fuse",), **options))
    assert not kinds.problem
    return Block(kinds)


# ------------------------------------------------------------------------------------------------- which keys
@settings(max_examples=examples(60, 400), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    way=ways, batch=st.integers(1, 2), groups=st.integers(1, 3), share=st.integers(1, 3), length=st.integers(1, 30),
    keep=st.one_of(st.integers(1, 30), st.sampled_from([0.1, 0.5, 1.0])), coarse=st.booleans(),
    seed=st.integers(0, 999), bounds=st.sampled_from([None, "causal", "only"]), data=st.data(),
)  # fmt: skip
def test_chosen_keys_are_those_of_the_description(
    way, batch, groups, share, length, keep, coarse, seed, bounds, data, monkeypatch_tiles
):
    """Whatever the tiles are; numbers that are all alike (``coarse``) make many ties."""
    score, sets = way
    generator = torch.Generator().manual_seed(seed)

    def numbers(*sizes):
        made = torch.randn(*sizes, generator=generator, dtype=torch.float64)
        return made.round() if coarse else made

    chosen = [sorted(data.draw(st.sets(st.integers(0, length - 1), min_size=1, max_size=5))) for _ in range(batch)]
    most = max(map(len, chosen))
    rows = torch.tensor([each + each[-1:] * (most - len(each)) for each in chosen])
    query, key = numbers(batch, groups * share, most, 4), numbers(batch, groups, length, 4)
    query = query.gather(2, torch.tensor([[min(i, len(each) - 1) for i in range(most)] for each in chosen])[
        :, None, :, None].expand_as(query))  # fmt: skip
    first = last = only = None
    seen = torch.ones(batch, most, length, dtype=torch.bool)
    if bounds == "causal":
        last = (rows + 1)[:, None, :, None]
        seen = torch.arange(length) <= rows[:, :, None]
    if bounds == "only":
        only = (torch.rand(batch, 1, 1, length, generator=generator) < 0.7).contiguous()
        seen = only[:, 0].expand(-1, most, -1)
    count = kept_keys(keep, length, most)
    out = torch.empty(batch, groups if sets == "head" else 1, count, dtype=torch.int64)
    select_keys_(out, query, key, rows, first, last, only, None, score)
    for entry, own in enumerate(chosen):
        # the same places are compared by their scores: softmaxes are summed in another order
        scores = scores_of(
            query[entry][:, : len(own)], key[entry], seen[entry, : len(own)], own, score, sets, count - most
        )
        expected = chosen_of(scores, own, count)
        got = torch.zeros_like(expected).scatter(1, out[entry], True)
        assert bool((got.sum(1) == count).all())
        assert bool(got[:, own].all())
        assert torch.equal(out[entry], torch.sort(out[entry], 1).values)
        if score == "mage" or not coarse:  # whole numbers; of the others ties are by rounding
            assert torch.equal(got, expected)
        worst, best = (scores.masked_fill(~got, torch.inf).amin(1), scores.clone())
        best[:, own] = -torch.inf
        worst = scores.masked_fill(~got, torch.inf)
        worst[:, own] = torch.inf
        assert bool((worst.amin(1) >= best.masked_fill(got, -torch.inf).amax(1) - 1e-12).all())


@pytest.fixture(params=[7, 512])
def monkeypatch_tiles(request, monkeypatch):
    from mosaic_compiler.kernels import key_selection

    monkeypatch.setitem(key_selection._TILES, "cpu", request.param)


def test_ties_go_to_the_first_keys():
    query, key = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 9, 4)
    for score in SCORES:
        sets = selection_of(score, None).sets
        out = torch.empty(1, 2 if sets == "head" else 1, 5, dtype=torch.int64)
        select_keys_(out, query, key, torch.tensor([[4, 5, 6]]), None, None, None, None, score)
        assert out.tolist() == [[[0, 1, 4, 5, 6]] * out.shape[1]]


def test_what_is_no_number_is_chosen_and_shows():
    """NaN in a key is NaN in the results, as it is without choosing."""
    key = torch.randn(1, 1, 40, 4)
    key[0, 0, 33] = torch.nan
    out = torch.empty(1, 1, 6, dtype=torch.int64)
    select_keys_(out, torch.randn(1, 1, 2, 4), key, torch.tensor([[1, 2]]), None, None, None, None, "sparse-dllm")
    assert {1, 2, 33} <= set(out[0, 0].tolist())


# ------------------------------------------------------------------------------------------------------ steps
@settings(max_examples=examples(2, 40), deadline=None)
@given(
    toy=toys, way=ways, batch=st.integers(1, 3), length=st.integers(3, 24), keep=st.sampled_from([1, 4, 0.3, 0.7]),
    precision=st.sampled_from([None, None, "fp8", "int4"]), chunk=st.sampled_from([None, 1, 3, 8]),
    shares=st.lists(st.floats(0, 0.999), min_size=1, max_size=5), steps=st.integers(1, 3), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_steps_equal_an_independent_implementation(
    toy, way, batch, length, keep, precision, chunk, shares, steps, seed
):
    weights, (score, sets) = toy.weights(seed), way
    block = block_of(
        toy,
        batch,
        weights,
        cache_keep=keep,
        cache_score=score,
        cache_sets=sets,
        cache_dtype=precision,
        chunk_rows=chunk,
    )
    rows = torch.tensor([sorted({int(share * length) for share in shares})] * batch)
    count = kept_keys(keep, length, rows.shape[1])
    oracle = Chosen(lambda tokens: toy(tokens, *weights), toy.kv_heads, count, score, sets, precision)
    tokens = ids(batch, length, seed)
    for got, expected in zip(block.keep([tokens, *weights], rows), oracle.full(rows, tokens), strict=True):
        torch.testing.assert_close(got, expected)
    for step in range(steps):
        tokens = tokens.clone()
        tokens[:, rows[0, step % rows.shape[1]]] = step
        some = rows[:, : 1 + step]
        got, expected = block.run_rows([tokens, *weights], some), oracle.reuse(some, tokens)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(at_rows(one, some), at_rows(other, some), **closeness(precision))
    block.release()


@settings(max_examples=examples(1, 30), deadline=None)
@given(
    toy=toys, batch=st.integers(1, 2), precision=st.sampled_from([None, "int8"]), seed=st.integers(0, 9),
    sets=st.sampled_from(["head", "layer"]), keep=st.sampled_from([1.0, 1000]), chunk=st.sampled_from([None, 3]),
)  # fmt: skip
def test_all_keys_are_what_is_kept_without_choosing(toy, batch, precision, sets, keep, chunk, seed):
    """Bit for bit, where all queries see all keys, and nothing is rounded."""
    weights, tokens, rows = toy.weights(seed), ids(batch, 17, seed), torch.tensor([[3, 4, 5, 9]] * batch)
    results = []
    for options in ({}, {"cache_keep": keep, "cache_sets": sets}):
        block = block_of(toy, batch, weights, cache_dtype=precision, chunk_rows=chunk, **options)
        full = [part.clone() for part in block.keep([tokens, *weights], rows)]
        changed = tokens.clone()
        changed[:, 4] = 1
        results.append((full, [at_rows(part, rows) for part in block.run_rows([changed, *weights], rows)]))
        assert not block.is_partial
        block.release()
    is_whole = toy.window is None and precision is None  # else other kernels, or loops, which round elsewhere
    exactly = {"rtol": 0, "atol": 0} if is_whole else {}
    for one, other in zip(*results, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, **exactly)


def test_graphs_run_in_plain_pytorch_and_are_verified():
    toy = Toy(kv_heads=2, window=3, result="logits")
    weights = toy.weights(0)
    canonical, _ = run_passes(traced(toy, 2, weights), passes=[CanonicalizePass()])
    rows = torch.tensor([[2, 3], [2, 3]])
    for make in (KeepSelectedPass, ReuseSelectedPass):
        from mosaic_compiler.passes.visible_keys import VisibleKeysPass

        module = make()(VisibleKeysPass()(canonical))
        Verifier(module).check(module, "test")
        states = [torch.zeros(2, 2, 5, dtype=torch.int64) + torch.arange(5), torch.rand(2, 2, 5, 4).double(),
                  torch.rand(2, 2, 5, 4).double()] * 2  # fmt: skip
        results = module(ids(2, 13, 1), *weights, rows, *[state.clone() for state in states])
        assert results[0].shape == (2, 13, 23)


# --------------------------------------------------------------------------------------------------- sessions
def test_a_session_for_a_block():
    model, tokens = TidyLike(1), torch.randint(10, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(1))
    with Session(model, options={"cache_keep": 8}) as session:
        with pytest.raises(StateError, match=r"full\(ids, rows=\.\.\.\)"):
            session.full(tokens)
        full = session.full(tokens, rows=range(16, 24))
        torch.testing.assert_close(full.logits, model(tokens).logits, atol=1e-4, rtol=1e-4)
        assert not session.is_approximate
        got = session.reuse(tokens, [18, 20]).logits
        assert session.is_approximate
        assert not torch.equal(got[0, 18], full.logits[0, 18])
        with pytest.raises(MissingStateError, match="other rows"):
            session.reuse(tokens, [15])
        heads, layers, keys = 4, 2, 16
        assert session.nbytes <= layers * heads * keys * (8 + 2 * 4 * 8) + 4096
        with pytest.raises(StateError, match="cache_keep"):
            session.exact(tokens, [18])
        session.full(tokens[:, :20], rows=range(8))  # another length, and another number of keys
        session.reuse(tokens[:, :20], range(8))


# ------------------------------------------------------------------------------------------------- generation
@pytest.mark.parametrize(
    "score", ["sparse-dllm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("probability", "mage"))]
)
def test_generation_keeps_chosen_keys(score):
    model = TidyLike(0)
    prompt = torch.randint(10, VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(3))
    options = {"gen_length": 12, "block_length": 6, "steps": 8, "mask_token_id": MASK}
    got = mosaic_compiler.generate(model, prompt, **options, cache="select", cache_keep=0.3, cache_score=score)
    assert got.is_approximate
    delayed = 2 * SCORES[score].delay
    assert got.steps_by_kind == {"full": 2 + delayed, "reuse": 6 - delayed}
    assert not bool((got.sequences == MASK).any())
    every = mosaic_compiler.generate(model, prompt, **options, cache="select", cache_keep=1.0, cache_score=score)
    if not delayed:
        dual = mosaic_compiler.generate(model, prompt, **options, cache="dual")
        assert torch.equal(every.sequences, dual.sequences)
    assert got.state_bytes < every.state_bytes


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["prefix", "delayed"])
def test_other_policies_choose_as_well(cache):
    model, prompt = TidyLike(0), torch.full((1, 21), 11)
    options = {"gen_length": 12, "block_length": 6, "steps": 8, "mask_token_id": MASK, "cache": cache}
    plain = mosaic_compiler.generate(model, prompt, **options)
    every = mosaic_compiler.generate(model, prompt, **options, cache_keep=1.0)
    assert torch.equal(every.sequences, plain.sequences)
    some = mosaic_compiler.generate(model, prompt, **options, cache_keep=2)
    assert some.steps_by_kind["reuse"] > 0
    assert some.state_bytes < every.state_bytes


def test_never_refreshed_is_chosen_again_for_each_block():
    model, prompt = TidyLike(0), torch.full((1, 9), 11)
    got = mosaic_compiler.generate(
        model, prompt, gen_length=12, block_length=4, steps=6, mask_token_id=MASK, cache="select", cache_refresh="never"
    )
    assert got.steps_by_kind == {"full": 3, "reuse": 3}


@pytest.mark.slow
def test_auto_goes_down_until_it_fits(tiny_llada, caplog):
    """The first rung that fits where it alone does; the log says which one was taken, and why."""
    model, prompt = tiny_llada, torch.full((1, 2000), 11)
    options = {"gen_length": 8, "block_length": 8, "steps": 4, "mask_token_id": 3}
    rungs = rungs_of("auto", None, None)
    assert [str(rung) for rung in rungs[3:]] == [
        "5% of the keys in the precision that they are computed in",
        "5% of the keys in int4",
        "nothing (every step computes all rows)",
    ]
    needed = {}
    for rung in rungs:
        kept = {"cache": "dual", "cache_dtype": rung.precision, "cache_keep": rung.keep}
        more = kept if rung.is_kept else {"cache": "none"}
        with pytest.raises(BudgetError) as refused:
            mosaic_compiler.generate(model, prompt, **options, **more, memory_budget=64 << 10)
        needed[rung] = refused.value.needed
    assert needed[rungs[3]] < needed[rungs[2]] < needed[rungs[1]] < needed[rungs[0]]
    assert needed[rungs[5]] < needed[rungs[4]] < needed[rungs[3]]
    for rung in rungs:
        budget = needed[rung] + (4 << 10)
        caplog.clear()
        with caplog.at_level("WARNING", "mosaic_compiler"):
            got = mosaic_compiler.generate(model, prompt, **options, cache="auto", memory_budget=budget)
        assert (got.cache_dtype, got.cache_keep) == (rung.precision, rung.keep)
        assert got.steps_by_kind["reuse"] == (3 if rung.is_kept else 0)
        assert got.is_approximate == rung.is_kept
        assert got.plan.workspace <= budget
        assert (f"{rung}, and not" in caplog.text) == (rung is not rungs[0])


def test_sessions_with_other_numbers_of_keys_compile_nothing():
    model, tokens = TidyLike(2), torch.randint(10, VOCABULARY, (1, 300), generator=torch.Generator().manual_seed(1))
    sizes, steps = [], []
    with observing(steps.append):
        for keep in (0.2, 0.5, 7):
            with Session(model, options={"cache_keep": keep}) as session:
                session.full(tokens, rows=range(4))
                session.reuse(tokens, range(4))
                sizes.append(session.nbytes)
            if keep == 0.2:
                steps.clear()
    assert not steps
    assert sizes[2] < sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cache": "select", "cache_keep": 0}, "a share of the keys above 0"),
        ({"cache": "select", "cache_keep": 1.5}, "a share of the keys above 0"),
        ({"cache": "select", "cache_keep": True}, "a share of the keys above 0"),
        ({"cache": "select", "cache_score": "best"}, "cache_score must be one of"),
        ({"cache": "select", "cache_sets": "model"}, "cache_sets must be one of"),
        ({"cache": "select", "cache_score": "sparse-dllm", "cache_sets": "head"}, "one set per layer"),
        ({"cache": "none", "cache_keep": 0.5}, "choose a cache"),
        ({"cache": "exact", "cache_keep": 0.5}, "choose a cache"),
    ],
)
def test_bad_input(given, message):
    with pytest.raises(ValueError, match=message):
        mosaic_compiler.generate(TidyLike(0), torch.full((1, 9), 11), gen_length=4, mask_token_id=MASK, **given)


def test_bad_options():
    with pytest.raises(OptionsError, match="needs to know the rows"):
        MosaicOptions.parse({"cache": "delayed", "needed_rows": "masked", "mask_token_id": 5, "cache_keep": 0.5})
    with pytest.raises(OptionsError, match="a share of the keys"):
        MosaicOptions.parse({"cache_keep": "half"})


def test_masks_that_are_no_runs_are_refused():
    """LLaDA's own code adds a bias that is given: nobody knows what it hides.  It has padding that way."""
    model, tokens = LLaDALike(1), torch.full((1, 12), 11)
    padded = torch.ones(1, 12, dtype=torch.int64)
    padded[0, :3] = 0
    with pytest.raises(StateError, match="no run of keys"):
        mosaic_compiler.generate(
            TidyLike(0), tokens, attention_mask=padded, gen_length=4, steps=2, mask_token_id=MASK, cache="select"
        )
    with Session(model, options={"cache_keep": 4}) as session, pytest.raises(StateError, match="no run of keys"):
        session.full(tokens, attention_bias=torch.zeros(1, 1, 12, 12), rows=[1, 2])


def test_explain_says_what_a_key_takes():
    tokens = torch.randint(10, VOCABULARY, (1, 30))
    model = TidyLike(0)
    report = str(mosaic_compiler.explain(model, tokens, cache_keep=0.5))
    assert f"keys can be chosen (probability, per head), {2 * 4 * (8 + 2 * 8 * 4)} B for each that is kept" in report
    with Session(model, options={"cache_keep": 20}) as session:
        session.full(tokens, rows=range(4))
        assert session.nbytes - 24 * 2 * 4 * (8 + 2 * 8 * 4) < 6 * 512


REQUESTS = {
    "guidance": (TidyLike, {"cfg_scale": 1.5}),
    "shifted": (DreamLike, {"alg": "entropy", "block_length": None}),
    "block-causal": (TidyLike, {"block_causal": 4, "block_length": None}),
    "remote code": (LLaDALike, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REQUESTS)
def test_all_keys_are_dual_whatever_is_asked_for(name):
    make, more = REQUESTS[name]
    model, prompt = make(0), torch.randint(10, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(1))
    options = {"gen_length": 12, "block_length": 6, "steps": 8, "mask_token_id": MASK, **more}
    for _ in range(2):  # remote code may be compiled again in its second call
        dual = mosaic_compiler.generate(model, prompt, **options, cache="dual")
        every = mosaic_compiler.generate(model, prompt, **options, cache="select", cache_keep=1.0)
        some = mosaic_compiler.generate(model, prompt, **options, cache="select", cache_keep=0.3)
    assert torch.equal(every.sequences, dual.sequences)
    assert every.steps_by_kind == some.steps_by_kind == dual.steps_by_kind
    assert some.state_bytes < every.state_bytes
    assert not bool((some.sequences == MASK).any())


def test_layers_with_other_numbers_of_heads():
    generator = torch.Generator().manual_seed(0)
    table, *layers = (torch.randn(*sizes, generator=generator, dtype=torch.float64) / 4
                      for sizes in ((23, 16), (4, 16, 16), (4, 16, 16)))  # fmt: skip

    def model(tokens, table, *layers):
        x = F.embedding(tokens, table)
        for weights, heads in zip(layers, (2, 4), strict=True):
            q, k, v = ((x @ weight).view(*tokens.shape, heads, -1).transpose(1, 2) for weight in weights[:3])
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*tokens.shape, 16) @ weights[3]
        return (x @ table.t(),)

    module = trace(model, ids(2, 13, 0), table, *layers, dynamic=[(0, 1)])
    STATIC_INPUTS.write(module, (1, 2, 3))
    tokens, rows, results = ids(2, 20, 1), torch.tensor([[2, 3, 4], [9, 10, 11]]), []
    for keep in (None, 1.0):
        block = Block(_kinds_of(module, MosaicOptions(cache_keep=keep, disable=("fuse",))))
        block.keep([tokens, table, *layers], rows)
        results.append(at_rows(block.run_rows([tokens, table, *layers], rows)[0], rows))
        block.release()
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], at_rows(model(tokens, table, *layers)[0], rows))


@pytest.mark.slow
def test_auto_passes_over_what_a_model_cannot_do():
    """Padding as a bias: no keys can be chosen, but nothing can be kept."""
    model, prompt = TidyLike(0), torch.full((1, 150), 11)
    padded = torch.ones_like(prompt)
    padded[0, :3] = 0
    options = {"gen_length": 8, "block_length": 8, "steps": 4, "mask_token_id": MASK, "attention_mask": padded}
    plain = mosaic_compiler.generate(model, prompt, **options, cache="none")
    budget = plain.plan.workspace + (4 << 10)
    got = mosaic_compiler.generate(model, prompt, **options, cache="auto", memory_budget=budget)
    assert torch.equal(got.sequences, plain.sequences) or got.is_approximate
    small = plain.plan.workspace // 4
    with pytest.raises(BudgetError):
        mosaic_compiler.generate(model, prompt, **options, cache="auto", memory_budget=small)


@pytest.mark.parametrize("share", [1, 20])
@pytest.mark.parametrize("score", list(SCORES))
def test_scratch_covers_what_is_allocated(score, share):
    sets = selection_of(score, None).sets
    sizes = {"query": (1, 8, 8, 16), "key": (1, 2, 3000, 16)}

    def choose(query, key, rows):
        return torch.ops.mosaic.select_keys(
            query, key, rows, None, None, None, None, key.shape[2] // share, score, sets
        )

    given = [torch.randn(size) for size in sizes.values()] + [torch.arange(8)[None]]
    graph = trace(choose, *given, dynamic=[(), (), ()]).graph
    node = next(node for node in graph.nodes if node.target is torch.ops.mosaic.select_keys.default)
    most = most_allocated(lambda: choose(*given))
    result = 3000 // share * 8 * (2 if sets == "head" else 1)
    assert most <= int(scratch_bytes(node)) + result
