"""Which layer of the model a schedule position belongs to, from the module paths of the buffers that begin there."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mosaic_compiler.planning.plan import MemoryPlan

_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Span:
    """Schedule positions ``[start, end)`` of one layer; ``in`` is what comes before all of them, ``head`` behind."""

    label: str
    start: int
    end: int

    @property
    def middle(self) -> float:
        return (self.start + self.end) / 2


def layers(plan: MemoryPlan) -> tuple[Span, ...]:
    """The spans of a plan, in order; none if its modules are not numbered.

    Layers are the outermost modules of a list (``model.layers.3``, ``h.3``).  A layer begins with its first buffer and
    lasts until the next one begins: loop bodies that layers share carry the module path of the first of them, so that
    later buffers may name an earlier layer.
    """
    first, last = _numbered(plan)
    starts: list[tuple[int, int]] = []
    for number, start in sorted(first.items()):
        if not starts or start > starts[-1][1]:
            starts.append((number, start))
    if len(starts) < 2:
        return ()
    behind = last[starts[-1][0]]
    head = min((b.start for b in plan.own if b.start > behind), default=len(plan.schedule))
    marks = [("in", 0), *((str(number), start) for number, start in starts), ("head", head)]
    ends = [start for _, start in marks[1:]] + [len(plan.schedule)]
    return tuple(Span(label, start, end) for (label, start), end in zip(marks, ends, strict=True) if start < end)


def _numbered(plan: MemoryPlan) -> tuple[dict[int, int], dict[int, int]]:
    """Where the first and the last buffer of each layer begins."""
    first: dict[str, dict[int, int]] = {}
    last: dict[str, dict[int, int]] = {}
    for buffer in plan.own:
        for found in _NUMBER.finditer("." + buffer.module):
            path, number = buffer.module[: max(found.start() - 1, 0)], int(found[1])
            starts, ends = first.setdefault(path, {}), last.setdefault(path, {})
            starts[number] = min(starts.get(number, buffer.start), buffer.start)
            ends[number] = max(ends.get(number, buffer.start), buffer.start)
    lists = [path for path, starts in first.items() if len(starts) > 1]
    if not lists:
        return {}, {}
    path = min(lists, key=lambda path: (path.count("."), -len(first[path])))  # experts are lists inside of layers
    return first[path], last[path]
