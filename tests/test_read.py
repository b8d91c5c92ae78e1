"""Chosen keys that are read where all are kept: steps equal an independent implementation, and those that evict."""

from __future__ import annotations

import pytest
import torch
from chosen import Chosen
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import closeness
from remote_models import VOCABULARY, TidyLike
from test_select import block_of, ways
from test_state import at_rows, traced
from toy_models import Toy, ids, toys

import mosaic_compiler
from mosaic_compiler import Session
from mosaic_compiler.backend import _kinds_of, observing
from mosaic_compiler.errors import MissingStateError, OptionsError, StateError
from mosaic_compiler.ir import ops
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes import CanonicalizePass, Verifier, run_passes
from mosaic_compiler.passes.state import ChooseKeysPass, ReadChosenPass
from mosaic_compiler.passes.visible_keys import VisibleKeysPass
from mosaic_compiler.planning.caches import POLICIES, Refresh
from mosaic_compiler.planning.selection import kept_keys
from mosaic_compiler.sampling.caching import Schedule
from mosaic_compiler.sampling.filling import Wanted

pytestmark = pytest.mark.usefixtures("warm")

MASK = 5
READ = {"cache_evict": False}


@settings(max_examples=examples(2, 40), deadline=None)
@given(
    toy=toys, way=ways, batch=st.integers(1, 3), length=st.integers(3, 24), keep=st.sampled_from([1, 4, 0.3, 0.7]),
    precision=st.sampled_from([None, None, "bf16", "fp8", "int4", "exact+int8"]),
    chunk=st.sampled_from([None, 1, 3, 8]),
    steps=st.lists(
        st.tuples(st.booleans(), st.lists(st.floats(0, 0.999), min_size=1, max_size=5)), min_size=1, max_size=5
    ),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_any_life_equals_an_independent_implementation(toy, way, batch, length, keep, precision, chunk, steps, seed):
    """Keys are chosen for some rows, some of those are computed, keys are chosen for others, ..."""
    weights, (score, sets) = toy.weights(seed), way
    options = {"cache_keep": keep, "cache_score": score, "cache_sets": sets, "cache_dtype": precision}
    block = block_of(toy, batch, weights, chunk_rows=chunk, **options, **READ)
    precisions = {"exact+int8": None}.get(precision, precision)
    if precision == "exact+int8" and toy.layers > 1:
        return
    oracle = Chosen(lambda tokens: toy(tokens, *weights), toy.kv_heads, 0, score, sets, precisions)
    tokens, rows = ids(batch, length, seed), None
    for got, expected in zip(
        block.keep([tokens, *weights]), oracle.full(torch.zeros(batch, 1, dtype=torch.int64), tokens), strict=True
    ):
        torch.testing.assert_close(got, expected)
    for number, (anew, shares) in enumerate(steps):
        tokens = tokens.clone()
        tokens[:, int(shares[0] * length)] = number
        if anew or rows is None:
            rows = torch.tensor([sorted({int(share * length) for share in shares})] * batch)
            oracle.count = kept_keys(keep, length, rows.shape[1])
            computed = rows
            got, expected = block.choose([tokens, *weights], rows), oracle.reuse(rows, tokens, chooses=True)
        else:
            computed = rows[:, : 1 + number % rows.shape[1]]
            got, expected = block.run_rows([tokens, *weights], computed), oracle.reuse(computed, tokens)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(at_rows(one, computed), at_rows(other, computed), **closeness(precisions))
    assert block.is_partial == (oracle.count < length)
    block.release()


@settings(max_examples=examples(1, 30), deadline=None)
@given(
    toy=toys, batch=st.integers(1, 2), precision=st.sampled_from([None, "int8"]), seed=st.integers(0, 9),
    keep=st.sampled_from([1.0, 1000, 0.4]),
)  # fmt: skip
def test_it_reads_what_would_have_been_kept(toy, batch, precision, keep, seed):
    """As keys are kept that are chosen in the full step (gathered, not evicted); all of them as without choosing."""
    weights, tokens, rows = toy.weights(seed), ids(batch, 17, seed), torch.tensor([[3, 4, 5, 9]] * batch)
    reading = block_of(toy, batch, weights, cache_dtype=precision, cache_keep=keep, **READ)
    evicting = block_of(toy, batch, weights, cache_dtype=precision, cache_keep=keep)
    every = block_of(toy, batch, weights, cache_dtype=precision)
    is_exact = precision is None  # keys that are chosen by are decoded here, and not there
    for block in (reading, evicting, every):
        block.keep([tokens, *weights], rows)
    for one, other in zip(
        reading.choose([tokens, *weights], rows), every.run_rows([tokens, *weights], rows), strict=True
    ):
        torch.testing.assert_close(at_rows(one, rows), at_rows(other, rows), rtol=0, atol=0)
    changed = tokens.clone()
    changed[:, 4] = 1
    for one, other in zip(
        reading.run_rows([changed, *weights], rows), evicting.run_rows([changed, *weights], rows), strict=True
    ):
        if is_exact or keep != 0.4:
            torch.testing.assert_close(at_rows(one, rows), at_rows(other, rows))
    if keep != 0.4:
        assert not reading.is_partial
    for block in (reading, evicting, every):
        block.release()
    assert reading.nbytes == 0


def test_votes_do_not_depend_on_the_rows_of_earlier_steps():
    """A step for fewer rows than one before computes one of them again, which is no query more."""
    toy = Toy(layers=1, result="tokens")
    weights, tokens = toy.weights(8), ids(1, 9, 8)
    few = torch.tensor([[4, 7, 8]])
    chosen = []
    for first in (None, torch.tensor([[0, 2, 5, 7, 8]])):
        block = block_of(toy, 1, weights, cache_keep=3, cache_score="mage", cache_sets="layer", **READ)
        block.keep([tokens, *weights])
        if first is not None:
            block.choose([tokens, *weights], first)
            block.run_rows([tokens, *weights], first)
        block.choose([tokens, *weights], few)
        chosen.append(block._positions.tensors[0].clone())
        block.release()
    assert torch.equal(*chosen)


def test_graphs_run_in_plain_pytorch_and_are_verified():
    toy = Toy(kv_heads=2, window=3, result="logits")
    weights, tokens, rows = toy.weights(0), ids(2, 13, 1), torch.tensor([[2, 3], [2, 3]])
    canonical, _ = run_passes(traced(toy, 2, weights), passes=[CanonicalizePass()])
    block = block_of(toy, 2, weights, cache_keep=3, **READ)
    block.keep([tokens, *weights])
    positions = torch.zeros(2, 2, 5, dtype=torch.int64)
    for make, run in ((ChooseKeysPass, block.choose), (ReadChosenPass, block.run_rows)):
        module = make()(VisibleKeysPass()(canonical))
        Verifier(module).check(module, "test")
        states = [*block._values.tensors, *(block._positions.tensors or [positions] * toy.layers)]
        results = module(tokens, *weights, rows, *[state.clone() for state in states])
        expected = run([tokens, *weights], rows)
        torch.testing.assert_close(at_rows(results[0], rows), at_rows(expected[0], rows))
        assert len(results) == (1 if make is ReadChosenPass else 1 + toy.layers)
        for one, other in zip(results[1:], block._positions.tensors if len(results) > 1 else [], strict=True):
            assert torch.equal(one, other)


def test_codes_are_gathered_as_codes():
    """Steps that read chosen keys decode none of them in full width; those that choose decode one attention's keys."""
    toy = Toy(layers=2, kv_heads=2)
    kinds = _kinds_of(
        traced(toy, 2, toy.weights(0)), MosaicOptions(cache_dtype="int4", cache_keep=0.5, disable=("fuse",), **READ)
    )
    for step, decoded in ((kinds.reuse, 0), (kinds.choose, 2)):
        targets = [node.target for node in next(iter(step.graphs.values())).graph.nodes]
        assert targets.count(ops.coded_attention) == 2
        assert targets.count(ops.select_keys) == (0 if step is kinds.reuse else 2)
        assert sum("bitwise_right_shift" in str(target) for target in targets) == decoded


def test_a_session_chooses_again_and_again():
    model, tokens = TidyLike(1), torch.randint(10, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(1))
    with Session(model, options={"cache_keep": 8, **READ}) as session:
        with pytest.raises(StateError, match=r"behind a full\(\) step"):
            session.choose(tokens, range(8))
        full = session.full(tokens)
        with pytest.raises(MissingStateError, match=r"call choose\(\) first"):
            session.reuse(tokens, range(8))
        session.full(tokens)
        kept = session.nbytes
        for first in (16, 24):
            rows = range(first, first + 8)
            chosen = session.choose(tokens, rows).logits
            if first == 16:  # nothing has changed since
                torch.testing.assert_close(chosen[:, rows], full.logits[:, rows], atol=1e-4, rtol=1e-4)
            got = session.reuse(tokens, rows).logits
            assert not torch.equal(got[:, rows], chosen[:, rows])
        assert session.is_approximate
        assert set(session.plans) == {"full", "choose", "reuse"}
        heads, layers, keys = 4, 2, 16
        assert kept < session.nbytes <= kept + layers * heads * keys * 8 + 1024
        with pytest.raises(MissingStateError, match=r"call choose\(\) for them first"):
            session.reuse(tokens, range(8))
        (block,) = session._store._blocks.values()
        bound = [*block.reuse._programs.values()]
        session.full(tokens)
        assert session.nbytes == kept  # positions are of other keys now
        session.choose(tokens, range(16, 24))
        session.reuse(tokens, range(16, 24))
        assert [*block.reuse._programs.values()] == bound  # nothing is bound again
    with Session(model, options={"cache_keep": 8}) as session:
        session.full(tokens, rows=range(8))
        with pytest.raises(StateError, match="cache_evict=False"):
            session.choose(tokens, range(8))


def test_another_number_of_keys_compiles_nothing():
    model, tokens = TidyLike(2), torch.randint(10, VOCABULARY, (1, 100), generator=torch.Generator().manual_seed(1))
    steps = []
    with observing(steps.append):
        for keep in (0.2, 0.5, 7):
            with Session(model, options={"cache_keep": keep, **READ}) as session:
                session.full(tokens)
                session.choose(tokens, range(4))
                session.choose(tokens, range(4, 10))  # in the same session: other numbers of rows, and of keys
                session.reuse(tokens, range(4, 10))
            if keep == 0.2:
                steps.clear()
    assert not steps


@pytest.mark.parametrize("keep", [0.3, pytest.param(1.0, marks=pytest.mark.slow)])
def test_generation_computes_all_rows_once(keep):
    model = TidyLike(0)
    prompt = torch.randint(10, VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(3))
    options = {
        "gen_length": 12, "block_length": 6, "steps": 8, "mask_token_id": MASK, "cache": "select",
        "cache_refresh": "never", **READ,
    }  # fmt: skip
    got = mosaic_compiler.generate(model, prompt, **options, cache_keep=keep)
    assert got.is_approximate
    assert got.steps_by_kind == {"full": 1, "choose": 2, "reuse": 5}
    positions = 2 * 2 * 4 * 8 * kept_keys(keep, 33, 6)  # of two sequences, layers, four heads
    every = 2 * 2 * 2 * 4 * 33 * 32
    assert 0 <= got.state_bytes - every - positions < 6 * 512
    if keep == 1:
        dual = mosaic_compiler.generate(model, prompt, **{**options, "cache": "dual", "cache_evict": True})
        assert torch.equal(got.sequences, dual.sequences)


@pytest.mark.parametrize("given", [{"cache": "dual"}, {"cache": "auto"}, {"cache": "auto", "cache_keep": 0.5}])
def test_nothing_is_read_that_nobody_counts(given):
    with pytest.raises(ValueError, match="say how many with cache_keep"):
        mosaic_compiler.generate(TidyLike(0), torch.full((1, 9), 11), gen_length=4, mask_token_id=MASK, **given, **READ)
    with pytest.raises(OptionsError, match="say how many with cache_keep"):
        Session(TidyLike(0), options=READ)


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("refresh", [Refresh(), Refresh(at_blocks=False), Refresh(at_blocks=False, every=3)])
def test_the_word_of_steps(refresh, delay):
    """Behind every step for all rows, and where a block begins, keys are chosen before any are read."""
    schedule = Schedule(POLICIES["select"], refresh, MASK, shifted=False)
    schedule.choose(delay, evicts=False)
    tokens, kinds = torch.full((1, 8), MASK), []
    for block in (slice(0, 4), slice(4, 8)):
        for step in range(5):
            kind, rows = schedule.next(
                tokens, Wanted(tokens == MASK, step, block), torch.arange(block.start, block.stop)
            )
            kinds.append(kind)
            assert (rows is None) == (kind == "full")
    word = "".join(kind[0] for kind in kinds)
    chosen = "c" * (delay + 1)
    assert "fr" not in word
    if refresh == Refresh():
        assert word == ("f" + chosen + "rrrr")[:5] * 2
    elif refresh.every is None:
        assert word == ("f" + chosen + "rrrr")[:5] + (chosen + "rrrrr")[:5]
    else:
        assert word.count("f") == 4


def test_explain_says_what_is_kept_and_what_a_key_takes():
    given = TidyLike(0), torch.full((1, 40), 11)
    said = " ".join(str(mosaic_compiler.explain(*given, cache_keep=0.5, **READ)).split())
    assert "keys can be chosen (probability, per head, all kept), 20.0 KiB, and 64 B for each that is read" in said
