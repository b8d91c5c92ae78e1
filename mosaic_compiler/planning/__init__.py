"""Planning: lives -> one verified :class:`MemoryPlan`.  Pure functions of their arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from mosaic_compiler.planning.placement import DEADLINE, place_blocks
from mosaic_compiler.planning.plan import Buffer, MemoryPlan, PlannedLoop

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
    """Place the arena buffers and return the verified plan.

    Args:
        buffers: lives in bytes and schedule positions, in any order, without offsets.
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
    arena = [buffer for buffer in buffers if buffer.kind == "arena"]
    name, offsets = place_blocks(arena, blocks, algorithm, deadline=deadline)
    placed = (dataclasses.replace(b, offset=offsets[b.name]) if b.kind == "arena" else b for b in buffers)
    return MemoryPlan(
        buffers=tuple(sorted(placed, key=lambda b: (b.start, b.end, b.name))),
        schedule=tuple(schedule),
        symbols=tuple(symbols),
        algorithm=name,
        loops=tuple(loops),
    )
