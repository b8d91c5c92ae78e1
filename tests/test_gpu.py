"""On a CUDA device: results, the arena's life, budgets, running out of memory, streams and several models."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from attentions import Attentions

import mosaic_compiler
from mosaic_compiler.backend import observing
from mosaic_compiler.errors import BudgetError
from mosaic_compiler.planning.flash import split_bytes
from mosaic_compiler.runtime.cuda_arena import CudaArena
from mosaic_compiler.runtime.cuda_driver import virtual_memory_problem
from mosaic_compiler.runtime.pools import pool_for
from mosaic_compiler.sampling import DenoisingStep, block_window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.fuse,
    pytest.mark.usefixtures("fresh_gpu"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MiB = 1 << 20
ATTENTION = torch.ops.aten._scaled_dot_product_cudnn_attention.default


def cuda():
    return torch.device("cuda", torch.cuda.current_device())


def model(dtype=torch.float32, kv_heads=4, seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, is_causal=False, max_position_embeddings=1 << 17,
    )  # fmt: skip
    return DenoisingStep(LlamaForCausalLM(config).to("cuda", dtype).eval().requires_grad_(False), 3)


def arguments(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 1000, (1, tokens), generator=generator)
    ids[:, ::2] = 3
    return ids.cuda(), block_window(tokens, 0, tokens, "cuda"), torch.tensor([tokens // 8], device="cuda")


def compiled(step, **options):
    return torch.compile(step, backend="mosaic", dynamic=True, fullgraph=True, options=options)


def device_bytes():
    """What this process holds of the device, whoever allocated it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_float32_token_ids_are_equal(kv_heads):
    step, steps = model(kv_heads=kv_heads), []
    with torch.no_grad(), observing(steps.append):
        fast = compiled(step, strict=True)
        for tokens in (4096, 100, 7, 1025, 4096):
            assert torch.equal(fast(*arguments(tokens)), step(*arguments(tokens)))
    assert len(steps) == 1
    assert steps[0].fallbacks == ()


def test_bfloat16_logits_are_as_close_to_float64_as_eager():
    step = model(torch.bfloat16, kv_heads=2)
    exact = model(torch.float64, kv_heads=2).model
    exact.load_state_dict({k: v.double() for k, v in step.model.state_dict().items()})
    ids = arguments(1024)[0]

    def logits(ids):
        return step.model(ids).logits

    with torch.no_grad():
        truth = exact(ids).logits
        errors = [((f(ids).double() - truth).norm() / truth.norm()).item() for f in (logits, compiled(logits))]
    assert errors[1] <= 1.1 * errors[0] < 0.1


