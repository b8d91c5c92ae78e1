"""Which kept rows are still what a step for all rows would compute."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from mosaic_compiler.compat.symbols import FloorDiv, Max, Min, Mod
from mosaic_compiler.planning.lives import Sizes
from mosaic_compiler.planning.reach import QUERY, Reach, Run
from mosaic_compiler.runtime.rows import numbers_in


class Validity:
    """Validity of the rows of one graph's state.

    A row is valid as long as nothing that it sees has changed since it was computed.

    Args:
        reach: what rows see.
        sizes: of the graph's symbols.
        inputs: those that state was just kept for.
        shape: batch B and length N of the token ids.
    """

    def __init__(self, reach: Reach, sizes: Sizes, inputs: Sequence[Any], shape: tuple[int, int]) -> None:
        self._shape = shape
        self._by_row, self._whole = reach.rows, reach.whole
        tensors = [inputs[i] for i in (*self._by_row, *self._whole)]
        self._device = tensors[0].device if tensors else torch.device("cpu")
        self._valid = torch.ones(shape, dtype=torch.bool, device=self._device)
        self._first, self._last = (bound.to(self._device) for bound in runs(reach, sizes, shape[1]))
        self._known = self._copied(inputs)

    def rows_to_compute(self, inputs: Sequence[Any], wanted: Tensor) -> Tensor | None:
        """Rows that a step with such inputs has to compute, so that some rows are right.

        Args:
            wanted: bool [B, N].

        Returns:
            int64 [B, C]; ``None``: all rows.
        """
        changed = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
        for i in self._by_row:
            differs = inputs[i] != self._known[i]
            changed |= differs.reshape(-1, *self._shape).any(0)
        others = [(inputs[i] != self._known[i]).any() for i in self._whole if inputs[i].shape == self._known[i].shape]
        is_other = torch.stack(others).any() if others else torch.zeros((), dtype=torch.bool, device=self._device)
        self._valid &= ~self._seeing(changed)
        needed = wanted | (~self._valid & self._seen_by(wanted))
        most, other = torch.stack([needed.sum(1).max(), is_other.to(torch.int64)]).tolist()
        if other or len(others) < len(self._whole) or most == self._shape[1]:
            return None
        # what was computed is not valid where it sees, through more layers than were needed of it, what was left out
        self._computed = needed & ~self._seeing(~self._valid & ~needed)
        return numbers_in(needed, max(most, 1))

    def computed(self, inputs: Sequence[Any]) -> None:
        """Those rows have been computed."""
        self._valid |= self._computed
        self._known = self._copied(inputs)

    @property
    def all_valid(self) -> Tensor:
        """bool []: every row is valid."""
        return self._valid.all()

    def _copied(self, inputs: Sequence[Any]) -> dict[int, Tensor]:
        return {i: inputs[i].clone() for i in (*self._by_row, *self._whole)}

    def _seeing(self, changed: Tensor) -> Tensor:
        """Rows that see one of some rows: bool [B, N]."""
        sums = torch.nn.functional.pad(changed.cumsum(1), (1, 0))
        return sums.index_select(1, self._last) > sums.index_select(1, self._first)

    def _seen_by(self, rows: Tensor) -> Tensor:
        """Rows that one of some rows sees: bool [B, N]."""
        ends = torch.zeros(self._shape[0], self._shape[1] + 1, dtype=torch.int64, device=self._device)
        count = rows.to(torch.int64)
        ends.index_add_(1, self._first, count).index_add_(1, self._last, -count)
        return ends.cumsum(1)[:, :-1] > 0


def runs(reach: Reach, sizes: Sizes, length: int) -> tuple[Tensor, Tensor]:
    """The rows [first, last) that each row sees through all layers: int64 [N] both."""
    positions = torch.arange(length)
    first, last = positions, positions + 1
    for level in reach.levels:
        before = first, last
        # what a run of rows sees begins where the first of them, or a later one, sees first
        low = first.flip(0).cummin(0).values.flip(0)
        high = last.cummax(0).values
        for run in level:
            begin, end = seen(run, positions, sizes)
            is_some = begin < end
            first = torch.where(is_some, torch.minimum(first, low[begin.clamp(max=length - 1)]), first)
            last = torch.where(is_some, torch.maximum(last, high[(end - 1).clamp(min=0)]), last)
        if torch.equal(first, before[0]) and torch.equal(last, before[1]) and len(set(reach.levels)) == 1:
            break
    return first, last


def seen(run: Run, positions: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """The keys [first, last) of queries at some positions: int64, as they are."""
    length = len(positions)
    first = torch.zeros_like(positions) if run[0] is None else positions * 0 + _value(run[0], positions, sizes)
    last = torch.full_like(positions, length) if run[1] is None else positions * 0 + _value(run[1], positions, sizes)
    return first.clamp(0, length), last.clamp(0, length)


def _value(expr: sympy.Expr, positions: Tensor, sizes: Sizes) -> Any:
    """An expression at some positions."""
    if expr == QUERY:
        return positions
    if QUERY not in expr.free_symbols:
        return sizes(expr)
    functions: dict[type, Callable[[Any, Any], Any]] = {
        sympy.Add: operator.add,
        sympy.Mul: operator.mul,
        FloorDiv: operator.floordiv,
        Mod: operator.mod,
        Max: lambda a, b: torch.maximum(*_tensors(a, b)),
        Min: lambda a, b: torch.minimum(*_tensors(a, b)),
    }
    return functools.reduce(functions[type(expr)], [_value(part, positions, sizes) for part in expr.args])


def _tensors(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    return torch.as_tensor(a), torch.as_tensor(b)
