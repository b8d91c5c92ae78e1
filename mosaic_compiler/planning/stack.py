"""Who lies on whom: a placement as a relation, evaluated for other sizes in a fraction of the time of a new one."""

from __future__ import annotations

from collections.abc import Sequence

from mosaic_compiler.planning.placement import Interval, neighbours_of


class Stack:
    """The order in which intersecting lives lie above each other in one placement.

    For any other sizes each life goes right onto the highest of those below it.  That is free of overlap whatever the
    sizes are, since every two lives that intersect stand in the relation; whether it is as low as it can be depends on
    them.

    Args:
        lives: with any sizes; only who intersects whom counts.
        offsets: of the placement, by position.
    """

    def __init__(self, lives: Sequence[Interval], offsets: Sequence[int]) -> None:
        neighbours = neighbours_of([life._replace(size=1) for life in lives])
        # what is empty rests on nothing, and nothing that it meets is lifted by it
        self._order = sorted(range(len(lives)), key=lambda i: (offsets[i], lives[i].size > 0, lives[i].name))
        rank = {index: position for position, index in enumerate(self._order)}
        below: list[set[int]] = [set() for _ in lives]
        self._supports: list[tuple[int, ...]] = [()] * len(lives)
        for index in self._order:
            under = sorted((other for other in neighbours[index] if rank[other] < rank[index]), key=lambda i: -rank[i])
            below[index].update(under)
            hidden: set[int] = set()  # those below one of its supports
            supports = []
            for other in under:
                if other not in hidden:
                    supports.append(other)
                    hidden |= below[other]
            self._supports[index] = tuple(supports)

    def offsets(self, sizes: Sequence[int]) -> list[int]:
        """Offsets by position for these sizes (multiples of 512)."""
        tops = [0] * len(sizes)
        lows = [0] * len(sizes)
        for index in self._order:
            supports = self._supports[index]
            at = max([tops[other] for other in supports]) if supports else 0
            lows[index] = at
            tops[index] = at + sizes[index]
        return lows
