"""The kinds of steps that are made of one captured graph: what a session or a policy chooses from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mosaic_compiler.ir.notes import StateNote
from mosaic_compiler.planning.reach import Reach

if TYPE_CHECKING:
    from torch import Tensor

    from mosaic_compiler.runtime.engine import Step


@dataclass(frozen=True)
class Kinds:
    """The kinds of steps that are made of one captured graph.

    Attributes:
        full: for all rows, keeping state; ``None`` if that cannot be.
        reuse: for some rows, with state; there with ``full``, or not at all.
        notes: where state and row numbers come in, of both (and of ``choose``).
        space: sizes of the rows: (N,), or (E, N) for E batch entries.
        origins: where in the model each kept value is computed.
        problem: why nothing can be kept.
        is_heavy: there are products in it: what it computes is worth keeping.
        ids: which input holds token ids; ``None``: that cannot be told.
        weights: which inputs are weights that kept values are computed with.
        reach: which rows depend on which; ``None``: all on all, for all that is known.
        is_rounded: values are kept in fewer bits than they are computed in.
        selects: keys are chosen for some rows in a step for all of them, and the others are not kept.
        parts: for each of them (dim, size), if it is only read up to that size; a table that may be made again longer.
        choose: for some rows, choosing the keys that ``reuse`` reads of all that are kept; ``None``: it reads all.
        has_residual: the last rows are also kept as they are computed; how many is a size of the last kept values.
    """

    full: Step | None = None
    reuse: Step | None = None
    notes: tuple[StateNote, ...] = (StateNote(), StateNote())
    space: tuple[Any, ...] = ()
    origins: tuple[str, ...] = ()
    problem: str = ""
    is_heavy: bool = False
    ids: int | None = None
    weights: tuple[int, ...] = ()
    reach: Reach | None = None
    parts: tuple[tuple[int, Any] | None, ...] = ()
    is_rounded: bool = False
    selects: bool = False
    choose: Step | None = None
    has_residual: bool = False

    @property
    def steps(self) -> tuple[Step, ...]:
        """All that there are, in the order of ``notes``."""
        return tuple(step for step in (self.full, self.reuse, self.choose) if step is not None)

    @property
    def keeps(self) -> bool:
        """Something lives from step to step."""
        return self.full is not None and bool(self.notes[0].places)

    @property
    def why(self) -> str:
        """Why nothing does."""
        return "" if self.keeps else self.problem or "each row depends on itself only"

    def has_rows_of(self, inputs: Sequence[Any], shape: tuple[int, int]) -> bool:
        """Its rows are those of token ids of this shape (a graph behind a break may have others: rows that were
        picked)."""
        if self.full is None:
            return False
        sizes = self.full.numbers(inputs)
        *entries, length = map(sizes, self.space)
        return length == shape[1] and (entries[0] if entries else 1) % shape[0] == 0

    def rows_for_entries(self, rows: Tensor, inputs: Sequence[Any]) -> Tensor:
        """Row numbers int64 [B, R] as the graph takes them: for its batch entries, which may be the batch several times
        over (guidance)."""
        assert self.full is not None
        entries = self.full.numbers(inputs)(self.space[0]) if len(self.space) > 1 else 1
        return rows.repeat(entries // rows.shape[0], 1) if entries != rows.shape[0] else rows.contiguous()
