"""The last rows as they are computed, beside codes of all: steps equal an independent implementation."""

from __future__ import annotations

import pytest
import torch
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import Kept, closeness
from remote_models import VOCABULARY, TidyLike
from test_state import at_rows, traced
from toy_models import Toy, ids, toys

import mosaic_compiler
from mosaic_compiler import Session
from mosaic_compiler.backend import _kinds_of, observing
from mosaic_compiler.errors import OptionsError, StateError
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes import CanonicalizePass, Verifier, run_passes
from mosaic_compiler.passes.state import KeepStatePass, ReuseStatePass
from mosaic_compiler.passes.visible_keys import VisibleKeysPass
from mosaic_compiler.planning.precisions import precision_at
from mosaic_compiler.runtime.state import Block

pytestmark = pytest.mark.usefixtures("warm")

MASK = 5


@settings(max_examples=examples(2, 40), deadline=None)
@given(
    toy=toys, precision=st.sampled_from(["int4", "int8", "fp8", "int4+exact", "int8+int4"]), batch=st.integers(1, 3),
    length=st.integers(2, 24), residual=st.sampled_from([1, 2, 7, 30]), chunk=st.sampled_from([None, 1, 3, 8]),
    steps=st.lists(
        st.tuples(st.booleans(), st.lists(st.floats(0, 0.999), min_size=1, max_size=5)), min_size=1, max_size=4
    ),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_any_schedule_equals_an_independent_one(toy, precision, batch, length, residual, chunk, steps, seed):
    """Rows are computed before the last ones, among them, or both; batch entries have others each."""
    weights = toy.weights(seed)
    options = MosaicOptions(
        cache_dtype=precision, cache_residual=residual, chunk_rows=chunk, disable=("fuse",)
    )  # fmt: skip
    block = Block(_kinds_of(traced(toy, batch, weights), options))
    layers = [precision_at(precision, layer) for layer in range(toy.layers)]
    oracle, tokens = Kept(lambda tokens: toy(tokens, *weights), layers, residual), ids(batch, length, seed)
    for got, expected in zip(block.keep([tokens, *weights]), oracle.full(tokens), strict=True):
        torch.testing.assert_close(got, expected)
    for number, (is_full, shares) in enumerate(steps):
        tokens = tokens.clone()
        tokens[:, int(shares[0] * length)] = number
        if is_full:
            for got, expected in zip(block.keep([tokens, *weights]), oracle.full(tokens), strict=True):
                torch.testing.assert_close(got, expected)
            continue
        first = sorted({int(share * length) for share in shares})
        rows = torch.tensor([[(row + entry) % length for row in first] for entry in range(batch)])
        for got, expected in zip(block.run_rows([tokens, *weights], rows), oracle.reuse(rows, tokens), strict=True):
            torch.testing.assert_close(at_rows(got, rows), at_rows(expected, rows), **closeness("int4"))
    block.release()


def test_graphs_run_in_plain_pytorch_and_are_verified():
    toy = Toy(kv_heads=2, result="logits")
    weights, tokens, rows = toy.weights(0), ids(2, 13, 1), torch.tensor([[2, 12], [2, 12]])
    canonical, _ = run_passes(traced(toy, 2, weights), passes=[CanonicalizePass()])
    given = {"cache_dtype": "int8", "cache_residual": 4}
    block = Block(_kinds_of(traced(toy, 2, weights), MosaicOptions(disable=("fuse",), **given)))
    full = block.keep([tokens, *weights])
    states = [state.clone() for state in block.tensors]
    expected = block.run_rows([tokens, *weights], rows)
    for make, more, result in ((KeepStatePass, [], full), (ReuseStatePass, [rows], expected)):
        module = make("int8", True)(VisibleKeysPass()(canonical))
        Verifier(module).check(module, "test")
        results = module(tokens, *weights, *more, *[state.clone() for state in states])
        for one, other in zip(results, result, strict=False):
            at = rows if more else torch.arange(13).expand(2, -1)
            torch.testing.assert_close(at_rows(one, at), at_rows(other, at), atol=1e-5, rtol=1e-5)
    assert states[-1].shape == (2, 2, 5, 4)  # one row more than is read


def test_another_number_compiles_nothing():
    model, tokens = TidyLike(2), torch.randint(10, VOCABULARY, (1, 60), generator=torch.Generator().manual_seed(1))
    steps, sizes = [], []
    with observing(steps.append):
        for residual in (8, 16, 59):
            with Session(model, options={"cache_dtype": "int4", "cache_residual": residual}) as session:
                full = session.full(tokens).logits
                got = session.reuse(tokens, range(4)).logits[:, :4]
                sizes.append((session.nbytes, float((got - full[:, :4]).abs().max())))
            if residual == 8:
                steps.clear()
    assert not steps
    assert sizes[0][0] < sizes[1][0] < sizes[2][0]
    assert sizes[2][1] < sizes[0][1]  # all rows but one, which is computed


def test_generation_keeps_what_is_new_exactly():
    model = TidyLike(0)
    prompt = torch.randint(10, VOCABULARY, (1, 21), generator=torch.Generator().manual_seed(3))
    options = {"gen_length": 12, "block_length": 6, "steps": 8, "mask_token_id": MASK, "cache": "dual"}
    got = mosaic_compiler.generate(model, prompt, **options, cache_dtype="int8", cache_residual=32)
    exact = mosaic_compiler.generate(model, prompt, **options)
    assert torch.equal(got.sequences, exact.sequences)  # of 33 rows the first one is in 8 bits
    assert got.state_bytes > exact.state_bytes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cache": "dual", "cache_residual": 4}, "give cache_dtype"),
        ({"cache": "dual", "cache_residual": -1, "cache_dtype": "int4"}, "a number of rows from 0"),
        ({"cache": "select", "cache_residual": 4, "cache_dtype": "int4"}, "no cache_keep"),
        ({"cache": "auto", "cache_residual": 4, "cache_dtype": "int4"}, "take 'dual'"),
    ],
)
def test_bad_input(given, message):
    with pytest.raises(ValueError, match=message):
        mosaic_compiler.generate(TidyLike(0), torch.full((1, 9), 11), gen_length=4, mask_token_id=MASK, **given)


def test_what_reads_no_codes_has_none():
    with pytest.raises(OptionsError, match="give cache_dtype"):
        Session(TidyLike(0), options={"cache_residual": 4})
    session = Session(TidyLike(0), options={"cache_residual": 4, "cache_dtype": "bf16"})
    with pytest.raises(StateError, match="no attention reads codes"):
        session.full(torch.full((1, 9), 11))


def test_explain_says_their_bytes():
    given = TidyLike(0), torch.full((1, 40), 11)
    said = " ".join(str(mosaic_compiler.explain(*given, cache_dtype="int4", cache_residual=9)).split())
    with Session(given[0], options={"cache_dtype": "int4", "cache_residual": 9}) as session:
        session.full(given[1])
        codes, last = 40 * 2 * 2 * 4 * (4 + 4), 10 * 2 * 2 * 4 * 32
        assert 0 <= session.nbytes - codes - last < 512 * 12
    assert f"{(codes + last) / 1024:.1f} KiB" in said
