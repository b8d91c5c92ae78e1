"""Models with a canvas: transformers' own ``generate``, with our random numbers, is what ours is held against."""

from __future__ import annotations

import contextlib
import math
from unittest import mock

import pytest
import torch

import mosaic_compiler
from mosaic_compiler.backend import observing
from mosaic_compiler.sampling import noise
from mosaic_compiler.sampling.canvas import EntropyBound

pytestmark = pytest.mark.usefixtures("warm")

hf = pytest.importorskip("transformers")
VOCABULARY, CANVAS, WINDOW, EOS = 96, 12, 16, 1


def model_of(seed=0, vocabulary=VOCABULARY, **more):
    from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig

    torch.manual_seed(seed)
    text = hf.DiffusionGemmaTextConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, global_head_dim=16, num_global_key_value_heads=1, sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"], num_experts=6, top_k_experts=2,
        moe_intermediate_size=16, max_position_embeddings=65536, pad_token_id=0, eos_token_id=EOS, bos_token_id=2,
    )  # fmt: skip
    vision = Gemma4VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=16, position_embedding_size=16,
    )  # fmt: skip
    config = hf.DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=CANVAS, image_token_id=vocabulary - 1,
        boi_token_id=vocabulary - 2, eoi_token_id=vocabulary - 3, **more,
    )  # fmt: skip
    made = hf.DiffusionGemmaForBlockDiffusion._from_config(config, attn_implementation="sdpa").eval()
    made.requires_grad_(False)
    made.model.decoder.norm.weight.mul_(12)  # sharper logits
    return made


@pytest.fixture(scope="module")
def model():
    return model_of()


