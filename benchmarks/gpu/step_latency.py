"""Time of one denoising step: eager, Inductor and mosaic in turns, at several lengths and shares of masked rows."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.common import interleaved
from benchmarks.gpu.benchmark import Benchmark, quotient
from benchmarks.gpu.models import SYSTEMS, Session, arguments, clean


def measure(session: Session, lengths: list[int], repeats: int, shares: tuple[float, ...] = (0.5, 0.1, 1.0)) -> Any:
    """One row per length and share: milliseconds per system, and how the results differ from eager's."""
    rows = []
    with torch.no_grad():
        session.warm_up()
        for masked in shares:
            for tokens in lengths:
                given = arguments(session.name, tokens, masked)
                functions = {system: session.function(system) for system in SYSTEMS}
                results, times = interleaved_or_none(functions, given, repeats if masked == 0.5 else 2)
                eager = results.get("eager")
                differing = {
                    system: int((result != eager).sum()) for system, result in results.items() if eager is not None
                }
                rows.append(
                    {"model": session.name, "tokens": tokens, "masked": masked, "ms": times, "differing": differing}
                )
                print(rows[-1], flush=True)
                clean()
    return rows


def interleaved_or_none(
    functions: dict[str, Any], given: tuple[Any, ...], repeats: int
) -> tuple[dict[str, Any], dict[str, float | None]]:
    """Results and median milliseconds; a system that runs out of memory has none."""
    results: dict[str, Any] = {}
    for system, function in functions.items():
        try:
            results[system] = function(*given)
        except torch.OutOfMemoryError:
            clean()
    calls = {system: (lambda f=functions[system]: f(*given)) for system in results}
    seconds = interleaved(calls, repeats)
    return results, {system: seconds[system] * 1e3 if system in seconds else None for system in functions}


def _cells(row: dict[str, Any]) -> list[Any]:
    return [row["model"], row["tokens"], row["masked"], *row["ms"].values(), quotient(row["ms"], "mosaic", "inductor")]


BENCHMARK = Benchmark(
    "step_latency",
    lambda session, given: measure(session, given.lengths, given.repeats),
    "milliseconds per step",
    ["model", "tokens", "masked", *SYSTEMS, "against inductor"],
    _cells,
)


if __name__ == "__main__":
    BENCHMARK.alone(__doc__)
