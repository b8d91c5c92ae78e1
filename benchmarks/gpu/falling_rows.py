"""Steps as they are when a sequence is generated: one length, and fewer needed rows each time, none seen before."""

from __future__ import annotations

import statistics

import torch

from benchmarks.gpu.benchmark import Benchmark, Row
from benchmarks.gpu.compile_time import clocked
from benchmarks.gpu.models import MASK, SYSTEMS, Session, arguments, clean


def measure(session: Session, lengths: list[int], steps: int = 40) -> list[Row]:
    """One row per length and system: milliseconds of ``steps`` steps, of which the first has half of the tokens masked
    and the last almost none."""
    rows = []
    with torch.no_grad():
        session.warm_up()
        for tokens in lengths:
            for system in SYSTEMS:
                took = _steps(session, system, tokens, steps)
                rows.append(
                    {
                        "model": session.name, "tokens": tokens, "system": system, "steps": len(took),
                        "ms": 1e3 * statistics.mean(took), "median_ms": 1e3 * statistics.median(took),
                    }
                )  # fmt: skip
                print(rows[-1], flush=True)
                clean()
    return rows


def _steps(session: Session, system: str, tokens: int, steps: int) -> list[float]:
    """Seconds of each step behind the first."""
    function = session.function(system)
    ids, window, count = arguments(session.name, tokens)
    function(ids, window, count)
    masked = (ids == MASK).nonzero()[:, 1]
    took = []
    for step in range(1, steps):
        ids[0, masked[: step * len(masked) // steps]] = MASK + 1
        took.append(clocked(function, (ids, window, count)))
    return took


BENCHMARK = Benchmark(
    "falling_rows",
    lambda session, given: measure(session, sorted({1024, min(given.lengths)})),
    "milliseconds of steps with fewer needed rows each",
    ["model", "tokens", "system", "steps", "mean", "median"],
    lambda r: [r["model"], r["tokens"], r["system"], r["steps"], r["ms"], r["median_ms"]],
)


if __name__ == "__main__":
    BENCHMARK.alone(__doc__)
