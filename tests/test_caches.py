"""``generate(cache=...)`` against the published samplers over an independent implementation of what is kept."""

from __future__ import annotations

import gc
import math

import published_samplers as published
import pytest
import torch
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import Kept
from remote_models import VOCABULARY, DreamLike, TidyLike
from test_generate import Addressed, seeded

import mosaic_compiler
from mosaic_compiler.errors import BudgetError, StateError
from mosaic_compiler.runtime import pools
from mosaic_compiler.runtime.arena import HostArena

pytestmark = pytest.mark.usefixtures("warm")

MASK = 5
LLADA, DREAM = TidyLike(0), DreamLike(1)


class Cached:
    """``logits_fn`` of a published sampler: full forwards when they are due, else keys and values as they were kept.

    Args:
        call: from ids [B, N] to logits.
        policy, refresh: names as ``generate`` takes them.
        blocks: positions of each block, in order.
        per_block: calls in each.
    """

    def __init__(self, call, policy, refresh, blocks, per_block, *, shifted=False):
        self.kept, self.policy, self.refresh = Kept(call), policy, refresh
        self.blocks, self.per_block, self.shifted = blocks, per_block, shifted
        self.calls, self.since, self.last = 0, math.inf, None
        self.kinds = {"full": 0, "reuse": 0}

    def __call__(self, ids):
        block, begins = self.blocks[self.calls // self.per_block], self.calls % self.per_block == 0
        due = self.since == math.inf
        due |= begins if self.refresh == "block" else self.refresh != "never" and self.since + 1 >= self.refresh
        self.calls += 1
        if due or self.policy == "none":
            self.since, logits = 0, self.kept.full(ids)
            self.kinds["full"] += 1
        else:
            self.since += 1
            self.kinds["reuse"] += 1
            logits = self.kept.reuse(self.rows(ids, block), ids)
        self.last = ids.clone()
        return logits

    def rows(self, ids, block):
        chosen = []
        for entry, before in zip(ids.tolist(), self.last.tolist(), strict=True):
            if self.policy == "dual":
                found = set(range(block.start, block.stop))
            elif self.policy == "prefix":
                found = set(range(block.start, len(entry)))
            else:
                found = {n for n, token in enumerate(entry) if token == MASK or token != before[n]}
            if self.shifted:
                found |= {n - 1 for n in found if n}
            chosen.append(sorted(found))
        most = max(map(len, chosen))
        assert most
        return torch.tensor([(rows or [0]) + [(rows or [0])[-1]] * (most - len(rows or [0])) for rows in chosen])


policies, refreshes = st.sampled_from(["prefix", "dual", "delayed"]), st.sampled_from(["block", "never", 1, 3])


def prompt_of(batch, length, seed):
    return torch.randint(10, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=examples(2, 8))
@given(policies, refreshes, st.integers(1, 3), st.integers(1, 11), st.sampled_from([(8, 4, 2), (12, 3, 3), (6, 6, 4)]),
       st.sampled_from([0.0, 0.0, 1.5]), st.sampled_from([0.0, 0.7]), st.integers(0, 999))  # fmt: skip
def test_llada_with_caches(policy, refresh, batch, length, sizes, guidance, temperature, seed):
    new, block, per_block = sizes
    prompt = prompt_of(batch, length, seed)
    steps = per_block * (new // block)
    generator, number = seeded(seed)
    got = mosaic_compiler.generate(
        LLADA, prompt, gen_length=new, block_length=block, steps=steps, cfg_scale=guidance, temperature=temperature,
        mask_token_id=MASK, generator=generator, cache=policy, cache_refresh=refresh,
    )  # fmt: skip
    blocks = [slice(begin, begin + block) for begin in range(length, length + new, block)]
    cached = Cached(lambda ids: LLADA(ids).logits, policy, refresh, blocks, per_block)
    if guidance:  # the published code runs the two halves in one batch; what changes is told by the first
        cached.rows = _of_the_first_half(cached.rows)
    expected = published.llada(
        cached, prompt, steps=steps, gen_length=new, block_length=block, cfg_scale=guidance, temperature=temperature,
        mask_id=MASK, noise=Addressed(number, length + new),
    )  # fmt: skip
    assert torch.equal(got.sequences, expected)
    assert got.steps_by_kind == cached.kinds
    assert got.is_approximate == (cached.kinds["reuse"] > 0)
    assert got.state_bytes >= 2 * 2 * (1 + (guidance > 0)) * batch * (length + new) * 32 * 4


def _of_the_first_half(rows):
    def chosen(ids, block):
        found = rows(ids, block)
        return found[: len(found) // 2]

    return chosen


@settings(max_examples=examples(1, 6))
@given(policies, refreshes, st.integers(1, 2), st.integers(1, 9), st.sampled_from(["maskgit_plus", "entropy"]),
       st.integers(0, 999))  # fmt: skip
def test_dream_with_caches(policy, refresh, batch, length, algorithm, seed):
    """Shifted by one: the row in front of each is computed, too."""
    prompt = prompt_of(batch, length, seed)
    for _ in range(2):  # in the first run, a model may be compiled again in the second step, which is a full one then
        got = mosaic_compiler.generate(
            DREAM, prompt, gen_length=8, steps=5, alg=algorithm, mask_token_id=MASK, cache=policy, cache_refresh=refresh
        )

    def call(ids):
        return DREAM(ids, "full").logits

    cached = Cached(call, policy, refresh, [None], 1 << 30, shifted=True)
    cached.blocks = _unfilled(cached)
    expected = published.dream(cached, prompt, steps=5, max_new_tokens=8, alg=algorithm, mask_id=MASK)
    assert torch.equal(got.sequences, expected)
    assert got.steps_by_kind == cached.kinds


def _unfilled(cached):
    """Dream's sampler has one block: all that was masked at first."""

    class Blocks:
        def __getitem__(self, number):
            return self.first

    blocks = Blocks()
    call = cached.__class__.__call__

    def remembering(self, ids):
        if self.calls == 0:
            places = (ids == MASK).any(0).nonzero().flatten().tolist()
            blocks.first = slice(places[0], places[-1] + 1)
        return call(self, ids)

    cached.__class__ = type("Remembering", (Cached,), {"__call__": remembering})
    return blocks


@settings(max_examples=examples(2, 4))
@given(policies, st.integers(0, 99))
@pytest.mark.slow
def test_left_padding_with_caches(policy, seed):
    prompt, real = prompt_of(2, 7, seed), torch.ones(2, 7, dtype=torch.bool)
    real[0, :3] = False
    options = {"gen_length": 8, "block_length": 4, "steps": 4, "mask_token_id": MASK, "attention_mask": real}
    got = mosaic_compiler.generate(LLADA, prompt, cache=policy, **options)
    whole = torch.cat([real, torch.ones(2, 8, dtype=torch.bool)], 1)[:, None, None, :]
    bias = torch.zeros(whole.shape).masked_fill(~whole, torch.finfo(torch.float32).min)
    blocks = [slice(7, 11), slice(11, 15)]
    cached = Cached(lambda ids: LLADA(ids, attention_bias=bias).logits, policy, "block", blocks, 2)
    expected = published.llada(cached, prompt, steps=4, gen_length=8, block_length=4, mask_id=MASK)
    assert torch.equal(got.sequences, expected)


@pytest.mark.slow
def test_infilling_with_caches():
    """Refreshed in every step, and exact: no cache."""
    prompt = prompt_of(2, 20, 3)
    prompt[:, [2, 3, 9, 10, 11, 17, 18]] = MASK
    options = {"gen_length": 0, "block_length": 4, "steps": 6, "mask_token_id": MASK}
    plain = mosaic_compiler.generate(LLADA, prompt, cache="none", **options)
    exact = mosaic_compiler.generate(LLADA, prompt, cache="exact", **options)
    assert torch.equal(exact.sequences, plain.sequences)
    assert not exact.is_approximate
    for policy in ("prefix", "dual", "delayed"):
        got = mosaic_compiler.generate(LLADA, prompt, cache=policy, cache_refresh=1, **options)
        assert torch.equal(got.sequences, plain.sequences)
        got = mosaic_compiler.generate(LLADA, prompt, cache=policy, **options)
        assert not (got.sequences == MASK).any()
        assert got.steps_by_kind == {"full": 3, "reuse": 3}
        blocks = [slice(2, 6), slice(9, 13), slice(17, 20)]
        cached = Cached(lambda ids: LLADA(ids).logits, policy, "block", blocks, 2)
        assert torch.equal(got.sequences, _infilled(cached, prompt, blocks))


def _infilled(logits_fn, ids, blocks):
    """LLaDA's loop over given blocks: in each of two steps half of what is masked there, the most confident first."""
    ids = ids.clone()
    for block in blocks:
        counts = [published.schedule(int((row[block] == MASK).sum()), 2) for row in ids]
        for step in range(2):
            probabilities = torch.softmax(logits_fn(ids), -1)
            best, token = probabilities.max(-1)
            for entry in range(len(ids)):
                places = [n for n in range(block.stop) if ids[entry, n] == MASK]
                for place in published.first_k([float(best[entry, n]) for n in places], counts[entry][step]):
                    ids[entry, places[place]] = token[entry, places[place]]
    return ids


def test_one_log_line_says_what_an_approximation_would_save(caplog):
    with caplog.at_level("INFO", "mosaic_compiler"):
        got = mosaic_compiler.generate(
            LLADA, prompt_of(1, 9, 0), gen_length=8, block_length=4, steps=4, mask_token_id=MASK
        )
    lines = [line for line in caplog.messages if "cache='exact'" in line]
    assert len(lines) == 1
    assert "all 17 rows" in lines[0]
    assert "compute 4 in all but the first step of a block" in lines[0]
    assert got.steps_by_kind == {"full": 4, "reuse": 0}
    assert not got.state_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "duel"}, "cache must be one of none, exact, prefix, dual, select, auto, delayed, got 'duel'"),
        ({"cache": "dual", "cache_refresh": 0}, "cache_refresh must be block, never, or a number of steps from 1"),
        ({"cache": "dual", "cache_refresh": "often"}, "cache_refresh must be block, never, or a number of steps"),
        ({"cache": "dual", "compile": False}, "needs a compiled model"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        mosaic_compiler.generate(LLADA, prompt_of(1, 4, 0), gen_length=4, steps=2, mask_token_id=MASK, **options)


@pytest.mark.slow
def test_a_budget_covers_state():
    """One that fits a step, and not what is kept, is refused before the first step, and names state."""
    prompt, mapped = prompt_of(1, 3000, 0), Arenas()
    options = {"gen_length": 8, "block_length": 8, "steps": 4, "mask_token_id": MASK}
    with pytest.raises(BudgetError, match="for state, which lives from step to step") as refused:
        mosaic_compiler.generate(LLADA, prompt, cache="dual", memory_budget=1 << 20, **options)
    assert mapped.of_state() == 0
    state = 2 * 2 * 3008 * 32 * 4
    assert refused.value.needed > state
    budget = refused.value.needed + (64 << 10)
    got = mosaic_compiler.generate(LLADA, prompt, cache="dual", memory_budget=budget, **options)
    assert got.state_bytes == got.plan.state == state
    assert got.plan.workspace <= budget
    assert mapped.of_state() == 0


class Arenas:
    """Memory that arenas of state hold, from when this is made on."""

    def __init__(self):
        self.before = self._all()

    def of_state(self):
        gc.collect()
        return sum(arena.reserved for arena in self._all() if not any(arena is other for other in self.before))

    def _all(self):
        shared = [arena for pool in pools._pools.values() for arena in pool._arenas]
        return [o for o in gc.get_objects() if type(o) is HostArena and not any(o is arena for arena in shared)]


def test_a_model_without_a_cut_gets_no_cache():
    from test_generate import Scores

    with pytest.raises(StateError, match="keep"):
        mosaic_compiler.generate(
            Scores(0), prompt_of(1, 4, 0), gen_length=4, steps=2, mask_token_id=MASK, cache="dual", bidirectional=True
        )
