"""Room for rows: the one rule about how many rows are planned and computed where so many are needed.

The number of needed rows changes from step to step, and a new number is dear: a plan, a program, kernels that libraries
choose.  So there is room for a few more than are needed, and what has room for up to twice as many serves as well.
"""

from __future__ import annotations

FEW = 32
"""So many rows cost no more than one."""


def capacity(count: int) -> int:
    """The number of rows to plan for when ``count`` are needed: rounded up to a multiple of 32, and from 1,024 rows on
    by at most 1/32, so that a step whose count changes from call to call does not need a new plan each time.

    capacity(0) == 0, capacity(1) == 32, capacity(1000) == 1024, capacity(4096) == 4096.
    """
    unit = max(FEW, 1 << max(count.bit_length() - 6, 0))
    return -(-count // unit) * unit


def serves(room: int, needed: int) -> bool:
    """What has room for so many rows does for those that are needed (both as :func:`capacity` rounds them)."""
    return needed <= room <= 2 * needed


def most_for(count: int) -> int:
    """The most rows that are computed where ``count`` are needed."""
    return max(2 * count, FEW) if count else 0


def least_served(rows: int) -> int:
    """The fewest needed rows for which so many may be computed: half of them, and what was rounded up."""
    return max(rows // 2 - FEW, 1)
