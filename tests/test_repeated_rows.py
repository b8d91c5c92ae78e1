"""Steps with other numbers of needed rows run in the program of more rows: the last needed one is computed again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import mosaic_compiler
from mosaic_compiler.backend import observing
from mosaic_compiler.runtime.program import Program, _StepBinder
from mosaic_compiler.runtime.prologue import _repeated

MASK, WIDTH, VOCABULARY = 3, 16, 40
generator = torch.Generator().manual_seed(0)
TABLE, MIX, HEAD = (
    torch.randn(*shape, generator=generator, dtype=torch.float64)
    for shape in ((VOCABULARY, WIDTH), (WIDTH, WIDTH), (WIDTH, VOCABULARY))
)


def step(ids):
    """Tokens and confidences for the masked rows of [1, N]."""
    x = TABLE[ids]
    x = x + torch.softmax(x @ x.transpose(1, 2), -1) @ x
    logits = torch.relu(x @ MIX) @ HEAD
    masked = ids == MASK
    confidence = torch.softmax(logits, -1).amax(-1)
    return torch.where(masked, logits.argmax(-1), ids), torch.where(masked, confidence, -torch.inf)


def picked(ids):
    """The logits of masked rows themselves."""
    return (torch.relu(TABLE[ids] @ MIX) @ HEAD)[ids == MASK]


def sequence(tokens, masked, seed=0):
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(MASK + 1, VOCABULARY, (1, tokens), generator=made)
    ids[0, torch.randperm(tokens, generator=made)[:masked]] = MASK
    return ids


class Products(TorchDispatchMode):
    """Rows of the head's products, while programs run."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.rows = []
        run = Program.run

        def watched(*args):
            with self:
                return run(*args)

        monkeypatch.setattr(Program, "run", watched)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._overloadpacket is torch.ops.aten.mm and args[1].shape == HEAD.shape:
            self.rows.append(args[0].shape[0])
        return function(*args, **(kwargs or {}))


def compiled(function=step, **options):
    torch._dynamo.reset()
    return torch.compile(function, backend="mosaic", dynamic=True, fullgraph=True, options=options)


def check(fast, ids, function=step):
    for result, expected in zip(fast(ids), function(ids), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)


def test_fewer_rows_take_a_known_program_down_to_half(monkeypatch):
    fast, products, bound = compiled(), Products(monkeypatch), []
    bind_node = _StepBinder.bind_node
    monkeypatch.setattr(_StepBinder, "bind_node", lambda self, node: bound.append(node) or bind_node(self, node))
    with observing((steps := []).append):
        for masked in (1000, 999, 800, 512, 500):
            check(fast, sequence(1500, masked))
            assert bound if masked == 1000 else not bound
            bound.clear()
    assert products.rows == [1000] * 5
    assert len(steps) == 1
    products.rows.clear()
    for masked in (499, 485, 700, 1024, 1025, 480, 1024):
        check(fast, sequence(1500, masked))
    assert products.rows == [499, 499, 700, 1024, 1025, 480, 1024]


def test_few_rows_are_as_good_as_one(monkeypatch):
    fast, products = compiled(), Products(monkeypatch)
    for masked in (40, 33, 20, 19, 0, 32, 3, 1, 0):
        check(fast, sequence(40, masked))
    assert products.rows == [40, 40, 40, 19, 32, 32, 32]  # nothing is computed for no rows


@pytest.mark.parametrize("options", [{"poison": True}, {"chunk_rows": 7}, {"chunk_rows": 7, "poison": True}])
def test_any_numbers_in_any_order(options):
    fast = compiled(**options)
    with observing((steps := []).append):

        @settings(max_examples=15, deadline=None)
        @given(st.lists(st.integers(0, 150), min_size=1, max_size=8), st.integers(150, 300), st.integers(0, 99))
        def run(counts, tokens, seed):
            for masked in counts:
                check(fast, sequence(tokens, masked, seed))

        run()
    assert len(steps) == 1


def test_rows_in_chunks_are_not_served_by_larger_programs(monkeypatch):
    fast, products = compiled(chunk_rows=200), Products(monkeypatch)
    for masked in (1000, 700):
        check(fast, sequence(1500, masked))
    assert products.rows == [200] * 5 + [200] * 3 + [100]


def test_a_number_of_rows_that_shows_is_exact(monkeypatch):
    products = Products(monkeypatch)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        fast = compiled(picked)
        for masked in (1000, 999, 520, 3):
            ids = sequence(1500, masked)
            torch.testing.assert_close(fast(ids), picked(ids), rtol=1e-12, atol=0)
    assert products.rows == [1000, 999, 520, 3]


def test_other_lengths_and_weights_have_programs_of_their_own():
    fast = compiled()
    for tokens in (300, 200, 300, 200):
        for masked in (150, 90):
            check(fast, sequence(tokens, masked, tokens))


def test_needed_rows_of_a_whole_model(monkeypatch):
    """Drop-in mode: the pages that hold needed rows are counted without repeats."""

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed = torch.nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64)
            self.head = torch.nn.Linear(WIDTH, 3000, bias=False, dtype=torch.float64)

        def forward(self, ids):
            return self.head(torch.relu(self.embed(ids)))

    model = Head().requires_grad_(False)
    fast = compiled(model, needed_rows="masked", mask_token_id=MASK, strict=True)
    with observing((steps := []).append):
        for masked in (200, 150, 101, 30, 200):
            ids = sequence(400, masked)
            logits, expected = fast(ids), model(ids)
            needed = ids == MASK
            torch.testing.assert_close(logits[needed], expected[needed], rtol=1e-12, atol=1e-12)
            assert not logits[~needed].any()
    assert len(steps) == 1
    mosaic_compiler.release_memory()


def test_the_last_number_is_repeated():
    numbers = torch.tensor([[2], [5]])
    assert _repeated(numbers, 2) is numbers
    assert _repeated(numbers, 4).tolist() == [[2], [5], [5], [5]]
    assert _repeated(numbers[:0], 0).tolist() == []
