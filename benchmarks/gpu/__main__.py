"""All GPU benchmarks, model by model, so that each model is built and compiled once.

Each is a module of this package and a command of its own, too: ``python -m benchmarks.gpu.peak --models Dream-7B``.
"""

from __future__ import annotations

from itertools import groupby

from benchmarks.gpu import (
    accuracy,
    breakdown,
    compile_time,
    drop_in,
    falling_rows,
    gather_logits,
    generate,
    max_tokens,
    par,
    peak,
    row_demand,
    step_latency,
)
from benchmarks.gpu.benchmark import Benchmark, Row
from benchmarks.gpu.models import Session, clean, forget, parser, use_expandable_segments

# Neighbours that run as many layers share a model and what is compiled for it.
BENCHMARKS: tuple[Benchmark, ...] = (
    step_latency.BENCHMARK,
    falling_rows.BENCHMARK,
    breakdown.BENCHMARK,
    compile_time.BENCHMARK,
    peak.BENCHMARK,
    par.BENCHMARK,
    row_demand.BENCHMARK,
    generate.BENCHMARK,
    drop_in.BENCHMARK,
    max_tokens.BENCHMARK,
    accuracy.BENCHMARK,
    gather_logits.BENCHMARK,
)


def main() -> None:
    made = parser(__doc__)
    for benchmark in BENCHMARKS:
        benchmark.add_arguments(made)
    names = [benchmark.name for benchmark in BENCHMARKS]
    made.add_argument("--only", nargs="*", default=names, choices=names, metavar="NAME", help="run these benchmarks")
    given = made.parse_args()
    use_expandable_segments()
    chosen = [benchmark for benchmark in BENCHMARKS if benchmark.name in given.only]
    found: dict[str, list[Row]] = {benchmark.name: [] for benchmark in chosen}
    for index, name in enumerate(given.models):
        wanted = [b for b in chosen if b.models is None or index < b.models]
        for layers, group in groupby(wanted, key=lambda benchmark: benchmark.layers):
            session = Session(name, given.layers or layers)
            for benchmark in group:
                found[benchmark.name] += benchmark.measure(session, given)
                benchmark.write(found[benchmark.name], given)
                clean()
            del session
            forget()
    for benchmark in chosen:
        benchmark.show(found[benchmark.name])


if __name__ == "__main__":
    main()
