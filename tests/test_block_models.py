"""Samplers of block-causal models, on stand-ins of their code: id for id what is published, and exact state."""

from __future__ import annotations

import logging
import types

import pytest
import torch
from block_models import MASK, VOCABULARY, FastLike, LLaDA2Like, SDARLike
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mosaic_compiler
from mosaic_compiler.sampling import DenoisingStep
from mosaic_compiler.sampling.bidirectional import NotADiffusionModelError, declared_block

pytestmark = pytest.mark.usefixtures("warm")

EOS = 7


def prompt_of(batch, length, seed):
    return torch.randint(10, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


class Rows(nn.Module):
    """Logits of a row that depend on the ids of its block and of all before it, and on where it stands; no kernels."""

    def __init__(self, block, seed, sharp=6.0, vocabulary=23):
        super().__init__()
        self.block, self.config = block, types.SimpleNamespace(mask_token_id=MASK, bd_size=block)
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(997, vocabulary, generator=generator) * sharp, requires_grad=False)
        self.primes = nn.Parameter(torch.randint(1, 997, (512,), generator=generator).double(), requires_grad=False)

    def forward(self, input_ids, attention_mask=None):
        at = torch.arange(input_ids.shape[1])
        seen = at[:, None] // self.block >= at[None, :] // self.block
        mixed = (input_ids.double() * self.primes[: len(at)]) @ seen.double().T
        return self.table[((mixed + at * 31) % 997).long()]


def logits_of(model, ids, block):
    """Of the blocks that there are, as published loops see them."""
    if isinstance(model, LLaDA2Like | SDARLike):
        at = torch.arange(ids.shape[1])
        seen = at[:, None] // block >= at[None, :] // block
        if isinstance(model, SDARLike):
            return model(ids, attention_mask=seen[None]).logits
        return model(ids, attention_mask=torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]).logits
    output = model(ids)
    return output if isinstance(output, torch.Tensor) else output.logits


def published_joint(model, prompt, new, block, fill, edit, most):
    """LLaDA2.1's ``generate``, one sequence, without edits into the mask."""
    begin = prompt.shape[1]
    ids = torch.cat([prompt, torch.full((1, new), MASK)], 1)
    forwards = 0
    for number in range(begin // block, -(-(begin + new) // block)):
        low, high = number * block, min((number + 1) * block, begin + new)
        after = 0
        while True:
            old = ids[0].clone()
            masked = [p for p in range(low, high) if old[p] == MASK]
            after += not masked
            if after > most:
                break
            probability = torch.softmax(logits_of(model, ids[:, :high], block)[0], -1)
            forwards += 1
            best, token = probability.max(-1)
            filled = [p for p in masked if best[p] > fill]
            if masked and not filled:
                filled = [max(masked, key=lambda p: (float(best[p]), -p))]
            edited = [
                p for p in range(max(low, begin), high)
                if p not in masked and best[p] > edit and token[p] not in (old[p], MASK)
            ]  # fmt: skip
            for p in (*filled, *edited):
                ids[0, p] = token[p]
            if not masked and not edited:
                break
            if masked and torch.equal(ids[0], old):
                break
    return ids, forwards


def published_sub_blocks(model, prompt, new, block, part, threshold):
    """Fast-dLLM v2's ``generate``, greedy, to the end of the last block."""
    ids, end, forwards = prompt.clone(), prompt.shape[1] + new, 0
    if ids.shape[1] % block == 0:
        ids = torch.cat([ids, logits_of(model, ids, block)[:, -1:].argmax(-1)], 1)
        forwards += 1
    while True:
        begin = (ids.shape[1] - 1) // block * block
        stop = min(begin + block, end)
        ids = torch.cat([ids, torch.full((1, stop - ids.shape[1]), MASK)], 1)
        for at in range(begin, stop, part):
            inside = range(at, min(at + part, stop))
            while any(ids[0, p] == MASK for p in inside):
                before = ids.clone()
                rows = torch.softmax(logits_of(model, ids, block)[0], -1)
                forwards += 1
                masked = [p for p in inside if ids[0, p] == MASK]
                best = {p: rows[p - 1].max(-1) for p in masked}
                surest = max(masked, key=lambda p: (float(best[p].values), -p))
                for p in masked:
                    if p == surest or best[p].values > threshold:
                        ids[0, p] = best[p].indices
                if torch.equal(before, ids):
                    break
        if stop == end:
            return ids, forwards
        ids = torch.cat([ids, logits_of(model, ids, block)[:, -1:].argmax(-1)], 1)
        forwards += 1


@settings(max_examples=examples(10, 25), deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 30),
    st.sampled_from([3, 4, 8]),
    st.sampled_from([0.3, 0.7, 0.95]),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.sampled_from([0, 1, 4, 16]),
    st.integers(0, 999),
)
def test_joint_threshold_is_what_is_published(length, new, block, fill, edit, most, seed):
    model, prompts = Rows(block, seed), [prompt_of(1, length, seed + index) % 23 for index in range(2)]
    prompts = [torch.where(prompt == MASK, 6, prompt) for prompt in prompts]
    options = {
        "gen_length": new, "sampler": "llada", "remasking": "joint_threshold", "threshold": fill,
        "edit_threshold": edit, "max_post_steps": most, "block_causal": block, "compile": False,
    }  # fmt: skip
    expected = [published_joint(model, prompt, new, block, fill, edit, most) for prompt in prompts]
    for prompt, (ids, forwards) in zip(prompts, expected, strict=True):
        got = mosaic_compiler.generate(model, prompt, **options)
        assert torch.equal(got.sequences, ids)
        assert got.steps == forwards
    both = mosaic_compiler.generate(model, torch.cat(prompts), **options)  # each by itself
    assert torch.equal(both.sequences, torch.cat([ids for ids, _ in expected]))


