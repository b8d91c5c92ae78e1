"""A step with and without the ``row-demand`` pass, beside eager PyTorch's, at a tenth of the tokens masked."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.common import interleaved
from benchmarks.gpu.benchmark import Benchmark, Row
from benchmarks.gpu.models import GIB, Session, arguments, clean, high_water

_OPTIONS: dict[str, dict[str, Any]] = {"row-demand": {}, "without": {"disable": ["row-demand"]}}


def measure(session: Session, tokens: int, repeats: int, masked: float = 0.1) -> list[Row]:
    """One row per system; ``ids_equal`` is the share of ids that are eager's."""
    rows = []
    with torch.no_grad():
        given = arguments(session.name, tokens, masked)
        functions = {"eager": session.step, **{name: session.mosaic(options) for name, options in _OPTIONS.items()}}
        reference = session.step(*given)
        equal = {name: float((function(*given) == reference).float().mean()) for name, function in functions.items()}
        peaks = {}
        for name, function in functions.items():
            clean()
            peaks[name] = high_water(function, given)
        seconds = interleaved({name: (lambda f=f: f(*given)) for name, f in functions.items()}, repeats)
        for name in functions:
            plan = session.compiled(_OPTIONS[name]).plan if name in _OPTIONS else None
            rows.append(
                {
                    "model": session.name, "tokens": tokens, "masked": masked, "system": name,
                    "ms": seconds[name] * 1e3, "peak": peaks[name], "ids_equal": equal[name],
                    "planned": None if plan is None else plan.peak,
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows


BENCHMARK = Benchmark(
    "row_demand",
    lambda session, given: measure(session, sorted(given.lengths)[len(given.lengths) // 2], given.repeats),
    "row demand",
    ["model", "tokens", "system", "ms", "peak GiB", "planned GiB", "ids equal to eager's"],
    lambda r: [
        r["model"], r["tokens"], r["system"], r["ms"], r["peak"] / GIB, r["planned"] and r["planned"] / GIB,
        r["ids_equal"],
    ],
    models=1,
)  # fmt: skip


if __name__ == "__main__":
    BENCHMARK.alone(__doc__)
