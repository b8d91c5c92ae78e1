"""Rotary positions of another base: what runs is the model whose config says so; the given one comes back."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from remote_models import LLaDALike
from torch import nn

import mosaic_compiler
from mosaic_compiler.sampling.rotary import find_rotary, longllada_factor, scaled_rotary, ultrallada_factor

pytestmark = pytest.mark.usefixtures("warm")

MASK = 5


def llama(theta=500.0, **more):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, is_causal=False, mask_token_id=MASK, max_position_embeddings=64, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": theta, **more},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompt(length, seed=0):
    return torch.randint(6, 61, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("make", [llama, lambda theta=500.0: LLaDALike(rope_theta=theta)], ids=["llama", "tables"])
def test_generate_runs_the_model_whose_base_is_that_much_greater(make):
    model, other = make(500.0), make(2000.0)
    own = {"gen_length": 8, "steps": 4, "block_length": 8, "mask_token_id": MASK}
    before = model(prompt(20)).logits
    plain = mosaic_compiler.generate(model, prompt(20), **own).sequences
    for compile in (False, True):
        scaled = mosaic_compiler.generate(model, prompt(20), **own, rope_factor=4, compile=compile)
        expected = mosaic_compiler.generate(other, prompt(20), **own, compile=False)
        assert torch.equal(scaled.sequences, expected.sequences)
        assert not scaled.fallbacks
    long = prompt(150)  # tables grow in there
    scaled = mosaic_compiler.generate(model, long, **own, rope_factor=4.0, compile=False)
    assert torch.equal(scaled.sequences, mosaic_compiler.generate(other, long, **own, compile=False).sequences)
    assert torch.equal(model(prompt(20)).logits, before)  # and back
    assert torch.equal(mosaic_compiler.generate(model, prompt(20), **own).sequences, plain)
    assert not torch.allclose(before, other(prompt(20)).logits, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([100.0, 10_000.0, 500_000.0, 1e6]),
    st.sampled_from([4, 8, 32]),
    st.floats(0.3, 100.0),
    st.integers(0, 2),
)
def test_tables_and_angles_are_found_by_their_values(base, half, factor, layout):
    class Holder(nn.Module):
        def __init__(self, base):
            super().__init__()
            angles = 1.0 / base ** (torch.arange(half).float() / half)
            turns = torch.arange(40.0)[:, None] * angles
            turns = [torch.cat([turns, turns], -1), turns.repeat_interleave(2, -1), turns][layout]
            self.register_buffer("a", angles)
            self.register_buffer("b", turns.cos()[None, None], persistent=False)
            self.kept = {"c": turns.sin()}
            self.register_buffer("d", torch.linspace(1, 0.1, half))  # falls, but is none
            self.kept["e"] = torch.randn(40, 2 * half)

    found, expected = Holder(base), Holder(base * factor)
    before = copy.deepcopy((found.a, found.b, found.kept, found.d))
    rotary = find_rotary(found)
    assert math.isclose(rotary.base, base, rel_tol=1e-4)
    assert rotary.depth == 2 * half
    with rotary.times(factor):
        torch.testing.assert_close(found.a, expected.a)
        torch.testing.assert_close(found.b, expected.b, rtol=0, atol=1e-3)
        torch.testing.assert_close(found.kept["c"], expected.kept["c"], rtol=0, atol=1e-3)
        assert torch.equal(found.d, before[3])
        assert torch.equal(found.kept["e"], before[2]["e"])
    for now, was in zip((found.a, found.b, *found.kept.values()), (*before[:2], *before[2].values()), strict=True):
        assert torch.equal(now, was)


class Grows(nn.Module):
    """Tables that grow, where old code keeps them: buffers and how long they are, attributes, tuples by length."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.longest, self.made = kind, 0, {}
        self.register_buffer("inv_freq", 1.0 / 100.0 ** (torch.arange(4) / 4))
        self.embed, self.head = nn.Embedding(61, 8), nn.Linear(8, 61)
        self.grow(16)

    def grow(self, length):
        turns = torch.arange(length)[:, None] * self.inv_freq
        turns = torch.cat([turns, turns], -1)
        self.longest = length
        if self.kind == "buffers":
            self.register_buffer("cos", turns.cos(), persistent=False)
            self.register_buffer("sin", turns.sin(), persistent=False)
        elif self.kind == "attributes":
            self.cos, self.sin = turns.cos(), turns.sin()
        else:
            self.made[length] = turns.cos(), turns.sin()

    def forward(self, ids):
        length = ids.shape[1]
        if length > self.longest if self.kind != "tuples" else length not in self.made:
            self.grow(length)
        cos, sin = self.made[length] if self.kind == "tuples" else (self.cos[:length], self.sin[:length])
        x = self.embed(ids)
        x = x * cos + torch.roll(x, 4, -1) * sin
        return self.head(x + x.mean(1, keepdim=True))


