"""Rich renderings of a plan: the summary, the largest buffers, the timeline."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mosaic_compiler.planning.budget import format_bytes
from mosaic_compiler.planning.buffers import Buffer
from mosaic_compiler.planning.plan import Fallback, MemoryPlan, PlannedLoop

_BARS = " ▁▂▃▄▅▆▇█"


def summary(plan: MemoryPlan) -> Table:
    """The figures of one plan, one per line."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    bound = plan.height / plan.lower_bound if plan.lower_bound else 1.0
    outside = max(plan.outside, default=0)
    rows = (
        ("peak", format_bytes(plan.peak), "arena + what is live outside of it at the worst moment"),
        ("arena height", format_bytes(plan.height), f"{bound:.3f} x the lower bound, placed by {plan.algorithm}"),
        (
            "without reuse",
            format_bytes(plan.naive),
            f"{plan.naive / plan.height:.1f} x the height" if plan.height else "",
        ),
        ("outside", format_bytes(outside), "outputs, and what opaque ops allocate"),
        ("workspace", format_bytes(plan.workspace), "the peak without outputs: what a memory budget covers"),
        ("peak / average", f"{plan.par:.2f}", "of live bytes over the step"),
        *((f"height of {space}", format_bytes(top), "") for space, top in plan.heights.items() if space != "arena"),
        ("given", _given(plan), "the caller's memory, besides the peak"),
        ("sizes", ", ".join(plan.sizes) or "static", ""),
    )
    for name, value, remark in rows:
        table.add_row(name, Text(value, style="bold"), Text(remark, style="dim"))
    return table


def _given(plan: MemoryPlan) -> str:
    """``weights 16.1 GiB, inputs 70.0 KiB``."""
    names = {"model": "weights", "state": "state", "call": "inputs"}
    parts = [f"{what} {format_bytes(plan.given[term])}" for term, what in names.items() if term in plan.given]
    return ", ".join(parts) or "nothing"


def loops(plan: MemoryPlan) -> Group:
    """The chunk loops; equal ones (layers) in one line.  Below: why they have their size, their origin and operands."""
    table = Table(
        title="chunk loops (bytes: what the body holds at most, and what it would with all rows at once)",
        title_justify="left",
        box=None,
        padding=(0, 1),
    )
    table.add_column("loop", overflow="fold")
    for column in ("rows", "chunk", "bytes", "unchunked"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("computes", overflow="fold")
    lines = []
    for first, count in alike(plan.loops):
        name = first.name + (f" and {count - 1} like it" if count > 1 else "")
        nbytes, unchunked = format_bytes(first.nbytes), format_bytes(first.unchunked)
        table.add_row(name, str(first.rows), str(first.chunk), nbytes, unchunked, first.computes)
        origin = " ".join(part for part in (first.module, first.source) if part)
        details = (first.reason, origin and f"from {origin}", first.operands and f"reads {', '.join(first.operands)}")
        lines.append(Text(f" {first.name}: {'; '.join(detail for detail in details if detail)}", style="dim"))
    return Group(table, *lines)


def alike(loops: Sequence[PlannedLoop]) -> list[tuple[PlannedLoop, int]]:
    """The first of each group of equal loops (layers), and how many there are."""
    groups: dict[tuple[object, ...], list[PlannedLoop]] = {}
    for loop in loops:
        key = (loop.ops, loop.rows, loop.chunk, loop.nbytes, loop.unchunked, loop.reason, len(loop.operands))
        groups.setdefault(key, []).append(loop)
    return [(group[0], len(group)) for group in groups.values()]


def fallbacks(found: Sequence[Fallback]) -> Table | Text:
    """What a plan does not fully cover, by name."""
    if not found:
        return Text("fallbacks: none")
    table = Table(title="fallbacks", title_justify="left", box=None, padding=(0, 1))
    for column in ("name", "node", "op", "reason", "source"):
        table.add_column(column, overflow="fold")
    for f in found:
        table.add_row(f.name, f.node, f.op, f.reason, f.source)
    return table


def plan_lines(plan: MemoryPlan) -> Iterator[RenderableType]:
    """Everything about one plan: figures, timeline, loops, largest buffers."""
    yield summary(plan)
    yield Text()
    yield timeline(plan.timeline)
    yield Text()
    if plan.loops:
        yield loops(plan)
        yield Text()
    yield largest_buffers(plan)
    yield Text()


def largest_buffers(plan: MemoryPlan, count: int = 12) -> Table:
    """The largest buffers that a step takes memory for, with their origins; equal ones (of layers) in one line."""
    table = Table(title=f"largest of {len(plan.own)} buffers", title_justify="left", box=None, padding=(0, 1))
    for column in ("buffer", "space", "term", "shape", "dtype"):
        table.add_column(column, overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("life", justify="right", no_wrap=True)
    table.add_column("from", overflow="fold")
    groups: dict[tuple[object, ...], list[Buffer]] = {}
    for buffer in sorted(plan.own, key=lambda b: (-b.size, b.start, b.name)):
        key = (buffer.size, buffer.space, buffer.term, buffer.shape, buffer.dtype, buffer.source)
        groups.setdefault(key, []).append(buffer)
    for buffer, *others in itertools.islice(groups.values(), count):
        table.add_row(
            buffer.name + (f" and {len(others)} like it" if others else ""),
            buffer.space,
            buffer.term,
            "x".join(map(str, buffer.shape)),
            buffer.dtype,
            format_bytes(buffer.size),
            f"{buffer.start}-{buffer.end}",
            " ".join(part for part in (buffer.module, buffer.source) if part),
        )
    return table


def timeline(values: Sequence[int], width: int = 76) -> Text:
    """Live bytes over the schedule as one line of bars; each bar is the maximum of its positions."""
    if not values:
        return Text("(empty step)")
    columns = min(width, len(values))
    edges = [len(values) * i // columns for i in range(columns + 1)]
    peaks = [max(values[a:b]) for a, b in itertools.pairwise(edges)]
    top = max(peaks) or 1
    bars = "".join(_BARS[max(1, round(value / top * (len(_BARS) - 1))) if value else 0] for value in peaks)
    return Text.assemble(
        ("live bytes over the step", "bold"),
        f"  (full bar: {format_bytes(top)}, {len(values)} positions)\n",
        (bars, "cyan"),
    )
