"""Whole models: token ids equal to eager bit for bit, one compile for all lengths."""

from __future__ import annotations

import functools

import pytest
import torch

import mosaic_compiler
from mosaic_compiler.backend import mosaic, observing
from mosaic_compiler.report.measure import _cpu_peak
from mosaic_compiler.runtime.arena import pool_for
from mosaic_compiler.sampling import DenoisingStep, block_window


def half_masked(ids: torch.Tensor, length: int, mask_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A step's arguments: every second token of the passage masked, commit a quarter of them."""
    ids = ids[:, :length].repeat(1, -(-length // ids.shape[1]))[:, :length].clone()
    ids[:, ::2] = mask_id
    return ids, block_window(length, 0, length), torch.tensor([max(length // 8, 1)])


def test_tiny_llada_at_six_lengths_with_one_compile(tiny_llada, genesis):
    """Equal ids, height at the bound; at 8192 also the planned peak against the measured one."""
    step, steps = DenoisingStep(tiny_llada, 3), []
    long_ids = torch.cat((genesis, genesis), 1)
    torch.set_num_threads(2)
    with torch.no_grad(), observing(steps.append):
        compiled = torch.compile(step, backend="mosaic", dynamic=True, fullgraph=True)
        for length in (64, 7, 2, 513, 2048, 8192):
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
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    small = {
        "vocab_size": 120,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    if name == "llama":
        config = LlamaConfig(**small, is_causal=False, use_cache=False)
        return LlamaForCausalLM(config).eval()
    if name == "qwen2":
        config = Qwen2Config(**small, num_key_value_heads=2, is_causal=False, use_cache=False)
        model = Qwen2ForCausalLM(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # biases too
        return model
    return BertForMaskedLM(BertConfig(**small)).eval()


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
@pytest.mark.parametrize("batch", [1, 3])
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
def test_thirty_two_layers_plan_at_the_bound_within_100_ms():
    import time

    from transformers import LlamaConfig, LlamaForCausalLM

    from mosaic_compiler.planning import make_plan

    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=192, num_hidden_layers=32, num_attention_heads=4,
        is_causal=False, use_cache=False,
    )  # fmt: skip
    step, steps = DenoisingStep(LlamaForCausalLM(config).eval(), 3), []
    ids = torch.randint(4, 500, (1, 96))
    with torch.no_grad(), observing(steps.append):
        torch.compile(step, backend="mosaic", dynamic=True)(ids, block_window(96, 0, 96), torch.tensor([4]))
    times = []
    for length in (97, 1000, 100_000):
        sizes = steps[0].sizes([length] * len(steps[0]._readers), [length // 2])
        started = time.perf_counter()
        plan = make_plan(steps[0].lives.at(sizes), steps[0].lives.schedule)
        times.append(time.perf_counter() - started)
        assert plan.height <= 1.01 * plan.lower_bound
    assert min(times) <= 0.1, times


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
