"""Long prompts on a 24 GiB card: state in fewer bits, and chosen keys.  Four blocks of 32 tokens, one token a step.

A card is emulated: the process may use its size less what CUDA itself takes, with all weights resident.  The first call
of a kind is for compilation, on a short prompt.  The seconds are those of a call without a callback; what single steps
take, and the bytes, are of the last block, in a call of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import mosaic_compiler
from benchmarks.common import show, write
from benchmarks.gpu.max_tokens import RESERVE
from benchmarks.gpu.models import GIB, MASK, MODELS, build, clean, device, timed_generation
from mosaic_compiler.runtime.pools import pool_for

BLOCK = 32
CASES: dict[str, tuple[int, dict[str, Any]]] = {  # the last one on the whole card
    "5 %, chosen again in each block": (60_000, {"cache": "select", "cache_keep": 0.05}),
    "int4, never refreshed": (40_000, {"cache": "dual", "cache_dtype": "int4", "cache_refresh": "never"}),
    "5 % in int4, chosen again in each block": (60_000, {"cache": "select", "cache_keep": 0.05, "cache_dtype": "int4"}),
    "int4, 5 % read, never refreshed": (
        40_000,
        {"cache": "select", "cache_keep": 0.05, "cache_dtype": "int4", "cache_refresh": "never", "cache_evict": False},
    ),
    "int4 on the whole card": (60_000, {"cache": "dual", "cache_dtype": "int4", "cache_refresh": "never"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--model", default="LLaDA-8B", choices=MODELS)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--prompts", type=int, nargs="*", default=[], help="other lengths, one for each case")
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)))
    given = parser.parse_args()
    model = build(given.model, given.layers).model
    limit = 24 * GIB - RESERVE
    total = torch.cuda.get_device_properties(0).total_memory
    clean()
    weights = torch.cuda.memory_allocated()
    budget = limit - weights - (256 << 20)
    found: dict[str, Any] = {"model": given.model, "weights": weights, "budget": budget, "runs": []}
    for number, name in enumerate(CASES):
        if number not in given.cases:
            continue
        prompt, options = CASES[name]
        has_all = number == len(CASES) - 1
        torch.cuda.set_per_process_memory_fraction(1.0 if has_all else limit / total)
        prompt = given.prompts[number] if number < len(given.prompts) else prompt
        run = {
            "case": name,
            "prompt": prompt,
            **options,
            **_measured(model, given.model, prompt, options, None if has_all else budget),
        }
        found["runs"].append(run)
        print(run, flush=True)
        write("kept_24gib", found, given.out)
    columns = ["case", "prompt", "seconds", "median_step_ms", "planned", "measured"]
    show("generate", columns, [[run[column] for column in columns] for run in found["runs"]])


def _measured(model: Any, name: str, prompt: int, options: dict[str, Any], budget: int | None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(MASK + 1, MODELS[name].vocabulary, (1, prompt + 3 * BLOCK), generator=generator).to(device())
    started = time.perf_counter()
    _generate(model, ids[:, : 4096 - 4 * BLOCK], options, budget)
    compiled = time.perf_counter() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    whole = _generate(model, ids[:, :prompt], options, budget)
    seconds = time.perf_counter() - started
    pool = pool_for(device())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    reserved: list[int] = []
    given = {**_given(options, budget), "gen_length": BLOCK, "steps": BLOCK}
    result, times = timed_generation(model, ids, lambda: reserved.append(pool.reserved()), **given)
    measured = torch.cuda.max_memory_allocated() - before + max(reserved) + result.state_bytes
    return {
        "compile_s": compiled,
        "seconds": seconds,
        "steps": whole.steps_by_kind,
        "fallbacks": [f"{fallback.name}: {fallback.reason}" for fallback in result.fallbacks],
        "first_ms": times[0],
        "median_step_ms": statistics.median(times[1:]),
        "state": result.state_bytes,
        "planned": result.plan.peak,
        "measured": measured,
    }


def _given(options: dict[str, Any], budget: int | None) -> dict[str, Any]:
    """Arguments of ``generate()``."""
    new = 4 * BLOCK
    return {
        "gen_length": new, "steps": new, "block_length": BLOCK, "bidirectional": True, "memory_budget": budget,
        "mask_token_id": MASK, **options,
    }  # fmt: skip


def _generate(model: Any, ids: torch.Tensor, options: dict[str, Any], budget: int | None) -> Any:
    result = mosaic_compiler.generate(model, ids, **_given(options, budget))
    torch.cuda.synchronize()
    return result


if __name__ == "__main__":
    main()
