"""Generating behind a long prompt inside a 24 GiB card: tokens per second and peak, with mosaic and in eager PyTorch.

LLaDA-8B's dims, all layers, random weights: 1,024 new tokens in blocks of 32, 32 steps in all.  Where eager PyTorch
runs out of memory, it is measured at a prompt that it takes as well, and mosaic beside it.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

import mosaic_compiler
from benchmarks.gpu.benchmark import Benchmark, Row
from benchmarks.gpu.max_tokens import RESERVE
from benchmarks.gpu.models import GIB, MASK, MODELS, Session, clean, device
from mosaic_compiler.runtime.pools import pool_for

NEW, BLOCK = 1024, 32


def run(session: Session, prompt: int, system: str, new: int, card: int = 24) -> Row:
    """One row, with an ``error`` if there is not enough memory."""
    limit = card * GIB - RESERVE
    model = session.step.model
    ids = torch.randint(MASK + 1, MODELS[session.name].vocabulary, (1, prompt), device=device())
    pool, compiled = pool_for(device()), system == "mosaic"
    row: Row = {"model": session.name, "system": system, "prompt": prompt, "new": new}
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        clean()
        budget = limit - torch.cuda.memory_allocated() - 64 * (prompt + new) - (64 << 20)
        options: dict[str, Any] = {"memory_budget": budget} if compiled else {"compile": False}
        blocks = new // BLOCK
        arguments = {"gen_length": new, "block_length": BLOCK, "steps": blocks, "mask_token_id": MASK, **options}
        if compiled:  # compile, and make the plan, outside of what is timed
            warm = {**arguments, "gen_length": BLOCK, "steps": 1}
            started = time.perf_counter()
            mosaic_compiler.generate(model, ids[:, : 4096 - BLOCK], **warm)
            row["compile_s"] = time.perf_counter() - started
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        result = mosaic_compiler.generate(model, ids, **arguments)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        mapped = max((getattr(a, "mapped", 0) for a in pool._arenas), default=0)
        row |= {
            "seconds": seconds, "tokens_per_s": new / seconds, "steps": result.steps,
            "peak": torch.cuda.max_memory_allocated() + mapped, "limit": limit,
        }  # fmt: skip
        if result.plan is not None:
            row["planned"] = result.plan.peak
    except torch.OutOfMemoryError as error:
        row["error"] = str(error).splitlines()[0][:160]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        clean()
    return row


def add_arguments(made: argparse.ArgumentParser) -> None:
    """The arguments of this benchmark."""
    made.add_argument("--prompts", type=int, nargs="*", default=[60_000, 14_336])
    made.add_argument("--new", type=int, default=NEW)


def measure(session: Session, given: argparse.Namespace) -> list[Row]:
    """One row per prompt and system."""
    rows = []
    for prompt in given.prompts:
        for system in ("mosaic", "eager"):
            rows.append(run(session, prompt, system, given.new))
            print(rows[-1], flush=True)
    return rows


BENCHMARK = Benchmark(
    "generate",
    measure,
    "new tokens within 24 GiB",
    ["model", "prompt", "new", "system", "tokens/s", "seconds", "peak GiB"],
    lambda r: [
        r["model"], r["prompt"], r["new"], r["system"], r.get("tokens_per_s"), r.get("seconds"),
        r.get("peak") and r["peak"] / GIB,
    ],
    models=1,
    add_arguments=add_arguments,
)  # fmt: skip


if __name__ == "__main__":
    BENCHMARK.alone(__doc__)
