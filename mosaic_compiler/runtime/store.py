"""The state of a session: a block for each graph that it runs.

Compiled steps are called as ever, by a model's own code.  While a session says so (:func:`stepping`), a call runs the
kind of step that is asked for: for all rows, keeping state, or for some rows, with state.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from mosaic_compiler.errors import MissingStateError, StateError
from mosaic_compiler.planning.reach import Reach
from mosaic_compiler.runtime.bindings import told
from mosaic_compiler.runtime.engine import Step
from mosaic_compiler.runtime.kinds import Kinds
from mosaic_compiler.runtime.state import Block

if TYPE_CHECKING:
    from torch import Tensor


class Stateful(Step, ABC):
    """A step that has kinds (see :class:`Kinds`)."""

    @property
    @abstractmethod
    def kinds(self) -> Kinds:
        """Made when they are first asked for."""

    @property
    @abstractmethod
    def reach(self) -> Reach | None:
        """Which rows depend on which; ``None``: all on all, for all that is known."""

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        store = _store.get()
        return told(self, inputs, lambda: self.run_alone(inputs) if store is None else store.run(self, inputs))

    def run_alone(self, inputs: Sequence[Any]) -> list[Any]:
        """A call outside of sessions."""
        return Step.__call__(self, inputs)


class Store:
    """The state of one session: a block for each graph that it runs.

    Attributes:
        kind: what the next steps are: ``full``; ``reuse``; ``choose``: as that, and where keys are chosen among all
            that are kept, they are chosen; or ``exact``: for all rows or for some, whatever is right (where rows depend
            on all others, nothing is kept for that).
        keep: other keys that are kept, where keys are chosen; ``None``: as many as the options say.
        residual: rows at the end that are kept as they are computed, where some are; ``None``: as the options say.
        shape: of the token ids.
        rows: int64 [B, R], which rows they compute; of ``exact`` steps those that somebody reads (or bool [B, N]); of
            ``full`` ones, where keys are chosen, those of the steps to come.
        ran: kinds of the graphs that ran in the last call.
        computed: the most rows that a graph with state computed in a sequence of it; 0: none has state.
    """

    def __init__(self) -> None:
        self.kind = "full"
        self.keep: float | int | None = None
        self.residual: int | None = None
        self.shape = (1, 1)
        self.rows: Tensor | None = None
        self.ran: list[Kinds] = []
        self.computed = 0
        self._blocks: weakref.WeakKeyDictionary[Step, Block] = weakref.WeakKeyDictionary()
        self._used: set[Step] = set()
        self._before: list[Stateful] = []
        self._now: list[Stateful] = []

    @property
    def nbytes(self) -> int:
        """Bytes of state."""
        return sum(block.nbytes for block in self._blocks.values())

    @property
    def has_read_rounded(self) -> bool:
        """The last step has used state that is kept in fewer bits than it was computed in, or without all keys."""
        return any((block.is_rounded or block.is_partial) and block.is_read for block in self._blocks.values())

    @property
    def selects(self) -> bool:
        """Keys are chosen for some rows."""
        return any(block.selects for block in self._blocks.values())

    @property
    def chooses(self) -> bool:
        """Keys are chosen among all that are kept."""
        return any(block.chooses for block in self._blocks.values())

    @property
    def is_proven(self) -> bool:
        """Of all state it is known which rows are valid."""
        return bool(self._blocks) and all(block.validity is not None for block in self._blocks.values())

    @property
    def has_invalid(self) -> Tensor | bool:
        """Some rows are known to be invalid (on a GPU as a tensor there)."""
        known = [block.validity for block in self._blocks.values() if block.validity is not None]
        found: Tensor | bool = False
        for validity in known:
            found = found | ~validity.all_valid
        return found

    def run(self, step: Stateful, inputs: Sequence[Any]) -> list[Any]:
        """Run the kind of step that is asked for.

        A graph that keeps nothing runs for some rows, where they are rows of its own, or as it is.
        """
        self._now.append(step)
        if self.kind == "exact" and not self._may_be_exact(step, inputs):
            return Step.__call__(step, inputs)
        kinds = step.kinds
        self.ran.append(kinds)
        is_for_rows = kinds.has_rows_of(inputs, self.shape)
        if not kinds.keeps:
            if kinds.problem and kinds.is_heavy:
                raise StateError(f"this step cannot keep state: {kinds.problem}")
            if self.kind == "full" or not is_for_rows:
                return Step.__call__(step, inputs)
            assert self.rows is not None
            assert kinds.reuse is not None
            return Step.__call__(kinds.reuse, [*inputs, kinds.rows_for_entries(self.rows, inputs)])
        if not is_for_rows:
            raise StateError("rows of this step are not those of its token ids, so it cannot be told which to compute")
        block = self._blocks.get(step)
        is_for_some = self.kind in ("reuse", "choose")
        if block is None and is_for_some:
            block = self._adopted(step, kinds, inputs)
        if block is None:
            if is_for_some:
                raise MissingStateError(
                    "there is no state of this graph, which was compiled for these inputs just now: call full() first"
                )
            block = self._blocks[step] = Block(kinds)
        self._used.add(step)
        if self.kind == "full":
            self.computed = self.shape[1]
            results = block.keep(inputs, self.rows, self.keep, self.residual)
            block.track(inputs, self.shape)
            return results
        assert self.rows is not None
        if self.kind == "exact":
            wanted = self.rows
            if wanted.dtype != torch.bool:
                wanted = torch.zeros(self.shape, dtype=torch.bool, device=self.rows.device).scatter_(1, self.rows, True)
            results = block.exact(inputs, wanted, self.residual)
            self.computed = max(self.computed, block.computed)
            return results
        self.computed = max(self.computed, self.rows.shape[1])
        block.validity = None  # what is used need not be valid
        if self.kind == "choose" and block.chooses:
            return block.choose(inputs, self.rows, self.keep)
        return block.run_rows(inputs, self.rows)

    def _may_be_exact(self, step: Stateful, inputs: Sequence[Any]) -> bool:
        """It is known which rows of it are valid, and the other graphs of the call can do with some rows as well.

        Raises:
            MissingStateError: if some rows were computed by a graph before, and this one needs all of them.
        """
        if 0 < self.computed < self.shape[1] and not _takes_some_rows(step, inputs, self.shape):
            raise MissingStateError("a graph that needs all rows follows one that has computed some")
        others = [other for other in self._before if other is not step]
        is_proven = step.reach is not None and step.kinds.keeps and step.kinds.has_rows_of(inputs, self.shape)
        if is_proven and all(other.reach is not None or _is_row_by_row(other) for other in others):
            return True
        if (block := self._blocks.pop(step, None)) is not None:
            block.release()
        return False

    def _adopted(self, step: Step, kinds: Kinds, inputs: Sequence[Any]) -> Block | None:
        """State of another graph that is just what this one needs."""
        made = Block(kinds)
        for other, block in list(self._blocks.items()):
            if made.adopt(block, inputs):
                del self._blocks[other]
                self._blocks[step] = made
                return made
        return None

    def check_kept(self) -> None:
        """Raise :class:`StateError` if nothing of what was called in this step could be kept."""
        if not any(kinds.keeps for kinds in self.ran):
            problems = [kinds.why for kinds in self.ran if kinds.is_heavy]
            reason = problems[0] if problems else "nothing of it was compiled"
            raise StateError(f"this function keeps no state: {reason}")

    def begin(self, kind: str, shape: tuple[int, int], rows: Tensor | None) -> None:
        """A step of this kind begins."""
        self.kind, self.shape, self.rows, self.ran, self._used, self.computed = kind, shape, rows, [], set(), 0
        self._now = []
        for block in self._blocks.values():
            block.is_read = False

    def end(self) -> None:
        """The step is done: state of graphs that had no part in a full one is of other ids."""
        is_for_some = self.kind in ("reuse", "choose")
        for step in [step for step in self._blocks if not is_for_some and step not in self._used]:
            self._blocks.pop(step).release()
        self._used, self._before = set(), self._now

    def invalidate(self) -> None:
        """Steps that use state are errors until it is kept again."""
        for block in self._blocks.values():
            block.is_valid = False

    def release(self) -> None:
        """Give all memory back."""
        for block in self._blocks.values():
            block.release()
        self._blocks.clear()


def _is_row_by_row(step: Stateful) -> bool:
    """Each row depends on itself only."""
    kinds = step.kinds
    return kinds.full is not None and not kinds.keeps


def _takes_some_rows(step: Stateful, inputs: Sequence[Any], shape: tuple[int, int]) -> bool:
    if step.reach is not None:
        return step.kinds.keeps and step.kinds.has_rows_of(inputs, shape)
    return _is_row_by_row(step)


_store: ContextVar[Store | None] = ContextVar("state_store", default=None)


def kind_asked_for() -> str:
    """The kind of step that a session asks this thread for; nothing outside of sessions."""
    store = _store.get()
    return "" if store is None else store.kind


@contextmanager
def stepping(store: Store, kind: str, shape: tuple[int, int], rows: Tensor | None = None) -> Iterator[None]:
    """Compiled steps that this thread calls inside of the ``with`` block are of this kind, with a session's state."""
    store.begin(kind, shape, rows)
    token = _store.set(store)
    try:
        yield
        store.end()
    except BaseException:
        store.invalidate()  # some graphs may have run, and others not
        raise
    finally:
        _store.reset(token)
