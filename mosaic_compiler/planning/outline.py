"""``StepOutline``: a compiled step as planning sees it.  Data: it can be kept on disk and planned without torch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

import sympy

from mosaic_compiler.errors import BudgetError, CaptureError, OptionsError
from mosaic_compiler.planning.lives import Sizes, StepLives
from mosaic_compiler.planning.placement import DEADLINE
from mosaic_compiler.planning.planner import Planned, Planner
from mosaic_compiler.planning.room import capacity


@dataclass(frozen=True)
class Selected:
    """A number that is known when a step starts, such as that of masked rows.

    Attributes:
        symbol: what it is called.
        counted: it is about the share of selected rows times this.
        most: and not more than this.
    """

    symbol: sympy.Symbol
    counted: sympy.Expr
    most: sympy.Expr


@dataclass(frozen=True)
class StepOutline:
    """What plans are made from.

    Attributes:
        variants: lives of each graph of the step by its name, the preferred ones first; the last one is always there.
        hints: the example's value of every symbol of the inputs.
        selected: the numbers that are known when a step starts.
        placement, deadline, chunk_rows, guard, meanings: see :class:`planner.Planner`.
    """

    variants: Mapping[str, StepLives]
    hints: Mapping[sympy.Symbol, int]
    selected: tuple[Selected, ...]
    placement: str = "auto"
    deadline: float = DEADLINE
    chunk_rows: int | None = None
    guard: int = 0
    meanings: tuple[tuple[str, str], ...] = ()

    @cached_property
    def planners(self) -> dict[str, Planner]:
        """Plans each graph; where a chunk size is asked for, only those with loops, and the last one."""
        *others, main = self.variants
        wanted = [name for name in others if self.chunk_rows is None or self.variants[name].regions]
        return {name: self._planner(self.variants[name]) for name in (*wanted, main)}

    @property
    def planner(self) -> Planner:
        """Plans the graph that is always there."""
        return self.planners[list(self.variants)[-1]]

    def _planner(self, lives: StepLives) -> Planner:
        return Planner(
            lives,
            counted=[number.symbol for number in self.selected],
            placement=self.placement,
            deadline=self.deadline,
            chunk_rows=self.chunk_rows,
            guard=self.guard,
            meanings=self.meanings,
        )

    def data(self) -> StepOutline:
        """This without graphs behind its lives, to be pickled."""
        return replace(self, variants={name: lives.data() for name, lives in self.variants.items()})

    def choose(self, sizes: Sizes, budget: int | None) -> tuple[str, Planned]:
        """The first graph that fits the budget, and its plan; the last one in whatever chunks it needs.

        Raises:
            BudgetError: if no chunk sizes fit the memory budget.
        """
        *others, main = self.planners
        for name in others:
            planner = self.planners[name]
            unchunked = planner.model.at(sizes)
            if budget is None or unchunked.peak(unchunked.rows) <= budget:
                with suppress(BudgetError):  # its placement is above the lower bound
                    return name, planner.plan(sizes, budget)
        return main, self.planner.plan(sizes, budget)

    def sizes_for(self, tokens: int, row_share: float = 1.0) -> Sizes:
        """All sizes of a step for a sequence of ``tokens``, as running it would plan them.

        The other sizes are those of the example; what was as long as its sequence is taken to be so again.
        ``row_share`` is the share of rows that masks select.

        Raises:
            OptionsError: if ``tokens`` or ``row_share`` is out of range.
            CaptureError: if the captured graph has no symbolic length.
        """
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
            raise OptionsError(f"tokens must be a whole number from 1, got {tokens!r}")
        if not 0 <= row_share <= 1:
            raise OptionsError(f"row_share is a share between 0 and 1, got {row_share!r}")
        main = self.planner.tokens
        if main is None:
            raise CaptureError("the captured graph has no symbolic length: give an example of more than one token")
        values = {symbol: tokens if hint == self.hints[main] else hint for symbol, hint in self.hints.items()}
        for number in self.selected:
            sizes = Sizes(values)
            values[number.symbol] = capacity(min(round(sizes(number.counted) * row_share), sizes(number.most)))
        return Sizes(values)

    def plan_for(self, tokens: int, row_share: float = 1.0, budget: int | None = None) -> Planned:
        """The plan for a sequence of ``tokens`` (see :meth:`sizes_for`).

        Raises:
            BudgetError: if it cannot fit.
        """
        return self.choose(self.sizes_for(tokens, row_share), budget)[1]

    def longest(self, budget: int, row_share: float = 1.0) -> int:
        """The most tokens whose step fits ``budget`` bytes besides weights, inputs and outputs; 0 if none do."""
        found = self.planner.longest(self.sizes_for(1 << 16, row_share), budget) or 0
        while found:
            try:
                self.planner.plan(self.sizes_for(found, row_share), budget)
            except BudgetError:  # the placement is above the lower bound, or rounding took more rows
                found -= max(found // 1000, 1)
            else:
                break
        return found
