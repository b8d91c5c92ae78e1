"""Placement: from lives to offsets.  Pure, deterministic, independent of the order of its input.

Every algorithm has the same signature, ``place(buffers) -> {name: offset}``.  Buffers are the arena
ones; sizes are multiples of 512, and so every offset is.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

from mosaic_compiler.planning.plan import Buffer, align, lower_bound

Offsets: TypeAlias = "dict[str, int]"
Placement: TypeAlias = "Callable[[Sequence[Buffer]], Offsets]"


def naive(buffers: Sequence[Buffer]) -> Offsets:
    """No reuse: one buffer behind the other, in order of birth.  The baseline of every report."""
    offsets: Offsets = {}
    top = 0
    for buffer in sorted(buffers, key=lambda b: (b.start, b.name)):
        offsets[buffer.name] = top
        top += buffer.size
    return offsets


def by_size(buffers: Sequence[Buffer]) -> Offsets:
    """First fit in order of decreasing size."""
    return first_fit(sorted(buffers, key=lambda b: (-b.size, b.start, b.end, b.name)))


def by_live_total(buffers: Sequence[Buffer]) -> Offsets:
    """First fit in order of (max live total over the life, lifetime, area), each decreasing.

    Buffers that live through the worst moment are placed first, long lives before short ones, so that
    they stack from the bottom without holes.
    """
    worst = _max_live_total(buffers)

    def key(buffer: Buffer) -> tuple[int, int, int, int, str]:
        lifetime = buffer.end - buffer.start
        return (-worst[buffer.name], -lifetime, -lifetime * buffer.size, buffer.start, buffer.name)

    return first_fit(sorted(buffers, key=key))


def by_lifetime(buffers: Sequence[Buffer]) -> Offsets:
    """First fit in order of decreasing (lifetime, size): what lives through loops goes to the bottom, and every loop's
    own buffers stack above it."""
    return first_fit(sorted(buffers, key=lambda b: (b.start - b.end, -b.size, b.start, b.name)))


def first_fit(ordered: Sequence[Buffer]) -> Offsets:
    """Place each buffer at the lowest offset that is free over its whole life."""
    neighbours = overlapping_lives(ordered)
    offsets: Offsets = {}
    spans: list[tuple[int, int] | None] = [None] * len(ordered)
    for index, buffer in enumerate(ordered):
        size = buffer.size
        at = 0
        if size:
            for low, high in sorted(span for other in neighbours[index] if (span := spans[other]) is not None):
                if at + size <= low:
                    break
                if high > at:
                    at = high
            spans[index] = (at, at + size)
        offsets[buffer.name] = at
    return offsets


def overlapping_lives(buffers: Sequence[Buffer]) -> list[list[int]]:
    """For each buffer the indices of the others whose lives intersect its own (empty ones left out)."""
    by_start = sorted((i for i, b in enumerate(buffers) if b.size), key=lambda i: buffers[i].start)
    result: list[list[int]] = [[] for _ in buffers]
    live: list[int] = []
    for index in by_start:
        start = buffers[index].start
        live = [other for other in live if buffers[other].end > start]
        for other in live:
            result[other].append(index)
        result[index].extend(live)
        live.append(index)
    return result


def _max_live_total(buffers: Sequence[Buffer]) -> dict[str, int]:
    """For each buffer the largest number of live bytes at any time of its life (a sparse table).

    Live bytes only grow where a buffer is born, so births are all the positions that have to be looked at.
    """
    births = sorted({buffer.start for buffer in buffers})
    lives = [(bisect_left(births, b.start), bisect_left(births, b.end)) for b in buffers]
    change = [0] * (len(births) + 1)
    for buffer, (start, end) in zip(buffers, lives, strict=True):
        change[start] += buffer.size
        change[end] -= buffer.size
    levels = [list(itertools.accumulate(change[:-1]))]
    while len(levels[-1]) > 1 << (len(levels) - 1):
        previous, half = levels[-1], 1 << (len(levels) - 1)
        levels.append([max(previous[i], previous[i + half]) for i in range(len(previous) - half)])
    result = {}
    for buffer, (start, end) in zip(buffers, lives, strict=True):
        level = (end - start).bit_length() - 1
        row = levels[level]
        result[buffer.name] = max(row[start], row[end - (1 << level)])
    return result


ALGORITHMS: Mapping[str, Placement] = MappingProxyType(
    {"live-total": by_live_total, "size": by_size, "lifetime": by_lifetime, "naive": naive}
)


def height_of(buffers: Sequence[Buffer], offsets: Mapping[str, int]) -> int:
    return max((offsets[b.name] + b.size for b in buffers), default=0)


def place(buffers: Sequence[Buffer], algorithm: str = "auto") -> tuple[str, Offsets]:
    """Offsets by one algorithm, or by the best of the portfolio (``auto``).

    ``auto`` stops at the first placement whose height equals the lower bound.  Returns the name of
    the algorithm that was used, and its offsets.
    """
    if algorithm != "auto":
        return algorithm, ALGORITHMS[algorithm](buffers)
    bound = lower_bound(buffers)
    best: tuple[int, str, Offsets] | None = None
    for name in ("live-total", "size", "lifetime"):
        offsets = ALGORITHMS[name](buffers)
        height = height_of(buffers, offsets)
        if best is None or height < best[0]:
            best = (height, name, offsets)
        if height == bound:
            break
    assert best is not None
    return best[1], best[2]


def place_blocks(buffers: Sequence[Buffer], blocks: Mapping[str, str], algorithm: str = "auto") -> tuple[str, Offsets]:
    """As :func:`place`, with the buffers that are local to one loop placed as one block.

    What lives at full length does not change while a loop runs, so nothing is lost by it; equal loops (layers) are
    placed once.  If the height is above the bound nevertheless, all buffers are placed one by one as well.
    """
    if algorithm != "auto" or not blocks:
        return place(buffers, algorithm)
    members: dict[str, list[Buffer]] = {}
    outer: list[Buffer] = []
    for buffer in buffers:
        if buffer.name in blocks:
            members.setdefault(blocks[buffer.name], []).append(buffer)
        else:
            outer.append(buffer)
    known: dict[tuple[tuple[int, int, int], ...], tuple[list[int], int]] = {}
    inside: dict[str, list[int]] = {}
    for loop, own in members.items():
        start = min(b.start for b in own)
        key = tuple((b.start - start, b.end - start, b.size) for b in own)
        if key not in known:
            _, found = place(own)
            known[key] = [found[b.name] for b in own], height_of(own, found)
        inside[loop], height = known[key]
        outer.append(Buffer(f"{loop}.*", "arena", align(height), start, max(b.end for b in own)))
    name, offsets = place(outer)
    result = {buffer.name: offsets[buffer.name] for buffer in outer}
    for loop, own in members.items():
        base = result.pop(f"{loop}.*")
        result.update({b.name: base + at for b, at in zip(own, inside[loop], strict=True)})
    height = height_of(buffers, result)
    if height > lower_bound(buffers):
        single, alone = place(buffers)
        if height_of(buffers, alone) < height:
            return single, alone
    return name, result