def test_chunks_inside_a_budget_and_the_measured_peak():
    step, steps = model(torch.bfloat16), []
    tokens, pool = 16384, pool_for(cuda())
    with torch.no_grad(), observing(steps.append):
        compiled(step)(*arguments(tokens))
        unchunked = steps[0].plan.workspace
        mosaic_compiler.release_memory()
        fast = compiled(DenoisingStep(step.model, 3), memory_budget=unchunked // 2)
        given = arguments(tokens)
        fast(*given)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fast(*given)
        torch.cuda.synchronize()
        measured = torch.cuda.max_memory_allocated() - before + pool.reserved()
    plan = steps[1].plan
    assert any(loop.chunk < loop.rows for loop in plan.loops)
    assert plan.workspace <= unchunked // 2
    assert measured <= plan.peak
    assert plan.peak - measured <= 0.02 * plan.peak + 2 * MiB


@pytest.mark.parametrize("wide", [False, True])
def test_the_first_step_stays_within_its_plan(monkeypatch, wide):
    """Kernels choose their launch parameters before; Inductor's copy destinations for that."""
    from mosaic_compiler.kernels import fused
    from mosaic_compiler.runtime.program import Program

    monkeypatch.setattr(fused, "_kernels", {})
    if wide:
        monkeypatch.setattr(fused, "_WIDE", 1000)
    fused.kernel_for.cache_clear()
    run, peaks = Program.run, []

    def measured(self, inputs):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run(self, inputs)
        torch.cuda.synchronize()
        peaks.append((torch.cuda.max_memory_allocated() - before, max(self.plan.outside)))
        return result

    monkeypatch.setattr(Program, "run", measured)
    step = model(torch.bfloat16)
    uncached = torch._inductor.config.patch(force_disable_caches=True)  # what was chosen before is not known
    with torch.no_grad(), uncached:
        step(*arguments(100))  # cuBLAS takes its workspace
        fast = compiled(step, strict=True)
        for tokens in (20_000, 300):
            fast(*arguments(tokens))
    assert len(peaks) == 2
    assert all(peak <= planned for peak, planned in peaks), peaks
    fused.kernel_for.cache_clear()


def test_poison_finds_nothing():
    step = model()
    with torch.no_grad():
        for options in ({}, {"chunk_rows": 300}):
            fast = compiled(DenoisingStep(step.model, 3), poison=True, **options)
            assert torch.equal(fast(*arguments(1000)), step(*arguments(1000)))


def test_the_arena_maps_the_plan_and_gives_it_back():
    assert virtual_memory_problem(cuda()) is None
    step, steps = model(torch.bfloat16), []
    with torch.no_grad(), observing(steps.append):
        fast = compiled(step)
        fast(*arguments(4096))
        start = device_bytes()
        fast(*arguments(32768))
        high = device_bytes()
        arena = next(a for a in pool_for(cuda())._arenas if a.reserved)
        assert isinstance(arena, CudaArena)
        assert 0 <= arena.mapped - steps[0].plan.height < 2 * MiB
        assert abs((high - start) - (arena.mapped - 2 * MiB * (arena.mapped > 2 * MiB))) < 64 * MiB
        result = fast(*arguments(4096))
        assert device_bytes() <= start + 2 * MiB
        assert torch.equal(result, fast(*arguments(4096)))
    del fast, step
    steps.clear()
    torch._dynamo.reset()
    import gc

    gc.collect()
    assert arena.mapped == 0


def test_under_inference_mode_and_beside_eager_work():
    step = model()
    with torch.inference_mode():
        fast = compiled(step)
        for seed in range(3):
            noise = torch.randn(1000, 1000, device="cuda") @ torch.randn(1000, 1000, device="cuda")
            assert torch.equal(fast(*arguments(513, seed)), step(*arguments(513, seed)))
            assert noise.isfinite().all()


def test_a_full_device_is_refused_and_the_next_call_works():
    """Another tensor holds nearly everything: BudgetError before anything runs; when it is gone, all is well."""
    step = model(torch.bfloat16)
    with torch.no_grad():
        fast = compiled(step, memory_budget="2GiB")
        expected = fast(*arguments(1024))
        mosaic_compiler.release_memory()
        torch.cuda.empty_cache()
        before = device_bytes()
        hog = torch.empty(torch.cuda.mem_get_info()[0] - 60 * MiB, dtype=torch.uint8, device="cuda")
        with pytest.raises(BudgetError, match="the device has"):
            fast(*arguments(65536))
        del hog
        assert device_bytes() <= before + 4 * MiB
        assert torch.equal(fast(*arguments(1024)), expected)
        assert fast(*arguments(65536)).shape == (1, 65536)


def test_what_pytorch_caches_is_asked_for():
    step = model(torch.bfloat16)
    with torch.no_grad():
        fast = compiled(step, memory_budget="2GiB")
        fast(*arguments(1024))
        mosaic_compiler.release_memory()
        cached = torch.empty(torch.cuda.mem_get_info()[0] - 300 * MiB, dtype=torch.uint8, device="cuda")
        del cached  # stays in PyTorch's cache
        assert fast(*arguments(65536)).shape == (1, 65536)


def test_an_out_of_memory_elsewhere_leaves_the_step_usable():
    step = model()
    with torch.no_grad():
        fast = compiled(step)
        expected = step(*arguments(2048))
        assert torch.equal(fast(*arguments(2048)), expected)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        assert torch.equal(fast(*arguments(2048)), expected)


def test_two_streams_have_arenas_of_their_own():
    step = model()
    results, errors = {}, []
    with torch.no_grad():
        fast = compiled(step)
        expected = {seed: step(*arguments(3000, seed)) for seed in range(2)}
        fast(*arguments(3000))
        torch.cuda.synchronize()

        def work(seed):
            try:
                stream = torch.cuda.Stream()
                with torch.no_grad(), torch.cuda.stream(stream):
                    given = arguments(3000, seed)
                    results[seed] = [fast(*given) for _ in range(10)]
                    results[seed, "pool"] = pool_for(cuda())
                stream.synchronize()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert not errors
    assert results[0, "pool"] is not results[1, "pool"]
    for seed in range(2):
        assert all(torch.equal(result, expected[seed]) for result in results[seed])


def test_two_models_share_the_arena():
    first, second = model(seed=0), model(seed=1)
    with torch.no_grad():
        fast, other = compiled(first), compiled(second)
        for tokens in (500, 2000):
            given = arguments(tokens)
            assert torch.equal(fast(*given), first(*given))
            assert torch.equal(other(*given), second(*given))
    assert sum(isinstance(a, CudaArena) for a in pool_for(cuda())._arenas) == 1


def test_every_gpu_gets_its_own_arena():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    step = model()
    other = DenoisingStep(model().model.to("cuda:1"), 3)
    given = arguments(1000)
    with torch.no_grad():
        expected = step(*given)
        assert torch.equal(compiled(step)(*given), expected)
        moved = compiled(other)(*(t.to("cuda:1") for t in given))
    assert torch.equal(moved.to("cuda:0"), expected)
    assert pool_for(torch.device("cuda", 0)) is not pool_for(torch.device("cuda", 1))


@pytest.mark.parametrize("rows", ["masked", "before_masked"])
def test_logits_of_needed_rows_and_shared_zeros(rows):
    """Drop-in mode: needed rows are eager's, the others zeros without memory; nothing is left when they are gone."""
    step, (ids, *_) = model(), arguments(6000)
    ids[:, :] = 7
    ids[:, 3000:3100] = 3
    lm = step.model
    lm.config.use_cache = False
    lm.lm_head = torch.nn.Linear(256, 30_000, bias=False).cuda().requires_grad_(False)  # 687 MiB of logits
    made = torch.compile(lm, backend="mosaic", dynamic=True, options={"needed_rows": rows, "mask_token_id": 3})
    with torch.no_grad():
        expected = lm(ids).logits
        needed = torch.zeros(6000, dtype=torch.bool, device="cuda")
        needed[3000 - (rows == "before_masked") : 3100 - (rows == "before_masked")] = True
        for _ in range(3):
            logits = made(ids).logits
            assert logits.stride() == expected.stride()
            torch.testing.assert_close(logits[0, needed], expected[0, needed], rtol=1e-4, atol=1e-4)
            assert not logits[0, ~needed].any()
            logits[:, :, 5] = -torch.inf  # as LLaDA's loop does; unneeded rows are anybody's afterwards
        del logits
        mosaic_compiler.release_memory()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        before = device_bytes()
        with observing(steps := []):
            logits = made(ids).logits
        mosaic_compiler.release_memory()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        taken = device_bytes() - before
        assert 100 * 30_000 * 4 <= taken < 64 * MiB, taken
        del logits
        torch.cuda.synchronize()
        assert device_bytes() - before < 4 * MiB
        assert not steps


def test_needed_rows_are_attended_without_a_plan_and_within_the_memory_plan():
    """The last layer's attention has another number of queries in each step."""
    step, steps, tokens = model(torch.bfloat16, kv_heads=2), [], 4096
    ids, window, count = arguments(tokens)
    ids[:] = 7
    with torch.no_grad(), observing(steps.append):
        fast = compiled(step)
        for masked in (512, 1, 3, 32, 33, 64, 100, 257, 2048):
            ids[:, :masked] = 3
            fast(ids, window, count)  # binds
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                result = fast(ids, window, count)
                torch.cuda.synchronize()
            assert torch.cuda.max_memory_allocated() - before <= max(steps[0].plan.outside)
            kernels = " ".join(event.name for event in profile.events())
            assert "flash_fwd" in kernels or "attention_kernel" in kernels  # the latter where queries are few
            assert (result != step(ids, window, count)).sum() <= 0.02 * masked + 2
            ids[:] = 7
    assert len(steps) == 1


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cudnn_plans_for_a_new_length_while_the_step_is_planned(monkeypatch, kv_heads):
    """The first attention is called once before the step, in the same thread and with the same layouts."""
    step, attentions = model(torch.bfloat16, kv_heads), Attentions(ATTENTION, monkeypatch)
    with torch.no_grad():
        fast = compiled(step, strict=True)
        for tokens, extra in ((4096, 0), (2000, 1), (4096, 0), (3001, 1), (2000, 0), (3001, 0)):
            given = arguments(tokens)
            attentions.seen.clear()
            result = fast(*given)
            assert len(attentions.seen) == 1 + extra  # of two layers; the second attends needed rows
            assert all(one == attentions.seen[0] for one in attentions.seen)
            assert torch.equal(result, fast(*given))
            expected = step(*given)
            both = (result != 3) & (expected != 3)  # which are committed depends on how confidences are rounded
            assert both.sum() > tokens // 2
            assert (result != expected)[both].sum() <= 0.01 * tokens


@pytest.mark.parametrize("depth", [64, 128])
def test_flash_attention_allocates_what_is_expected(depth):
    """Its float32 results of parts of the keys, besides what it returns."""
    for heads, rows, keys in (
        (4, 1, 4096),
        (4, 32, 9000),
        (28, 32, 4096),
        (32, 65, 60_000),
        (8, 2048, 4096),
        (7, 300, 900),
    ):
        query, key = (torch.randn(1, heads, n, depth, device="cuda", dtype=torch.bfloat16) for n in (rows, keys))
        call = torch.ops.aten._scaled_dot_product_flash_attention
        call(query, key, key)
        torch.cuda.synchronize()
        before = requested()["current"]
        torch.cuda.reset_peak_memory_stats()
        results = call(query, key, key)
        kept, most = requested()["current"] - before, requested()["peak"] - before
        processors = torch.cuda.get_device_properties(cuda()).multi_processor_count
        assert most - kept <= split_bytes(heads, rows, keys, depth, processors) + 4096
        del results


def requested():
    """Bytes that tensors asked for.  (What PyTorch counts as allocated are its blocks, which may be larger.)"""
    return torch.cuda.memory_stats_as_nested_dict()["requested_bytes"]["all"]


BENCHMARKS = {
    "steps": ("step_latency", "falling_rows", "breakdown", "compile_time", "peak", "par", "row_demand", "accuracy"),
    "uses": ("generate", "drop_in", "max_tokens", "gather_logits"),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("which", BENCHMARKS)
def test_benchmarks_run(tmp_path, which):
    """Of a toy, in one command, as ``make bench-gpu`` runs them."""
    root = Path(__file__).parents[1]
    lengths = ["--lengths", "256", "512", "--prompts", "600", "--new", "64", "--cases", "200", "56", "--cards", "1"]
    command = [sys.executable, "-m", "benchmarks.gpu", "--models", "toy-gqa", "--repeats", "1", *lengths]
    command += ["--only", *BENCHMARKS[which], "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {path.stem: json.loads(path.read_text())["rows"] for path in tmp_path.glob("*.json")}
    assert results.keys() == set(BENCHMARKS[which])
    known = {path.stem for path in (root / "benchmarks/gpu").glob("[!_]*.py")} - {"benchmark", "models"}
    assert known == {*BENCHMARKS["steps"], *BENCHMARKS["uses"]}
    assert all(results.values())
    assert all("error" not in row for name in ("generate", "drop_in") for row in results.get(name, ()))
    if which == "uses":
        longest = {row["system"]: row["tokens"] for row in results["max_tokens"]}
        assert longest["mosaic"] > longest["eager"] > 0
    else:
        planned = [row for row in results["peak"] if row["planned"] > 64 * MiB]
        assert all(0.98 <= row["measured"] / row["planned"] <= 1 for row in planned)
