"""What the picture of a plan consists of, for the page (page.py) and the image (picture.py) alike."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from mosaic_compiler.planning.budget import format_bytes
from mosaic_compiler.planning.buffers import ON_DEVICE, Buffer
from mosaic_compiler.planning.plan import MemoryPlan

# Paul Tol's "bright" scheme, which the colour-blind can tell apart; grey is outside of the arena.
COLOURS = {
    "attention": "#4477AA",
    "MLP": "#EE6677",
    "residual and norm": "#CCBB44",
    "head and sampling": "#66CCEE",
    "embedding": "#228833",
    "other": "#AA3377",
    "transient": "#BBBBBB",
    "output": "#BBBBBB",
    "scratch": "#BBBBBB",
    "host": "#DDDDDD",
    "state": "#EE8866",
}
HATCHES = {"output": "x", "scratch": "/", "host": "."}
"""What tells the grey groups apart."""

LINES = {  # colour and dash
    "budget": ("#EE7733", "solid"),
    "lower bound of the arena": ("#0077BB", "dashed"),
    "arena without reuse": ("#EE3377", "dotted"),
}

MARK = "#CC3311"
"""Colour of the peak's marker."""

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))
_ROLES = (  # for colours only: the first that matches the module path, or the source where there is none
    ("residual and norm", re.compile(r"norm|(layers|blocks|h)\.\d+$")),
    ("attention", re.compile(r"attn|attention|rotary")),  # tables of rotary embeddings are for queries and keys
    ("MLP", re.compile(r"mlp|ffn|feed_forward|expert|moe")),
    ("embedding", re.compile(r"embed|wte|wpe")),
    ("head and sampling", re.compile(r"head|sampling")),
)


@dataclass(frozen=True)
class Rectangle:
    """One buffer: its life on x, ``[offset, offset + size)`` on y; what is outside of the arena is above it, and above
    that the other spaces, one on the other."""

    buffer: Buffer
    offset: int
    group: str  # a key of COLOURS


def rectangles(plan: MemoryPlan) -> list[Rectangle]:
    """Every buffer that a step takes memory for, in the order of the plan."""
    above = dict(_stack(plan.in_space("heap"), plan.height))
    floor = max((above[b.name] + b.size for b in plan.in_space("heap")), default=plan.height)
    floors = {"arena": 0}
    for space, height in plan.heights.items():
        if space not in floors:
            floors[space], floor = floor, floor + height
    return [
        Rectangle(b, above[b.name], b.kind)
        if b.offset is None
        else Rectangle(b, floors[b.space] + b.offset, _role(b) if b.space == "arena" else b.space)
        for b in plan.own
    ]


@dataclass(frozen=True)
class Peak:
    """The schedule position with the most live bytes, how many those are, and the largest buffer among them."""

    position: int
    nbytes: int
    largest: Buffer

    def __str__(self) -> str:
        b = self.largest
        made = b.op.split(".")[1] if "." in b.op else b.op or b.name
        where = f" of {b.module}" if b.module else ""
        shape = " x ".join(f"{size:,}" for size in b.shape)
        details = ", ".join(part for part in (f"{shape} {b.dtype}".strip(), format_bytes(b.nbytes)) if part)
        return f"most live at once: {format_bytes(self.nbytes)}; largest there: {made}{where} ({details})"


def peak(plan: MemoryPlan) -> Peak | None:
    """The first such position; ``None`` if nothing is live anywhere."""
    if not plan.in_space(*ON_DEVICE):
        return None
    position = max(range(len(plan.timeline)), key=plan.timeline.__getitem__)
    live = [b for b in plan.in_space(*ON_DEVICE) if b.start <= position < b.end]
    return Peak(position, plan.timeline[position], max(live, key=lambda b: b.size))


def headline(plan: MemoryPlan) -> tuple[str, str]:
    """What the plan is for, and its figures: a title and what stands below it."""
    title = plan.title or "Memory plan"
    outside = plan.peak - plan.height
    split = f" (arena {format_bytes(plan.height)}, outside of it {format_bytes(outside)})" if outside else ""
    figures = [f"peak {format_bytes(plan.peak)}{split}"]
    figures += [f"{space} {format_bytes(height)}" for space, height in plan.heights.items() if space != "arena"]
    if plan.budget is not None:
        figures.append(f"budget {format_bytes(plan.budget)}")
    if plan.device:
        figures.append(f"{plan.device.upper()} kernels")
    return f"{title}: one step of {', '.join(plan.sizes)}" if plan.sizes else title, ", ".join(figures)


def levels(plan: MemoryPlan) -> dict[str, int]:
    """The horizontal lines of the live-bytes curve, by their names in LINES."""
    lines = {"lower bound of the arena": plan.lower_bound, "arena without reuse": plan.naive}
    return lines if plan.budget is None else {"budget": plan.budget, **lines}


def top(plan: MemoryPlan) -> float:
    """Where the axis of the live-bytes curve ends: lines far above the curve would flatten it, and are only named."""
    shown = max(plan.peak, plan.budget or 0) if (plan.budget or 0) < 4 * plan.peak else plan.peak
    return 1.08 * max(plan.naive if plan.naive < 2 * shown else shown, 1)


def unit_of(nbytes: int) -> tuple[str, int]:
    """The largest unit an axis of so many bytes can be in: unit_of(3 << 20) == ("MiB", 1 << 20)."""
    return next((name, size) for name, size in _UNITS if nbytes >= size or size == 1)


def chunks(rows: int, chunk: int) -> int:
    """How often a loop runs: chunks(8192, 640) == 13."""
    return -(-rows // max(chunk, 1))


def _role(buffer: Buffer) -> str:
    where = (buffer.module or buffer.source).lower()
    return next((role for role, pattern in _ROLES if pattern.search(where)), "other")


def _stack(buffers: tuple[Buffer, ...], floor: int) -> Iterator[tuple[str, int]]:
    """Buffers without an address, each in the lowest gap above ``floor`` that is free for all of its life."""
    live: list[tuple[int, Buffer]] = []
    for buffer in sorted(buffers, key=lambda b: (b.start, -b.end)):
        live = sorted(((at, b) for at, b in live if b.end > buffer.start), key=lambda entry: entry[0])
        offset = floor
        for at, other in live:
            if offset + buffer.size <= at:
                break
            offset = max(offset, at + other.size)
        live.append((offset, buffer))
        yield buffer.name, offset
