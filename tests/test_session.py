"""Sessions: steps of one's own loop, side by side, behind errors, and what they leave behind."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import Kept
from remote_models import VOCABULARY, LLaDALike, TidyLike
from test_caches import Arenas

import mosaic_compiler
from mosaic_compiler import Session, StateError
from mosaic_compiler.errors import BudgetError, OptionsError
from mosaic_compiler.sampling import DenoisingStep, block_window

pytestmark = pytest.mark.usefixtures("warm")

MASK = 5
LENGTHS = (9, 24, 40)


def ids_of(length, seed, batch=1):
    return torch.randint(10, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model):
    return lambda ids: model(ids).logits


class Counted(TidyLike):
    """Ends with an op that raises when it is told to."""

    error: type[BaseException] | None = None

    def forward(self, input_ids, **given):
        output = super().forward(input_ids, **given)
        output.logits = torch.ops.session_tests.maybe_raise(output.logits)
        return output


@torch.library.custom_op("session_tests::maybe_raise", mutates_args=())
def maybe_raise(x: torch.Tensor) -> torch.Tensor:
    if Counted.error is not None:
        raise Counted.error("as told")
    return x.clone()


@maybe_raise.register_fake
def _(x):
    return torch.empty_like(x)


@settings(max_examples=examples(3, 12))
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(["full", "reuse", "reuse", "reuse"]), st.integers(0, 999)),
        min_size=1,
        max_size=12,
    )
)
def test_sessions_stand_side_by_side(events):
    """Steps of three sessions with other lengths and budgets in any order, each as if it were alone."""
    model = MODEL
    budgets = (None, 4 << 20, 8 << 20)
    sessions = [Session(model, memory_budget=budget) for budget in budgets]
    oracles = [Kept(logits_of(model)) for _ in sessions]
    begun = set()
    for which, kind, seed in events:
        ids, session, oracle = ids_of(LENGTHS[which], seed), sessions[which], oracles[which]
        if kind == "full" or which not in begun:
            begun.add(which)
            torch.testing.assert_close(session.full(ids).logits, oracle.full(ids), atol=1e-4, rtol=1e-4)
            continue
        rows = torch.randperm(LENGTHS[which], generator=torch.Generator().manual_seed(seed))[: 1 + seed % 5]
        got, expected = session.reuse(ids, rows).logits, oracle.reuse(rows[None], ids)
        torch.testing.assert_close(got[:, rows], expected[:, rows], atol=1e-4, rtol=1e-4)
    for session in sessions:
        session.close()


MODEL = TidyLike(3)


@pytest.mark.slow
def test_tables_that_grow_for_another_session_leave_state_valid():
    """Tables of a model are made again, longer: what is read of them is the same.  If it is not, state is stale, and
    what can is computed for all rows."""
    model, short, long = LLaDALike(3), ids_of(24, 0), ids_of(40, 1)
    with Session(model) as one, Session(model) as other:
        one.full(short)
        expected = one.full(short).logits  # in its second call the model has tables, as inputs
        old = model.cache["sin"].data_ptr()
        other.full(long)
        other.full(long)
        assert model.cache["sin"].data_ptr() != old
        for _ in range(2):
            got = one.reuse(short, [3, 20]).logits
            torch.testing.assert_close(got[:, [3, 20]], expected[:, [3, 20]], atol=1e-4, rtol=1e-4)
        assert not one.exact(short, [3]).logits[:, 20].any()
        model.cache["sin"] = model.cache["sin"].clone()
        model.cache["sin"][5] += 1
        with pytest.raises(StateError, match="weights have changed"):
            one.reuse(short, [3])
        got = one.exact(short, [3]).logits  # all rows
        torch.testing.assert_close(got, model(short).logits, atol=1e-4, rtol=1e-4)
        model.cache["sin"][5] -= 1  # a table that was written is not compared: what it held is not known
        with pytest.raises(StateError, match="weights have changed"):
            one.reuse(short, [3])


def test_rows_may_be_given_in_any_way():
    ids = ids_of(12, 0, batch=2)
    with Session(MODEL) as session:
        full = session.full(ids).logits
        mask = torch.zeros(2, 12, dtype=torch.bool)
        mask[0, 2:5] = mask[1, 7] = True
        for rows in (range(2, 8), [2, 3, 7, 4], torch.tensor([7, 2, 3, 4]), torch.tensor([[2, 3, 4], [7, 7, 7]]), mask):
            got = session.reuse(ids, rows).logits
            torch.testing.assert_close(got[0, 2:5], full[0, 2:5], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(got[1, 7], full[1, 7], atol=1e-4, rtol=1e-4)
        assert not got[0, 7].any()  # rows that are not computed are zeros where they are returned
        assert session.nbytes == 2 * 2 * 2 * 12 * 32 * 4
        assert set(session.plans) == {"full", "reuse"}


def test_a_step_of_ones_own():
    step = DenoisingStep(MODEL, MASK)
    ids = ids_of(20, 1)
    ids[:, 8:16] = MASK
    window, count = block_window(20, 8, 16), torch.tensor([2])
    with Session(step) as session, torch.no_grad():
        first = session.full(ids, window, count)
        assert torch.equal(first, step(ids, window, count))
        assert torch.equal(session.reuse(ids, range(8, 16), window, count), first)


@pytest.mark.parametrize(
    ("error", "kind"), [pytest.param(RuntimeError, "full", marks=pytest.mark.slow), (KeyboardInterrupt, "reuse")]
)
def test_an_error_in_a_step_makes_state_invalid(error, kind):
    """State has been written when the last op raises: what it holds must not be used any more."""
    model, ids = Counted(0), ids_of(10, 2)
    session = Session(model)
    expected = session.full(ids).logits.clone()
    Counted.error = error
    try:
        with pytest.raises(error, match="as told"):
            session.full(ids) if kind == "full" else session.reuse(ids_of(10, 7), [3, 4])
    finally:
        Counted.error = None
    with pytest.raises(StateError, match=r"call full\(\) first"):
        session.reuse(ids, [3])
    torch.testing.assert_close(session.full(ids).logits, expected)
    torch.testing.assert_close(session.reuse(ids, [3]).logits[:, 3], expected[:, 3], atol=1e-4, rtol=1e-4)
    session.close()


def test_what_a_session_refuses():
    model, ids = TidyLike(5), ids_of(10, 3)
    session = Session(model)
    with pytest.raises(StateError, match=r"no state yet: call full\(\)"):
        session.reuse(ids, [0])
    session.full(ids)
    for rows, message in (
        ([10], "rows 10 to 10 are not within the sequence: it has rows 0 to 9"),
        ([-1, 2], "rows -1 to 2"),
        ([], "at least one row"),
        (torch.tensor([0.5]), "whole numbers or a mask"),
        (torch.zeros(1, 10, dtype=torch.bool), "at least one in each sequence"),
        (torch.ones(1, 9, dtype=torch.bool), r"must be \[1, 10\]"),
        (torch.zeros(2, 3, dtype=torch.int64), "given for 2 sequences"),
    ):
        with pytest.raises(StateError, match=message):
            session.reuse(ids, rows)
    with pytest.raises(StateError, match=r"kept for ids \[1, 10\], these are \[1, 9\]"):
        session.reuse(ids[:, :9], [0])
    session.reuse(ids, [4])  # what was refused has not harmed it
    with torch.no_grad():
        model.layers[0].out.weight.mul_(2)
    with pytest.raises(StateError, match="weights have changed"):
        session.reuse(ids, [0])
    session.full(ids)
    model.layers[0].out.weight.data = model.layers[0].out.weight.data.clone()
    with pytest.raises(StateError, match="weights have changed"):
        session.reuse(ids, [0])
    session.close()
    session.close()
    for call in (lambda: session.full(ids), lambda: session.reuse(ids, [0])):
        with pytest.raises(StateError, match="closed"):
            call()


@settings(max_examples=examples(4, 12))
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 999)), min_size=1, max_size=8))
def test_exact_steps_are_exact(events):
    """Whatever approximate steps stand between them; and it is known which results may differ."""
    ids = ids_of(20, 0)
    with Session(MODEL) as session:
        session.full(ids)
        differs = False
        kept = ids
        for is_exact, changes, seed in events:
            if changes:
                ids = ids.clone()
                ids[0, seed % 20] = 10 + seed % 40
            rows = [seed % 20, (seed // 20) % 20]
            if not is_exact:
                session.reuse(ids, rows)
                differs |= not torch.equal(ids, kept)
                assert session.is_approximate == differs
                continue
            got = session.exact(ids, rows).logits
            torch.testing.assert_close(got[:, rows], MODEL(ids).logits[:, rows], atol=1e-4, rtol=1e-4)
            assert not session.is_approximate
            if differs or not torch.equal(ids, kept):
                kept, differs = ids, False


@pytest.mark.slow
def test_an_exact_step_computes_only_the_rows_where_nothing_has_changed():
    ids = ids_of(20, 0)
    with Session(MODEL) as session:
        assert session.exact(ids, [3]).logits[:, 4].any()  # a full step: nothing was kept yet
        assert not session.exact(ids, [3]).logits[:, 4].any()
        session.exact(ids, [3], attention_bias=torch.zeros(1, 1, 1, 20))  # another argument: a full step
        assert not session.is_approximate
        session.reuse(ids, [3])
        assert session.is_approximate


@pytest.mark.slow
def test_weights_that_nothing_kept_depends_on_may_change():
    model, ids = TidyLike(6), ids_of(10, 3)
    with Session(model) as session:
        session.full(ids)
        with torch.no_grad():
            model.head.weight.mul_(2)
        expected = model(ids).logits
        torch.testing.assert_close(session.reuse(ids, [4]).logits[:, 4], expected[:, 4], atol=1e-4, rtol=1e-4)


def test_two_threads_cannot_step_at_once():
    session, ids, problems = Session(MODEL), ids_of(10, 4), []
    session.full(ids)
    inside, done = threading.Event(), threading.Event()
    original = session._function

    def slow(*args, **named):
        inside.set()
        done.wait(20)
        return original(*args, **named)

    session._function = slow
    thread = threading.Thread(target=lambda: session.full(ids))
    thread.start()
    inside.wait(20)
    try:
        session.reuse(ids, [0])
    except StateError as error:
        problems.append(str(error))
    done.set()
    thread.join()
    session._function = original
    session.reuse(ids, [0])
    session.close()
    assert problems == ["this session is in use by another thread: give each thread a session of its own"]


@pytest.mark.slow
def test_nothing_is_left_behind():
    """Memory goes back when a session is closed, when nobody has it any more, and where a step does not fit."""
    mapped, ids = Arenas(), ids_of(4000, 5)
    session = Session(MODEL)
    session.full(ids)
    assert mapped.of_state() == session.nbytes > 0
    session.full(ids_of(2000, 5))  # another length
    assert mapped.of_state() == session.nbytes
    session.close()
    assert mapped.of_state() == 0
    session = Session(MODEL)
    session.full(ids)
    del session
    gc.collect()
    assert mapped.of_state() == 0
    session = Session(MODEL, memory_budget=1 << 20)
    with pytest.raises(BudgetError, match="for state"):
        session.full(ids)
    assert mapped.of_state() == 0
    small = ids_of(100, 5)
    session.full(small)
    session.reuse(small, [3])
    session.close()


def test_no_recompilation_for_other_lengths_and_rows():
    import torch._dynamo.utils as utils
    from test_models import random_model

    with Session(random_model("llama")) as session:
        session.full(ids_of(30, 1))
        session.reuse(ids_of(30, 1), [1, 2])
        before = utils.counters["stats"]["unique_graphs"]
        for length in (31, 64, 500):
            ids = ids_of(length, 2)
            session.full(ids)
            for count in (1, 3, 17):
                session.reuse(ids, range(count))
        assert utils.counters["stats"]["unique_graphs"] == before


# ---------------------------------------------------------------------------------- the option ``cache``
def loop(model, ids, steps=6, mask=MASK):
    """A generate loop that somebody wrote: the most confident masked token, one a step; ids change in place."""
    ids = ids.clone()
    with torch.no_grad():
        for _ in range(steps):
            masked = ids == mask
            probability, token = torch.softmax(model(ids).logits, -1).max(-1)
            best = torch.where(masked, probability, -1.0).argmax(-1, keepdim=True)
            ids.scatter_(1, best, token.gather(1, best))
    return ids


class Delayed:
    """The oracle of ``cache="delayed"`` for a loop: rows of masked and changed tokens."""

    def __init__(self, model, refresh, mask=MASK):
        self.kept, self.refresh, self.mask = Kept(logits_of(model)), refresh, mask
        self.last, self.since = None, 0

    def __call__(self, ids):
        import types

        if self.last is None or self.since + 1 >= self.refresh:
            logits, self.since = self.kept.full(ids), 0
        else:
            rows = ((ids == self.mask) | (ids != self.last))[0].nonzero().squeeze(1)[None]
            logits, self.since = self.kept.reuse(rows, ids), self.since + 1
        self.last = ids.clone()
        return types.SimpleNamespace(logits=logits)


@pytest.mark.parametrize("refresh", [pytest.param(given, marks=pytest.mark.slow) for given in (3, 1, "never")])
def test_a_loop_of_ones_own_finds_its_rows(refresh, caplog):
    model = LLaDALike(8)
    options = {"needed_rows": "masked", "mask_token_id": MASK, "cache": "delayed", "cache_refresh": refresh}
    with caplog.at_level("INFO", "mosaic_compiler"):
        fast = torch.compile(model, backend="mosaic", dynamic=True, options=options)
        for seed in range(3):  # another text begins with all rows
            ids = ids_of(30, seed)
            ids[:, 11:19] = MASK
            oracle = Delayed(model, 1 << 30 if refresh == "never" else refresh)
            for _ in range(2):  # the first time, the model is compiled again in its second call
                got = loop(fast, ids)
            assert torch.equal(got, loop(oracle, ids))
    assert sum("cache='delayed' is an approximation" in line for line in caplog.messages) >= 1


def test_bad_options_of_the_cache():
    for options, message in (
        ({"cache": "dual"}, "prefix and dual need to know the blocks"),
        ({"cache": "delayed"}, "say that no others are read"),
        ({"cache": "exact", "cache_refresh": 0}, "a number of calls from 1, or 'never'"),
        ({"cache": "exact", "cache_refresh": "block"}, "a number of calls from 1, or 'never'"),
    ):
        with pytest.raises(OptionsError, match=message):
            mosaic_compiler.MosaicOptions.parse(options)


def test_what_cannot_be_kept_is_named():
    """Without attention there is nothing to keep; every row is computed, and explain() says why."""

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20, bias=False)
            self.requires_grad_(False)

        def forward(self, ids):
            return self.head(self.embed(ids))

    model, ids = Plain(), torch.randint(6, 20, (1, 12))
    ids[:, 4] = MASK
    options = {"needed_rows": "masked", "mask_token_id": MASK, "cache": "delayed"}
    report = mosaic_compiler.explain(model, ids, **options)
    assert "nothing can be kept from step to step" in str(report)
    assert [fallback.name for fallback in report.fallbacks] == ["no-state"]
    with pytest.raises(StateError, match="keeps no state: each row depends on itself only"):
        Session(model).full(ids)
