"""Time of one denoising step: eager, Inductor and mosaic in turns, at several lengths and shares of masked rows."""

from __future__ import annotations

import math
from typing import Any

import torch

from benchmarks.common import interleaved, show, write
from benchmarks.gpu.models import SYSTEMS, Session, arguments, clean, forget, parser


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


def ratios(rows: list[dict[str, Any]], against: str) -> tuple[list[float], float]:
    """mosaic / the other system at half of the rows masked, and the geometric mean."""
    found = [r["ms"]["mosaic"] / r["ms"][against] for r in rows if r["masked"] == 0.5 and r["ms"][against]]
    return found, math.exp(sum(map(math.log, found)) / len(found)) if found else float("nan")


def main() -> None:
    given = parser(__doc__).parse_args()
    rows: list[dict[str, Any]] = []
    for name in given.models:
        session = Session(name, given.layers)
        rows += measure(session, given.lengths, given.repeats)
        del session
        forget()
        write("step_latency", {"layers": given.layers or "all", "rows": rows}, given.out)
    show(
        "milliseconds per step",
        ["model", "tokens", "masked", *SYSTEMS, "against inductor"],
        [[r["model"], r["tokens"], r["masked"], *r["ms"].values(), quotient(r, "inductor")] for r in rows],
    )


def quotient(row: dict[str, Any], against: str) -> float | None:
    other = row["ms"][against]
    return row["ms"]["mosaic"] / other if other else None


if __name__ == "__main__":
    main()
