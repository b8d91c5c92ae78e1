"""Exact steps: what is proven of kept rows, and that no other rows are computed than those that have to be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_visible_keys import MASK, VOCABULARY, Toy, blocks, causal, ids_of, prefix, sliding, window

import mosaic_compiler
from mosaic_compiler import Session
from mosaic_compiler.sampling import DenoisingStep

pytestmark = pytest.mark.usefixtures("warm")

MASKS = [causal, blocks(4), blocks(7), sliding(3), window(2), prefix(5)]
LAYERS = 2


def sees(mask, length):
    """bool [N, N]: through all layers, by following every edge."""
    seen = mask(length, None)
    seen = seen if seen.dtype == torch.bool else seen == 0
    reached = torch.eye(length, dtype=torch.bool)
    for _ in range(LAYERS):
        reached = reached | ((seen.float() @ reached.float()) > 0)
    return reached


class Oracle:
    """For each row what it was last computed with; computed from the definition, edge by edge."""

    def __init__(self, mask, length, ids):
        self.reached, self.ids = sees(mask, length), ids.clone()
        self.valid = torch.ones_like(ids, dtype=torch.bool)

    def step(self, ids, wanted):
        """Rows that have to be computed, in each sequence."""
        changed = ids != self.ids
        self.valid &= ~((changed.float() @ self.reached.T.float()) > 0)
        needed = wanted | (((wanted.float() @ self.reached.float()) > 0) & ~self.valid)
        left = ~self.valid & ~needed
        self.valid |= needed & ~((left.float() @ self.reached.T.float()) > 0)
        self.ids = ids.clone()
        if needed.sum(1).max() == ids.shape[1]:
            self.valid[:] = True
        return int(needed.sum(1).max())


@pytest.fixture(scope="module")
def models():
    torch._dynamo.reset()
    return {mask: Toy(mask) for mask in MASKS}


@settings(max_examples=examples(4, 24))
@given(
    which=st.sampled_from(MASKS),
    length=st.sampled_from([9, 24]),
    batch=st.integers(1, 2),
    events=st.lists(
        st.tuples(
            st.lists(st.integers(0, 99), max_size=3),
            st.lists(st.integers(0, 99), min_size=1, max_size=3),
            st.sampled_from(["exact", "exact", "exact", "full", "reuse"]),
        ),
        min_size=1,
        max_size=8,
    ),
    seed=st.integers(0, 99),
)
def test_exact_steps_compute_what_is_invalid_and_needed(models, which, length, batch, events, seed):
    model, ids = models[which], ids_of(length, seed, batch)
    generator = torch.Generator().manual_seed(seed)
    with torch._dynamo.config.patch(recompile_limit=64), Session(model) as session, torch.no_grad():
        session.full(ids)
        oracle = Oracle(which, length, ids)
        for changes, rows, kind in events:
            ids = ids.clone()
            for place in changes:
                ids[place % batch, place % length] = int(torch.randint(4, VOCABULARY, (), generator=generator))
            wanted = torch.zeros_like(ids, dtype=torch.bool)
            for row in rows:
                wanted[:, row % length] = True
            if kind == "full":
                session.full(ids)
                oracle = Oracle(which, length, ids)
                continue
            if kind == "reuse":  # whatever it used: the next exact step for other ids begins anew
                session.reuse(ids, wanted)
                oracle = None
                continue
            got = session.exact(ids, wanted)
            torch.testing.assert_close(got[wanted], model(ids)[wanted])
            assert not session.is_approximate
            if oracle is None:
                assert session.computed_rows in (length, int(wanted.sum(1).max()))
                oracle = Oracle(which, length, ids) if session.computed_rows == length else None
            else:
                assert session.computed_rows == oracle.step(ids, wanted)


def test_rows_that_see_what_was_left_out_stay_invalid():
    """A window reaches further with each layer: rows that a wanted one sees need less of what they see themselves."""
    torch._dynamo.reset()
    model, ids = Toy(window(2)), ids_of(9, 0, 1)
    with Session(model) as session, torch.no_grad():
        session.full(ids)
        ids = ids.clone()
        ids[0, 5] += 1
        for row in (0, 1, 3, 8):
            torch.testing.assert_close(session.exact(ids, [row])[:, row], model(ids)[:, row])
    torch._dynamo.reset()


def test_computing_the_changed_rows_only_is_not_enough():
    """So that the proof is known to matter: rows that see a changed one have to be computed again."""
    torch._dynamo.reset()
    model, ids = Toy(blocks(4)), ids_of(24, 0, 1)
    other = ids.clone()
    other[0, 9] = (ids[0, 9] + 1) % VOCABULARY
    with Session(model) as session, torch.no_grad():
        session.full(ids)
        expected = model(other)[:, 14]
        assert not torch.allclose(session.reuse(other, [9, 14])[:, 14], expected)
        session.full(ids)
        torch.testing.assert_close(session.exact(other, [14])[:, 14], expected)
        assert session.computed_rows == 8  # its own block, and the one of the change
        session.exact(other, [14])
        assert session.computed_rows == 1


def test_what_reads_all_ids_has_no_proof():
    """Padding that is read off the ids: one changed id may hide keys from every row."""

    class Padded(Toy):
        def forward(self, ids):
            self.mask = lambda n, pads: causal(n, None)[None, None] & pads[:, None, None, :]
            return super().forward(ids)

    torch._dynamo.reset()
    model, ids = Padded(None), ids_of(12, 0)
    with Session(model) as session, torch.no_grad():
        session.full(ids)
        ids = ids.clone()
        ids[0, 3] = 0
        torch.testing.assert_close(session.exact(ids, [2])[:, 2], model(ids)[:, 2])
        assert session.computed_rows == 12


@torch._dynamo.disable
def between(x):
    return x + 1


@pytest.mark.filterwarnings("ignore:the forward of Broken breaks")
@pytest.mark.parametrize(
    "last",
    [pytest.param("mixes", marks=pytest.mark.slow), pytest.param("row by row", marks=pytest.mark.slow), "proven"],
)
def test_several_graphs_are_exact_together_or_not_at_all(last):
    """What a graph computes for some rows must not be read by another one that needs all of them."""

    class Broken(Toy):
        def forward(self, input_ids, attention_mask=None):
            x = between(super().forward(input_ids))
            if last == "mixes":
                return x + x.mean(1, keepdim=True) @ self.head.weight @ self.head.weight.T
            if last == "row by row":
                return x @ self.head.weight @ self.head.weight.T
            return self.again(input_ids) + x

    torch._dynamo.reset()
    model, ids = Broken(blocks(4), torch.float32), ids_of(10, 4, 1)
    model.again = Toy(blocks(4), torch.float32)
    given = {"gen_length": 12, "steps": 12, "mask_token_id": MASK, "block_length": 4, "bidirectional": True}
    kept = mosaic_compiler.generate(model, ids, **given)
    assert torch.equal(kept.sequences, mosaic_compiler.generate(model, ids, **given, cache="none").sequences)
    assert last != "mixes" or not kept.steps_by_kind["reuse"]


def test_a_compiled_model_finds_exact_rows_by_itself():
    torch._dynamo.reset()
    model, ids = Toy(blocks(4)), ids_of(16, 3, 1)
    ids[:, 8:] = MASK
    options = {"needed_rows": "masked", "mask_token_id": MASK, "cache": "exact"}
    compiled = torch.compile(model, backend="mosaic", dynamic=True, options=options)
    with torch.no_grad():
        for place in (9, 8, 11, 10, 12, 15):
            masked = ids == MASK
            torch.testing.assert_close(compiled(ids)[masked], model(ids)[masked])
            ids = ids.clone()
            ids[0, place] = 7 + place


def test_explain_says_the_proof():
    torch._dynamo.reset()
    ids = ids_of(64, 0, batch=1)
    with torch.no_grad():
        for mask, words in (
            (causal, "causal"),
            (blocks(32), "block-causal, 32"),
            (window(4), r"keys [query - 4, query + 5)"),
        ):
            assert words in str(mosaic_compiler.explain(Toy(mask), ids))


class Masked(Toy):
    """Takes its mask, as models of transformers do."""

    def __init__(self):
        super().__init__(None, torch.float32)

    def forward(self, input_ids, attention_mask=None):
        self.mask = lambda n, pads: (
            torch.zeros(1, 1, 1, n, dtype=torch.bool) == 0 if attention_mask is None else attention_mask
        )
        return super().forward(input_ids)


@settings(max_examples=examples(2, 8))
@given(
    prompt=st.integers(1, 20),
    length=st.integers(1, 20),
    block=st.sampled_from([4, 7]),
    batch=st.integers(1, 2),
    threshold=st.sampled_from([None, 0.05]),
    seed=st.integers(0, 99),
)
@pytest.mark.slow
def test_generation_for_block_causal_models_is_exact(prompt, length, block, batch, threshold, seed):
    """Id for id what is generated without a cache, and rows of earlier blocks are not computed again."""
    model, ids = BLOCK_CAUSAL, ids_of(prompt, seed, batch)
    given = {"gen_length": length, "steps": 30, "block_causal": block, "threshold": threshold, "mask_token_id": MASK}
    kept = mosaic_compiler.generate(model, ids, **given)
    plain = mosaic_compiler.generate(model, ids, **given, cache="none")
    assert torch.equal(kept.sequences, plain.sequences)
    assert not kept.is_approximate
    assert kept.steps_by_kind["full"] == 1 or prompt + length <= 2 * block
    assert kept.state_bytes > 0


BLOCK_CAUSAL = Masked()


def test_a_denoising_step_for_block_causal_models():
    torch._dynamo.reset()
    step, ids = DenoisingStep(BLOCK_CAUSAL, MASK, block_causal=4), ids_of(14, 1)
    ids[:, 6:] = MASK
    window, count = torch.ones_like(ids, dtype=torch.bool), torch.tensor([2, 3])
    with torch.no_grad():
        assert torch.equal(
            torch.compile(step, backend="mosaic", dynamic=True)(ids, window, count), step(ids, window, count)
        )
    assert "block-causal, 4" in str(mosaic_compiler.explain(step, ids, window, count))


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (BLOCK_CAUSAL, {"block_causal": 0}, "at least 1"),
        (BLOCK_CAUSAL, {"block_causal": 4, "cfg_scale": 1.0}, "cfg_scale masks the prompt"),
        (Toy(blocks(9), torch.float32), {"block_causal": 4}, "takes no mask"),
    ],
)
def test_bad_block_causal_input(model, given, message):
    with pytest.raises(ValueError, match=message):
        mosaic_compiler.generate(model, ids_of(6, 0), gen_length=4, steps=4, mask_token_id=MASK, **given)


RECALL = Path(__file__).parent.parent.parent / "shared" / "recall"


@pytest.mark.slow
@pytest.mark.skipif(not RECALL.exists(), reason="the block-causal model is not here")
def test_a_trained_block_causal_model_generates_the_same_ids():
    """Random prompts, lengths, blocks and schedules: id for id as without a cache; computing the changed rows only is
    not enough."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(RECALL / "blocks").eval().requires_grad_(False)
    mask = model.config.mask_token_id
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        prompt, length = (int(torch.randint(1, most, (), generator=generator)) for most in (200, 64))
        ids = torch.randint(4, 8000, (1, prompt), generator=generator)
        threshold = [None, 0.3][int(torch.randint(2, (), generator=generator))]
        given = {
            "gen_length": length,
            "steps": length,
            "block_causal": 32,
            "threshold": threshold,
            "mask_token_id": mask,
        }
        kept = mosaic_compiler.generate(model, ids, **given)
        plain = mosaic_compiler.generate(model, ids, **given, cache="none")
        assert torch.equal(kept.sequences, plain.sequences)
        assert kept.steps_by_kind["full"] == 1 or prompt + length <= 64