def prompt_of(batch, length, seed=0):
    return torch.randint(3, VOCABULARY - 4, (batch, length), generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def addressed(seed, batch):
    """PyTorch's random numbers are those of the addresses at which ours stand."""
    cells, draws = torch.arange(batch * CANVAS), [0]

    def randint(*args, **named):
        draws[0] += 1
        keys = noise.row_keys(seed, noise.CANVAS, draws[0], cells)
        return (noise.uniform(keys, 1).squeeze(1) * VOCABULARY).long().view(batch, CANVAS)

    def multinomial(shares, num_samples=1, **named):
        keys = noise.row_keys(seed, noise.TOKENS, draws[0], cells)
        return (shares / noise.exponential(keys, VOCABULARY).float()).argmax(-1, keepdim=True)

    with mock.patch.object(torch, "randint", randint), mock.patch.object(torch, "multinomial", multinomial):
        yield


def theirs(model, prompt, seed, canvases, **given):
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

    bound = given.pop("entropy_bound", 0.1)
    with addressed(seed, prompt.shape[0]), torch.no_grad():
        made = model.generate(
            prompt, max_new_tokens=canvases * CANVAS, sampler_config=EntropyBoundSamplerConfig(bound), **given
        )
    return made.sequences


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.Generator().manual_seed(seed), int(torch.randint(1 << 62, (), generator=generator))


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_generate_is_transformers_own(model, compile):
    """Prompts shorter and longer than the window, several canvases, batches."""
    for seed, (batch, length, canvases, steps, bound) in enumerate(
        [(1, 1, 2, 6, 0.1), (1, 40, 3, 5, 2.0), (2, 25, 2, 6, 8.0)]
    ):
        prompt = prompt_of(batch, length, seed)
        generator, number = drawn(seed)
        given = EntropyBound(steps=steps, entropy_bound=bound)
        got = mosaic_compiler.generate(
            model, prompt, gen_length=canvases * CANVAS, entropy_bound=given, generator=generator, compile=compile
        )
        expected = theirs(model, prompt, number, canvases, max_denoising_steps=steps, entropy_bound=bound)
        assert torch.equal(got.sequences, expected)
        assert got.steps == got.steps_by_kind["reuse"] == canvases * steps
        assert not got.is_approximate
        assert got.state_bytes > 0
        assert not got.fallbacks


def test_rows_that_are_done_stay_and_canvases_end(model):
    prompt = prompt_of(2, 20, 3)
    ends = set()
    for seed, confidence, stability in ((1, 2.6, 0), (1, 2.0, 0), (3, 50.0, 1)):
        generator, number = drawn(seed)
        given = EntropyBound(24, 4.0, confidence_threshold=confidence, stability_threshold=stability)
        got = mosaic_compiler.generate(
            model, prompt, gen_length=CANVAS, entropy_bound=given, generator=generator, compile=False
        )
        expected = theirs(
            model, prompt, number, 1, max_denoising_steps=24, entropy_bound=4.0, confidence_threshold=confidence,
            stability_threshold=stability,
        )  # fmt: skip
        assert torch.equal(got.sequences, expected)
        ends.add(got.steps)
    assert min(ends) < 24


def test_long_prompts_are_encoded_in_pieces(model, monkeypatch):
    prompt = prompt_of(1, 50, 5)
    whole = mosaic_compiler.generate(model, prompt, gen_length=20, steps=4, generator=drawn(1)[0], compile=False)
    monkeypatch.setattr("mosaic_compiler.sampling.canvas.PIECE", 13)
    parts = mosaic_compiler.generate(model, prompt, gen_length=20, steps=4, generator=drawn(1)[0], compile=False)
    assert torch.equal(whole.sequences, parts.sequences)
    assert whole.sequences.shape == (1, 70)  # the second canvas is cut
    assert (whole.steps_by_kind["full"], parts.steps_by_kind["full"]) == (2, 5)


def test_an_end_token_ends_a_row(model):
    prompt = prompt_of(2, 20, 3)
    plain = mosaic_compiler.generate(model, prompt, gen_length=36, steps=3, generator=drawn(4)[0], compile=False)
    end = int(plain.sequences[0, 20 + 3])  # this text has it in its first canvas
    got = mosaic_compiler.generate(
        model, prompt, gen_length=36, steps=3, generator=drawn(4)[0], compile=False, stop_at_eos=True, eos_token_id=end
    )
    first = got.sequences[0, 20:].tolist().index(end)
    assert torch.equal(got.sequences[0, : 20 + first], plain.sequences[0, : 20 + first])
    assert set(got.sequences[0, 20 + first :].tolist()) == {end}
    assert got.sequences.shape == plain.sequences.shape


@pytest.mark.slow
def test_what_the_encoder_left_is_read_where_it_stands(model):
    """No plan of a denoising step has a copy of it; one compilation for all lengths, bounds and counts of steps; behind
    16,384 tokens neither the encoder nor a canvas has a mask of all pairs."""
    steps = []
    generator, number = drawn(1)
    with observing(steps.append):
        got = mosaic_compiler.generate(model, prompt_of(1, 40), gen_length=2 * CANVAS, steps=2, generator=generator)
        before = len(steps)
        mosaic_compiler.generate(model, prompt_of(1, 61), gen_length=24, steps=3, entropy_bound=0.5)
    assert len(steps) == before
    assert torch.equal(got.sequences, theirs(model, prompt_of(1, 40), number, 2, max_denoising_steps=2))
    assert not got.fallbacks
    denoising = [step for step in steps if len(step.module.graph.output_node().args[0]) == 4]
    assert len(denoising) == 1
    plan = denoising[0].plan
    assert plan is not None
    kept = [buffer for buffer in plan.buffers if buffer.is_given and len(buffer.shape) == 4]
    assert len(kept) == 2 * 3
    made = [buffer for buffer in plan.buffers if not buffer.is_given and len(buffer.shape) == 4]
    assert not [buffer.describe() for buffer in made if buffer.shape[2] > CANVAS]
    tokens = 16384
    measured = [step for step in steps if any(meaning for _, meaning in step.outline.meanings)]
    plans = [step.outline.plan_for(tokens, 1.0, None).plan for step in measured]
    assert plans
    for plan in plans:
        assert not [buffer.describe() for buffer in plan.buffers if math.prod(buffer.shape) >= tokens**2]
        assert plan.workspace <= tokens**2 // 4


def test_conditioning_is_kept_as_embeddings(model):
    got = mosaic_compiler.generate(model, prompt_of(1, 40), gen_length=12, steps=2, compile=False)
    kept = 2 * (WINDOW - 1) * 2 * 2 * 8 + 2 * (5 * 12 + 12) * 16  # two windows, and 60 + 12 rows of one layer
    assert got.state_bytes == 4 * (kept + CANVAS * 32)


@pytest.mark.slow
def test_a_budget_that_state_does_not_fit_is_refused(model, monkeypatch):
    monkeypatch.setattr("mosaic_compiler.sampling.canvas.PIECE", 64)
    with pytest.raises(mosaic_compiler.BudgetError, match="less than the state alone"):
        mosaic_compiler.generate(model, prompt_of(1, 6000), gen_length=12, steps=2, memory_budget=700_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.5}, "temperature: not for models with a canvas"),
        ({"cfg_scale": 1.0, "alg": "entropy"}, "cfg_scale, alg: not for"),
        ({"gen_length": 0}, "gen_length must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"entropy_bound": -1.0}, "entropy_bound must be"),
        ({"entropy_bound": EntropyBound(t_min=0.9)}, "temperatures must be"),
        ({"entropy_bound": EntropyBound(stability_threshold=-1)}, "stability_threshold must be"),
        ({"attention_mask": torch.tensor([[0, 1, 1]])}, "attention_mask: not for"),
    ],
)
def test_bad_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        mosaic_compiler.generate(model, prompt_of(1, 3), **options)


def test_models_without_a_canvas_and_with_another_conditioning(model):
    from remote_models import LLaDALike

    with pytest.raises(ValueError, match="entropy_bound is for models with a canvas"):
        mosaic_compiler.generate(LLaDALike(), prompt_of(1, 3) % 50, entropy_bound=0.1)
    other = model_of(1)
    other.model.decoder.embed_tokens.embed_scale = other.model.decoder.embed_tokens.embed_scale * 2
    own = other.model.decoder.self_conditioning
    own.register_forward_pre_hook(lambda module, inputs: (inputs[0], inputs[1] * 3 + 1))
    with pytest.raises(ValueError, match="makes something else of its last logits"):
        mosaic_compiler.generate(other, prompt_of(1, 5), compile=False)