@settings(max_examples=examples(10, 25), deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 30),
    st.sampled_from([(4, 2), (8, 4), (8, 3), (6, 6)]),
    st.sampled_from([0.2, 0.6, 0.9, 1.0]),
    st.integers(0, 999),
)
def test_sub_blocks_are_what_is_published(length, new, sizes, threshold, seed):
    block, part = sizes
    model, prompt = Rows(block, seed), prompt_of(1, length, seed) % 23
    prompt = torch.where(prompt == MASK, 6, prompt)
    ids, forwards = published_sub_blocks(model, prompt, new, block, part, threshold)
    got = mosaic_compiler.generate(
        model, prompt, gen_length=new, threshold=threshold, sub_block_length=part, compile=False
    )  # the sampler and the length of blocks are what its config says
    if not bool((ids == MASK).any()):  # where a model proposes the mask itself
        assert torch.equal(got.sequences, ids)
        assert got.steps == forwards


CASES = {
    "llada2": (
        LLaDA2Like,
        {"block_causal": 4, "remasking": "joint_threshold", "threshold": 0.3, "edit_threshold": 0.2},
    ),
    "sdar": (SDARLike, {"remasking": "low_confidence_dynamic", "threshold": 0.3, "steps": 16}),
    "fast": (FastLike, {"threshold": 0.3, "sub_block_length": 4}),
}


