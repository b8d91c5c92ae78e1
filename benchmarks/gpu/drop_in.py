"""A compiled model under its caller's own loop (``needed_rows``): logits [N, V] with memory for the masked rows only.

Eager PyTorch computes logits of all rows, mosaic those of masked rows, within 2 GiB besides its result.  ``peak`` is
what a call holds above the weights, its result included (mosaic: the arena, and the larger one of the allocator's peak
and the result, which exists at the end only).
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from benchmarks.gpu.benchmark import Benchmark, Row
from benchmarks.gpu.models import GIB, MASK, MODELS, Session, clean, device, synchronize
from mosaic_compiler.backend import observing
from mosaic_compiler.runtime.pools import pool_for
from mosaic_compiler.runtime.step import CompiledStep

BUDGET = "2GiB"


def ids_with(name: str, prompt: int, new: int) -> torch.Tensor:
    """A random prompt with masked positions behind it."""
    ids = torch.randint(
        MASK + 1, MODELS[name].vocabulary, (1, prompt + new), generator=torch.Generator().manual_seed(0)
    )
    ids[:, prompt:] = MASK
    return ids.to(device())


def measure(name: str, model: torch.nn.Module, cases: list[tuple[int, int]], repeats: int) -> list[dict[str, Any]]:
    """One row per (prompt, new) and system."""
    options = {"needed_rows": "masked", "mask_token_id": MASK, "memory_budget": BUDGET}
    steps: list[CompiledStep] = []
    mosaic = torch.compile(model, backend="mosaic", dynamic=True, options=options)
    rows = []
    with torch.no_grad():
        for prompt, new in cases:
            ids = ids_with(name, prompt, new)
            for system, function in (("eager", model), ("mosaic", mosaic)):
                row: dict[str, Any] = {"model": name, "prompt": prompt, "new": new, "system": system}
                try:
                    with observing(steps.append):
                        function(ids)  # compiles, plans
                except torch.OutOfMemoryError as error:
                    rows.append({**row, "error": str(error).splitlines()[0][:120]})
                    print(rows[-1], flush=True)
                    continue
                clean()
                synchronize()
                free = torch.cuda.mem_get_info()[0]
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                logits = function(ids).logits
                synchronize()
                row["shape"] = list(logits.shape)
                arena = pool_for(device()).reserved()
                allocator = torch.cuda.max_memory_allocated() - before
                if system == "mosaic":
                    row["planned"] = steps[0].plan.peak if steps[0].plan is not None else None
                    clean()
                    row["result"] = free - torch.cuda.mem_get_info()[0]
                else:
                    row["result"] = logits.numel() * logits.element_size()
                row["peak"] = arena + max(allocator, row["result"])
                del logits
                times = []
                for _ in range(repeats):
                    synchronize()
                    started = time.perf_counter()
                    logits = function(ids).logits
                    synchronize()
                    times.append(time.perf_counter() - started)
                    del logits
                row["step_s"] = statistics.median(times)
                print(row, flush=True)
                rows.append(row)
    return rows


def add_arguments(made: argparse.ArgumentParser) -> None:
    """The arguments of this benchmark."""
    made.add_argument(
        "--cases", type=int, nargs="*", default=[15_360, 1024, 8192, 8192, 60_000, 1024],
        help="pairs: tokens of a prompt, masked tokens behind it",
    )  # fmt: skip


def _measure(session: Session, given: argparse.Namespace) -> list[Row]:
    cases = list(zip(given.cases[::2], given.cases[1::2], strict=True))
    return measure(session.name, session.step.model, cases, given.repeats)


BENCHMARK = Benchmark(
    "drop_in",
    _measure,
    "a model's logits, masked rows needed",
    ["model", "prompt", "masked", "system", "peak GiB", "of it logits GiB", "seconds"],
    lambda r: [
        r["model"], r["prompt"], r["new"], r["system"],
        r.get("peak") and r["peak"] / GIB, r.get("result") and r["result"] / GIB, r.get("step_s"),
    ],
    models=1,
    add_arguments=add_arguments,
)  # fmt: skip


if __name__ == "__main__":
    BENCHMARK.alone(__doc__)
