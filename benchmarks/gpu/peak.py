"""Planned against measured peak of a step's activations, without a budget and within one."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.common import show, write
from benchmarks.gpu.models import GIB, Session, arguments, clean, device, forget, high_water, parser
from mosaic_compiler.runtime.arena import pool_for


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


def main() -> None:
    given = parser(__doc__).parse_args()
    rows: list[dict[str, Any]] = []
    for name in given.models:
        rows += measure(Session(name, given.layers), max(given.lengths))
        forget()
        write("peak", {"layers": given.layers or "all", "rows": rows}, given.out)
    show(
        "peak of activations, GiB",
        ["model", "tokens", "budget", "planned", "measured", "measured / planned", "MiB beyond the height"],
        [
            [r["model"], r["tokens"], r["budget"] or "none", r["planned"] / GIB, r["measured"] / GIB,
             r["measured"] / r["planned"], r["beyond"] / (1 << 20)]
            for r in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
