"""All GPU benchmarks of the step, model by model, so that each model is built and compiled once."""

from __future__ import annotations

from typing import Any

from benchmarks.common import write
from benchmarks.gpu import accuracy, breakdown, compile_time, max_tokens, par, peak, step_latency
from benchmarks.gpu.models import SYSTEMS, Session, forget, parser

_PER_MODEL = ("step_latency", "breakdown", "compile_time", "peak", "par")


def main() -> None:
    made = parser(__doc__)
    max_tokens.add_arguments(made)
    given = made.parse_args()
    found: dict[str, list[Any]] = {name: [] for name in (*_PER_MODEL, "max_tokens", "accuracy")}
    layers = {"layers": given.layers or "all"}

    def keep(name: str, rows: list[Any]) -> None:
        found[name] += rows
        write(name, {**(layers if name in _PER_MODEL else {}), "rows": found[name]}, given.out)

    for model in given.models:
        session = Session(model, given.layers)
        keep("step_latency", step_latency.measure(session, given.lengths, given.repeats))
        keep("breakdown", breakdown.measure(session, [min(given.lengths), max(given.lengths)]))
        keep("compile_time", compile_time.measure(session))
        keep("peak", peak.measure(session, max(given.lengths)))
        keep("par", par.measure(session, max(given.lengths)))
        del session
        forget()
        session = Session(model, 2)
        session.warm_up()
        for card in given.cards:
            keep("max_tokens", max_tokens.measure(session, card, SYSTEMS, given.below / 100))
        del session
        forget()
        keep("accuracy", accuracy.measure(model))


if __name__ == "__main__":
    main()
