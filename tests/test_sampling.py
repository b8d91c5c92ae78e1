"""The sampler against a naive re-implementation from the paper's description."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_compiler.sampling import DenoisingStep, block_window, denoise, transfer_counts

MASK = 7


class Lookup(torch.nn.Module):
    """Logits from a table, by position and token: a model without a model."""

    def __init__(self, length: int, seed: int) -> None:
        super().__init__()
        self.table = torch.randn(length, 9, 9, generator=torch.Generator().manual_seed(seed))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[torch.arange(ids.shape[1]).expand_as(ids), ids]


def naive_denoise(model, ids, steps, block):
    """Row by row, as the paper describes it, with lists."""
    ids = ids.clone()
    for start in range(0, ids.shape[1], block):
        end = min(start + block, ids.shape[1])
        left = [(ids[b, start:end] == MASK).sum().item() for b in range(ids.shape[0])]
        quota = [[n // steps + (s < n % steps) for s in range(steps)] for n in left]
        for s in range(steps):
            logits = model(ids)
            for b in range(ids.shape[0]):
                scored = []
                for i in range(start, end):
                    if ids[b, i] == MASK:
                        p = torch.softmax(logits[b, i], -1)
                        scored.append((-p.max().item(), i, int(logits[b, i].argmax())))
                for _, i, token in sorted(scored)[: quota[b][s]]:
                    ids[b, i] = token
    return ids


@settings(max_examples=40)
@given(
    st.integers(1, 12), st.integers(1, 3), st.integers(1, 5), st.integers(1, 12), st.floats(0, 1), st.integers(0, 10**6)
)
def test_denoise_equals_the_description(length, batch, steps, block, share, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 7, (batch, length), generator=generator)
    ids[torch.rand(batch, length, generator=generator) < share] = MASK
    model = Lookup(length, seed)
    model.table[..., MASK] = -9  # so that a committed token is never the mask
    before = ids.clone()
    got = denoise(DenoisingStep(model, MASK), ids, mask_token_id=MASK, steps=steps, block_length=block)
    assert torch.equal(got, naive_denoise(model, ids, steps, block))
    assert torch.equal(ids, before)
    assert not (got == MASK).any()


@given(st.lists(st.integers(0, 50), min_size=1, max_size=4), st.integers(1, 9))
def test_transfer_counts(masked, steps):
    counts = transfer_counts(torch.tensor(masked), steps)
    assert counts.sum(1).tolist() == masked
    assert (counts[:, :-1] >= counts[:, 1:]).all()
    assert (counts.max(1)[0] - counts.min(1)[0] <= 1).all()


def test_callbacks_and_nothing_to_do():
    model = Lookup(6, 0)
    seen = []
    ids = torch.randint(0, 7, (1, 6))
    assert torch.equal(denoise(DenoisingStep(model, MASK), ids, mask_token_id=MASK, steps=3, on_step=seen.append), ids)
    assert seen == []


@pytest.mark.parametrize(
    ("change", "message"),
    [({"steps": 0}, "steps"), ({"block_length": 0}, "block_length"), ({"input_ids": torch.zeros(3)}, r"\[B, N\]")],
)
def test_bad_arguments(change, message):
    arguments = {
        "input_ids": torch.full((1, 4), MASK),
        "steps": 2,
        "block_length": None,
        "mask_token_id": MASK,
    } | change
    ids = arguments.pop("input_ids")
    with pytest.raises(ValueError, match=message):
        denoise(DenoisingStep(Lookup(4, 0), MASK), ids, **arguments)


def test_window():
    assert block_window(5, 1, 3).tolist() == [[False, True, True, False, False]]