@pytest.mark.parametrize(
    "name", [name if name == "llada2" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
@pytest.mark.slow
def test_published_code_with_exact_state(name, caplog):
    """Id for id what is computed without state, of fewer rows; and not what is kept without a proof."""
    make, options = CASES[name]
    model, rows = make(3), []
    options = {"gen_length": 16, **options}
    with caplog.at_level(logging.INFO, "mosaic_compiler"):
        for batch, length in ((1, 21), (2, 9))[: examples(1, 2)]:
            prompt = prompt_of(batch, length, length)
            plain = mosaic_compiler.generate(model, prompt, **options, compile=False)
            for _ in range(2):
                exact = mosaic_compiler.generate(model, prompt, **options)
            assert torch.equal(exact.sequences, plain.sequences)
            assert exact.steps == plain.steps
            assert not exact.is_approximate
            assert not exact.fallbacks
            rows.append(exact.steps_by_kind)
    assert all(kinds["reuse"] > 0 for kinds in rows)
    says = {"llada2": False, "sdar": "block_size=4", "fast": "bd_size=8"}[name]
    assert says in caplog.text if says else "config has" not in caplog.text


def test_editing_changes_what_was_committed_and_state_knows():
    model, prompt = LLaDA2Like(3), prompt_of(1, 21, 5)
    options = {"gen_length": 16, **CASES["llada2"][1]}
    edited = mosaic_compiler.generate(model, prompt, **options, output_history=True)
    changed = [
        bool(((before != MASK) & (before != after)).any())
        for before, after in zip(edited.history, edited.history[1:], strict=False)
    ]
    assert any(changed)
    never = mosaic_compiler.generate(model, prompt, **{**options, "edit_threshold": 1.0}, output_history=True)
    assert all(
        bool(((before == MASK) | (before == after)).all())
        for before, after in zip(never.history, never.history[1:], strict=False)
    )


def test_generation_ends_where_nothing_can_change_any_more():
    class Ends(Rows):
        def forward(self, input_ids, attention_mask=None):
            logits = super().forward(input_ids)
            logits[:, 12:13, EOS] += 1000.0
            return logits

    model, prompt = Ends(4, 1), torch.full((1, 9), 6)
    options = {"gen_length": 24, "block_causal": 4, "sampler": "llada", "eos_token_id": EOS, "compile": False}
    more = {"remasking": "joint_threshold", "threshold": 0.3, "edit_threshold": 0.2}
    whole = mosaic_compiler.generate(model, prompt, **options, **more)
    ended = mosaic_compiler.generate(model, prompt, **options, **more, stop_at_eos=True)
    assert ended.steps < whole.steps
    assert torch.equal(ended.sequences[0, :13], whole.sequences[0, :13])
    assert bool((ended.sequences[0, 13:] == EOS).all())


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in ("llada2", "fast")])
def test_tokens_are_drawn(name):
    make, options = CASES[name]
    model, prompt = make(3), prompt_of(1, 16, 5)
    options = {"gen_length": 16, **options, "temperature": 1.0}
    drawn = [
        mosaic_compiler.generate(
            model, prompt, **options, compile=compiled, generator=torch.Generator().manual_seed(seed)
        ).sequences
        for seed, compiled in ((1, True), (1, False), (2, False))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    if name == "fast":  # the first token of a block is not
        cold = mosaic_compiler.generate(model, prompt, **{**options, "temperature": 0.0}, compile=False)
        assert drawn[0][0, 16] == drawn[2][0, 16] == cold.sequences[0, 16]


def test_lengths_of_blocks_in_configs():
    def says(**config):
        model = nn.Linear(2, 2)
        model.config = types.SimpleNamespace(**config)
        return declared_block(model)

    assert says(bd_size=32) == ("bd_size", 32)
    assert says(block_size=4, mask_token_id=3) == ("block_size", 4)
    assert says(block_size=4) is None  # of pages, or of quantisation
    assert says(block_size=32, mask_token_id=3, dlm_paradigm="bidirectional") is None
    assert says(block_group_size=1, block_type="llama", mask_token_id=3) is None
    assert says(block_length=32, mask_token_id=3) is None  # an argument of samplers, in no published config
    assert declared_block(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit_threshold": 0.5}, "edit_threshold is for"),
        ({"remasking": "joint_threshold", "edit_threshold": 1.5}, "edit_threshold must be"),
        ({"remasking": "joint_threshold", "max_post_steps": -1}, "max_post_steps must be"),
        ({"sampler": "fast_dllm_v2", "sub_block_length": 0}, "sub_block_length must be"),
        ({"sampler": "fast_dllm_v2", "block_causal": 0}, "block_causal must be"),
        ({"sampler": "fast_dllm_v2", "remasking": "random"}, "are LLaDA's"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        mosaic_compiler.generate(FastLike(), prompt_of(1, 4, 0), gen_length=8, **{"sampler": "llada", **options})


def test_a_sampler_of_block_causal_models_on_one_that_is_not():
    from remote_models import LLaDALike

    with pytest.raises(ValueError, match="say how long their blocks are"):
        mosaic_compiler.generate(LLaDALike(), prompt_of(1, 4, 0), gen_length=8, sampler="fast_dllm_v2")
    with pytest.raises(NotADiffusionModelError, match="not proven"):
        mosaic_compiler.generate(LLaDA2Like(), prompt_of(1, 4, 0), gen_length=8)


@pytest.mark.parametrize("options", [{"sampler": "fast_dllm_v2"}, {"sampler": "llada", "remasking": "joint_threshold"}])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_model_that_proposes_the_mask_itself_ends(options, temperature):
    class MaskLover(FastLike):
        def forward(self, input_ids=None, **more):
            output = super().forward(input_ids, **more)
            output.logits[..., MASK] += 1000.0
            return output

    got = mosaic_compiler.generate(
        MaskLover(), prompt_of(1, 5, 0), gen_length=11, temperature=temperature, compile=False, **options
    )
    assert bool((got.sequences == MASK).any())
    assert got.steps <= 100


def test_a_length_of_blocks_that_a_model_contradicts_is_refused():
    with pytest.raises(NotADiffusionModelError, match=r"bd_size=8.*does not look at"):
        mosaic_compiler.generate(FastLike(), prompt_of(1, 5, 0), gen_length=8, block_causal=5)


@pytest.mark.parametrize("name", ["steps", "max_post_steps", "gen_length", "sub_block_length"])
def test_numbers_are_whole(name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        mosaic_compiler.generate(FastLike(), prompt_of(1, 5, 0), **{"gen_length": 8, name: 2.5})


@pytest.mark.parametrize(("make", "block"), [(LLaDA2Like, 4), (SDARLike, 4), (FastLike, 8)])
def test_a_denoising_step_gives_the_mask_in_the_form_that_is_taken(make, block):
    model, ids = make(3), prompt_of(1, 18, 2)
    ids[:, 13:] = MASK
    window, count = torch.ones_like(ids, dtype=torch.bool), torch.tensor([2])
    got = DenoisingStep(model, MASK, block_causal=block)(ids, window, count)
    shares, tokens = torch.softmax(logits_of(model, ids, block), -1).max(-1)
    best = torch.where(ids == MASK, shares, -1.0).topk(2).indices
    assert torch.equal(got, ids.scatter(1, best, tokens.gather(1, best)))
    with pytest.raises(NotADiffusionModelError, match="takes no mask"):
        DenoisingStep(nn.Embedding(61, 61), MASK, block_causal=4)
