"""Placement: from lives to offsets.  Pure, deterministic, independent of the order of its input.

Every algorithm is an order in which first-fit places the lives.  Where none of the orders reaches the lower bound, a
local search changes the best of them.  Sizes are multiples of 512, and so every offset is.
"""

from __future__ import annotations

import itertools
import random
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypeAlias

from mosaic_compiler.planning.plan import align

Offsets: TypeAlias = "dict[str, int]"
_Span: TypeAlias = "tuple[int, int]"

ROUNDS = 400
"""Placements that the local search tries at most."""

_PATIENCE = 8
"""Changes of one order that may bring nothing before the search begins again with the order that it started from."""

_WORK = 2_000_000
"""Pairs of lives that the local search looks at in all: large instances get fewer rounds."""


class Life(Protocol):
    """What placement has to know of a buffer: half-open life, and bytes rounded up to 512."""

    @property
    def name(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def size(self) -> int: ...


class Interval(NamedTuple):
    """A life and nothing else."""

    name: str
    start: int
    end: int
    size: int


def naive(lives: Sequence[Life]) -> Offsets:
    """No reuse: one buffer behind the other, in order of birth.  The baseline of every report."""
    offsets: Offsets = {}
    top = 0
    for life in sorted(lives, key=lambda b: (b.start, b.name)):
        offsets[life.name] = top
        top += life.size
    return offsets


def _by_size(lives: Sequence[Life]) -> list[int]:
    """Decreasing size."""
    return _ranked([(-b.size, b.start, b.end, b.name) for b in lives])


def _by_live_total(lives: Sequence[Life]) -> list[int]:
    """(Max live total over the life, lifetime, area), each decreasing.

    Buffers that live through the worst moment are placed first, long lives before short ones, so that
    they stack from the bottom without holes.
    """
    worst = _max_live_total(lives)
    return _ranked(
        [
            (-most, b.start - b.end, (b.start - b.end) * b.size, b.start, b.name)
            for b, most in zip(lives, worst, strict=True)
        ]
    )


def _ranked(keys: Sequence[tuple[int | str, ...]]) -> list[int]:
    return sorted(range(len(keys)), key=keys.__getitem__)


ORDERS: Mapping[str, Callable[[Sequence[Life]], list[int]]] = MappingProxyType(
    {"live-total": _by_live_total, "size": _by_size}
)
"""Orders for first-fit, by name: positions of the lives, the first one placed first."""


def first_fit(order: Sequence[int], sizes: Sequence[int], neighbours: Sequence[Sequence[int]]) -> list[_Span]:
    """Place each life at the lowest offset that is free over all of it; (bottom, top) by position."""
    spans: list[_Span | None] = [None] * len(order)
    for index in order:
        size, at = sizes[index], 0
        if size:
            for low, high in sorted([span for other in neighbours[index] if (span := spans[other]) is not None]):
                if at + size <= low:
                    break
                if high > at:
                    at = high
        spans[index] = (at, at + size)
    return [span for span in spans if span is not None]


def neighbours_of(lives: Sequence[Life]) -> list[list[int]]:
    """For each life the positions of the others that intersect it (empty ones left out)."""
    by_start = sorted((i for i, b in enumerate(lives) if b.size), key=lambda i: lives[i].start)
    result: list[list[int]] = [[] for _ in lives]
    live: list[int] = []
    for index in by_start:
        start = lives[index].start
        live = [other for other in live if lives[other].end > start]
        for other in live:
            result[other].append(index)
        result[index].extend(live)
        live.append(index)
    return result


def live_totals(lives: Sequence[Life]) -> tuple[list[int], list[int]]:
    """Positions at which somebody is born, and the bytes live there.  Live bytes grow nowhere else."""
    births = sorted({life.start for life in lives})
    change = [0] * (len(births) + 1)
    for life in lives:
        change[bisect_left(births, life.start)] += life.size
        change[bisect_left(births, life.end)] -= life.size
    return births, list(itertools.accumulate(change[:-1]))


def _max_live_total(lives: Sequence[Life]) -> list[int]:
    """For each life the largest number of live bytes at any time of it (a sparse table over births)."""
    births, totals = live_totals(lives)
    levels = [totals]
    while len(levels[-1]) > 1 << (len(levels) - 1):
        previous, half = levels[-1], 1 << (len(levels) - 1)
        levels.append([max(previous[i], previous[i + half]) for i in range(len(previous) - half)])
    result = []
    for life in lives:
        start, end = bisect_left(births, life.start), bisect_left(births, life.end)
        level = (end - start).bit_length() - 1
        result.append(max(levels[level][start], levels[level][end - (1 << level)]))
    return result


def place(lives: Sequence[Life], algorithm: str = "auto") -> tuple[str, Offsets]:
    """Offsets by one algorithm, or by the best of the portfolio (``auto``).

    ``auto`` stops at the first placement whose height equals the lower bound.  Returns the name of
    the algorithm that was used, and its offsets.
    """
    lives = sorted(lives, key=lambda life: life.name)
    if algorithm == "naive":
        return algorithm, naive(lives)
    sizes, neighbours = [life.size for life in lives], neighbours_of(lives)
    bound = max(live_totals(lives)[1], default=0)
    found: list[tuple[int, str, list[int], list[_Span]]] = []
    for name in ORDERS if algorithm == "auto" else (algorithm,):
        order = ORDERS[name](lives)
        spans = first_fit(order, sizes, neighbours)
        found.append((_top(spans), name, order, spans))
        if found[-1][0] == bound:
            break
    height, name, order, spans = min(found, key=lambda entry: entry[0])
    if algorithm == "auto" and height > bound:
        better = _search([entry[2] for entry in found], sizes, neighbours, bound, height)
        if better is not None:
            name, spans = f"{name}, searched", better
    return name, {life.name: low for life, (low, _) in zip(lives, spans, strict=True)}


def _top(spans: Sequence[_Span]) -> int:
    return max((high for _, high in spans), default=0)


def _search(
    orders: Sequence[Sequence[int]],
    sizes: Sequence[int],
    neighbours: Sequence[Sequence[int]],
    bound: int,
    height: int,
) -> list[_Span] | None:
    """Local search over first-fit orders: a better placement than ``height``, or ``None``.

    The height is the length of a chain of lives, each resting on the one below.  Only a change of that chain can lower
    it: one of its links is turned around (the lower life is placed right behind the upper one).  Changes that do not
    make it worse are kept; after :data:`_PATIENCE` of them without a gain it starts again from the next given order.
    """
    chance = random.Random(0)
    rounds = min(ROUNDS, _WORK // max(sum(map(len, neighbours)), 1))
    best: list[_Span] | None = None
    starts = itertools.cycle(orders)
    order, spans, now, patience = list(next(starts)), None, 0, 0
    for _ in range(rounds):
        if spans is None:
            spans = first_fit(order, sizes, neighbours)
            now, patience = _top(spans), _PATIENCE
        chain = _chain(spans, neighbours, chance)
        link = chance.randrange(len(chain) - 1)
        upper, lower = chain[link], chain[link + 1]
        changed = [index for index in order if index != lower]
        changed.insert(changed.index(upper) + 1, lower)
        placed = first_fit(changed, sizes, neighbours)
        top = _top(placed)
        patience = _PATIENCE if top < now else patience - 1
        if top <= now:
            order, spans, now = changed, placed, top
        if top < height:
            height, best = top, placed
            if height == bound:
                break
        if not patience:
            order, spans = list(next(starts)), None
    return best


def _chain(spans: Sequence[_Span], neighbours: Sequence[Sequence[int]], chance: random.Random) -> list[int]:
    """Lives from the highest top down to the ground, each resting on the next."""
    chain = [max(range(len(spans)), key=lambda index: spans[index][1])]
    while bottom := spans[chain[-1]][0]:
        chain.append(chance.choice([other for other in neighbours[chain[-1]] if spans[other][1] == bottom]))
    return chain


def height_of(lives: Sequence[Life], offsets: Mapping[str, int]) -> int:
    return max((offsets[b.name] + b.size for b in lives), default=0)


def place_blocks(lives: Sequence[Life], blocks: Mapping[str, str], algorithm: str = "auto") -> tuple[str, Offsets]:
    """As :func:`place`, with the buffers that are local to one loop placed as one block.

    What lives at full length does not change while a loop runs, so nothing is lost by it; equal loops (layers) are
    placed once.
    """
    if algorithm != "auto" or not blocks:
        return place(lives, algorithm)
    members: dict[str, list[Life]] = {}
    outer: list[Life] = []
    for life in lives:
        if life.name in blocks:
            members.setdefault(blocks[life.name], []).append(life)
        else:
            outer.append(life)
    known: dict[tuple[_Span | int, ...], tuple[list[int], int]] = {}
    inside: dict[str, list[int]] = {}
    for loop, own in members.items():
        start = min(b.start for b in own)
        key = tuple(number for b in own for number in (b.start - start, b.end - start, b.size))
        if key not in known:
            _, found = place(own)
            known[key] = [found[b.name] for b in own], height_of(own, found)
        inside[loop], height = known[key]
        outer.append(Interval(f"{loop}.*", start, max(b.end for b in own), align(height)))
    name, offsets = place(outer)
    for loop, own in members.items():
        base = offsets.pop(f"{loop}.*")
        offsets.update({b.name: base + at for b, at in zip(own, inside[loop], strict=True)})
    return name, offsets
