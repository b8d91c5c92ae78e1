"""Placement from the ground up: a beam search over the skyline.

Every life that covers the lowest point of the skyline is tried there, and the :data:`WIDTH` partial placements that
lose least are kept.  A point that no life fits on any more is raised at once, so that what is lost there counts from
then on.  Searches begin again with other random numbers; each one only looks for placements lower than the best so far.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

_Ints: TypeAlias = "npt.NDArray[np.int64]"

WIDTH = 32
"""Partial placements that are kept; fewer where there is little time."""

_RAISES = 32
"""Points of the skyline that one step raises at most."""

_NOISE = 0.1
"""Randomness of the choice of candidates, relative to (height so far - bound)."""

_FAR = 1 << 60


class Skyline:
    """The lives of one placement problem, and the points of time that matter to it.

    Only the last birth before a death matters: what lives at any other time lives at such a one as well.

    Args:
        starts, ends, sizes: of the lives, half-open, none of them empty.

    Attributes:
        bound: the most bytes live at once.
    """

    def __init__(self, starts: Sequence[int], ends: Sequence[int], sizes: Sequence[int]) -> None:
        births = sorted(set(starts))
        times = sorted({births[bisect_left(births, end) - 1] for end in ends})
        self._sizes = list(sizes)
        self._first = [bisect_left(times, start) for start in starts]
        self._last = [bisect_left(times, end) for end in ends]
        change = [0] * (len(times) + 1)
        for first, last, size in zip(self._first, self._last, sizes, strict=True):
            change[first] += size
            change[last] -= size
        self._totals = list(accumulate(change[:-1]))
        self.bound = max(self._totals)

    def _tables(self) -> tuple[_Ints, _Ints, _Ints, _Ints, _Ints]:
        """Sizes, first and last points, live bytes by point, lives by point (filled up with one that never fits)."""
        first, last, count = self._first, self._last, len(self._sizes)
        members: list[list[int]] = [[] for _ in self._totals]
        for index in range(count):
            for point in range(first[index], last[index]):
                members[point].append(index)
        most = max(map(len, members))
        padded = [row + [count] * (most - len(row)) for row in members]
        return (
            _ints([*self._sizes, 0]), _ints([*first, 0]), _ints([*last, 0]), _ints(self._totals), _ints(padded)
        )  # fmt: skip

    def search(self, chance: np.random.Generator, height: int, cells: int, stop: float) -> tuple[list[int] | None, int]:
        """One beam search for a placement lower than ``height``.

        Args:
            chance: where its random numbers come from.
            cells: entries of its tables that it may write; it ends without a result after them, and after ``stop``
                (of ``time.perf_counter``).

        Returns:
            An offset for each life (``None`` if nothing was found), and the entries written.
        """
        count = len(self._sizes)
        width = min(WIDTH, cells // (count * (count + len(self._totals))))
        if not width:
            return None, cells  # not even one placement would be finished
        size, first, last, totals, members = self._tables()
        points = np.arange(len(totals))
        floor = np.zeros((1, len(totals)), np.int64)  # by state and point: the skyline
        rest = totals[None]  # ... and the bytes that are still to be placed
        lowest = np.zeros((1, count + 1), np.int64)  # by state and life: the lowest offset; FAR when placed
        lowest[:, count] = _FAR
        identity = np.zeros(1, np.int64)  # by state: hash of the lives placed
        marks = chance.integers(1, 1 << 62, count)
        history: list[tuple[_Ints, _Ints, _Ints]] = []  # by step and state: state before, life, offset
        done = 0
        for _ in range(count):
            done += floor.size + lowest.size
            if done > cells or time.perf_counter() > stop:
                return None, done
            rows = np.arange(len(floor))
            for _ in range(_RAISES):  # no life fits as low as the skyline is: those bytes are lost
                point = np.where(rest > 0, floor, _FAR).argmin(1)
                life = members[point]
                at = lowest[rows[:, None], life]
                least = at.min(1)
                if (floor[rows, point] == least).all():
                    break
                floor[rows, point] = least
            reach = floor + rest
            lost = reach.sum(1)
            kept = np.flatnonzero(reach.max(1) < height)
            if not len(kept):
                return None, done
            kept = kept[np.argsort(lost[kept], kind="stable")[:width]]
            floor, rest, lowest, identity, lost = floor[kept], rest[kept], lowest[kept], identity[kept], lost[kept]
            life, at = life[kept], at[kept]
            if history:
                before, what, where = history[-1]
                history[-1] = before[kept], what[kept], where[kept]
            # Candidates: lives that cover the lowest point, unless another one fits below them.
            area = np.zeros((len(kept), len(totals) + 1), np.int64)
            np.cumsum(floor, 1, out=area[:, 1:])
            row = np.arange(len(kept))[:, None]
            top = at + size[life]
            begin, end = first[life], last[life]
            cost = lost[:, None] + at * (end - begin) - area[row, end] + area[row, begin]
            state, column = np.nonzero((at < top.min(1)[:, None]) & (top < height))
            cost = cost[state, column]
            ranking = cost + chance.random(len(cost)) * (_NOISE * (height - self.bound))
            best = np.argsort(ranking, kind="stable")[: 8 * width]
            key = identity[state[best]] + marks[life[state[best], column[best]]]
            _, new = np.unique(key ^ (cost[best] * 0x9E3779B97F4A7), return_index=True)  # equal sets, equal loss: one
            new = np.sort(new)[: 2 * width]
            identity, state, column = key[new], state[best[new]], column[best[new]]
            what, where, above = life[state, column], at[state, column], top[state, column][:, None]
            begin, end = first[what][:, None], last[what][:, None]
            covered = (begin <= points) & (points < end)
            floor = np.where(covered, above, floor[state])
            rest = rest[state] - covered * size[what][:, None]
            lowest = lowest[state]
            meets = (first < end) & (begin < last)
            lowest = np.where(meets, np.maximum(lowest, above), lowest)
            lowest[np.arange(len(what)), what] = _FAR
            history.append((state, what, where))
        offsets, current = [0] * count, int(floor.max(1).argmin())
        for before, what, where in reversed(history):
            offsets[int(what[current])] = int(where[current])
            current = int(before[current])
        return offsets, done


def _ints(numbers: Sequence[int] | Sequence[Sequence[int]]) -> _Ints:
    return np.array(numbers, dtype=np.int64)
