"""State of real models: the shipped one, and (where they are) two that recall facts from far back."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from kept import Kept

import mosaic_compiler
from mosaic_compiler import Session

pytestmark = pytest.mark.usefixtures("warm")

RECALL = Path(__file__).parent.parent.parent / "shared" / "recall"
MASK = 3


def check(model, ids, **named):
    """All rows; any rows right behind a full step; other ids."""
    torch.set_num_threads(2)
    tokens = ids.shape[1]
    oracle = Kept(lambda ids: model(ids, **named).logits)
    with Session(model) as session:
        full = session.full(ids, **named).logits
        torch.testing.assert_close(full, oracle.full(ids), atol=2e-3, rtol=1e-3)
        for rows in (range(tokens), range(tokens - 33, tokens - 1), [5, 0, tokens - 1, 5]):
            got = session.reuse(ids, rows, **named).logits[:, list(rows)]
            torch.testing.assert_close(got, full[:, list(rows)], atol=2e-3, rtol=1e-3)
        oracle.full(ids)
        other = ids.clone()
        other[:, tokens - 20 : tokens - 10] = 77
        rows = torch.arange(tokens - 32, tokens)
        expected = oracle.reuse(rows[None], other)
        got = session.reuse(other, rows, **named).logits
        torch.testing.assert_close(got[:, rows], expected[:, rows], atol=2e-3, rtol=1e-3)
        assert torch.equal(got[:, rows].argmax(-1), expected[:, rows].argmax(-1))


@pytest.mark.slow
def test_tiny_llada(tiny_llada, genesis):
    ids = genesis[:, :400].clone()
    ids[:, 300:350] = MASK
    check(tiny_llada, ids)


@pytest.mark.slow
def test_tiny_llada_generates_the_same_with_a_refresh_in_every_step(tiny_llada, genesis):
    torch.set_num_threads(2)
    options = {"gen_length": 32, "steps": 16, "block_length": 16}
    plain = mosaic_compiler.generate(tiny_llada, genesis[:, :200], cache="none", **options)
    for cache in ("prefix", "dual", "delayed"):
        got = mosaic_compiler.generate(tiny_llada, genesis[:, :200], cache=cache, cache_refresh=1, **options)
        assert torch.equal(got.sequences, plain.sequences)
        assert not got.is_approximate
    exact = mosaic_compiler.generate(tiny_llada, genesis[:, :200], cache="exact", **options)
    assert torch.equal(exact.sequences, plain.sequences)


@pytest.mark.slow
@pytest.mark.skipif(not RECALL.is_dir(), reason="the models that recall are not here")
@pytest.mark.parametrize("which", ["full", "blocks"])
def test_models_that_recall(which):
    """``blocks`` attends block-causally, by a mask that it is given."""
    spec = importlib.util.spec_from_file_location("recall", RECALL / "recall.py")
    assert spec is not None
    assert spec.loader is not None
    recall = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recall)
    ids, answers, _ = recall.sequences(512, 1)
    named = {} if which == "full" else {"attention_mask": recall.block_causal(512)}
    check(recall.load(which), recall.masked(ids, answers), **named)
