"""The ladder: what is kept where not all of it fits, one rung after the other, the least approximate first.

Each rung is measured (``docs/quality.md``).  Nobody is put on an approximate one who has not asked for it: by
``cache_dtype="auto"``, or by ``cache="auto"``, whose last rung is to keep nothing, and to compute all rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mosaic_compiler.planning.precisions import LADDER, precision_of
from mosaic_compiler.planning.selection import DEFAULT_KEEP, keep_text


@dataclass(frozen=True)
class Rung:
    """One way to keep values.

    Attributes:
        precision: see ``planning/precisions.py``; ``None``: as they are computed.
        keep: other keys, a share or a number; ``None``: all of them.
        is_kept: ``False``: nothing is, and every step computes all rows.
    """

    precision: str | None = None
    keep: float | int | None = None
    is_kept: bool = True

    def __str__(self) -> str:
        if not self.is_kept:
            return "nothing (every step computes all rows)"
        keys = "all keys" if self.keep is None else f"{keep_text(self.keep)} of the keys"
        return f"{keys} in {self.precision or 'the precision that they are computed in'}"

    @property
    def short(self) -> str:
        """For tables."""
        if not self.is_kept:
            return "nothing"
        keys = "all" if self.keep is None else keep_text(self.keep)
        return keys if self.precision is None else f"{keys}, {self.precision}"


def rungs_of(policy: str, precision: str | None, keep: float | int | None) -> tuple[Rung, ...]:
    """What is tried, in this order, until state and steps fit the memory budget.

    Args:
        policy: its name; ``auto``: down to nothing.
        precision: ``auto``: those of :data:`~mosaic_compiler.planning.precisions.LADDER`.

    Raises:
        ValueError: for a precision that there is not.
    """
    is_auto = policy == "auto"
    if precision != "auto":
        precision_of(precision)
    tried = LADDER if precision == "auto" or (is_auto and precision is None) else (precision,)
    rungs = [Rung(each, keep) for each in tried]
    if is_auto and keep is None:
        rungs += [replace(rung, keep=DEFAULT_KEEP) for rung in (rungs[0], rungs[-1])]
    if is_auto:
        rungs.append(Rung(is_kept=False))
    return tuple(dict.fromkeys(rungs))
