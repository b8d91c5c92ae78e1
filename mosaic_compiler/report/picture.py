"""The picture of a memory plan as an image: address space over time, and live bytes.  Needs ``matplotlib``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mosaic_compiler.planning.budget import format_bytes
from mosaic_compiler.planning.plan import MemoryPlan
from mosaic_compiler.report.scene import COLOURS, HATCHES, LINES, chunks, levels, rectangles, top, unit_of

_WIDE = 0.045  # of the schedule: what a loop's label needs


def picture(plan: MemoryPlan, path: str | Path, *, dpi: int = 160) -> None:
    """Write the picture; the file's suffix (``.png``, ``.svg``, ``.pdf``) says in which format."""
    unit, scale = unit_of(plan.peak)
    shapes = rectangles(plan)
    page = Figure(figsize=(10, 5.6), layout="constrained")
    address, live = page.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))

    handles = []
    for group, colour in COLOURS.items():
        members = [(s.buffer.start, s.buffer.end, s.offset / scale, (s.offset + s.buffer.size) / scale)
                   for s in shapes if s.group == group]  # fmt: skip
        if members:
            style: dict[str, Any] = {"facecolor": colour, "hatch": 5 * HATCHES[group] if group in HATCHES else None}
            corners = [((a, low), (b, low), (b, high), (a, high)) for a, b, low, high in members]
            address.add_collection(PolyCollection(corners, edgecolor="black", linewidth=0.15, **style))
            handles.append(Patch(label=group, **style))
    address.axhline(plan.height / scale, color="grey", linewidth=1)
    address.set_ylim(0, max((s.offset + s.buffer.size for s in shapes), default=1) / scale)
    address.set_ylabel(f"address ({unit})")

    live.stairs(
        [value / scale for value in plan.timeline], fill=True, facecolor="#BBBBBB", edgecolor="#888888", linewidth=0.6
    )
    for name, value in levels(plan).items():
        colour, dash = LINES[name]
        above = " (above the axis)" if value > top(plan) else ""
        live.axhline(value / scale, color=colour, linestyle=dash, label=f"{name} {format_bytes(value)}{above}")
    live.set(xlabel="schedule position", ylabel=f"live ({unit})", xlim=(0, max(len(plan.schedule), 1)))
    live.set_ylim(0, top(plan) / scale)

    for loop in plan.loops:
        for axes in (address, live):
            axes.axvspan(loop.start, loop.end, color="#808080", alpha=0.22 if loop.chunk < loop.rows else 0.1,
                         linewidth=0, zorder=0)  # fmt: skip
        if loop.chunk < loop.rows and loop.end - loop.start > _WIDE * len(plan.schedule):
            address.text((loop.start + loop.end) / 2, 1.01, f"{chunks(loop.rows, loop.chunk)} x {loop.chunk}",
                         transform=address.get_xaxis_transform(), ha="center", va="bottom", fontsize=7)  # fmt: skip

    for axes in (address, live):
        axes.spines[["top", "right"]].set_visible(False)
    page.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=8)
    page.legend(
        handles=live.get_legend_handles_labels()[0], loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    page.savefig(path, dpi=dpi)
