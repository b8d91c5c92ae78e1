"""Planning: lives -> one verified :class:`MemoryPlan`.  Pure functions of their arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from mosaic_compiler.planning.buffers import PLACED, Buffer
from mosaic_compiler.planning.placement import DEADLINE, place_blocks
from mosaic_compiler.planning.plan import MemoryPlan, PlannedLoop

__all__ = ["Buffer", "MemoryPlan", "PlannedLoop", "make_plan"]


def make_plan(
    buffers: Sequence[Buffer],
    schedule: Sequence[str],
    *,
    algorithm: str = "auto",
    deadline: float = DEADLINE,
    symbols: Sequence[tuple[str, int]] = (),
    loops: Sequence[PlannedLoop] = (),
    blocks: Mapping[str, str] = MappingProxyType({}),
) -> MemoryPlan:
    """Place the buffers of each space whose memory is planned, and return the verified plan.

    Args:
        buffers: lives in bytes and schedule positions, in any order.  Those that have an offset already keep it.
        schedule: node names by position.
        algorithm: ``auto``, ``live-total``, ``size``, ``area``, ``lifetime`` or ``naive``.
        deadline: seconds that the search may take where first-fit does not reach the lower bound.
        symbols: the sizes that the bytes were computed for, kept for the reader.
        loops: the chunk loops and their sizes, kept for the reader.
        blocks: the loop that a buffer is local to, by the buffer's name: each loop's own buffers are placed as one
            block.

    Raises:
        PlanError: if a life is malformed.
    """
    names, offsets = dict[str, None](), dict[str, int]()
    for space in PLACED:
        own = [buffer for buffer in buffers if buffer.space == space]
        fixed = {buffer.name: buffer.offset for buffer in own if buffer.offset is not None}
        if own or space == "arena":
            used, found = place_blocks(own, blocks, algorithm, deadline=deadline, fixed=fixed)
            names[used], offsets = None, offsets | found
    placed = (dataclasses.replace(b, offset=offsets.get(b.name)) for b in buffers)
    return MemoryPlan(
        buffers=tuple(sorted(placed, key=lambda b: (b.start, b.end, b.name))),
        schedule=tuple(schedule),
        symbols=tuple(symbols),
        algorithm=", ".join(names),
        loops=tuple(loops),
    )
