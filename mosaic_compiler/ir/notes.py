"""Notes: what one part of the compiler finds out about a graph, and others want to know.

A note is a typed key into ``module.meta`` (which copies of a graph take along), so that nobody has to spell its name or
guess what it holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from torch import fx

from mosaic_compiler.ir.graphs import Provenance
from mosaic_compiler.ir.storage import Root, StorageMap

T = TypeVar("T")


@dataclass(frozen=True)
class Note(Generic[T]):
    """One kind of note.

    Attributes:
        name: its key in ``module.meta``.
        missing: what it is where nobody wrote one.
    """

    name: str
    missing: T

    def of(self, module: fx.GraphModule) -> T:
        """What the note says."""
        return cast("T", module.meta.get(self.name, self.missing))

    def write(self, module: fx.GraphModule, value: T) -> None:
        """Put it down (a pass writes on its own copy of a graph only)."""
        module.meta[self.name] = value


STATIC_INPUTS: Note[tuple[int, ...]] = Note("static_inputs", ())
"""Positions of placeholders that are parameters and buffers."""

UNMET_ROWS: Note[str] = Note("needed_rows_problem", "")
"""Why ``needed_rows`` cannot be had."""

UNRULED: Note[tuple[tuple[str, str, Provenance], ...]] = Note("unruled", ())
"""Nodes (name, operator, origin) that need all rows of what would otherwise exist in chunks only."""


@dataclass(frozen=True)
class StatePlace:
    """One value that lives from step to step.

    Attributes:
        input: the placeholder that is its memory.
        output: the result that is written there; ``None``: rows of it are replaced in place.
    """

    input: int
    output: int | None


@dataclass(frozen=True)
class StateNote:
    """What of a graph is state.

    Attributes:
        places: where it comes in and goes out.
        rows: the placeholder with the numbers of the rows that are computed; ``None``: all are.
    """

    places: tuple[StatePlace, ...] = ()
    rows: int | None = None


STATE: Note[StateNote] = Note("state", StateNote())
"""What lives longer than the step (``passes/state/``)."""


def kept_roots(module: fx.GraphModule, storage: StorageMap) -> dict[Root, int]:
    """Storages of results that are written where state is, each with the number of its place."""
    results: Any = module.graph.output_node().args[0]
    found: dict[Root, int] = {}
    for number, place in enumerate(STATE.of(module).places):
        if place.output is not None:
            root = storage.root(results[place.output])
            assert root is not None
            found[root] = number
    return found
