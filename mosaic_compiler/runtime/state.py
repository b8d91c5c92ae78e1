"""What one graph keeps from step to step: memory with addresses of its own, for one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor

from mosaic_compiler.errors import MissingStateError, StateError
from mosaic_compiler.planning.lives import Sizes
from mosaic_compiler.planning.room import most_for
from mosaic_compiler.planning.selection import kept_keys
from mosaic_compiler.planning.words import in_words
from mosaic_compiler.runtime.engine import Step, holding
from mosaic_compiler.runtime.instructions import DEAD
from mosaic_compiler.runtime.kept_memory import KeptMemory
from mosaic_compiler.runtime.kinds import Kinds
from mosaic_compiler.runtime.validity import Validity

if TYPE_CHECKING:
    from mosaic_compiler.ir.notes import StatePlace
    from mosaic_compiler.planning.lowered import TensorFacts


class Block:
    """The state of one graph: memory for one length.

    Attributes:
        is_rounded: values are kept in fewer bits than they are computed in.
        is_partial: some keys are not kept, or not read.
        is_read: a step has used them since that was asked for.
        is_valid: a full step has filled it, and no step has failed since.
        validity: of its rows; ``None``: nobody asked, or rows depend on all others.
        computed: rows that the last step computed in each sequence.
    """

    def __init__(self, kinds: Kinds) -> None:
        assert kinds.full is not None
        assert kinds.reuse is not None
        self.full, self.reuse = kinds.full, kinds.reuse
        self._kinds, self.is_rounded, self.is_read = kinds, kinds.is_rounded, False
        self.is_partial = self._has_chosen = False
        self.device = kinds.full.device
        kept = len(kinds.notes[0].places)
        self._values = KeptMemory(_facts_of(kinds.full, kinds.notes[0].places), self.device)
        self._positions: KeptMemory | None = None  # of keys that are chosen among all of these
        self._chosen: sympy.Symbol | None = None
        if kinds.choose is not None:
            facts = _facts_of(kinds.choose, kinds.notes[2].places[kept:])
            self._positions, self._chosen = KeptMemory(facts, self.device), facts[0].shape[2]
        elif kinds.selects:
            self._chosen = _facts_of(kinds.full, kinds.notes[0].places)[0].shape[2]
        self._last = _facts_of(kinds.full, kinds.notes[0].places)[-1].shape[2] if kinds.has_residual else None
        self._keys = self._residual = 0
        self._for_rows: Tensor | None = None
        self.is_valid, self.computed = False, 0
        self.validity: Validity | None = None
        self._sizes: tuple[tuple[str, int], ...] | None = None
        self._meanings = dict(kinds.full.outline.meanings)
        self._weights: _Weights | None = None
        self._served: set[int] = set()

    @property
    def tensors(self) -> list[Tensor]:
        """One for each kept value, and for the positions of chosen keys, over memory that nobody else writes."""
        return self._values.tensors + ([] if self._positions is None else self._positions.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return self._values.nbytes + (0 if self._positions is None else self._positions.nbytes)

    @property
    def selects(self) -> bool:
        """Keys are chosen in full steps."""
        return self._kinds.selects

    @property
    def chooses(self) -> bool:
        """Keys are chosen among all that are kept, by :meth:`choose`."""
        return self._positions is not None

    def adopt(self, other: Block, inputs: Sequence[Any]) -> bool:
        """Take over the state of another graph of the same model, if it holds the same values: a model may be compiled
        again in its second call (because it has made tables in its first one)."""
        self._keys, self._for_rows, self.is_partial = other._keys, other._for_rows, other.is_partial
        self._residual = other._residual
        layouts = self._values.layouts(self._numbers(inputs))
        if not other.is_valid or self._kinds.origins != other._kinds.origins or not other._values.holds(layouts):
            return False
        weights = self._weights_in(inputs)
        if other._weights is None or not weights.is_same_where_both_are(other._weights):
            return False
        other._forget_programs(other.tensors)
        self._values, other._values = other._values, self._values
        other.is_valid = False
        self._sizes, self._weights, self.is_valid = self._sizes_of(inputs), weights, True
        return True

    def problem(self, inputs: Sequence[Any]) -> str:
        """Why state cannot be used with such inputs; nothing if it can."""
        if not self.is_valid:
            return "there is no valid state: the last step failed, or none has run; call full() first"
        if (sizes := self._sizes_of(inputs)) != self._sizes:
            known, now = (", ".join(in_words(given or (), self._meanings)) for given in (self._sizes, sizes))
            return f"state was kept for {known}, and this step has {now}: call full() with these ids first"
        if self._weights is None or not self._weights.are([inputs[i] for i in self._kinds.weights]):
            return "the model's weights have changed since state was kept: it is stale; call full() first"
        return ""

    def keep(
        self,
        inputs: Sequence[Any],
        rows: Tensor | None = None,
        keep: float | int | None = None,
        residual: int | None = None,
    ) -> list[Any]:
        """A step for all rows.

        Args:
            rows: int64 [B, R], those of the steps to come: where keys are chosen for them.
            keep: how many of the others are kept; ``None``: as the options say.
            residual: how many rows at the end are kept as they are computed as well, if some are; ``None``: as the
                options say.
        """
        if self._last is not None:
            length = self.full.numbers(inputs)(self._kinds.space[-1])
            wanted = self.full.options.cache_residual if residual is None else residual
            self._residual = min(max(wanted, 1) + 1, length)  # one more than is read
        self.is_valid, self.validity, self._has_chosen = False, None, False
        given = list(inputs)
        if self._kinds.selects:
            if rows is None:
                raise StateError(
                    "keys are chosen for rows (cache_keep): say which ones the next steps compute, full(ids, rows=...)"
                )
            self._choose_for(rows, keep, inputs)
            given.append(self._kinds.rows_for_entries(self._for_rows, inputs))  # type: ignore[arg-type]
        if self._positions is not None:  # they are of other keys now, and no part of this step's plan
            bound = list(self._positions.tensors)
            if not self._positions.lend():
                self._forget_programs(bound)
        if self._sizes_of(inputs) != self._sizes:
            self._map(inputs)
        if self.full.kept.outline.guard:
            self._values.fill(DEAD)
        try:
            with holding(self.nbytes):
                results = Step.__call__(self.full, [*given, *self._values.tensors])
        except BaseException:
            self.release()  # a step that did not fit leaves nothing behind
            raise
        self._weights, self.is_valid = self._weights_in(inputs), True
        return results[: len(results) - len(self._values.tensors)]

    def _choose_for(self, rows: Tensor, keep: float | int | None, inputs: Sequence[Any]) -> None:
        """Keys are chosen for these rows [B, R] now, so many of them."""
        self._for_rows = torch.sort(rows, 1).values
        keep = self.full.options.cache_keep if keep is None else keep
        assert keep is not None
        length = self.full.numbers(inputs)(self._kinds.space[-1])
        self._keys = kept_keys(keep, length, rows.shape[1])
        self.is_partial = self._keys < length

    def choose(self, inputs: Sequence[Any], rows: Tensor, keep: float | int | None = None) -> list[Any]:
        """A step for some rows that reads all keys, and chooses those that the next ones read.

        Args:
            rows: int64 [B, R], also those of the steps to come.
            keep: how many of the others are chosen; ``None``: as the options say.

        Raises:
            MissingStateError: if state is not there, or not for this.
        """
        assert self._kinds.choose is not None
        assert self._positions is not None
        if problem := self.problem(inputs):
            raise MissingStateError(problem)
        self._choose_for(rows, keep, inputs)
        sizes = self._numbers(inputs)
        if not self._positions.holds(self._positions.layouts(sizes)):
            self._forget_programs(self._positions.tensors)
        self._positions.map(sizes)
        # just these rows, none of them again: how many queries there are counts for some scores
        results = self._run_for_rows(self._kinds.choose, inputs, self._for_rows)  # type: ignore[arg-type]
        self._has_chosen = True
        return results[: len(results) - len(self._positions.tensors)]

    def track(self, inputs: Sequence[Any], shape: tuple[int, int]) -> None:
        """All rows were computed just now: from here on, know which of them are valid, where rows do not depend on all
        others."""
        if self._kinds.reach is not None:
            self.validity = Validity(self._kinds.reach, self.full.numbers(inputs), inputs, shape)

    def exact(self, inputs: Sequence[Any], wanted: Tensor, residual: int | None = None) -> list[Any]:
        """A step that computes what is invalid and needed, and nothing else; for all rows, if that is all.

        Args:
            wanted: bool [B, N], rows that somebody reads.
            residual: as of :meth:`keep`.
        """
        shape = (wanted.shape[0], wanted.shape[1])
        rows = None
        if self.validity is not None and not self.problem(inputs):
            rows = self.validity.rows_to_compute(inputs, wanted)
        if rows is None:
            results = self.keep(inputs, residual=residual)
            self.track(inputs, shape)
            self.computed = shape[1]
            return results
        validity, self.validity = self.validity, None  # should this step fail, nothing is known
        results = self.run_rows(inputs, rows)
        assert validity is not None
        validity.computed(inputs)
        self.validity, self.computed = validity, rows.shape[1]
        return results

    def run_rows(self, inputs: Sequence[Any], rows: Tensor) -> list[Any]:
        """A step for some rows.

        Args:
            rows: int64 [B, R], of each sequence of the batch.

        Raises:
            MissingStateError: if state is not there, or not for this.
        """
        if problem := self.problem(inputs):
            raise MissingStateError(problem)
        if self._for_rows is not None and not bool(_are_among(rows, self._for_rows)):
            raise MissingStateError(
                "keys were chosen for other rows than these (cache_keep): call "
                f"{'choose' if self.chooses else 'full'}() for them first"
            )
        if self.chooses and not self._has_chosen:
            raise MissingStateError("no keys are chosen yet among those that are kept: call choose() first")
        if self.is_rounded:
            rows = torch.sort(rows, 1).values  # attention of codes looks for rows that come twice side by side
        return self._run_for_rows(self.reuse, inputs, self._with_room(rows))

    def _run_for_rows(self, step: Step, inputs: Sequence[Any], rows: Tensor) -> list[Any]:
        entries = self._kinds.rows_for_entries(rows, inputs)
        self.is_valid, self.is_read = False, True
        with holding(self.nbytes):
            results = Step.__call__(step, [*inputs, entries, *self.tensors])
        self.is_valid = True
        return results

    def _with_room(self, rows: Tensor) -> Tensor:
        """As many columns as in an earlier step, down to half: the last row again."""
        count = rows.shape[1]
        wanted = min((known for known in self._served if count <= known <= most_for(count)), default=count)
        self._served.add(wanted)
        return rows if wanted == count else torch.cat([rows, rows[:, -1:].expand(-1, wanted - count)], 1)

    def _sizes_of(self, inputs: Sequence[Any]) -> tuple[tuple[str, int], ...]:
        """The sizes that kept values depend on."""
        numbers = self._numbers(inputs)
        return tuple((str(symbol), numbers(symbol)) for symbol in self._values.symbols)

    def _numbers(self, inputs: Sequence[Any]) -> Sizes:
        """The inputs' symbols, and the number of keys that are chosen."""
        found = dict(self.full.numbers(inputs).symbols)
        if self._chosen is not None:
            found[self._chosen] = self._keys
        if self._last is not None:
            found[self._last] = self._residual
        return Sizes(found)

    def _map(self, inputs: Sequence[Any]) -> None:
        """Memory and tensors for these sizes."""
        self._forget()
        self._values.map(self._numbers(inputs))
        self._sizes = self._sizes_of(inputs)

    def _weights_in(self, inputs: Sequence[Any]) -> _Weights:
        """Those that state is computed with."""
        sizes = self.full.numbers(inputs)
        parts = [part and (part[0], sizes(part[1])) for part in self._kinds.parts]
        return _Weights([inputs[i] for i in self._kinds.weights], parts)

    def _forget(self) -> None:
        """No program may be bound to memory that is given back."""
        self._forget_programs(self.tensors)
        self._sizes, self._has_chosen = None, False
        for memory in (self._values, self._positions):
            if memory is not None:
                memory.forget()

    def _forget_programs(self, tensors: Sequence[Tensor]) -> None:
        """Those that are bound to these."""
        for step in self._kinds.steps:
            step.forget(tensors)

    def release(self) -> None:
        """Give the memory back."""
        self.is_valid = False
        self._forget()
        for memory in (self._values, self._positions):
            if memory is not None:
                memory.release()


