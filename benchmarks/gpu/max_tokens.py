"""The longest sequence that a card has room for beside all weights, found by running it.

A card is emulated: the process may use its size less 600 MiB (what CUDA itself takes), all weights are resident (a few
layers run; the bytes of the others are allocated too).  Eager PyTorch and Inductor are bisected.  Mosaic runs what its
planner promises less ``--below`` per cent: at the limit itself the chunks of the last layer, which has the logits in
it, are a few rows only, and a step takes several times as long.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.gpu.benchmark import Benchmark, Row
from benchmarks.gpu.models import (
    GIB,
    SYSTEMS,
    Session,
    arguments,
    build,
    clean,
    device,
    synchronize,
    use_expandable_segments,
)
from benchmarks.gpu.models import weights as weights_of
from mosaic_compiler.errors import BudgetError
from mosaic_compiler.runtime.pools import pool_for

RESERVE = 600 << 20
COMPILING = 192 << 20  # what kernels that a length is the first to need take while they are compiled
STEP = 1024


def all_weights(name: str) -> int:
    """Bytes of all weights of a model in bf16, counted on the meta device."""
    return weights_of(build(name, on=torch.device("meta")))


def measure(session: Session, card: int, systems: Sequence[str], below: float) -> list[dict[str, Any]]:
    """One row per system for a card of so many GiB; mosaic stays ``below`` its longest sequence by this share."""
    limit = card * GIB - RESERVE
    total = torch.cuda.get_device_properties(0).total_memory
    missing = max(all_weights(session.name) - weights_of(session.step), 0)
    rows = []
    with torch.no_grad():
        clean()
        ballast = torch.empty(missing, dtype=torch.uint8, device=device())
        torch.cuda.set_per_process_memory_fraction(limit / total)
        try:
            for system in systems:
                started = time.perf_counter()
                longest, seconds = (
                    longest_planned(session, limit, below)
                    if system == "mosaic"
                    else bisected(session.function(system), session)
                )
                rows.append(
                    {
                        "model": session.name, "card_gib": card, "system": system, "tokens": longest,
                        "step_s": seconds, "layers": session.layers, "search_s": time.perf_counter() - started,
                        **({"below": below} if system == "mosaic" else {}),
                    }
                )  # fmt: skip
                print(rows[-1], flush=True)
                clean()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            del ballast
            clean()
    return rows


def bisected(function: Callable[..., Any], session: Session) -> tuple[int, float]:
    """The longest sequence, in steps of 1,024 tokens, that runs without running out of memory."""
    low, high, seconds = 0, 8, 0.0
    while (took := attempt(function, session, high * STEP)) is not None:
        low, high, seconds = high, high * 2, took
    while high - low > 1:
        middle = (low + high) // 2
        took = attempt(function, session, middle * STEP)
        low, high, seconds = (low, middle, seconds) if took is None else (middle, high, took)
    return low * STEP, seconds


def attempt(function: Callable[..., Any], session: Session, tokens: int) -> float | None:
    """Seconds of a step; ``None`` if there is not enough memory."""
    clean()
    given = arguments(session.name, tokens)
    synchronize()
    started = time.perf_counter()
    try:
        function(*given)
        synchronize()
    except (torch.OutOfMemoryError, BudgetError):
        return None
    return time.perf_counter() - started


def longest_planned(session: Session, limit: int, below: float) -> tuple[int, float]:
    """The longest sequence that the planner promises (less the share ``below``), run; the arena counts against the same
    limit."""
    pool = pool_for(device())
    budget = limit - torch.cuda.memory_allocated()
    options = {"memory_budget": budget - COMPILING}
    session.mosaic(options)(*arguments(session.name, 4096))
    step = session.compiled(options)
    tokens = 0
    for _ in range(3):
        # inputs and result are not in the budget: 8 + 1 + 8 bytes per token, and as many again to make them
        room = budget - 34 * tokens - COMPILING
        tokens = (step.planner.longest(step.outline.sizes_for(1 << 16, 0.5), room) or 0) // STEP * STEP
    tokens = int(tokens * (1 - below)) // STEP * STEP
    shorter = max(tokens // 50 // STEP, 1) * STEP
    while tokens > 0:
        clean()
        inputs = arguments(session.name, tokens)
        room = limit - torch.cuda.memory_allocated() - 8 * tokens - COMPILING
        function = session.mosaic({"memory_budget": room})
        function(*arguments(session.name, 4096))  # compiles
        torch.cuda.reset_peak_memory_stats()
        synchronize()
        started = time.perf_counter()
        try:
            function(*inputs)
            synchronize()
        except (BudgetError, torch.OutOfMemoryError) as error:
            print(f"{tokens} tokens: {str(error)[:160]}", flush=True)
            tokens, shorter = tokens - shorter, 2 * shorter
            continue
        seconds = time.perf_counter() - started
        held = torch.cuda.max_memory_allocated() + max(getattr(a, "mapped", 0) for a in pool._arenas)
        if held > limit:
            print(f"{tokens} tokens held {held - limit} bytes too many", flush=True)
            tokens, shorter = tokens - shorter, 2 * shorter
            continue
        return tokens, seconds
    return 0, 0.0


def add_arguments(made: argparse.ArgumentParser) -> None:
    """The arguments of this benchmark."""
    made.add_argument("--cards", type=int, nargs="*", default=[24, 40], help="GiB")
    made.add_argument("--below", type=float, default=1.0, help="per cent that mosaic stays below its limit")
    made.add_argument("--systems", nargs="*", default=SYSTEMS, choices=SYSTEMS)


def _measure(session: Session, given: argparse.Namespace) -> list[Row]:
    session.warm_up(systems=given.systems)
    return [row for card in given.cards for row in measure(session, card, given.systems, given.below / 100)]


BENCHMARK = Benchmark(
    "max_tokens",
    _measure,
    "longest sequence",
    ["model", "card GiB", "system", "tokens", "seconds per step (layers run)"],
    lambda r: [r["model"], r["card_gib"], r["system"], r["tokens"], f"{r['step_s']:.2f} ({r['layers']})"],
    layers=2,
    add_arguments=add_arguments,
)


if __name__ == "__main__":
    use_expandable_segments()
    BENCHMARK.alone(__doc__)
