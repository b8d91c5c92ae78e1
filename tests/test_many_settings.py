"""Many settings and models in one process: each has a plan within its budget, and nothing compiles for a number."""

from __future__ import annotations

import itertools
import math
import threading
import time
import warnings

import pytest
import torch
from effort import examples
from remote_models import BreaksLike

import mosaic_compiler
from mosaic_compiler.backend import observing
from mosaic_compiler.errors import BudgetError, FallbackError, OptionsError
from mosaic_compiler.sampling import DenoisingStep, block_window

LLADA = {"steps": 4, "gen_length": 16}
DREAM = {"steps": 3, "gen_length": 8, "alg": "entropy"}


def model(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, is_causal=False, mask_token_id=3, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompt(length=6, seed=1):
    return torch.randint(4, 64, (1, length), generator=torch.Generator().manual_seed(seed))


def generated(made, given, compile=True, **more):
    generator = torch.Generator().manual_seed(7)
    return mosaic_compiler.generate(made, given, generator=generator, compile=compile, **more)


SETTINGS = (
    [{**LLADA, "temperature": t, "memory_budget": f"{30 + 10 * t:.0f}MiB"} for t in (0.3, 0.5, 1.0, 1.7)]
    + [{**LLADA, "cfg_scale": s} for s in (0.5, 1.5, 2.0)]
    + [{**LLADA, "threshold": t} for t in (0.5, 0.9)]
    + [{**DREAM, "temperature": t, "top_p": p} for t, p in ((0.2, 0.5), (0.7, 0.9), (1.1, 0.95))]
    + [{**DREAM, "temperature": 0.4, "top_k": k} for k in (5, 9, 40)]
)  # fmt: skip


def test_another_number_compiles_nothing_and_gives_what_eager_gives():
    made, compiled = model(), {}
    for setting in SETTINGS:
        structure = tuple(sorted(name for name in setting if name not in ("memory_budget", "steps", "gen_length")))
        steps = []
        with observing(steps.append):
            result = generated(made, prompt(), **setting)
        expected = generated(
            made, prompt(), compile=False, **{k: v for k, v in setting.items() if k != "memory_budget"}
        )
        assert torch.equal(result.sequences, expected.sequences), setting
        assert result.plan is not None
        assert not steps or structure not in compiled, f"{setting} was compiled again"
        compiled.setdefault(structure, len(steps))
    assert all(count >= 1 for count in compiled.values())


@pytest.mark.parametrize(("settings", "models"), [pytest.param(60, 5, marks=pytest.mark.slow), (6, 2)])
def test_settings_and_models_all_have_a_plan_and_keep_their_budget(settings, models):
    made, count = [model(seed) for seed in range(models)], []
    temperatures = itertools.cycle((0.0, 0.0, 0.4, 1.3))
    with observing(count.append):
        for number, temperature in zip(range(settings), temperatures, strict=False):
            budget = 600_000 + 20_000 * number
            for one in made:
                length = 6 + number % 5
                result = generated(one, prompt(length), **LLADA, temperature=temperature, memory_budget=budget)
                assert result.plan is not None
                assert result.plan.budget == budget
                assert result.plan.workspace <= budget
    assert len(count) == 2, "one graph at temperature 0, one above it, whatever the model, the length and the budget"
    with pytest.raises(BudgetError):
        generated(made[0], prompt(), **LLADA, memory_budget=1024)


def test_models_of_one_architecture_have_results_of_their_own():
    made = [model(seed) for seed in range(3)]
    for one in (*made, *made):
        result = generated(one, prompt(), **LLADA)
        assert torch.equal(result.sequences, generated(one, prompt(), compile=False, **LLADA).sequences)
        assert result.plan is not None


@pytest.mark.slow
def test_rows_are_picked_in_front_of_the_head_of_every_model_that_breaks():
    for seed in range(examples(1, 2)):
        made, given = BreaksLike(seed), torch.randint(6, 61, (1, 40), generator=torch.Generator().manual_seed(1))
        first = generated(made, given, **LLADA)  # its first step finds out that there are several graphs
        again = generated(made, given, **LLADA)
        assert torch.equal(again.sequences, generated(made, given, compile=False, **LLADA).sequences)
        assert "graph-break" in [fallback.name for fallback in first.fallbacks]
        wide = [[b.shape[0] for b in result.plan.buffers if b.shape[-1:] == (61,)] for result in (first, again)]
        assert max(wide[1]) <= 32, "logits for the masked rows only"
        assert max(wide[0]) == 56, "the plan with the highest peak is that of the first step"


@pytest.mark.slow
def test_threads_take_turns_with_the_head_of_a_model():
    made, given = BreaksLike(0), torch.randint(6, 61, (1, 40), generator=torch.Generator().manual_seed(1))
    expected = generated(made, given, **LLADA).sequences
    results = {}

    def run(number):
        results[number] = generated(made, given, memory_budget=(64 + number) << 20, **LLADA).sequences

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert all(torch.equal(result, expected) for result in results.values())
    assert not made.head._forward_pre_hooks


@pytest.mark.parametrize(
    "wrong", [{"temperature": math.nan}, {"cfg_scale": math.inf}, {"alg": "entropy", "alg_temp": -1}]
)
def test_numbers_that_are_none(wrong):
    with pytest.raises(ValueError, match="must be a number from 0"):
        generated(model(), prompt(), compile=False, **wrong)


def test_options_are_looked_at_without_compiling_too():
    for wrong in ({"memory_budget": "garbage"}, {"options": {"nope": 1}}):
        with pytest.raises(OptionsError):
            generated(model(), prompt(), compile=False, **wrong)


def test_where_nothing_ran_it_is_said():
    made = model(3)
    made.register_forward_hook(lambda module, args, output: time.time() and output)  # which is left to Dynamo
    with torch._dynamo.config.patch(disable=True), pytest.warns(UserWarning, match="eager PyTorch"):
        result = generated(made, prompt(), **LLADA)
    assert result.plan is None
    assert [fallback.name for fallback in result.fallbacks] == ["eager"]
    with torch._dynamo.config.patch(disable=True), pytest.raises(FallbackError, match="strict mode: eager"):
        generated(made, prompt(), **LLADA, options={"strict": True})


@pytest.mark.slow
def test_a_step_that_dynamo_gave_up_says_so(monkeypatch):
    step = DenoisingStep(model(), 3)
    arguments = torch.full((1, 24), 3), block_window(24, 0, 24), torch.tensor([4])

    def run(budget):
        with torch.no_grad():
            options = {"memory_budget": budget}
            return torch.compile(step, backend="mosaic", dynamic=True, options=options)(*arguments)

    with torch._dynamo.config.patch(recompile_limit=2):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            expected = [run("64MiB"), run("63MiB")]
        with pytest.warns(UserWarning, match="too many different options"):
            expected.append(run("62MiB"))
        assert all(torch.equal(one, expected[0]) for one in expected)
        step._has_said_eager = False
        monkeypatch.setenv("MOSAIC_STRICT", "1")
        with pytest.raises(FallbackError, match="strict mode"):
            run("62MiB")
