"""Placement: from lives to offsets.  Deterministic, independent of the order of its input.

First-fit in a few orders costs milliseconds, and mostly reaches the lower bound.  Where it does not, what came out
above the bound is placed again together with its neighbours, and first-fit goes round them.  Where that fails too, a
beam search (``skyline.py``) builds placements from the ground up until the deadline.  Sizes are multiples of 512, and
so every offset is.
"""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np

from mosaic_compiler.planning.buffers import align
from mosaic_compiler.planning.skyline import Skyline

Offsets: TypeAlias = "dict[str, int]"

DEADLINE = 0.02
"""Seconds that the search for a better placement may take, where first-fit does not reach the lower bound."""

RATE = 25_000_000
"""Entries of its tables that the search writes per second of its deadline: what it finds depends on this work, not on
the clock, which only stops it on a much slower machine (after ten times the deadline)."""

_REPAIRS = 6
"""Repairs of one first-fit placement."""

_REPAIRED = 300
"""Lives that a repair places again at most."""


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


def _by_area(lives: Sequence[Life]) -> list[int]:
    """Decreasing bytes times lifetime."""
    return _ranked([((b.start - b.end) * b.size, b.start, b.end, b.name) for b in lives])


def _by_lifetime(lives: Sequence[Life]) -> list[int]:
    """Decreasing lifetime."""
    return _ranked([(b.start - b.end, -b.size, b.start, b.name) for b in lives])


ORDERS: Mapping[str, Callable[[Sequence[Life]], list[int]]] = MappingProxyType(
    {"live-total": _by_live_total, "size": _by_size, "area": _by_area, "lifetime": _by_lifetime}
)
"""Orders for first-fit, by name: positions of the lives, the first one placed first."""


def first_fit(
    order: Sequence[int],
    sizes: Sequence[int],
    neighbours: Sequence[Sequence[int]],
    fixed: Mapping[int, int] = MappingProxyType({}),
) -> list[int]:
    """Each life at the lowest offset that is free over all of it, round those that are fixed; offsets by position."""
    low, high = [-1] * len(sizes), [0] * len(sizes)
    for index, at in fixed.items():
        low[index], high[index] = at, at + sizes[index]
    for index in order:
        size, at = sizes[index], 0
        if size:
            for other in sorted([other for other in neighbours[index] if low[other] >= 0], key=low.__getitem__):
                if at + size <= low[other]:
                    break
                if high[other] > at:  # max() costs a third more
                    at = high[other]
        low[index], high[index] = at, at + size
    return low


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


def place(
    lives: Sequence[Life],
    algorithm: str = "auto",
    *,
    deadline: float = DEADLINE,
    seed: int = 0,
    fixed: Mapping[str, int] = MappingProxyType({}),
) -> tuple[str, Offsets]:
    """Offsets by one algorithm, or by the best of the portfolio (``auto``).

    ``auto`` ends at the first placement whose height equals the lower bound, or when the search has done the work of
    ``deadline`` seconds.  Lives that are ``fixed`` stay where they are, and first-fit goes round them.  Returns the
    name of the algorithm that was used, and its offsets.
    """
    lives = sorted(lives, key=lambda life: life.name)
    if fixed:
        return _place_around(lives, algorithm, fixed)
    if algorithm == "naive":
        return algorithm, naive(lives)
    if algorithm != "auto":
        offsets = first_fit(ORDERS[algorithm](lives), [life.size for life in lives], neighbours_of(lives))
        return algorithm, {life.name: at for life, at in zip(lives, offsets, strict=True)}
    problem = _Problem(lives)
    if problem.height > problem.bound:
        problem.improve(_Work.of(deadline), np.random.default_rng(seed))
    return problem.name, {life.name: at for life, at in zip(lives, problem.offsets, strict=True)}


def _place_around(lives: Sequence[Life], algorithm: str, fixed: Mapping[str, int]) -> tuple[str, Offsets]:
    """First-fit round lives that have their places, in one order or the best of all."""
    at = {index: fixed[life.name] for index, life in enumerate(lives) if life.name in fixed}
    sizes, neighbours = [life.size for life in lives], neighbours_of(lives)
    found: list[tuple[int, str, Offsets]] = []
    for name, make in ORDERS.items():
        if algorithm in ("auto", "naive", name):
            order = [index for index in make(lives) if index not in at]
            offsets = first_fit(order, sizes, neighbours, at)
            named = {life.name: offset for life, offset in zip(lives, offsets, strict=True)}
            found.append((height_of(lives, named), name, named))
    _, name, offsets_by_name = min(found, key=lambda item: item[0])
    return f"{name}, round fixed ones", offsets_by_name


