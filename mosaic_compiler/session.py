"""``Session``: steps that keep what they computed, and steps that only compute some rows, for loops of one's own."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from mosaic_compiler.compat.dynamo import lookup_backend
from mosaic_compiler.errors import StateError
from mosaic_compiler.planning.budget import parse_budget
from mosaic_compiler.planning.plan import MemoryPlan
from mosaic_compiler.runtime.engine import Step, running, within_budget
from mosaic_compiler.runtime.rows import rows_of
from mosaic_compiler.runtime.state import Store, stepping

lookup_backend("mosaic")


class Session:
    """One sequence (or batch) that is denoised step by step, and what its steps have kept.

    A ``full`` step computes all rows, as calling the function does, and keeps the values that are needed whole (keys
    and values of attention).  A ``reuse`` step computes some rows: of what is kept those rows are replaced, all others
    are as they were.  What it returns is the same as of a full step if nothing that the rows see has changed since
    their state was kept; otherwise it is an approximation.

    Args:
        function: a model or step, called with token ids int64 [B, N] first; compiled or not.
        memory_budget: bytes (or ``"8GiB"``) for state and everything that a step allocates besides weights, inputs and
            outputs.
        options: of the backend (see :class:`~mosaic_compiler.MosaicOptions`), unless ``function`` is compiled already.

    Attributes:
        plans: by kind of step, the plan of the last one with the highest peak.

    Example:
        >>> with mosaic_compiler.Session(model) as session:
        ...     logits = session.full(ids).logits
        ...     ids[:, 40] = logits[:, 40].argmax(-1)
        ...     logits = session.reuse(ids, range(32, 64)).logits  # rows 32 to 63; zeros elsewhere

    A session is for one thread at a time; several sessions of a function stand side by side.  It may be used again
    after an error in a step, beginning with a full one.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        memory_budget: int | str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._function = compiled_once(function, dict(options or {}))
        self._budget = parse_budget(memory_budget)
        self._store: Store | None = Store()
        self._lock = threading.Lock()
        self._shape: tuple[int, int] | None = None
        self.plans: dict[str, MemoryPlan] = {}

    # ---------------------------------------------------------------------------------------- steps
    def full(self, ids: Tensor, *more: Any, **named: Any) -> Any:
        """Call the function, for all rows, and keep state.

        Args:
            ids: int64 [B, N]; ``more`` and ``named`` are what the function takes besides.

        Raises:
            StateError: if the function has nothing that can be kept, or the session is closed, or in use.
            BudgetError: if step and state do not fit ``memory_budget``.
        """
        with self._taken() as store:
            self._shape = _shape_of(ids)
            return self._run(store, "full", None, (ids, *more), named)

    def reuse(self, ids: Tensor, rows: Any, *more: Any, **named: Any) -> Any:
        """Call the function for some rows, with all others as they were kept.

        Args:
            ids: int64 [B, N].
            rows: which: int64 [R] (for each sequence) or [B, R], a ``range`` or list of numbers, or bool [B, N].  Of
                others, results hold nothing in particular: zeros where they are returned.

        Raises:
            StateError: if there is no state for these ids or weights, for rows out of range, or as for :meth:`full`.
        """
        with self._taken() as store:
            if self._shape is None:
                raise StateError("there is no state yet: call full() first")
            if (shape := _shape_of(ids)) != self._shape:
                known, now = list(self._shape), list(shape)
                raise StateError(f"state was kept for ids {known}, these are {now}: call full() first")
            return self._run(store, "reuse", rows_of(rows, *shape, ids.device), (ids, *more), named)

    def _run(self, store: Store, kind: str, rows: Tensor | None, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
        ran: list[Step] = []
        assert self._shape is not None
        with (
            running(ran.append),
            within_budget(self._budget),
            stepping(store, kind, self._shape, rows),
            torch.no_grad(),
        ):
            result = self._function(*args, **named)
            store.check_kept()
        plans = [step.plan for step in ran if step.plan is not None]
        if plans:
            self.plans[kind] = max(plans, key=lambda plan: plan.peak)
        return result

    # ----------------------------------------------------------------------------------------- life
    @property
    def nbytes(self) -> int:
        """Bytes of state."""
        return 0 if self._store is None else self._store.nbytes

    def invalidate(self) -> None:
        """Make the next step a full one: a ``reuse`` raises."""
        if self._store is not None:
            self._store.invalidate()

    def close(self) -> None:
        """Give the memory of state back.  Closing again does nothing."""
        with self._lock:
            if self._store is not None:
                self._store.release()
                self._store = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _taken(self) -> Iterator[Store]:
        if not self._lock.acquire(blocking=False):
            raise StateError("this session is in use by another thread: give each thread a session of its own")
        try:
            if self._store is None:
                raise StateError("this session is closed: make another one")
            yield self._store
        finally:
            self._lock.release()


def _shape_of(ids: Tensor) -> tuple[int, int]:
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise StateError("token ids must be a tensor [B, N]")
    return ids.shape[0], ids.shape[1]


_compiled: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
_compiled_lock = threading.Lock()


def compiled_once(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    """The function, compiled; the same one for all sessions with the same options."""
    if hasattr(function, "_orig_mod") or hasattr(function, "_torchdynamo_orig_callable"):
        return function
    with _compiled_lock:
        known = _compiled.setdefault(function, {})
        key = repr(sorted(options.items()))
        if key not in known:
            known[key] = torch.compile(function, backend="mosaic", dynamic=True, options=options)
        return known[key]
