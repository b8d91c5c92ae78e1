"""A block-causal model on a 24 GiB card: exact state, proven, behind a long prompt.

SDAR-8B's dims, all layers, random weights: four blocks of 32 tokens, one token a step.  What runs without a cache is
measured for four steps.  First, on two layers: the ids are those that come out without a cache.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from benchmarks.common import write
from benchmarks.gpu.max_tokens import RESERVE
from benchmarks.gpu.models import GIB, MASK, clean, device, timed_generation
from mosaic_compiler.runtime.pools import pool_for

WIDTH, LAYERS, VOCABULARY, BLOCK = 4096, 36, 151936, 32


def build(layers: int) -> Any:
    """Random weights, bf16."""
    config = hf.Qwen3Config(
        hidden_size=WIDTH, intermediate_size=12288, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=VOCABULARY, is_causal=False, use_cache=False,
        max_position_embeddings=1 << 20,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device():
            return hf.Qwen3ForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def generate(model: Any, ids: torch.Tensor, new: int, cache: str, **more: Any) -> tuple[Any, list[float]]:
    """What came out, and the milliseconds between steps."""
    given = {"gen_length": new, "steps": new, "block_causal": BLOCK, "cache": cache, **more}
    return timed_generation(model, ids, **given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--prompt", type=int, default=40_000)
    parser.add_argument("--layers", type=int, default=LAYERS)
    given = parser.parse_args()
    found: dict[str, Any] = {"prompt": given.prompt, "layers": given.layers, "runs": []}
    small = build(2)
    generator = torch.Generator().manual_seed(0)
    same = 0
    for prompt, new in ((300, 64), (1000, 40), (31, 70), (2049, 33)):
        ids = torch.randint(MASK + 1, VOCABULARY, (1, prompt), generator=generator).to(device())
        kept, plain = (generate(small, ids, new, cache)[0] for cache in ("exact", "none"))
        assert kept.steps_by_kind["reuse"] == new - 1, kept.steps_by_kind
        equal = int((kept.sequences == plain.sequences).sum()) - prompt
        same += equal
        print("two layers", prompt, new, "equal ids", equal, "of", new, flush=True)
    found["equal_ids_of_207"] = same
    del small
    torch._dynamo.reset()
    clean()
    model = build(given.layers)
    limit = 24 * GIB - RESERVE
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    clean()
    ids = torch.randint(MASK + 1, VOCABULARY, (1, given.prompt), generator=generator).to(device())
    budget = limit - torch.cuda.memory_allocated() - (256 << 20)
    found |= {"weights": torch.cuda.memory_allocated(), "budget": budget}
    started = time.perf_counter()
    generate(model, ids[:, : 4096 - BLOCK], BLOCK, "exact", memory_budget=budget)
    found["compile_s"] = time.perf_counter() - started
    print("compiled", found["compile_s"], flush=True)
    for number in range(2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        result, times = generate(model, ids, 4 * BLOCK, "exact", memory_budget=budget)
        seconds = time.perf_counter() - started
        ordered = sorted(times[1:])
        run = {
            "seconds": seconds, "steps": result.steps_by_kind, "state": result.state_bytes, "first_ms": times[0],
            "median_step_ms": ordered[len(ordered) // 2], "slowest_ms": ordered[-4:], "peak": result.plan.peak,
            "is_approximate": result.is_approximate,
            "mapped": max((getattr(a, "mapped", 0) for a in pool_for(device())._arenas), default=0),
            "in_use": torch.cuda.max_memory_allocated(),
        }  # fmt: skip
        found["runs"].append(run)
        print(number, run, flush=True)
    _, times = generate(model, ids, BLOCK, "none", memory_budget=budget, steps=4)
    found["no_cache_step_ms"] = times
    print("no cache", times, flush=True)
    write("block_causal", found, given.out)


if __name__ == "__main__":
    main()
