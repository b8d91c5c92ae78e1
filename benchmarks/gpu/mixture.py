"""LLaDA-MoE's dims: steps with mixtures as one op, and as many; and 600,000 tokens on a 24 GiB card."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import write
from benchmarks.gpu.max_tokens import RESERVE
from benchmarks.gpu.models import GIB, arguments, build, clean, device
from mosaic_compiler.backend import observing
from mosaic_compiler.runtime.pools import pool_for

NAME = "LLaDA-MoE-7B-A1B"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--lengths", type=int, nargs="*", default=[4_096, 16_384, 32_768])
    parser.add_argument("--tokens", type=int, default=600_000)
    given = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    step = build(NAME)
    systems: dict[str, Any] = {"eager": step}
    compiled: list[Any] = []
    with torch.no_grad(), observing(compiled.append):
        for name, disable in (("before", ("mixtures",)), ("now", ())):
            systems[name] = torch.compile(step, backend="mosaic", dynamic=True, options={"disable": disable})
            started = time.perf_counter()
            systems[name](*arguments(NAME, 2048))
            print(name, "compiled", time.perf_counter() - started, list(compiled[-1].graphs), flush=True)
        rows = []
        for tokens in given.lengths:
            inputs = arguments(NAME, tokens)
            results = {name: call(*inputs) for name, call in systems.items()}
            row: dict[str, Any] = {"tokens": tokens}
            row["same_ids"] = int((results["now"] == results["eager"]).sum())
            for _ in range(3):
                for name, call in systems.items():
                    row.setdefault(name, []).append(_milliseconds(call, inputs, 4 if tokens > 10_000 else 12))
            rows.append(row)
            print(row, flush=True)
        found: dict[str, Any] = {"steps": rows}
        del systems["before"]
        clean()
        limit = 24 * GIB - RESERVE
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
        inputs = arguments(NAME, given.tokens)
        budget = limit - torch.cuda.memory_allocated() - (64 << 20)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        from mosaic_compiler.runtime.engine import within_budget

        started = time.perf_counter()
        with within_budget(budget):
            systems["now"](*inputs)
        torch.cuda.synchronize()
        mapped = max((getattr(a, "mapped", 0) for a in pool_for(device())._arenas), default=0)
        found["longest"] = {
            "tokens": given.tokens, "seconds": time.perf_counter() - started, "budget": budget,
            "planned": compiled[-1].plan.peak, "in_use": torch.cuda.max_memory_allocated() + mapped, "limit": limit,
        }  # fmt: skip
        print(found["longest"], flush=True)
    write("mixture", found, given.out)


def _milliseconds(call: Any, inputs: Any, repeats: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call(*inputs)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats


if __name__ == "__main__":
    main()
