"""Peak-to-average ratio of live activation bytes over a step.

Eager and Inductor: the caching allocator's own record of allocations and frees, averaged over its events.  Mosaic: the
plan's live bytes, averaged over the schedule (what an arena of that height is used for).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.benchmark import Benchmark
from benchmarks.gpu.models import GIB, Session, arguments, clean, synchronize


def live_bytes(function: Callable[..., Any], given: tuple[Any, ...]) -> list[int]:
    """Bytes that the allocator holds for a call, after each of its events."""
    function(*given)
    synchronize()
    torch.cuda.memory._record_memory_history(enabled="all", context=None, stacks="python", max_entries=1 << 20)
    function(*given)
    synchronize()
    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.memory._record_memory_history(enabled=None)
    live, timeline = 0, []
    for event in trace:
        if event["action"] == "alloc":
            live += event["size"]
        elif event["action"] == "free_completed":
            live -= event["size"]
        else:
            continue
        timeline.append(max(live, 0))
    return timeline


def measure(session: Session, tokens: int = 32768) -> list[dict[str, Any]]:
    """One row per system."""
    rows = []
    with torch.no_grad():
        given = arguments(session.name, tokens)
        for system in ("eager", "inductor"):
            try:
                timeline = live_bytes(session.function(system), given)
            except torch.OutOfMemoryError:
                clean()
                continue
            rows.append(_row(session.name, tokens, system, timeline))
        for label, options in (("mosaic", {}), ("mosaic, 4 GiB", {"memory_budget": "4GiB"})):
            timeline = planned(session, options, given)
            rows.append(_row(session.name, tokens, label, timeline))
            clean()
    return rows


def planned(session: Session, options: dict[str, Any], given: tuple[Any, ...]) -> list[int]:
    """Live bytes of mosaic's plan."""
    session.mosaic(options)(*given)
    return list(session.compiled(options).plan.timeline)


def _row(model: str, tokens: int, system: str, timeline: list[int]) -> dict[str, Any]:
    peak, average = max(timeline), sum(timeline) / len(timeline)
    row = {
        "model": model, "tokens": tokens, "system": system, "peak": peak, "average": average, "par": peak / average,
    }  # fmt: skip
    print(row, flush=True)
    return row


BENCHMARK = Benchmark(
    "par",
    lambda session, given: measure(session, max(given.lengths)),
    "live bytes of activations",
    ["model", "tokens", "system", "peak GiB", "average GiB", "peak / average"],
    lambda r: [r["model"], r["tokens"], r["system"], r["peak"] / GIB, r["average"] / GIB, r["par"]],
)


if __name__ == "__main__":
    BENCHMARK.alone(__doc__)
