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
from mosaic_compiler.planning.room import most_for
from mosaic_compiler.planning.words import in_words
from mosaic_compiler.runtime.engine import Step, holding
from mosaic_compiler.runtime.instructions import DEAD
from mosaic_compiler.runtime.link import object_of
from mosaic_compiler.runtime.pools import new_arena

if TYPE_CHECKING:
    from mosaic_compiler.planning.lowered import TensorFacts


_NOTHING = torch.empty(0)


@dataclass(frozen=True)
class Kinds:
    """The kinds of steps that are made of one captured graph.

    Attributes:
        full: for all rows, keeping state; ``None`` if that cannot be.
        reuse: for some rows, with state.
        notes: where state and row numbers come in, of both.
        space: sizes of the rows: (N,), or (E, N) for E batch entries.
        origins: where in the model each kept value is computed.
        problem: why nothing can be kept.
        is_heavy: there are products in it: what it computes is worth keeping.
        ids: which input holds token ids; ``None``: that cannot be told.
        weights: which inputs are weights that kept values are computed with.
    """

    full: Step | None = None
    reuse: Step | None = None
    notes: tuple[StateNote, StateNote] = (StateNote(), StateNote())
    space: tuple[Any, ...] = ()
    origins: tuple[str, ...] = ()
    problem: str = ""
    is_heavy: bool = False
    ids: int | None = None
    weights: tuple[int, ...] = ()

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
        sizes = self.full.numbers([*inputs, *[_NOTHING] * len(self.notes[0].places)])
        *entries, length = map(sizes, self.space)
        return length == shape[1] and (entries[0] if entries else 1) % shape[0] == 0


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


