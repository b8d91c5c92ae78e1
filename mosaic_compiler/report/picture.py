"""The picture of a memory plan as an image: address space over time, and live bytes.  Needs ``matplotlib``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mosaic_compiler.planning.budget import format_bytes
from mosaic_compiler.planning.plan import MemoryPlan
from mosaic_compiler.report.layers import layers
from mosaic_compiler.report.scene import (
    COLOURS,
    HATCHES,
    LINES,
    MARK,
    Rectangle,
    chunks,
    headline,
    levels,
    peak,
    rectangles,
    top,
    unit_of,
)

_WIDE = 0.045  # of the schedule: what a loop's label needs
_NARROW = 0.01  # of the schedule: what comes before or behind the layers is not named if it is no wider
_LEFT = 0.012  # of the page: where text begins
_LABELS = 16  # at most so many layers are labelled
_VISIBLE = 1 / 400  # of the address axis: groups without a box so high are left out of the legend


def picture(plan: MemoryPlan, path: str | Path, *, dpi: int = 160) -> None:
    """Write the picture; the file's suffix (``.png``, ``.svg``, ``.pdf``) says in which format."""
    unit, scale = unit_of(plan.peak)
    shapes = rectangles(plan)
    page = Figure(figsize=(10, 6), layout="constrained")
    page.get_layout_engine().set(rect=(0, 0.08, 1, 0.79))  # type: ignore[union-attr,call-arg]  # text is around it
    address, live = page.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    title, figures = headline(plan)
    page.text(_LEFT, 0.968, title, fontsize=12 * min(1, 80 / len(title)), fontweight="bold", va="center")
    page.text(_LEFT, 0.93, figures, fontsize=9, va="center")

    highest = max((s.offset + s.buffer.size for s in shapes), default=1)
    handles = _boxes(address, shapes, scale, highest * _VISIBLE)
    arena = address.axhline(plan.height / scale, color="grey", linewidth=1, label="top of the arena")
    address.set_ylim(0, highest / scale)
    address.set_ylabel(f"address ({unit})")

    live.stairs(
        [value / scale for value in plan.timeline], fill=True, facecolor="#BBBBBB", edgecolor="#888888", linewidth=0.6
    )
    for name, value in levels(plan).items():
        colour, dash = LINES[name]
        above = " (above the axis)" if value > top(plan) else ""
        live.axhline(value / scale, color=colour, linestyle=dash, label=f"{name} {format_bytes(value)}{above}")
    live.set(ylabel=f"live ({unit})", xlim=(0, max(len(plan.schedule), 1)))
    live.set_ylim(0, top(plan) / scale)
    _label_layers((address, live), plan)
    if (most := peak(plan)) is not None:
        live.plot(most.position + 0.5, most.nbytes / scale, "v", color=MARK, markersize=5, zorder=3, clip_on=False)
        page.text(_LEFT, 0.022, "▼", color=MARK, fontsize=8, va="center")
        page.text(_LEFT + 0.017, 0.022, str(most), fontsize=8, va="center")

    for loop in plan.loops:
        for axes in (address, live):
            axes.axvspan(loop.start, loop.end, color="#808080", alpha=0.22 if loop.chunk < loop.rows else 0.1,
                         linewidth=0, zorder=0)  # fmt: skip
        if loop.chunk < loop.rows and loop.end - loop.start > _WIDE * len(plan.schedule):
            address.text((loop.start + loop.end) / 2, 1.01, f"{chunks(loop.rows, loop.chunk)} x {loop.chunk}",
                         transform=address.get_xaxis_transform(), ha="center", va="bottom", fontsize=7)  # fmt: skip

    for axes in (address, live):
        axes.spines[["top", "right"]].set_visible(False)
    lines = [*live.get_legend_handles_labels()[0], arena]
    if any(loop.chunk < loop.rows for loop in plan.loops):
        lines.append(Patch(color="#808080", alpha=0.22, linewidth=0, label="in chunks of rows"))
    for y, row in ((0.893, handles), (0.058, lines)):
        page.legend(handles=row, loc="center left", bbox_to_anchor=(_LEFT, y), ncols=len(row), frameon=False,
                    fontsize=8, borderpad=0, borderaxespad=0, columnspacing=1.6, handlelength=1.6)  # fmt: skip
    page.savefig(path, dpi=dpi)


def _boxes(axes: Axes, shapes: list[Rectangle], scale: int, visible: float) -> list[Artist]:
    """Draw the buffers; the legend's entries for the groups with a box of at least ``visible`` bytes."""
    handles: list[Artist] = []
    for group, colour in COLOURS.items():
        members = [(s.buffer.start, s.buffer.end, s.offset / scale, (s.offset + s.buffer.size) / scale)
                   for s in shapes if s.group == group]  # fmt: skip
        if members:
            style: dict[str, Any] = {"facecolor": colour, "hatch": 5 * HATCHES[group] if group in HATCHES else None}
            corners = [((a, low), (b, low), (b, high), (a, high)) for a, b, low, high in members]
            axes.add_collection(PolyCollection(corners, edgecolor="black", linewidth=0.15, **style))
            if max(s.buffer.size for s in shapes if s.group == group) >= visible:
                handles.append(Patch(label=group, **style))
    return handles


def _label_layers(plots: tuple[Axes, Axes], plan: MemoryPlan) -> None:
    """A tick where each layer begins, and names in the middle of as many as there is room for."""
    axes = plots[1]
    spans = layers(plan)
    if not spans:
        axes.set_xlabel("schedule position")
        return
    numbered = [span for span in spans if span.label.isdigit()]
    named = [s for s in spans if s not in numbered and s.end - s.start > _NARROW * len(plan.schedule)]
    shown = named + numbered[:: -(-len(numbered) // _LABELS)]
    axes.set_xlabel(f"layer ({len(plan.schedule):,} ops in the order they run)")
    begins = [span.start for span in spans if span in numbered or span in named]
    axes.set_xticks(begins, [""] * len(begins))
    axes.set_xticks([span.middle for span in shown], [span.label for span in shown], minor=True)
    for plot in plots:
        plot.tick_params(axis="x", which="minor", length=0)
