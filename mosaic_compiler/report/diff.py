"""What changed between two plans, and why the peak moved."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mosaic_compiler.planning.budget import format_bytes
from mosaic_compiler.planning.buffers import Buffer
from mosaic_compiler.planning.plan import MemoryPlan
from mosaic_compiler.report.tables import alike

_FIGURES = ("peak", "workspace", "height", "lower_bound", "naive")


def diff(before: MemoryPlan, after: MemoryPlan, count: int = 12) -> Iterator[RenderableType]:
    """Figures, sizes, chunk sizes, and what is live at the peak of each plan."""
    figures = _table("figures", "", "before", "after", "change")
    for name in _FIGURES:
        old, new = getattr(before, name), getattr(after, name)
        figures.add_row(name.replace("_", " "), format_bytes(old), format_bytes(new), _change(old, new))
    for space in sorted({*before.heights, *after.heights} - {"arena"}):
        old, new = before.heights.get(space, 0), after.heights.get(space, 0)
        figures.add_row(f"height of {space}", format_bytes(old), format_bytes(new), _change(old, new))
    for term, what in (("call", "inputs"), ("model", "weights")):
        old, new = before.given.get(term, 0), after.given.get(term, 0)
        figures.add_row(what, format_bytes(old), format_bytes(new), _change(old, new))
    figures.add_row("buffers", str(len(before.buffers)), str(len(after.buffers)), "")
    figures.add_row("placed by", before.algorithm, after.algorithm, "")
    sizes = [{dict(plan.meanings).get(name, name): size for name, size in plan.symbols} for plan in (before, after)]
    for name in dict.fromkeys([*sizes[0], *sizes[1]]):
        figures.add_row(name, *(f"{size[name]:,}" if name in size else "-" for size in sizes), "")
    yield figures
    yield Text()
    yield from _loops(before, after)
    yield _at_peak(before, after, count)


def _loops(before: MemoryPlan, after: MemoryPlan) -> Iterator[RenderableType]:
    if not before.loops and not after.loops:
        return
    table = _table("chunk loops", "loop", "rows x chunk before", "after", "bytes before", "after")
    old, new = ({(loop.name, loop.ops): loop for loop in plan.loops} for plan in (before, after))
    shown = {(loop.name, loop.ops) for plan in (before, after) for loop, _ in alike(plan.loops)}
    for key in dict.fromkeys([*old, *new]):
        if key not in shown:
            continue
        a, b = old.get(key), new.get(key)
        table.add_row(
            key[0],
            *(f"{loop.rows} x {loop.chunk}" if loop else "-" for loop in (a, b)),
            *(format_bytes(loop.nbytes) if loop else "-" for loop in (a, b)),
        )
    yield table
    yield Text()


def _at_peak(before: MemoryPlan, after: MemoryPlan, count: int) -> Table:
    """What is live at the worst moment, by what made it and where; the largest changes first."""
    old, new = _live_at_peak(before), _live_at_peak(after)
    table = _table(
        f"live at the peak (before: {_moment(before)}, after: {_moment(after)})", "what", "before", "after", "change"
    )
    changes = sorted(old.keys() | new.keys(), key=lambda key: (-abs(new.get(key, 0) - old.get(key, 0)), key))
    for key in changes[:count]:
        a, b = old.get(key, 0), new.get(key, 0)
        table.add_row(key, format_bytes(a), format_bytes(b), _change(a, b))
    return table


def _live_at_peak(plan: MemoryPlan) -> dict[str, int]:
    position, found = _worst(plan), dict[str, int]()
    for buffer in plan.own:
        if buffer.start <= position < buffer.end and buffer.size:
            found[_what(buffer)] = found.get(_what(buffer), 0) + buffer.size
    return found


def _what(buffer: Buffer) -> str:
    return " ".join(part for part in (buffer.op or buffer.kind, buffer.module, buffer.source) if part)


def _worst(plan: MemoryPlan) -> int:
    return max(range(len(plan.timeline)), key=plan.timeline.__getitem__, default=0)


def _moment(plan: MemoryPlan) -> str:
    return plan.schedule[_worst(plan)] if plan.schedule else "empty step"


def _change(old: int, new: int) -> str:
    if old == new:
        return "="
    return f"{'+' if new > old else '-'}{format_bytes(abs(new - old))}" + (f" ({new / old - 1:+.1%})" if old else "")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", justify="right" if index and "what" not in columns[0] else "left")
    return table
