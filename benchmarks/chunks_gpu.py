"""Chunk loops on a GPU: one step of LLaDA-8B dims and of Dream-7B dims, eager against mosaic, without a budget and
within one, and the longest sequence whose plan fits a 24 GiB card, run.

make bench-gpu
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

import benchmarks.common as common
from mosaic_compiler.backend import mosaic, observing
from mosaic_compiler.report.forecast import sizes_for
from mosaic_compiler.runtime.arena import pool_for
from mosaic_compiler.sampling import DenoisingStep, block_window

MASK = 100
DIMS = {
    "LLaDA-8B": {"heads": 32, "kv": 32, "width": 4096, "ff": 12288, "vocabulary": 126464, "layers": 32, "gib": 14.93},
    "Dream-7B": {"heads": 28, "kv": 4, "width": 3584, "ff": 18944, "vocabulary": 152064, "layers": 28, "gib": 14.19},
}
"""``gib``: all weights of the real model in bf16, GiB."""


def build(name: str, layers: int) -> DenoisingStep:
    """A model of these dims with random bf16 weights on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    dims = DIMS[name]
    settings: dict[str, Any] = {
        "vocab_size": dims["vocabulary"], "hidden_size": dims["width"], "intermediate_size": dims["ff"],
        "num_hidden_layers": layers, "num_attention_heads": dims["heads"], "num_key_value_heads": dims["kv"],
        "is_causal": False, "use_cache": False, "max_position_embeddings": 1 << 21,
    }  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        if dims["heads"] == dims["kv"]:
            model = LlamaForCausalLM(LlamaConfig(**settings))
        else:
            model = Qwen2ForCausalLM(Qwen2Config(**settings))
    torch.set_default_dtype(torch.float32)
    return DenoisingStep(model.eval().requires_grad_(False), MASK)


def arguments(vocabulary: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randint(101, vocabulary, (1, tokens), device="cuda")
    ids[:, ::2] = MASK
    return ids, block_window(tokens, 0, tokens, "cuda"), torch.tensor([tokens // 8], device="cuda")


def compiled(step: DenoisingStep, steps: list[Any], options: dict[str, Any]) -> Any:
    def backend(module: Any, inputs: Any) -> Any:
        return mosaic(module, inputs, options=options)

    torch._dynamo.reset()
    return torch.compile(step, backend=backend, dynamic=True, fullgraph=True)


def timed(function: Any, given: Any, repeats: int) -> tuple[list[float], int, torch.Tensor]:
    """Milliseconds, peak bytes above the start, result."""
    result = function(*given)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    pool = pool_for(torch.device("cuda", 0))
    before = torch.cuda.memory_allocated() - pool.reserved()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = function(*given)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    return times, torch.cuda.max_memory_allocated() - before, result


def case(name: str, layers: int, tokens: int, repeats: int) -> dict[str, Any]:
    """One model at one length: eager, mosaic unchunked, mosaic within 3 GiB."""
    step = build(name, layers)
    given = arguments(DIMS[name]["vocabulary"], tokens)
    found: dict[str, Any] = {"model": name, "layers": layers, "tokens": tokens}
    with torch.no_grad():
        times, peak, expected = timed(step, given, repeats)
        found["eager"] = {"ms": times, "peak": peak}
        for label, options in (("mosaic", {}), ("mosaic, 3 GiB", {"memory_budget": "3GiB"})):
            torch.cuda.empty_cache()
            steps: list[Any] = []
            with observing(steps.append):
                fast = compiled(step, steps, options)
                started = time.perf_counter()
                fast(*given)
                torch.cuda.synchronize()
                cold = time.perf_counter() - started
            times, peak, result = timed(fast, given, repeats)
            plan = steps[0].plan
            found[label] = {
                "ms": times, "peak": peak, "planned": plan.peak, "cold_s": cold,
                "chunks": sorted({(loop.rows, loop.chunk) for loop in plan.loops}),
                "differing": int((result != expected).sum()), "committed": tokens // 8,
                "height_over_bound": plan.height / plan.lower_bound,
            }  # fmt: skip
            pool_for(torch.device("cuda", 0)).release()
    return found


def longest(name: str, layers: int, card_gib: float) -> dict[str, Any]:
    """The longest sequence that the plan allows beside all weights on a card, executed with a few layers."""
    step = build(name, layers)
    budget = int((card_gib - DIMS[name]["gib"]) * 2**30) - (600 << 20)
    steps: list[Any] = []
    with torch.no_grad(), observing(steps.append):
        fast = compiled(step, steps, {"memory_budget": budget})
        fast(*arguments(DIMS[name]["vocabulary"], 256))
        tokens = steps[0].planner.longest(sizes_for(steps[0], 1 << 16, 0.5), budget)
        tokens = tokens * 98 // 100 // 1024 * 1024
        pool_for(torch.device("cuda", 0)).release()
        torch.cuda.empty_cache()
        given = arguments(DIMS[name]["vocabulary"], tokens)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        fast(*given)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() - before
        plan = steps[0].plan
    return {
        "model": name, "card_gib": card_gib, "budget": budget, "tokens": tokens, "peak": peak, "planned": plan.peak,
        "seconds_with_planning": seconds, "layers": layers,
        "chunks": sorted({(loop.rows, loop.chunk) for loop in plan.loops}),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 16384, 32768])
    given = parser.parse_args()
    results: dict[str, Any] = {"machine": common.machine(), "steps": [], "longest": []}
    path = Path(os.environ.get("OUT", common.RESULTS)) / "chunks_h100.json"
    for name in DIMS:
        for tokens in given.lengths:
            found = case(name, given.layers, tokens, given.repeats)
            results["steps"].append(found)
            print(json.dumps(found), flush=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
            torch.cuda.empty_cache()
        found = longest(name, 2, 24.0)
        results["longest"].append(found)
        print(json.dumps(found), flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