def test_low_confidence_dynamic_is_what_sdar_publishes():
    """Its rule, position by position (greedy tokens), with the whole sequence in every step."""
    block, length, prompt, steps, threshold = 4, 12, 8, 2, 0.03
    ids = torch.cat([ids_of(prompt, 7, 1), torch.full((1, length), MASK)], 1)
    at = torch.arange(prompt + length) // block
    seen = (at[:, None] >= at[None, :])[None, None]
    for begin in range(prompt, prompt + length, block):
        within = slice(begin, begin + block)
        for _ in range(steps):
            masked = ids[0, within] == MASK
            if not masked.any():
                break
            confidence, tokens = torch.softmax(BLOCK_CAUSAL(ids, attention_mask=seen)[0, within], -1).max(-1)
            confidence = torch.where(masked, confidence, -torch.inf)
            sure = confidence > threshold
            count = block // steps
            chosen = sure if sure.sum() >= count else torch.zeros(block, dtype=torch.bool)
            if sure.sum() < count:
                chosen[confidence.topk(min(count, int(masked.sum()))).indices] = True
            ids[0, within] = torch.where(chosen, tokens, ids[0, within])
    got = mosaic_compiler.generate(
        BLOCK_CAUSAL, ids[:, :prompt], gen_length=length, steps=steps * length // block, block_causal=block,
        remasking="low_confidence_dynamic", threshold=threshold, mask_token_id=MASK,
    )  # fmt: skip
    assert torch.equal(got.sequences, ids)
    assert not got.is_approximate
