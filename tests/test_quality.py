"""What an approximation costs: sequences that ask for something, figures, and the command."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from remote_models import VOCABULARY, TidyLike

from mosaic_compiler.cli_quality import SHIPPED
from mosaic_compiler.errors import ConfigError
from mosaic_compiler.quality.measure import Method, measure
from mosaic_compiler.quality.sequences import Asked, facts, words

pytestmark = pytest.mark.usefixtures("warm")

SHARED = Path(__file__).parent.parent.parent / "shared" / "recall" / "recall.py"
MASK = 5


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHIPPED / "full")


@pytest.fixture(scope="module")
def unseen():
    return torch.from_numpy(np.fromfile(SHIPPED / "heldout.bin", dtype=np.uint16).astype(np.int64))


def test_a_fact_is_told_once_and_asked_for_at_the_end(tokenizer, unseen):
    asked = facts(tokenizer, unseen, 512, 3)
    assert asked.masked.sum(1).tolist() == [8] * 3
    assert not asked.masked[:, :-32].any()
    for ids, masked in zip(asked.ids, asked.masked, strict=True):
        text = tokenizer.decode(ids)
        for answer in ids[masked].view(4, 2):
            assert text.count(tokenizer.decode(answer) + ".") >= 2, "told, and asked for"
    assert not (asked.shown(3)[asked.masked] != 3).any()


@pytest.mark.skipif(not SHARED.is_file(), reason="the script that the models were published with is not here")
def test_sequences_are_those_that_the_models_were_published_with(tokenizer, unseen):
    spec = importlib.util.spec_from_file_location("recall", SHARED)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    ids, answers, _ = theirs.sequences(1024, 5)
    ours = facts(tokenizer, unseen, 1024, 5)
    assert torch.equal(ours.ids, ids)
    assert torch.equal(ours.masked, answers)


def test_answers_are_right_together():
    asked = Asked(torch.arange(12).view(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1]] * 2).bool(), 2)
    answers = torch.tensor([[2, 3, 4, 5], [8, 0, 10, 11]])
    assert asked.right(answers) == 0.75
    assert Asked(asked.ids, asked.masked).right(answers) == 7 / 8


def test_words_of_a_text():
    asked = words(torch.arange(1000), 100, 4)
    assert asked.masked.sum(1).tolist() == [16] * 4
    assert bool((asked.ids.diff(dim=1) == 1).all())
    with pytest.raises(ConfigError, match="the text has 50 tokens, a sequence 100"):
        words(torch.arange(50), 100, 4)


def test_facts_need_their_words(tokenizer, unseen):
    with pytest.raises(ConfigError, match="at least 80 tokens"):
        facts(tokenizer, unseen, 64, 1)

    class Letters:
        def __call__(self, text, add_special_tokens=True):
            return type("Encoded", (), {"input_ids": [ord(letter) for letter in text]})

    with pytest.raises(ConfigError, match="takes the words of facts apart"):
        facts(Letters(), unseen, 512, 1)


@pytest.mark.slow
def test_figures_are_those_of_the_model():
    """Nothing is lost where values are kept as they are computed; what fewer bits lose is told."""
    model = TidyLike(0)
    text = torch.randint(10, VOCABULARY, (300,), generator=torch.Generator().manual_seed(0))
    asked, done = {"words": words(text, 48, 3)}, []
    found = measure(
        model, MASK, asked, [Method(), Method("int4")], generated=1, on_sequence=lambda *given: done.append(given)
    )
    plain, exact, four = found
    assert [row.method for row in found] == ["no cache", "as computed", "int4"]
    assert done == [(number + 1, 6) for number in range(6)]
    logits = model(asked["words"].shown(MASK)).logits[asked["words"].masked].view(3, 16, -1)
    assert plain.right["words"] == exact.right["words"] == asked["words"].right(logits.argmax(-1))
    assert (exact.agreement, plain.bytes_per_token) == (1.0, 0.0)
    assert exact.divergence < 1e-9 < four.divergence
    assert 2 * 2 * 4 * 8 * 4 <= exact.bytes_per_token < 1.3 * 2 * 2 * 4 * 8 * 4
    assert four.bytes_per_token < 0.6 * exact.bytes_per_token
    assert plain.steps >= 1


@pytest.mark.slow
def test_the_command(run):
    code, out, err = run(
        "quality", SHIPPED / "blocks", "--block-causal", "32", "--tokens", "96", "--sequences", "1", "--json",
        "--cache-dtype", "as-computed",
    )  # fmt: skip
    assert code == 0, err
    rows = json.loads(out)["models"][str(SHIPPED / "blocks")]
    assert [row["method"] for row in rows] == ["no cache", "as computed"]
    assert rows[1]["agreement"] == 1.0
    assert set(rows[0]["right"]) == {"facts", "words"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cache-dtype", "int3"], "'int3' is none of as-computed, bf16, fp8, int8, int4"),
        (["--cache-dtype", ","], "at least one of as-computed"),
        ([SHIPPED / "nowhere"], "no model"),
        ([SHIPPED / "full", "--mask-id", "99999", "--tokens", "96"], "mask_token_id 99999 is no token of the model"),
        ([SHIPPED / "full", "--text", "nowhere.txt"], "nowhere.txt: No such file"),
    ],
)
def test_bad_input(run, arguments, message):
    code, _, err = run("quality", *arguments)
    assert code == 2
    assert message in " ".join(err.split())