def rows_for_entries(kinds: Kinds, rows: Tensor, inputs: Sequence[Any]) -> Tensor:
    """Row numbers int64 [B, R] as a graph takes them: for its batch entries, which may be the batch several times over
    (guidance)."""
    assert kinds.full is not None
    sizes = kinds.full.numbers([*inputs, *[_NOTHING] * len(kinds.notes[0].places)])
    entries = sizes(kinds.space[0]) if len(kinds.space) > 1 else 1
    return rows.repeat(entries // rows.shape[0], 1) if entries != rows.shape[0] else rows.contiguous()


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
        self._kinds, self._note = kinds, kinds.notes[0]
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

    def adopt(self, other: Block, inputs: Sequence[Any]) -> bool:
        """Take over the state of another graph of the same model, if it holds the same values: a model may be compiled
        again in its second call (because it has made tables in its first one)."""
        layouts = zip(self._facts, *self._shapes(inputs), strict=True)
        values = [(facts.dtype, shape, step) for facts, shape, step in layouts]
        known = [(str(t.dtype), tuple(t.shape), t.stride()) for t in other.tensors]
        if not other.is_valid or self._kinds.origins != other._kinds.origins or values != known:
            return False
        if not _same_weights(self._weights_in(inputs), other._weights):
            return False
        self.tensors, self.nbytes, self.arena = other.tensors, other.nbytes, other.arena
        self._finalizer.detach()
        self._finalizer = weakref.finalize(self, self.arena.release)
        self._finalizer.atexit = False
        other._finalizer.detach()
        for step in (other.full, other.reuse):
            step.forget(other.tensors)
        other.tensors, other.is_valid = [], False
        self._sizes, self._weights, self.is_valid = self._sizes_of(inputs), self._weights_in(inputs), True
        return True

    def _shapes(self, inputs: Sequence[Any]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Sizes and strides of all values."""
        sizes = self.full.numbers([*inputs, *[_NOTHING] * len(self._facts)])
        shapes = [tuple(map(sizes, facts.shape)) for facts in self._facts]
        return shapes, [tuple(map(sizes, facts.strides)) for facts in self._facts]

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
        entries = rows_for_entries(self._kinds, self._with_room(rows), inputs)
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
                f"state was kept for {', '.join(known)}, and this step has {', '.join(now)}: call full() with these "
                "ids first"
            )
        if self._weights_in(inputs) != self._weights:
            raise StateError("the model's weights have changed since state was kept: it is stale; call full() first")

    def _with_room(self, rows: Tensor) -> Tensor:
        """As many columns as in an earlier step, down to half: the last row again."""
        count = rows.shape[1]
        wanted = min((known for known in self._served if count <= known <= most_for(count)), default=count)
        self._served.add(wanted)
        return rows if wanted == count else torch.cat([rows, rows[:, -1:].expand(-1, wanted - count)], 1)

    def _sizes_of(self, inputs: Sequence[Any]) -> tuple[tuple[str, int], ...]:
        """The sizes that state depends on."""
        numbers = self.full.numbers([*inputs, *[_NOTHING] * len(self._facts)])
        return tuple((str(symbol), numbers(symbol)) for symbol in self._symbols)

    @torch.inference_mode(False)
    def _map(self, inputs: Sequence[Any]) -> None:
        """Memory and tensors for these sizes."""
        self._forget()
        dtypes = [object_of(facts.dtype) for facts in self._facts]
        shapes, strides = self._shapes(inputs)
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


class Store:
    """The state of one session: a block for each graph that it runs.

    Attributes:
        kind: what the next steps are: ``full`` or ``reuse``.
        shape: of the token ids.
        rows: int64 [B, R], which rows they compute.
        ran: kinds of the graphs that ran in the last call.
    """

    def __init__(self) -> None:
        self.kind = "full"
        self.shape = (1, 1)
        self.rows: Tensor | None = None
        self.ran: list[Kinds] = []
        self._blocks: weakref.WeakKeyDictionary[Step, Block] = weakref.WeakKeyDictionary()
        self._used: set[Step] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of state."""
        return sum(block.nbytes for block in self._blocks.values())

    def run(self, step: Stateful, inputs: Sequence[Any]) -> list[Any]:
        """Run the kind of step that is asked for.

        A graph that keeps nothing runs for some rows, where they are rows of its own, or as it is.
        """
        kinds = step.kinds
        self.ran.append(kinds)
        is_for_rows = kinds.has_rows_of(inputs, self.shape)
        if not kinds.keeps:
            if kinds.problem and kinds.is_heavy:
                raise StateError(f"this step cannot keep state: {kinds.problem}")
            if self.kind == "full" or not is_for_rows or kinds.reuse is None:
                return Step.__call__(step, inputs)
            assert self.rows is not None
            return Step.__call__(kinds.reuse, [*inputs, rows_for_entries(kinds, self.rows, inputs)])
        if not is_for_rows:
            raise StateError("rows of this step are not those of its token ids, so it cannot be told which to compute")
        block = self._blocks.get(step)
        if block is None and self.kind != "full":
            block = self._adopted(step, kinds, inputs)
        if block is None:
            if self.kind != "full":
                raise MissingStateError(
                    "there is no state of this graph, which was compiled for these inputs just now: call full() first"
                )
            block = self._blocks[step] = Block(kinds)
        self._used.add(step)
        if self.kind == "full":
            return block.keep(inputs)
        assert self.rows is not None
        return block.run_rows(inputs, self.rows)

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
        self.kind, self.shape, self.rows, self.ran, self._used = kind, shape, rows, [], set()

    def end(self) -> None:
        """The step is done: state of graphs that had no part in a full one is of other ids."""
        for step in [step for step in self._blocks if self.kind == "full" and step not in self._used]:
            self._blocks.pop(step).release()
        self._used = set()

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


def _same_weights(one: Any, other: Any) -> bool:
    """The same memory, written as often, but for what only one of two graphs has (tables that the other one makes)."""
    first, second = (set(zip(at, writes or at, strict=True)) for at, writes in (one, other))
    return first <= second or second <= first
