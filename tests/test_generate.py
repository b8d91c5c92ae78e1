"""Every sampler against naive re-implementations of the published ones (``published_samplers.py``), also compiled."""

from __future__ import annotations

import dataclasses
import gc
import types
import weakref

import published_samplers as published
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from remote_models import VOCABULARY, BreaksLike, DreamLike, LLaDALike, TidyLike
from torch import nn

import mosaic_compiler
from mosaic_compiler.errors import BudgetError
from mosaic_compiler.owned.watch import Watch
from mosaic_compiler.sampling import noise

pytestmark = pytest.mark.usefixtures("warm")

MASK, EOS, EOT = 5, 7, 9


class Scores(nn.Module):
    """Logits that depend on all tokens: cheap, and without ties."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator), requires_grad=False)
        self.mixer = nn.Parameter(torch.randn(64, 64, generator=generator), requires_grad=False)
        self.config = types.SimpleNamespace(mask_token_id=MASK, eos_token_id=EOS)

    def forward(self, input_ids):
        rows = self.table[input_ids]
        n = input_ids.shape[1]
        mixed = torch.einsum("bnv,nm->bmv", rows, self.mixer[:n, :n])
        return types.SimpleNamespace(logits=rows + mixed * 0.5)


class Addressed:
    """The oracle's noise: the same numbers as ours, asked for one cell at a time."""

    def __init__(self, seed: int, length: int) -> None:
        self.seed, self.length = seed, length

    def _keys(self, purpose, step, cells):
        return noise.row_keys(self.seed, purpose, step, torch.tensor([b * self.length + n for b, n in cells]))

    def uniform(self, step, cells, vocab):
        return noise.uniform(self._keys(noise.TOKENS, step, cells), vocab)

    def rows(self, step, cells):
        return noise.uniform(self._keys(noise.CONFIDENCE, step, cells), 1).squeeze(1).float()

    def transfer(self, step, cells):
        return noise.uniform(self._keys(noise.TRANSFER, step, cells), 1).squeeze(1).float()

    def categorical(self, step, cells, probs):
        return (probs.double() / noise.exponential(self._keys(noise.TOKENS, step, cells), probs.shape[-1])).argmax(-1)

    def choice(self, step, probs, k):
        cells = [(b, n) for b in range(probs.shape[0]) for n in range(probs.shape[1])]
        drawn = noise.exponential(self._keys(noise.CHOICE, step, cells), 1).view(probs.shape)
        rows = (probs.double() / drawn).tolist()
        return torch.tensor([published.first_k(row, k) for row in rows]).reshape(len(rows), k)


def seeded(seed):
    """A generator, and the number that ``generate`` draws from it."""
    number = int(torch.randint(1 << 62, (), generator=torch.Generator().manual_seed(seed)))
    return torch.Generator().manual_seed(seed), number


