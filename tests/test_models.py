"""Whole models: token ids equal to eager bit for bit, one compile for all lengths."""

from __future__ import annotations

import functools
import importlib.metadata
import types

import pytest
import remote_models
import torch
from effort import examples
from remote_models import VOCABULARY, DreamLike, LLaDALike

import mosaic_compiler
from mosaic_compiler.ahead.configs import load_config
from mosaic_compiler.ahead.fit import answer, traced
from mosaic_compiler.backend import mosaic, observing
from mosaic_compiler.report.measure import _cpu_peak
from mosaic_compiler.runtime.pools import pool_for
from mosaic_compiler.sampling import DenoisingStep, block_window


def half_masked(ids: torch.Tensor, length: int, mask_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A step's arguments: every second token of the passage masked, commit a quarter of them."""
    ids = ids[:, :length].repeat(1, -(-length // ids.shape[1]))[:, :length].clone()
    ids[:, ::2] = mask_id
    return ids, block_window(length, 0, length), torch.tensor([max(length // 8, 1)])


@pytest.mark.slow
def test_tiny_llada_at_six_lengths_with_one_compile(tiny_llada, genesis):
    """Equal ids, height at the bound; at 4096 also the planned peak against the measured one."""
    step, steps = DenoisingStep(tiny_llada, 3), []
    long_ids = torch.cat((genesis, genesis), 1)
    torch.set_num_threads(2)
    with torch.no_grad(), observing(steps.append):
        compiled = torch.compile(step, backend="mosaic", dynamic=True, fullgraph=True)
        for length in (64, 7, 2, 513, 1024, 4096):
            arguments = half_masked(long_ids, length, 3)
            got, allocated = _cpu_peak(functools.partial(compiled, *arguments))
            plan = steps[0].plan
            assert plan.height <= 1.01 * plan.lower_bound
            assert torch.equal(got, step(*arguments)), length
        got, allocated = _cpu_peak(functools.partial(compiled, *arguments))
    measured = allocated + pool_for(torch.device("cpu")).reserved()
    assert measured <= plan.peak <= 1.05 * measured
    assert len(steps) == 1
    assert not steps[0].fallbacks


def random_model(name: str) -> torch.nn.Module:
    import transformers as hf

    torch.manual_seed(0)
    small = {
        "vocab_size": 120,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    causal = {**small, "is_causal": False, "use_cache": False, "eos_token_id": 2}
    if name == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**causal)).eval()
    if name == "qwen2":
        model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**causal, num_key_value_heads=2)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # biases too
        return model
    if name == "qwen3":
        return hf.Qwen3ForCausalLM(hf.Qwen3Config(**causal, num_key_value_heads=2, head_dim=8)).eval()
    if name == "olmoe":
        experts = {"num_experts": 8, "num_experts_per_tok": 2, "experts_implementation": "grouped_mm"}
        return hf.OlmoeForCausalLM(hf.OlmoeConfig(**causal, **experts)).eval()
    if name == "modernbert":
        ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
        config = hf.ModernBertConfig(**small, **ends, local_attention=16, global_attn_every_n_layers=2)
        return hf.ModernBertForMaskedLM(config).eval()
    return hf.BertForMaskedLM(hf.BertConfig(**small)).eval()


def test_arena_high_water_equals_the_height():
    """Fill the arena with a pattern, run, and look for the highest byte that changed; twice, with
    different patterns, because a written byte may equal one of them."""
    step, steps = DenoisingStep(random_model("llama"), 3), []
    arguments = half_masked(torch.randint(4, 120, (1, 512)), 512, 3)
    with torch.no_grad(), observing(steps.append):
        compiled = torch.compile(step, backend="mosaic", dynamic=True)
        compiled(*arguments)
        plan = steps[0].plan
        highest = 0
        for pattern in (0x5A, 0xA5):
            with steps[0]._pool.lease() as arena:
                arena.fill(0, plan.height + 8192, pattern)
                arena._touched = 0  # keep the pattern above the height: ensure() must not give it back
            compiled(*arguments)
            changed = (arena._bytes[: plan.height + 8192] != pattern).nonzero()
            highest = max(highest, int(changed.max()) + 1)
    assert -(-highest // 512) * 512 == plan.height


@pytest.mark.parametrize("name", ["llama", "qwen2", "bert"])
@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_transformers_models_token_for_token(name, batch):
    step, steps = DenoisingStep(random_model(name), 3), []
    with torch.no_grad(), observing(steps.append):
        compiled = torch.compile(step, backend="mosaic", dynamic=True, options={"poison": True})
        for length in (17, 2, 64, 200):
            torch.manual_seed(length)
            ids = torch.randint(4, 120, (batch, length))
            ids[:, ::2] = 3
            arguments = ids, block_window(length, 0, length), torch.full((batch,), 1 + length // 8)
            assert torch.equal(compiled(*arguments), step(*arguments)), length
    assert len(steps) == 1
    assert {f.name for f in steps[0].fallbacks} == set()


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        pytest.param("qwen2", marks=pytest.mark.slow),
        pytest.param("qwen3", marks=pytest.mark.slow),
        "bert",
        "modernbert",
        "olmoe",
    ],
)
def test_transformers_models_in_chunks(name):
    """Half-masked steps, 7 rows at a time; ModernBERT beyond its window of 16."""
    step, steps = DenoisingStep(random_model(name), 3), []
    with torch.no_grad(), observing(steps.append):
        compiled = torch.compile(step, backend="mosaic", dynamic=True, options={"chunk_rows": 7})
        for length in (50, 23, 64):
            torch.manual_seed(length)
            ids = torch.randint(4, 120, (1, length))
            ids[:, ::2] = 3
            arguments = ids, block_window(length, 0, length), torch.tensor([1 + length // 8])
            assert torch.equal(compiled(*arguments), step(*arguments)), length
            plan = steps[0].plan
            assert all(loop.chunk == 7 for loop in plan.loops)
            assert plan.height <= 1.01 * plan.lower_bound
            assert not [b for b in plan.buffers if b.shape.count(length) > 1], "an N x N buffer"
    assert len(steps) == 1
    assert {f.name for f in steps[0].fallbacks} <= ({"opaque-op"} if name == "olmoe" else set())


def dims(layers, heads, kv_heads, width, feed_forward, vocabulary):
    """A Llama (or, with fewer key/value heads, Qwen2) of published dims on the meta device, with the key/value cache
    that transformers fills by default."""
    import transformers as hf

    config = {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": feed_forward, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "is_causal": False,
        "max_position_embeddings": 1 << 20, "dtype": torch.bfloat16,
    }  # fmt: skip
    with torch.device("meta"):
        if kv_heads == heads:
            return hf.LlamaForCausalLM(hf.LlamaConfig(**config)).to(torch.bfloat16).eval()
        return hf.Qwen2ForCausalLM(hf.Qwen2Config(**config)).to(torch.bfloat16).eval()


FULL_SIZE = {
    "LLaDA-8B": ((32, 32, 4096, 12288, 126464), 24_576, 1.03),
    "Dream-7B": ((28, 4, 3584, 18944, 152064), 9_216, 1.05),
}


@pytest.mark.parametrize("layers", [2, pytest.param(32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_dims_need_x_k_and_v_per_token(monkeypatch, name, layers):
    """Without weights: 1,024-row chunks, half of the rows masked; also the time of planning.  (CPUs that multiply in
    tiles pack keys and values once more.)"""
    import time

    from mosaic_compiler.ahead.forecast import capture_step

    monkeypatch.setattr("mosaic_compiler.book.scratch.has_tiles", lambda: False)
    (heads, kv_heads, width, feed_forward, vocabulary), per_token, slack = FULL_SIZE[name]
    model = dims(layers, heads, kv_heads, width, feed_forward, vocabulary)
    ids, window = torch.zeros(1, 64, dtype=torch.long, device="meta"), torch.ones(1, 64, dtype=bool, device="meta")
    example = (ids, window, torch.tensor([8], device="meta"))
    step = capture_step(DenoisingStep(model, 3), example, {"chunk_rows": 1024})
    assert next(model.parameters()).is_meta
    for tokens in (65_536, 262_144):
        plan = step.outline.plan_for(tokens, 0.5).plan
        assert plan.peak <= per_token * tokens * slack + (1 << 30)
        assert plan.height <= 1.01 * plan.lower_bound
        largest = max(plan.of_kind("arena"), key=lambda b: b.nbytes if b.shape.count(tokens) else 0)
        assert largest.nbytes == tokens * width * 2  # x: no N x FF, no N x vocabulary, no N x N
        wide = [b for b in plan.buffers if tokens in b.shape and b.nbytes > tokens * 64]
        assert all(
            b.nbytes <= max(tokens * kv_heads * 128 * 2, tokens * width * 2 * (b is largest)) or b.shape[-1] == width
            for b in wide
        )
    budget = (per_token * 262_144) + (3 << 30)
    step.planner.chunk_rows = None
    times = []
    for tokens in (131_072, 196_608, 262_144):
        started = time.perf_counter()
        plan = step.planner.plan(step.outline.sizes_for(tokens, 0.5), budget).plan
        times.append(time.perf_counter() - started)
        assert plan.workspace <= budget
    assert min(times) <= 0.1, times
    print(f"{name}, {layers} layers: search and plan {min(times) * 1e3:.1f} ms")


@pytest.mark.slow
def test_max_tokens_and_explain_plan_without_running(tiny_llada, monkeypatch, tmp_path):
    monkeypatch.setenv("MOSAIC_CACHE", str(tmp_path))  # traced once
    step = DenoisingStep(tiny_llada, 3)
    ids = torch.full((1, 64), 3)
    example = (ids, block_window(64, 0, 64), torch.tensor([8]))
    longest = mosaic_compiler.max_tokens(step, example, "64MiB", row_share=0.5)
    assert 3072 * longest <= 64 << 20  # x + K + V in float32
    assert longest >= 0.75 * (64 << 20) / 3072
    report = mosaic_compiler.explain(step, *example, tokens=longest, row_share=0.5, memory_budget="64MiB")
    assert report.plan.workspace <= 64 << 20
    assert report.result is None
    assert "chunk loops" in str(report)
    assert any("would exceed the budget" in loop.reason for loop in report.plan.loops)
    with pytest.raises(mosaic_compiler.BudgetError, match="would fit"):
        mosaic_compiler.explain(step, *example, tokens=2 * longest, row_share=0.5, memory_budget="64MiB")


@pytest.mark.slow
def test_the_plan_ahead_is_the_plan_of_the_real_step(tiny_llada):
    step, steps = DenoisingStep(tiny_llada, 3), []
    ids = torch.full((1, 640), 5)
    ids[:, ::2] = 3
    example = (ids, block_window(640, 0, 640), torch.tensor([8]))
    ahead = mosaic_compiler.explain(step, *example, tokens=640, row_share=0.5, memory_budget="5MiB").plan
    with torch.no_grad(), observing(steps.append):
        torch.compile(step, backend="mosaic", dynamic=True, options={"memory_budget": "5MiB"})(*example)
    assert (ahead.peak, ahead.height, ahead.workspace) == tuple(
        getattr(steps[0].plan, key) for key in ("peak", "height", "workspace")
    )


def test_grouped_query_heads_are_not_repeated():
    """Qwen2 has 4 query and 2 key/value heads: no buffer holds keys repeated to 4 heads."""
    step = DenoisingStep(random_model("qwen2"), 3)
    ids = torch.randint(4, 120, (1, 33))
    report = mosaic_compiler.explain(step, ids, block_window(33, 0, 33), torch.tensor([1]))
    assert not [b for b in report.plan.buffers if b.op == "aten.clone.default"]


def test_an_all_true_attention_mask_is_dropped():
    model = random_model("llama")

    def step(ids):
        mask = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
        return model(ids, attention_mask=mask[:, None, None, :].expand(-1, -1, ids.shape[1], -1)).logits.argmax(-1)

    ids = torch.randint(4, 120, (2, 21))
    report = mosaic_compiler.explain(step, ids)
    with torch.no_grad():
        assert torch.equal(report.result, step(ids))
    assert not [b for b in report.plan.buffers if b.shape[-2:] == (21, 21)]


def test_graph_breaks_share_one_arena(tiny_llada, genesis):
    layers = tiny_llada.model.layers

    def broken(x):
        x = layers[0].mlp(x)
        torch._dynamo.graph_break()
        return layers[1].mlp(x)

    steps = []
    x = torch.randn(1, 40, 256)
    with torch.no_grad(), observing(steps.append):
        got = torch.compile(broken, backend="mosaic", dynamic=True)(x)
        assert torch.equal(got, broken(x))
    assert len(steps) == 2
    assert steps[0]._pool is steps[1]._pool
    used = {key[0] for step in steps for key in step._programs}
    assert len(used) == 1


@pytest.mark.slow
def test_thirty_two_layers_are_searched_and_planned_at_the_bound_within_50_ms():
    """For random lengths, shares of masked rows and budgets between the least and the most that a step can use."""
    import random
    import statistics
    import time

    from mosaic_compiler.ahead.forecast import capture_step

    model = DenoisingStep(dims(32, 32, 32, 4096, 12288, 126464), 3)
    ids, window = torch.zeros(1, 64, dtype=torch.long, device="meta"), torch.ones(1, 64, dtype=bool, device="meta")
    step = capture_step(model, (ids, window, torch.tensor([8], device="meta")), {})
    planner = step.planner
    chance, times = random.Random(0), []
    for _ in range(40):
        sizes = step.outline.sizes_for(chance.randrange(2_000, 300_000), chance.random())
        evaluation = planner.model.at(sizes)
        low, high = evaluation.peak(evaluation.smallest()), evaluation.peak(evaluation.rows)
        started = time.perf_counter()
        plan = planner.plan(sizes, chance.randrange(low + low // 300, high)).plan
        times.append(time.perf_counter() - started)
        assert plan.height <= 1.01 * plan.lower_bound
    assert statistics.median(times) <= 0.05, times


def test_random_plans_are_at_the_bound():
    """Random lengths, shares of masked rows, budgets and chunk sizes of four models, each length planned afresh."""
    import random
    from dataclasses import replace

    from mosaic_compiler.ahead.forecast import capture_step

    ids, window = torch.zeros(1, 64, dtype=torch.long), torch.ones(1, 64, dtype=torch.bool)
    chance, ratios = random.Random(0), []
    for kind in ("olmoe", "bert", "llama", "qwen2")[: examples(1, 4)]:
        step = DenoisingStep(random_model(kind), 3)
        outline = capture_step(step, (ids, window, torch.tensor([8])), {}).outline
        for number in range(examples(40, 130)):
            fresh = replace(outline, chunk_rows=chance.randrange(1, 3000) if number % 3 == 0 else None)
            sizes = fresh.sizes_for(chance.randrange(64, 200_000), chance.random())
            evaluation = fresh.planner.model.at(sizes)
            low, high = evaluation.peak(evaluation.smallest()), evaluation.peak(evaluation.rows)
            budget = chance.randrange(low + low // 200, max(high, low + low // 100))
            plan = fresh.choose(sizes, None if fresh.chunk_rows is not None else budget)[1].plan
            ratios.append(plan.height / plan.lower_bound)
    assert max(ratios) <= 1.005
    assert sum(ratio == 1 for ratio in ratios) >= 0.99 * len(ratios), sorted(ratios)[-8:]


@pytest.mark.skipif(
    importlib.metadata.files("mosaic-compiler") is None,
    reason="the package is on the path and not installed",
)
def test_backend_is_found_by_name_in_a_fresh_process():
    """After installation nothing has to be imported, and transformers is not imported."""
    import subprocess
    import sys

    code = (
        "import torch, sys\n"
        "f = torch.compile(lambda x: (x @ x.t()).relu().sum(-1), backend='mosaic', dynamic=True)\n"
        "x = torch.randn(6, 4)\n"
        "assert torch.equal(f(x), (x @ x.t()).relu().sum(-1))\n"
        "import mosaic_compiler\n"
        "assert 'transformers' not in sys.modules\n"
        "assert 'mosaic' in torch._dynamo.list_backends()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_one_partial_backend_call_reaches_the_options():
    compiled = torch.compile(lambda x: x + 1, backend=lambda gm, inputs: mosaic(gm, inputs, options={"strict": True}))
    assert torch.equal(compiled(torch.zeros(3)), torch.ones(3))


@pytest.mark.parametrize("kind", [LLaDALike, DreamLike])
def test_steps_of_remote_code_are_one_graph(kind, monkeypatch):
    """Nothing between the token ids and the sampler breaks the graph, so the head runs on the masked rows."""
    monkeypatch.setattr(remote_models, "print", lambda *words: None, raising=False)
    if kind is LLaDALike:  # logs in any case
        monkeypatch.setattr(remote_models, "log", types.SimpleNamespace(info=lambda *w: None, warning=lambda *w: None))
    model = kind()
    compiled = torch.compile(
        DenoisingStep(model, 5), backend="mosaic", dynamic=True, fullgraph=True, options={"disable": ("fuse",)}
    )
    steps = []
    with torch.no_grad(), observing(steps.append):
        for n in (12, 33):
            ids = torch.randint(8, VOCABULARY, (1, n))
            ids[:, n // 2 :] = 5
            given = ids, block_window(n, 0, n), torch.tensor([3])
            assert torch.equal(compiled(*given), DenoisingStep(model, 5)(*given))
    assert {decision.rows for step in steps for decision in step.module.meta["row_decisions"]} == {"M"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "per_token"), [("LLaDA2.0-mini", 6144), ("LLaDA-MoE-7B-A1B", 12288)])
def test_mixtures_take_their_rows_keys_and_values_and_little_else(name, per_token, tmp_path):
    """x, K and V of one layer in bfloat16, whatever the experts are: 262,144 tokens on the meta device."""
    tokens = 262_144
    bar = int(per_token * tokens * 1.05 + 1.5 * 2**30)
    found = answer(traced(load_config(name), device="cpu", cache=tmp_path), tokens, bar)
    assert found.plan is not None, found.problem
    assert found.plan.workspace <= bar
