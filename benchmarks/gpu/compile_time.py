"""Seconds to the first result (tracing, compiling, running), and what a second and third length cost."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.gpu.benchmark import Benchmark
from benchmarks.gpu.models import SYSTEMS, Session, arguments, synchronize


def measure(session: Session, lengths: tuple[int, ...] = (5120, 6016)) -> list[dict[str, Any]]:
    """One row per compiled system.  Each runs its other lengths in a thread of its own: cuDNN keeps its plans per
    thread, so none finds those of another."""
    rows = []
    with torch.no_grad():
        session.warm_up()
    for system in SYSTEMS[1:]:
        with ThreadPoolExecutor(1) as thread:
            extra = thread.submit(_extra, session, system, lengths).result()
        rows.append({"model": session.name, "system": system, "cold_s": session.cold[system], "extra_s": extra})
        print(rows[-1], flush=True)
    return rows


@torch.no_grad()
def _extra(session: Session, system: str, lengths: Sequence[int]) -> dict[int, float]:
    """By length, the seconds of the first call less those of the next."""
    function, extra = session.function(system), {}
    function(*arguments(session.name, 4096))  # this thread's handles
    for tokens in lengths:
        given = arguments(session.name, tokens)
        gc.collect()  # a full collection of what the compilers left takes more than a second
        first, second = clocked(function, given), min(clocked(function, given) for _ in range(2))
        extra[tokens] = first - second
    return extra


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