def _facts_of(step: Step, places: Sequence[StatePlace]) -> list[TensorFacts]:
    """Layouts of the inputs that are state."""
    found = [step.main_graph.inputs[place.input].tensor for place in places]
    return [facts for facts in found if facts is not None]


def _are_among(rows: Tensor, known: Tensor) -> Tensor:
    """Whether all rows [B, C] are among those known, int64 [B, R] in ascending order."""
    places = torch.searchsorted(known, rows.contiguous()).clamp(max=known.shape[1] - 1)
    return (known.gather(1, places) == rows).all()


class _Weights:
    """Weights that state was computed with, told by where they are and how often they were written (which inference
    tensors do not count).

    Args:
        parts: for each (dim, size), if it is only read up to there: a table, which the model may make again for longer
            sequences.  Those are kept, to be compared with what comes in their place.
    """

    def __init__(self, weights: Sequence[Tensor], parts: Sequence[tuple[int, int] | None]) -> None:
        self._counts_writes = not any(weight.is_inference() for weight in weights)
        self._parts = list(parts)
        self._tables = {i: weight for i, weight in enumerate(weights) if parts[i] is not None}
        self._marks = self._marks_of(weights)

    def _marks_of(self, weights: Sequence[Tensor]) -> list[tuple[int, int]]:
        if self._counts_writes:
            return [(weight.data_ptr(), weight._version) for weight in weights]
        return [(weight.data_ptr(), 0) for weight in weights]

    def are(self, weights: Sequence[Tensor]) -> bool:
        """They have not changed."""
        marks = self._marks_of(weights)
        if marks == self._marks:
            return True
        for i, (now, known) in enumerate(zip(marks, self._marks, strict=True)):
            if now != known and not self._takes_over(i, weights[i]):
                return False
        self._marks = marks
        return True

    def _takes_over(self, index: int, table: Tensor) -> bool:
        """What is read of a table is the same in another one."""
        old, part = self._tables.get(index), self._parts[index]
        if old is None or part is None or self._marks_of([old])[0] != self._marks[index]:
            return False
        if table.dtype != old.dtype or table.device != old.device or table.dim() != old.dim():
            return False
        if table.shape[part[0]] < part[1] or not torch.equal(
            table.narrow(part[0], 0, part[1]), old.narrow(part[0], 0, part[1])
        ):
            return False
        self._tables[index] = table
        return True

    def is_same_where_both_are(self, other: _Weights) -> bool:
        """The same, but for what only one of two graphs has (tables that the other one makes)."""
        first, second = set(self._marks), set(other._marks)
        return first <= second or second <= first
