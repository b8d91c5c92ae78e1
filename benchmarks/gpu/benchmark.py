"""A benchmark: what it measures on one model, the table it prints, the file it writes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from benchmarks.common import show, write
from benchmarks.gpu.models import Session, forget, parser

Row: TypeAlias = "dict[str, Any]"


def _nothing(made: argparse.ArgumentParser) -> None:
    pass


@dataclass(frozen=True)
class Benchmark:
    """One benchmark, by itself (:meth:`alone`) or among others (``benchmarks/gpu/__main__.py``).

    Attributes:
        name: of the result file.
        measure: rows for one model, under the command's arguments.
        columns: of the printed table.
        cells: a row as it is printed; ``None`` is a dash.
        layers: how many layers run unless ``--layers`` says so; ``None``: all.
        models: how many of the models that the command names are measured.
        add_arguments: arguments of its own.
    """

    name: str
    measure: Callable[[Session, argparse.Namespace], list[Row]]
    title: str
    columns: Sequence[str]
    cells: Callable[[Row], Sequence[Any]]
    layers: int | None = None
    models: int | None = None
    add_arguments: Callable[[argparse.ArgumentParser], None] = _nothing

    def alone(self, description: str | None) -> None:
        """The command: every model in turn, a file after each, the table in the end."""
        made = parser(description)
        self.add_arguments(made)
        given = made.parse_args()
        rows: list[Row] = []
        for name in given.models[: self.models]:
            session = Session(name, given.layers or self.layers)
            rows += self.measure(session, given)
            self.write(rows, given)
            del session
            forget()
        self.show(rows)

    def write(self, rows: Sequence[Row], given: argparse.Namespace) -> None:
        write(self.name, {"layers": given.layers or self.layers or "all", "rows": rows}, given.out)

    def show(self, rows: Sequence[Row]) -> None:
        show(self.title, self.columns, [self.cells(row) for row in rows])


def quotient(row: Row, numerator: str, denominator: str) -> float | None:
    """Of two entries, if both are there."""
    above, below = row.get(numerator), row.get(denominator)
    return above / below if above and below else None