@pytest.mark.parametrize("kind", ["buffers", "attributes", "tuples"])
def test_tables_that_grow_meanwhile_are_gone_afterwards(kind):
    torch.manual_seed(0)
    model = Grows(kind).eval().requires_grad_(False)
    other = copy.deepcopy(model)
    other.inv_freq *= 4.0 ** -(torch.arange(4) / 4)
    other.grow(16)
    fresh = copy.deepcopy(model)
    with scaled_rotary(model, 4.0, 40) as factor:
        assert factor == 4
        for length in (16, 12, 40):
            torch.testing.assert_close(model(prompt(length)), other(prompt(length)), atol=1e-4, rtol=1e-4)
    for length in (40, 16, 12, 50):
        assert torch.equal(model(prompt(length)), fresh(prompt(length)))


def test_nobody_else_runs_a_model_that_is_scaled():
    model = llama()
    with (
        scaled_rotary(model, 4.0, 8),
        pytest.raises(ValueError, match="another generate"),
        scaled_rotary(model, None, 8),
    ):
        pass
    with scaled_rotary(model, None, 8), scaled_rotary(model, 1, 8):
        pass


def test_factors_are_the_published_ones():
    of_llada = [longllada_factor(5e5, 128, 4096, wanted) for wanted in (4096, 8192, 16384, 24576, 32768)]
    assert [math.ceil(factor) for factor in of_llada] == [1, 4, 14, 31, 55]
    assert round(ultrallada_factor(5e5, 128, 4096, 131072)) == 562
    assert round(ultrallada_factor(5e5, 128, 4096, 32768), 1) == 44.5
    model = llama(100.0)
    with scaled_rotary(model, "auto", 256) as factor:
        assert factor == longllada_factor(100.0, 8, 64, 256) > 1
    with scaled_rotary(model, "auto", 64) as factor:
        assert factor == 1


def test_state_is_not_of_another_base():
    model = llama()
    ids = prompt(24)
    with torch.no_grad(), mosaic_compiler.Session(model) as session:
        session.full(ids)
        session.reuse(ids, torch.tensor([3]))
        with (
            scaled_rotary(model, 4.0, 24),
            pytest.raises(mosaic_compiler.StateError, match="changed"),
        ):
            session.reuse(ids, torch.tensor([3]))


def test_what_cannot_be_scaled():
    with pytest.raises(ValueError, match=r"yarn"), scaled_rotary(llama(factor=2.0, rope_type="yarn"), 2, 8):
        pass
    with pytest.raises(ValueError, match="has no rotary positions"), scaled_rotary(nn.Linear(2, 2), 2, 8):
        pass
    two = nn.Module()
    for index, base in enumerate((100.0, 10_000.0)):
        two.register_buffer(f"a{index}", base ** -(torch.arange(8.0) / 8))
    with pytest.raises(ValueError, match="several kinds"), scaled_rotary(two, 2, 8):
        pass
    for factor in (0, -1.0, math.inf, math.nan, "more", True):
        with pytest.raises(ValueError, match="rope_factor must be"), scaled_rotary(llama(), factor, 8):
            pass
    model = LLaDALike()
    del model.config.max_sequence_length
    with pytest.raises(ValueError, match="does not say how many"), scaled_rotary(model, "auto", 8):
        pass