@dataclass
class _Work:
    """What a search may still do: entries to write, and the time when it ends at the latest."""

    cells: int
    stop: float

    @classmethod
    def of(cls, seconds: float) -> _Work:
        return cls(round(seconds * RATE), time.perf_counter() + 10 * seconds)

    def is_left(self) -> bool:
        return self.cells > 0 and time.perf_counter() < self.stop

    @contextmanager
    def portion(self, parts: int) -> Iterator[_Work]:
        """One of so many parts of it; what is left of that is given back."""
        part = _Work(self.cells // parts, self.stop)
        self.cells -= part.cells
        yield part
        self.cells += max(part.cells, 0)


class _Problem:
    """Lives to be placed, and the best placement so far: of first-fit, to begin with."""

    def __init__(self, lives: Sequence[Life]) -> None:
        self.lives = lives
        self.sizes = [life.size for life in lives]
        self.bound = max(live_totals(lives)[1], default=0)
        self.height, self.name, self.offsets = 1 << 62, "", [0] * len(lives)
        self._neighbours = neighbours_of(lives)
        self._tried: list[tuple[str, list[int], list[int]]] = []
        for name, make in ORDERS.items():
            order = make(lives)
            offsets = first_fit(order, self.sizes, self._neighbours)
            self._tried.append((name, order, offsets))
            self._keep(name, offsets)
            if self.height == self.bound:
                return

    def improve(self, work: _Work, chance: np.random.Generator) -> None:
        """Repair what first-fit made, with a third of the work, then search."""
        with work.portion(3) as portion:
            for name, order, offsets in self._tried:
                self._repair(name, order, offsets, portion, chance)
        self._search(work, chance)

    def _keep(self, name: str, offsets: list[int]) -> None:
        height = max((at + size for at, size in zip(offsets, self.sizes, strict=True)), default=0)
        if height < self.height:
            self.height, self.name, self.offsets = height, name, offsets

    def _repair(
        self,
        name: str,
        order: Sequence[int],
        offsets: list[int],
        work: _Work,
        chance: np.random.Generator,
    ) -> None:
        """Place what is above the bound again, with its neighbours, as a problem of its own."""
        hot: set[int] = set()
        for _ in range(_REPAIRS):
            above = [i for i, at in enumerate(offsets) if at + self.sizes[i] > self.bound]
            before = len(hot)
            hot.update(above, *(self._neighbours[i] for i in above))
            few = before < len(hot) <= min(len(offsets) // 2, _REPAIRED)
            if not above or not few or self.height == self.bound or not work.is_left():
                return
            chosen = sorted(hot)
            part = _Problem([self.lives[i] for i in chosen])
            with work.portion(_REPAIRS) as portion:
                part.improve(portion, chance)
            fixed = dict(zip(chosen, part.offsets, strict=True))
            offsets = first_fit([i for i in order if i not in hot], self.sizes, self._neighbours, fixed)
            self._keep(f"{name}, repaired", offsets)

    def _search(self, work: _Work, chance: np.random.Generator) -> None:
        """Beam searches; the highest of the parts over which nothing lives across is always searched next."""
        parts = [_Part(self, indices) for indices in _split(self.lives)]
        while parts and work.is_left():
            worst = max(parts, key=lambda part: part.height)
            if worst.height <= self.bound:
                break
            found, cells = worst.skyline.search(chance, worst.height, work.cells, work.stop)
            work.cells -= cells
            if found is not None:
                worst.put(found)
        offsets = [0] * len(self.lives)
        for part in parts:
            for index, at in zip(part.indices, part.offsets, strict=True):
                offsets[index] = at
        self._keep("searched", offsets)


class _Part:
    """Lives of a problem that are searched together."""

    def __init__(self, problem: _Problem, indices: list[int]) -> None:
        own = [problem.lives[index] for index in indices]
        self.indices = indices
        self.sizes = [life.size for life in own]
        self.skyline = Skyline([life.start for life in own], [life.end for life in own], self.sizes)
        self.put([problem.offsets[index] for index in indices])

    def put(self, offsets: list[int]) -> None:
        self.offsets = offsets
        self.height = max(at + size for at, size in zip(offsets, self.sizes, strict=True))


def _split(lives: Sequence[Life]) -> list[list[int]]:
    """Positions of the lives that are not empty, divided at the times over which nothing lives."""
    parts: list[list[int]] = []
    until = None
    for index in sorted((i for i, life in enumerate(lives) if life.size), key=lambda i: lives[i].start):
        if until is None or lives[index].start >= until:
            parts.append([])
            until = lives[index].end
        parts[-1].append(index)
        until = max(until, lives[index].end)
    return parts


def height_of(lives: Sequence[Life], offsets: Mapping[str, int]) -> int:
    return max((offsets[b.name] + b.size for b in lives), default=0)


def place_blocks(
    lives: Sequence[Life],
    blocks: Mapping[str, str],
    algorithm: str = "auto",
    *,
    deadline: float = DEADLINE,
    seed: int = 0,
    fixed: Mapping[str, int] = MappingProxyType({}),
) -> tuple[str, Offsets]:
    """As :func:`place`, with the buffers that are local to one loop placed as one block.

    What lives at full length does not change while a loop runs, so little is lost by it, and equal loops (layers) are
    placed once.  Where the lower bound is missed, all are placed one by one as well.
    """
    if algorithm != "auto" or not blocks or fixed:
        return place(lives, algorithm, deadline=deadline, seed=seed, fixed=fixed)
    members: dict[str, list[Life]] = {}
    outer: list[Life] = []
    for life in lives:
        if life.name in blocks:
            members.setdefault(blocks[life.name], []).append(life)
        else:
            outer.append(life)
    known: dict[tuple[int, ...], tuple[list[int], int]] = {}
    inside: dict[str, list[int]] = {}
    for loop, own in members.items():
        start = min(b.start for b in own)
        key = tuple(number for b in own for number in (b.start - start, b.end - start, b.size))
        if key not in known:
            _, found = place(own, deadline=deadline, seed=seed)
            known[key] = [found[b.name] for b in own], height_of(own, found)
        inside[loop], height = known[key]
        outer.append(Interval(f"{loop}.*", start, max(b.end for b in own), align(height)))
    name, offsets = place(outer, deadline=deadline, seed=seed)
    for loop, own in members.items():
        base = offsets.pop(f"{loop}.*")
        offsets.update({b.name: base + at for b, at in zip(own, inside[loop], strict=True)})
    if height_of(lives, offsets) > max(live_totals(lives)[1], default=0):  # blocks do not stack as well as buffers
        other, single = place(lives, deadline=deadline, seed=seed)
        if height_of(lives, single) < height_of(lives, offsets):
            return other, single
    return name, offsets
