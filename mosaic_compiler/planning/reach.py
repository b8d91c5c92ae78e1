"""How far a row sees, through all layers: what says which kept rows are still what they would be.

A row's state is what a step for all rows would compute as long as no row that it sees has changed since it was written.
In one attention a query sees a run of keys, an expression of its position; through several, what those see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import sympy

QUERY = sympy.Symbol("query", integer=True, nonnegative=True)
"""The position of a query among the rows."""

Run: TypeAlias = "tuple[sympy.Expr | None, sympy.Expr | None]"
"""Keys [first, last) that a query sees, of ``QUERY`` and sizes; ``None``: from the first on, to the last one."""


@dataclass(frozen=True)
class Reach:
    """What the rows of a graph depend on.

    Attributes:
        levels: the attentions behind each other, from the inputs on; of those side by side, what each of them sees.
        rows: inputs that are read row by row.
        whole: inputs of which every row depends on all.
    """

    levels: tuple[tuple[Run, ...], ...]
    rows: tuple[int, ...]
    whole: tuple[int, ...]

    @property
    def says(self) -> str:
        """The visibilities, for people."""
        runs = dict.fromkeys(run for level in self.levels for run in level)
        return " and ".join(map(named, runs))


def named(run: Run) -> str:
    """What a visibility is called, for example ``block-causal, 32``."""
    first, last = run
    if first is None and last is None:
        return "all"
    if first is None and last is not None:
        if sympy.expand(last - QUERY) == 1:
            return "causal"
        block = last.subs(QUERY, 0)
        if block.is_Integer and block > 0 and _is_block(last, int(block)):
            return f"block-causal, {block}"
    return f"keys [{0 if first is None else first}, {'N' if last is None else last})"


def _is_block(last: sympy.Expr, block: int) -> bool:
    """Its values are those of the ends of blocks, where they change."""
    places = (0, block - 1, block, 2 * block - 1, 2 * block, 7 * block + 1)
    return all(last.subs(QUERY, at) == (at // block + 1) * block for at in places)