def prompt_of(batch, length, seed, *, masks=False):
    ids = torch.randint(10, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
    if masks and length > 2:
        ids[:, 1] = MASK  # as many in every row
    return ids


def logits_of(model):
    return lambda ids: model(ids).logits


temperatures = st.sampled_from([0.0, 0.0, 0.3, 1.0])
batches, prompts, seeds = st.integers(1, 3), st.integers(1, 9), st.integers(0, 10_000)


@settings(max_examples=120)
@given(batches, prompts, seeds, st.sampled_from([(8, 8), (8, 4), (12, 3), (6, 1)]), st.integers(1, 7), temperatures,
       st.sampled_from([0.0, 0.0, 1.5]), st.sampled_from(["low_confidence", "random"]), st.booleans(),
       st.sampled_from([None, "code", "logits", "confidence"]))  # fmt: skip
def test_llada(batch, length, seed, sizes, per_block, temperature, guidance, remasking, ban, rule):
    new, block = sizes
    model, prompt = Scores(seed % 7), prompt_of(batch, length, seed)
    steps = per_block * (new // block)
    generator, number = seeded(seed)
    got = mosaic_compiler.generate(
        model, prompt, gen_length=new, block_length=block, steps=steps, temperature=temperature, cfg_scale=guidance,
        remasking=remasking, logits_eos_inf=ban, confidence_eos_eot_inf=rule is not None, eos_rule=rule or "code",
        eot_token_id=EOT, generator=generator, compile=False,
    )  # fmt: skip
    expected = published.llada(
        logits_of(model), prompt, steps=steps, gen_length=new, block_length=block, temperature=temperature,
        cfg_scale=guidance, remasking=remasking, logits_eos_inf=ban, confidence_eos_eot_inf=rule is not None,
        eos_rule=rule or "code", mask_id=MASK, eos_id=EOS, eot_id=EOT, noise=Addressed(number, length + new),
    )  # fmt: skip
    assert torch.equal(got.sequences, expected)


def infilled(logits_fn, ids, steps, block_length, temperature, noise):
    """LLaDA's sampler over the masked tokens of the ids, position by position: an oracle."""
    x, (batch, length) = ids.clone(), ids.shape
    begins, begin = [], 0
    while begin < length:
        if bool((x[:, begin] == MASK).any()):
            begins.append(begin)
            begin += block_length
        else:
            begin += 1
    step = 0
    for number, begin in enumerate(begins):
        own = steps // len(begins) + (number < steps % len(begins))
        end = min(begin + block_length, length)
        quota = [published.schedule(int((x[b, begin:end] == MASK).sum()), own) for b in range(batch)]
        for i in range(own):
            cells = [(b, n) for b in range(batch) for n in range(end) if x[b, n] == MASK]
            if cells and any(quota[b][i] for b in range(batch)):
                logits = logits_fn(x)
                drawn = noise.uniform(step, cells, logits.shape[-1]) if temperature else [None] * len(cells)
                tokens = [published.gumbel_token(logits[c], temperature, u) for c, u in zip(cells, drawn, strict=True)]
                sure = [float(logits[c].softmax(-1)[t]) for c, t in zip(cells, tokens, strict=True)]
                for b in range(batch):
                    mine = [j for j, cell in enumerate(cells) if cell[0] == b]
                    for rank in published.first_k([sure[j] for j in mine], quota[b][i]):
                        x[cells[mine[rank]]] = tokens[mine[rank]]
            step += 1
    return x


def with_masks(ids, seed, share):
    """The ids with masks in places of their own in each row, and one at least."""
    where = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < share
    where[:, seed % ids.shape[1]] = True
    return torch.where(where, MASK, ids)


@settings(max_examples=100)
@given(
    batches, st.integers(1, 14), seeds, st.integers(1, 5), st.integers(0, 9), temperatures, st.sampled_from([0.2, 0.7])
)
def test_infilling(batch, length, seed, block, more_steps, temperature, share):
    model, ids = Scores(seed % 7), with_masks(prompt_of(batch, length, seed), seed, share)
    steps = length + more_steps
    generator, number = seeded(seed)
    got = mosaic_compiler.generate(
        model, ids, gen_length=0, block_length=block, steps=steps, temperature=temperature, generator=generator,
        compile=False,
    )  # fmt: skip
    expected = infilled(logits_of(model), ids, steps, block, temperature, Addressed(number, length))
    assert torch.equal(got.sequences, expected)
    assert torch.equal(got.sequences[ids != MASK], ids[ids != MASK])


@settings(max_examples=40)
@given(batches, prompts, seeds, st.sampled_from([(8, 8), (8, 4), (12, 3)]), st.integers(1, 4), temperatures,
       st.sampled_from([0.0, 1.5]), st.sampled_from([None, 0.4]))  # fmt: skip
def test_infilling_masks_behind_a_prompt_is_generating(
    batch, length, seed, sizes, per_block, temperature, guidance, sure
):
    new, block = sizes
    model, prompt = Scores(seed % 7), prompt_of(batch, length, seed)
    given = {
        "block_length": block, "steps": per_block * (new // block), "temperature": temperature, "cfg_scale": guidance,
        "threshold": sure, "compile": False,
    }  # fmt: skip
    masked = torch.cat([prompt, torch.full((batch, new), MASK)], 1)
    asked = ((prompt, new), (masked, 0))
    both = [
        mosaic_compiler.generate(model, ids, gen_length=count, **given, generator=seeded(seed)[0])
        for ids, count in asked
    ]
    assert torch.equal(both[0].sequences, both[1].sequences)
    assert both[0].steps == both[1].steps


@pytest.mark.parametrize("kind", [LLaDALike, DreamLike])
def test_infilling_compiled_is_infilling_in_eager(kind):
    model, options = kind().eval().requires_grad_(False), {"poison": True}
    for length in (12, 9):
        ids = with_masks(prompt_of(2, length, 3), 5, 0.5)
        both = [
            mosaic_compiler.generate(
                model, ids, gen_length=0, steps=6, mask_token_id=MASK, compile=c, options=options if c else None
            )
            for c in (True, False)
        ]
        assert torch.equal(both[0].sequences, both[1].sequences)
        assert both[0].sequences.shape == ids.shape
        assert both[0].plan is not None


@settings(max_examples=120)
@given(batches, prompts, seeds, st.integers(1, 10), st.integers(1, 12), temperatures,
       st.sampled_from(["origin", "maskgit_plus", "topk_margin", "entropy"]), st.sampled_from([None, 0.6, 1.0]),
       st.sampled_from([None, 1, 5, 999]), st.sampled_from([None, 0.0, 0.5]), st.sampled_from([1e-3, 0.0, 0.2]),
       st.booleans())  # fmt: skip
def test_dream(batch, length, seed, new, steps, temperature, alg, top_p, top_k, alg_temp, eps, masks):
    model, prompt = Scores(seed % 7), prompt_of(batch, length, seed, masks=masks)
    generator, number = seeded(seed)
    history = []
    got = mosaic_compiler.generate(
        model, prompt, max_new_tokens=new, steps=steps, temperature=temperature, alg=alg, alg_temp=alg_temp,
        top_p=top_p, top_k=top_k, eps=eps, generator=generator, compile=False, output_history=True,
    )  # fmt: skip
    expected = published.dream(
        logits_of(model), prompt, steps=steps, max_new_tokens=new, eps=eps, temperature=temperature, top_p=top_p,
        top_k=top_k, alg=alg, alg_temp=alg_temp, mask_id=MASK, noise=Addressed(number, length + new), history=history,
    )  # fmt: skip
    assert torch.equal(got.sequences, expected)
    assert all(any(torch.equal(mine, theirs) for theirs in history) for mine in got.history)


@settings(max_examples=40)
@given(batches, prompts, seeds, temperatures, st.sampled_from([0.05, 0.4, 0.9, 1.0]))
def test_fast_dllm(batch, length, seed, temperature, threshold):
    model, prompt = Scores(seed % 7), prompt_of(batch, length, seed)
    model.table[:, MASK] = -1e4  # else it may propose the mask for ever
    model.mixer.mul_(0.1)
    generator, number = seeded(seed)
    got = mosaic_compiler.generate(
        model, prompt, gen_length=8, block_length=4, steps=8, temperature=temperature, threshold=threshold,
        generator=generator, compile=False,
    )  # fmt: skip
    expected, forwards = published.fast_dllm(
        logits_of(model), prompt, steps=8, gen_length=8, block_length=4, temperature=temperature, threshold=threshold,
        mask_id=MASK, noise=Addressed(number, length + 8),
    )  # fmt: skip
    assert torch.equal(got.sequences, expected)
    assert got.steps == forwards


COMPILED = {
    "llada": {"gen_length": 8, "block_length": 4, "steps": 6},
    "noise": {"gen_length": 8, "block_length": 4, "steps": 4, "temperature": 0.7},
    "guided": {"gen_length": 8, "steps": 4, "cfg_scale": 0.8},
    "eos": {"gen_length": 8, "steps": 4, "logits_eos_inf": True, "confidence_eos_eot_inf": True},
    "fast": {"gen_length": 8, "steps": 4, "threshold": 0.3},
    "origin": {"max_new_tokens": 8, "steps": 5, "alg": "origin", "temperature": 0.4},
    "margin": {"max_new_tokens": 8, "steps": 5, "alg": "topk_margin", "top_k": 9, "top_p": 0.8},
    "entropy": {"max_new_tokens": 8, "steps": 5, "alg": "entropy", "temperature": 0.2, "top_p": 0.9, "alg_temp": 0.5},
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_equals_eager(name):
    model, prompt = LLaDALike(), prompt_of(1 + (name in ("guided", "entropy")), 11, 3)
    results = [
        mosaic_compiler.generate(
            model, prompt, generator=torch.Generator().manual_seed(4), compile=compiled, **COMPILED[name]
        )
        for compiled in (False, True)
    ]
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert results[0].steps == results[1].steps
    assert results[1].plan is not None
    assert not (results[1].sequences == MASK).any() or (results[0].sequences == MASK).any()


@pytest.mark.parametrize("kind", [LLaDALike, DreamLike, pytest.param(BreaksLike, marks=pytest.mark.slow)])
def test_remote_code_computes_needed_rows_only(kind, capsys):
    """Log lines, tables that grow, buffers in dicts: the rewrite is not lost, and results are eager's."""
    model, prompt = kind(), prompt_of(1, 40, 1)
    more = {"max_new_tokens": 16, "steps": 4}

    def run(prompt, **options):
        return mosaic_compiler.generate(model, prompt, generator=torch.Generator().manual_seed(6), **more, **options)

    first = run(prompt)
    first = run(prompt) if kind is not LLaDALike else first  # a first step finds out that there are several graphs
    assert torch.equal(first.sequences, run(prompt, compile=False).sequences)
    wide = [b for b in first.plan.buffers if b.shape[-1:] == (VOCABULARY,)]
    assert wide
    assert all(b.shape[0] <= 32 for b in wide), "logits for the masked rows only"
    longer = prompt_of(1, 90, 2)  # the rotary tables grow
    assert torch.equal(run(longer).sequences, run(longer, compile=False).sequences)


@pytest.mark.parametrize("kind", [LLaDALike, pytest.param(DreamLike, marks=pytest.mark.slow)])
def test_unequal_prompts_by_left_padding(kind):
    """Each row comes out as it would by itself; no N x N mask exists."""
    model = kind()
    prompts = [prompt_of(1, 6, 1), prompt_of(1, 11, 2)]
    batch = torch.zeros(2, 11, dtype=torch.int64)
    attention_mask = torch.zeros_like(batch)
    for row, prompt in enumerate(prompts):
        batch[row, 11 - prompt.shape[1] :] = prompt
        attention_mask[row, 11 - prompt.shape[1] :] = 1
    more = (
        {"max_new_tokens": 6, "steps": 3, "alg": "maskgit_plus"} if kind is DreamLike else {"gen_length": 6, "steps": 3}
    )
    together = mosaic_compiler.generate(model, batch, attention_mask=attention_mask, **more)
    for row, prompt in enumerate(prompts):
        alone = mosaic_compiler.generate(model, prompt, compile=False, **more)
        assert torch.equal(together.sequences[row, 11:], alone.sequences[0, -6:])
    assert not [b for b in together.plan.buffers if b.shape[-2:] == (17, 17)]


def test_callbacks_streamer_history_and_early_stop(capsys):
    model, prompt, seen = LLaDALike(), prompt_of(1, 5, 1), []

    class Streamer:
        drafts, ended = [], False

        def put(self, value):
            self.drafts.append(value)

        def end(self):
            self.ended = True

    streamer = Streamer()
    result = mosaic_compiler.generate(
        model, prompt, gen_length=8, steps=4, compile=False, streamer=streamer, output_history=True, progress=True,
        on_step=lambda number, ids: seen.append((number, int((ids == MASK).sum()))),
    )  # fmt: skip
    assert [left for _, left in seen] == [6, 4, 2, 0]
    assert [number for number, _ in seen] == [1, 2, 3, 4]
    assert len(streamer.drafts) == len(result.history) == 4
    assert torch.equal(streamer.drafts[-1], result.sequences)
    assert streamer.ended
    said = capsys.readouterr()
    assert "tokens" in said.err
    assert not said.out
    always = Scores(0)
    always.table[:, EOS] = 1e4
    always.mixer.zero_()
    stopped = mosaic_compiler.generate(
        always, prompt, gen_length=8, block_length=2, steps=8, stop_at_eos=True, compile=False
    )
    assert stopped.steps < 8
    assert (stopped.sequences[:, 5:] == EOS).all()


def test_what_is_no_streamer_is_refused_before_the_first_step():
    model, seen = Scores(0), []
    with pytest.raises(TypeError, match="list has no put and no end"):
        mosaic_compiler.generate(model, prompt_of(1, 5, 1), gen_length=4, streamer=seen, on_step=seen.append)
    assert not seen


def test_noise_is_the_same_for_any_part_of_it_and_looks_uniform():
    rows = torch.arange(500)
    whole = noise.uniform(noise.row_keys(3, noise.TOKENS, 5, rows), 300)
    part = noise.uniform(noise.row_keys(3, noise.TOKENS, 5, rows[7:9]), 100)
    assert torch.equal(part, whole[7:9, :100])
    assert whole.min() >= 0
    assert whole.max() < 1
    counts = torch.histc(whole, 100, 0, 1)
    expected = whole.numel() / 100
    assert ((counts - expected) ** 2 / expected).sum() < 170  # chi-squared, 99 degrees: 1e-5
    for a, b in ((whole[:-1], whole[1:]), (whole[:, :-1], whole[:, 1:])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.01
    other = noise.uniform(noise.row_keys(3, noise.TOKENS, 6, rows), 300)
    assert not torch.equal(whole, other)


def test_a_budget_that_is_too_small_is_refused_before_the_first_step():
    model, calls = LLaDALike(), []
    with pytest.raises(BudgetError, match=r"no length fits it, .*: raise the budget to at least \d+ bytes"):
        mosaic_compiler.generate(
            model, prompt_of(1, 64, 0), gen_length=8, steps=2, memory_budget=20_000, on_step=lambda *a: calls.append(a)
        )
    assert calls == []
    assert not model.training


class Causal(Scores):
    def __init__(self):
        super().__init__(0)
        self.attention = nn.Module()
        self.attention.is_causal = True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gen_length": 0}, "gen_length must be at least 1"),
        ({"gen_length": -1}, "gen_length must be at least 1, or 0"),
        ({"gen_length": 8, "max_new_tokens": 4}, "two names"),
        ({"gen_length": 8, "block_length": 3}, "multiple of block_length 3: take 9"),
        ({"gen_length": 8, "block_length": 4, "steps": 3}, "multiple of the 2 blocks: take 4"),
        ({"gen_length": 8, "steps": 0}, "steps must be"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"cfg_scale": -1.0}, "cfg_scale must be"),
        ({"remasking": "best"}, "remasking must be"),
        ({"threshold": 1.5}, "threshold must be"),
        ({"alg": "entropy", "top_p": 1.2}, "top_p must be"),
        ({"alg": "entropy", "top_k": 0}, "top_k must be"),
        ({"alg": "best"}, "alg must be one of"),
        ({"alg": "entropy", "eps": 1.0}, "eps must be"),
        ({"alg": "entropy", "threshold": 0.9}, "cfg_scale and threshold are LLaDA's"),
        ({"top_k": 5}, "top_p and top_k are Dream's"),
        ({"sampler": "gpt"}, "sampler must be"),
        ({"eos_rule": "paper"}, "eos_rule must be"),
        ({"attention_mask": torch.ones(2, 2)}, "attention_mask must be"),
    ],
)
def test_bad_options(options, message):
    model = Scores(0).train()
    with pytest.raises(ValueError, match=message):
        mosaic_compiler.generate(model, prompt_of(1, 4, 0), **options)
    assert model.training


def test_bad_models_and_prompts():
    prompt = prompt_of(1, 4, 0)
    with pytest.raises(ValueError, match="is_causal=False"):
        mosaic_compiler.generate(Causal(), prompt)
    nameless = Scores(0)
    nameless.config = types.SimpleNamespace()
    with pytest.raises(ValueError, match=r"Scores has no mask token .* no masked diffusion .*--mask-id"):
        mosaic_compiler.generate(nameless, prompt)
    with pytest.raises(ValueError, match="which token ends a text"):
        mosaic_compiler.generate(nameless, prompt, mask_id=5, stop_at_eos=True)
    with pytest.raises(ValueError, match="mask_token_id -7 is no token"):
        mosaic_compiler.generate(nameless, prompt, mask_id=-7)
    with pytest.raises(ValueError, match="int64"):
        mosaic_compiler.generate(Scores(0), prompt.float())
    with pytest.warns(UserWarning, match="pad on the left"):
        mosaic_compiler.generate(
            LLaDALike(), prompt, attention_mask=torch.tensor([[1, 1, 1, 0]]), gen_length=4, steps=1, compile=False
        )
    short = Scores(0)
    short.config.max_position_embeddings = 8
    with pytest.warns(UserWarning, match="more than the 8 positions"):
        mosaic_compiler.generate(short, prompt, gen_length=8, steps=2, compile=False)


def test_nothing_masked_and_everything_masked():
    model = Scores(1)
    everything = torch.full((1, 4), MASK)
    result = mosaic_compiler.generate(model, everything, max_new_tokens=4, steps=4, alg="maskgit_plus", compile=False)
    expected = published.dream(
        logits_of(model), everything, steps=4, max_new_tokens=4, alg="maskgit_plus", mask_id=MASK
    )
    assert torch.equal(result.sequences, expected)
    empty = mosaic_compiler.generate(model, torch.empty(1, 0, dtype=torch.int64), gen_length=4, steps=2, compile=False)
    assert empty.sequences.shape == (1, 4)


def test_models_are_not_kept_alive():
    model = LLaDALike()
    mosaic_compiler.generate(model, prompt_of(1, 9, 0), gen_length=4, steps=2)
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


@pytest.mark.slow
def test_512_new_tokens_behind_a_long_text_inside_64_mib(tiny_llada, genesis):
    """Equal to the plain loop's: what users would run by hand."""
    prompt, more = genesis[:, :3500], {"gen_length": 512, "block_length": 128, "steps": 4}
    result = mosaic_compiler.generate(tiny_llada, prompt, memory_budget="64MiB", **more)
    with torch.no_grad():
        expected = published.llada(logits_of(tiny_llada), prompt, mask_id=3, **more)
    assert torch.equal(result.sequences, expected)
    assert result.plan.workspace <= 64 << 20
    assert max(b.shape[0] for b in result.plan.buffers if b.shape[-1:] == (8192,)) <= 512


def test_a_sampler_is_a_generator_of_steps(monkeypatch):
    """One more: from left to right, one token a step.  It asks for that position only, and is sent the proposal."""
    from mosaic_compiler.sampling import run, samplers

    def leftmost(state):
        for position in range(state.start, state.ids.shape[1]):
            where = torch.zeros_like(state.ids, dtype=torch.bool)
            where[:, position] = True
            proposed, confidence = yield samplers.Wanted(where, position)
            assert bool(confidence[where].isfinite().all())
            assert bool((confidence[~where] == float("-inf")).all())
            state.ids = torch.where(where, proposed, state.ids)

    monkeypatch.setattr(run, "SAMPLERS", {"llada": dataclasses.replace(samplers.SAMPLERS["llada"], steps=leftmost)})
    model, prompt = LLaDALike().eval().requires_grad_(False), torch.tensor([[1, 2, 3]])
    given = {"gen_length": 8, "steps": 8, "block_length": 8, "mask_token_id": MASK}
    both = [mosaic_compiler.generate(model, prompt, **given, compile=c) for c in (True, False)]
    assert torch.equal(both[0].sequences, both[1].sequences)
    assert not bool((both[0].sequences == MASK).any())


class Shifted(TidyLike):
    shift = 0

    def forward(self, input_ids, attention_mask=None, attention_bias=None):
        result = super().forward(input_ids, attention_mask, attention_bias)
        result.logits = result.logits.roll(self.shift, -1)
        return result


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_callback_may_change_the_model(cache):
    """Whatever a callback writes to, the next step sees it."""
    found = []
    for compiled in (True, False):
        model = Shifted(2)
        model.shift = 0

        def change(step, ids, model=model):
            model.shift = step // 4

        given = {"gen_length": 8, "steps": 8, "block_length": 8, "mask_token_id": MASK, "on_step": change}
        if compiled:
            given["cache"] = cache
            if cache == "dual":
                given["cache_refresh"] = 1
        else:
            given["compile"] = False
        prompt = torch.randint(10, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(4))
        found.append(mosaic_compiler.generate(model, prompt, **given).sequences)
    assert torch.equal(*found)
    model.shift = 0
    still = mosaic_compiler.generate(model, prompt, **{**given, "on_step": None}).sequences
    assert not torch.equal(found[1], still)


@pytest.fixture
def _nothing_set_aside():
    were_set_aside = gc.get_freeze_count() > 0  # by conftest.py
    gc.unfreeze()
    yield
    gc.unfreeze()
    if were_set_aside:
        gc.freeze()


@pytest.mark.usefixtures("_nothing_set_aside")
def test_old_objects_are_set_aside_during_a_generation():
    """The collector looks at new ones only; behind it, all is as it was, also if somebody has set some aside."""
    model, prompt = TidyLike(0), torch.full((1, 9), 11)
    given = {"gen_length": 4, "steps": 4, "mask_token_id": MASK}
    counts = []
    mosaic_compiler.generate(model, prompt, **given, on_step=lambda step, ids: counts.append(gc.get_freeze_count()))
    assert min(counts) > 10_000
    assert gc.get_freeze_count() == 0
    with pytest.raises(ZeroDivisionError):
        mosaic_compiler.generate(model, prompt, **given, on_step=lambda step, ids: 1 // 0)
    assert gc.get_freeze_count() == 0
    gc.freeze()
    mosaic_compiler.generate(model, prompt, **given)
    assert gc.get_freeze_count() > 10_000


def test_no_collection_is_caused_by_looking_at_a_model():
    """Thousands of dicts are looked at between two steps, without a view of each that is there with the others."""
    model = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3000))
    watch = Watch(list(model.modules()), [])
    seen, thresholds = [], gc.get_threshold()
    gc.collect()
    gc.set_threshold(700, 10, 10)  # Python's own
    gc.callbacks.append(lambda phase, info: seen.append(info["generation"]))
    try:
        for _ in range(10):
            assert watch.is_as_it_was(closely=True)
    finally:
        gc.callbacks.pop()
        gc.set_threshold(*thresholds)
    assert len(seen) <= 2
