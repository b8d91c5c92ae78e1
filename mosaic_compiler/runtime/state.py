"""What lives from step to step: memory with addresses of its own, one block for each graph that a session runs.

Compiled steps are called as ever, by a model's own code.  While a session says so (:func:`stepping`), a call runs the
kind of step that is asked for: for all rows, keeping state, or for some rows, with state.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mosaic_compiler.errors import StateError
from mosaic_compiler.ir.notes import StateNote
from mosaic_compiler.planning.buffers import stacked
from mosaic_compiler.planning.lives import Sizes
from mosaic_compiler.planning.room import most_for
from mosaic_compiler.planning.words import in_words
from mosaic_compiler.runtime.engine import Step, holding
from mosaic_compiler.runtime.instructions import DEAD
from mosaic_compiler.runtime.link import object_of
from mosaic_compiler.runtime.pools import new_arena

if TYPE_CHECKING:
    from mosaic_compiler.planning.lowered import TensorFacts


@dataclass(frozen=True)
class Kinds:
    """The kinds of steps that are made of one captured graph.

    Attributes:
        full: for all rows, keeping state; ``None`` if there is nothing to keep.
        reuse: for some rows, with state.
        notes: where state and row numbers come in, of both.
        problem: why nothing can be kept.
        is_heavy: there are products in it: what it computes is worth keeping.
        ids: which input holds token ids; ``None``: that cannot be told.
        weights: which inputs are weights that kept values are computed with.
    """

    full: Step | None = None
    reuse: Step | None = None
    notes: tuple[StateNote, StateNote] = (StateNote(), StateNote())
    problem: str = ""
    is_heavy: bool = False
    ids: int | None = None
    weights: tuple[int, ...] = ()


class MissingStateError(StateError):
    """A graph is to use state, and has not run for all rows yet: it was compiled just now."""


class Stateful(Step):
    """A step that has kinds (see :class:`Kinds`)."""

    @property
    def kinds(self) -> Kinds:
        """Made when they are first asked for."""
        raise NotImplementedError

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        store = _store.get()
        return self.run_alone(inputs) if store is None else store.run(self, inputs)

    def run_alone(self, inputs: Sequence[Any]) -> list[Any]:
        """A call outside of sessions."""
        return Step.__call__(self, inputs)


class Block:
    """The state of one graph: memory for one length.

    Attributes:
        tensors: one for each kept value, over memory that nobody else writes.
        nbytes: of all.
        is_valid: a full step has filled it, and no step has failed since.
    """

    def __init__(self, kinds: Kinds) -> None:
        assert kinds.full is not None
        assert kinds.reuse is not None
        self.full, self.reuse = kinds.full, kinds.reuse
        self._note, self._reuse_note = kinds.notes
        self._weights_at = kinds.weights
        graph = kinds.full.main_graph
        self._facts: list[TensorFacts] = []
        for place in self._note.places:
            facts = graph.inputs[place.input].tensor
            assert facts is not None
            self._facts.append(facts)
        numbers = [number for facts in self._facts for number in (*facts.shape, *facts.strides)]
        self._symbols = sorted({symbol for number in numbers for symbol in number.free_symbols}, key=str)
        self.device = kinds.full.device
        self.arena = new_arena(self.device)
        self.tensors: list[Tensor] = []
        self.nbytes, self.is_valid = 0, False
        self._sizes: tuple[tuple[str, int], ...] | None = None
        self._meanings = dict(kinds.full.outline.meanings)
        self._weights: Any = None
        self._counts_writes: bool | None = None
        self._served: set[int] = set()
        self._finalizer = weakref.finalize(self, self.arena.release)
        self._finalizer.atexit = False

    def fits(self, inputs: Sequence[Any]) -> bool:
        """State is there, and for such inputs."""
        return self.is_valid and self._sizes_of(inputs) == self._sizes and self._weights_in(inputs) == self._weights

    def keep(self, inputs: Sequence[Any]) -> list[Any]:
        """A step for all rows."""
        self.is_valid, self._counts_writes = False, None
        if self._sizes_of(inputs) != self._sizes:
            self._map(inputs)
        if self.full.kept.outline.guard:
            self.arena.fill(0, self.nbytes, DEAD)
        try:
            with holding(self.nbytes):
                results = Step.__call__(self.full, [*inputs, *self.tensors])
        except BaseException:
            self.release()  # a step that did not fit leaves nothing behind
            raise
        self._weights, self.is_valid = self._weights_in(inputs), True
        return results[: len(results) - len(self.tensors)]

    def run_rows(self, inputs: Sequence[Any], rows: Tensor) -> list[Any]:
        """A step for some rows.

        Args:
            rows: int64 [B, R], of each sequence of the batch.

        Raises:
            StateError: if state is not there, or not for this.
        """
        self._check(inputs)
        entries = self._rows_for_entries(rows)
        self.is_valid = False
        with holding(self.nbytes):
            results = Step.__call__(self.reuse, [*inputs, entries, *self.tensors])
        self.is_valid = True
        return results

    def _check(self, inputs: Sequence[Any]) -> None:
        if not self.is_valid:
            raise StateError("there is no valid state: the last step failed, or none has run; call full() first")
        if (sizes := self._sizes_of(inputs)) != self._sizes:
            known, now = (in_words(given or (), self._meanings) for given in (self._sizes, sizes))
            raise StateError(
                f"state was kept for {', '.join(known)}, and this step has {', '.join(now)}: call full() with these ids "
                "first"
            )
        if self._weights_in(inputs) != self._weights:
            raise StateError("the model's weights have changed since state was kept: it is stale; call full() first")

    def _rows_for_entries(self, rows: Tensor) -> Tensor:
        """Row numbers as the graph takes them: for its batch entries, which may be the batch several times over
        (guidance), with as many columns as an earlier step, down to half (the last row again)."""
        position = self._reuse_note.rows
        assert position is not None
        facts = self.reuse.main_graph.inputs[position].tensor
        assert facts is not None
        count = rows.shape[1]
        served = [known for known in self._served if count <= known <= most_for(count)]
        wanted = min(served, default=count)
        self._served.add(wanted)
        if wanted > count:
            rows = torch.cat([rows, rows[:, -1:].expand(-1, wanted - count)], 1)
        entries = rows.shape[0]
        if len(facts.shape) > 1:
            entries = Sizes({s: n for s in self._symbols for name, n in self._sizes or () if str(s) == name})(
                facts.shape[0]
            )
        if entries % rows.shape[0]:
            raise StateError(f"rows are given for {rows.shape[0]} sequences, and the step has {entries}")
        return rows.repeat(entries // rows.shape[0], 1) if len(facts.shape) > 1 else rows.squeeze(0)

    def _sizes_of(self, inputs: Sequence[Any]) -> tuple[tuple[str, int], ...]:
        """The sizes that state depends on."""
        numbers = self.full.numbers([*inputs, *[_NOTHING] * len(self._facts)])
        return tuple((str(symbol), numbers(symbol)) for symbol in self._symbols)

    @torch.inference_mode(False)
    def _map(self, inputs: Sequence[Any]) -> None:
        """Memory and tensors for these sizes."""
        self._forget()
        sizes = self.full.numbers([*inputs, *[_NOTHING] * len(self._facts)])
        dtypes = [object_of(facts.dtype) for facts in self._facts]
        shapes = [tuple(map(sizes, facts.shape)) for facts in self._facts]
        strides = [tuple(map(sizes, facts.strides)) for facts in self._facts]
        nbytes = [
            dtype.itemsize * (1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)))
            for dtype, shape, stride in zip(dtypes, shapes, strides, strict=True)
        ]
        offsets, total = stacked(nbytes)
        self.arena.ensure(total)
        self.tensors = [
            self.arena.tensor(at, dtype, shape, stride, at + size)
            for at, size, dtype, shape, stride in zip(offsets, nbytes, dtypes, shapes, strides, strict=True)
        ]
        self.nbytes, self._sizes = total, self._sizes_of(inputs)

    def _weights_in(self, inputs: Sequence[Any]) -> Any:
        """What tells whether weights that state was computed with have changed: where they are, and how often they were
        written (inference tensors do not count that)."""
        weights = [inputs[i] for i in self._weights_at]
        if self._counts_writes is None:
            self._counts_writes = not any(weight.is_inference() for weight in weights)
        versions = [weight._version for weight in weights] if self._counts_writes else None
        return [weight.data_ptr() for weight in weights], versions

    def _forget(self) -> None:
        """No program may be bound to memory that is given back."""
        for step in (self.full, self.reuse):
            step.forget(self.tensors)
        self.tensors, self._sizes, self.nbytes = [], None, 0

    def release(self) -> None:
        """Give the memory back."""
        self.is_valid = False
        self._forget()
        self.arena.release()


_NOTHING = torch.empty(0)


class Store:
    """The state of one session: a block for each graph that it runs.

    Attributes:
        kind: what the next steps are: ``full`` or ``reuse``.
        rows: int64 [B, R], which rows they compute.
        ran: kinds of the graphs that ran in the last call.
    """

    def __init__(self) -> None:
        self.kind = "full"
        self.rows: Tensor | None = None
        self.ran: list[Kinds] = []
        self._blocks: weakref.WeakKeyDictionary[Step, Block] = weakref.WeakKeyDictionary()

    @property
    def nbytes(self) -> int:
        """Bytes of state."""
        return sum(block.nbytes for block in self._blocks.values())

    def run(self, step: Stateful, inputs: Sequence[Any]) -> list[Any]:
        """Run the kind of step that is asked for."""
        kinds = step.kinds
        self.ran.append(kinds)
        if kinds.full is None:
            if kinds.is_heavy:
                raise StateError(f"this step cannot keep state: {kinds.problem}")
            return Step.__call__(step, inputs)
        block = self._blocks.get(step)
        if block is None:
            if self.kind != "full":
                raise MissingStateError(
                    "there is no state of this graph, which was compiled for these inputs just now: call full() first"
                )
            block = self._blocks[step] = Block(kinds)
        if self.kind == "full":
            return block.keep(inputs)
        assert self.rows is not None
        return block.run_rows(inputs, self.rows)

    def check_kept(self) -> None:
        """Raise :class:`StateError` if nothing of what was called in this step could be kept."""
        if not any(kinds.full is not None for kinds in self.ran):
            problems = [kinds.problem for kinds in self.ran if kinds.problem]
            reason = problems[0] if problems else "nothing of it was compiled"
            raise StateError(f"this function keeps no state: {reason}")

    def invalidate(self) -> None:
        """Steps that use state are errors until it is kept again."""
        for block in self._blocks.values():
            block.is_valid = False

    def release(self) -> None:
        """Give all memory back."""
        for block in self._blocks.values():
            block.release()
        self._blocks.clear()


_store: ContextVar[Store | None] = ContextVar("state_store", default=None)


@contextmanager
def stepping(store: Store, kind: str, rows: Tensor | None = None) -> Iterator[None]:
    """Compiled steps that this thread calls inside of the ``with`` block are of this kind, with this session's state."""
    store.kind, store.rows, store.ran = kind, rows, []
    token = _store.set(store)
    try:
        yield
    except BaseException:
        store.invalidate()  # some graphs may have run, and others not
        raise
    finally:
        _store.reset(token)
