"""Seconds to the first result (tracing, compiling, running), and what a second and third length cost."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

from benchmarks.gpu.benchmark import Benchmark
from benchmarks.gpu.models import SYSTEMS, Session, arguments, synchronize


def measure(session: Session, lengths: tuple[int, ...] = (5120, 6016)) -> list[dict[str, Any]]:
    """One row per compiled system; ``extra`` is the first call at a new length less the second."""
    rows = []
    with torch.no_grad():
        session.warm_up()
        for system in SYSTEMS[1:]:
            function, extra = session.function(system), {}
            for tokens in lengths:
                given = arguments(session.name, tokens)
                gc.collect()  # a full collection of what the compilers left takes more than a second
                first, second = clocked(function, given), min(clocked(function, given) for _ in range(2))
                extra[tokens] = first - second
            rows.append({"model": session.name, "system": system, "cold_s": session.cold[system], "extra_s": extra})
            print(rows[-1], flush=True)
    return rows


def clocked(function: Any, given: tuple[Any, ...]) -> float:
    synchronize()
    started = time.perf_counter()
    function(*given)
    synchronize()
    return time.perf_counter() - started


BENCHMARK = Benchmark(
    "compile_time",
    lambda session, given: measure(session),
    "seconds",
    ["model", "system", "cold", "extra for other lengths"],
    lambda r: [r["model"], r["system"], r["cold_s"], ", ".join(f"{s:.3f}" for s in r["extra_s"].values())],
)


if __name__ == "__main__":
    BENCHMARK.alone(__doc__)
