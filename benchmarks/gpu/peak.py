"""Planned against measured peak of a step's activations, without a budget and within one."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.benchmark import Benchmark, quotient
from benchmarks.gpu.models import GIB, Session, arguments, clean, device, high_water
from mosaic_compiler.runtime.pools import pool_for


def measure(session: Session, tokens: int = 32768, budget: str = "4GiB") -> list[dict[str, Any]]:
    """One row per option; ``beyond`` is what the arena holds above the plan's height."""
    rows = []
    with torch.no_grad():
        for options in ({}, {"memory_budget": budget}):
            measured = high_water(session.mosaic(options), arguments(session.name, tokens))
            plan = session.compiled(options).plan
            arenas = pool_for(device())._arenas
            rows.append(
                {
                    "model": session.name, "tokens": tokens, "budget": options.get("memory_budget"),
                    "planned": plan.peak, "measured": measured, "height": plan.height, "lower_bound": plan.lower_bound,
                    "beyond": max(getattr(a, "mapped", a.reserved) - a.reserved for a in arenas),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
            clean()
    return rows


BENCHMARK = Benchmark(
    "peak",
    lambda session, given: measure(session, max(given.lengths)),
    "peak of activations, GiB",
    ["model", "tokens", "budget", "planned", "measured", "measured / planned", "MiB beyond the height"],
    lambda r: [
        r["model"], r["tokens"], r["budget"] or "none", r["planned"] / GIB, r["measured"] / GIB,
        quotient(r, "measured", "planned"), r["beyond"] / (1 << 20),
    ],
)  # fmt: skip


if __name__ == "__main__":
    BENCHMARK.alone(__doc__)
