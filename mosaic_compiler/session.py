"""``Session``: steps that keep what they computed, and steps that only compute some rows, for loops of one's own."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mosaic_compiler.compat.dynamo import forget_compiled
from mosaic_compiler.compat.tracing import tree_flatten, tree_map_only
from mosaic_compiler.errors import MissingStateError, StateError
from mosaic_compiler.kept_graphs import made_anew
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.owned.function import Owned
from mosaic_compiler.planning.budget import parse_budget
from mosaic_compiler.planning.plan import MemoryPlan
from mosaic_compiler.runtime.engine import Step, running, within_budget
from mosaic_compiler.runtime.rows import rows_of
from mosaic_compiler.runtime.served import MissingError
from mosaic_compiler.runtime.store import Store, stepping

logger = logging.getLogger("mosaic_compiler")


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
        computed_rows: how many rows of each sequence the last step computed.

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
        given = dict(options or {})
        parsed = MosaicOptions.parse(given)
        keep, residual = parsed.cache_keep, parsed.cache_residual
        if keep is not None:
            given["cache_keep"] = 1.0  # how many are kept is the session's number: nothing is compiled for it
        if residual:
            given["cache_residual"] = 1  # so is this
        self._function = compiled_once(function, given)
        if isinstance(self._function, Owned):
            self._function.refresh()
        self._budget = parse_budget(memory_budget)
        self._store: Store | None = Store()
        self._store.keep, self._store.residual = keep, residual or None
        self._lock = threading.Lock()
        self._shape: tuple[int, int] | None = None
        self._written: tuple[Sequence[Any], Mapping[str, Any]] | None = None
        self._differs: Tensor | bool = False
        self._has_used_rounded = False
        self.plans: dict[str, MemoryPlan] = {}
        self.computed_rows = 0

    # ---------------------------------------------------------------------------------------- steps
    def full(self, ids: Tensor, *more: Any, rows: Any = None, **named: Any) -> Any:
        """Call the function, for all rows, and keep state.

        Args:
            ids: int64 [B, N]; ``more`` and ``named`` are what the function takes besides.
            rows: with the option ``cache_keep``: the rows of the steps to come (as of :meth:`reuse`), for which keys
                are chosen (with ``cache_evict=False`` they are chosen later, by :meth:`choose`).  (Without it, ``rows``
                is an argument of the function's.)

        Raises:
            StateError: if the function has nothing that can be kept, or the session is closed, or in use.
            BudgetError: if step and state do not fit ``memory_budget``.
        """
        with self._taken() as store:
            if rows is not None and store.keep is None:
                named, rows = {**named, "rows": rows}, None  # one of the function's own
            chosen_for = None if rows is None else rows_of(rows, *_shape_of(ids), ids.device)
            return self._full(store, (ids, *more), named, chosen_for)

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
            return self._reuse(store, self._rows_of(rows, ids), (ids, *more), named)

    def choose(self, ids: Tensor, rows: Any, *more: Any, **named: Any) -> Any:
        """As :meth:`reuse`, reading all keys, and choose those that the steps to come for these rows read (with the
        options ``cache_keep`` and ``cache_evict=False``, under which all keys are kept).

        Args, raises: as :meth:`reuse`; :class:`StateError` without those options, too.
        """
        with self._taken() as store:
            if not store.chooses:
                raise StateError(
                    "keys are chosen among all that are kept with the options cache_keep and cache_evict=False, and "
                    "behind a full() step"
                )
            return self._reuse(store, self._rows_of(rows, ids), (ids, *more), named, "choose")

    def _rows_of(self, rows: Any, ids: Tensor) -> Tensor:
        """int64 [B, R], of ids that there is state for."""
        if self._shape is None:
            raise StateError("there is no state yet: call full() first")
        if (shape := _shape_of(ids)) != self._shape:
            known, now = list(self._shape), list(shape)
            raise StateError(f"state was kept for ids {known}, these are {now}: call full() first")
        return rows_of(rows, *shape, ids.device)

    def exact(self, ids: Tensor, rows: Any, *more: Any, **named: Any) -> Any:
        """Call the function for some rows, exactly: what is computed besides them are rows that they see whose state
        is not valid any more, because something that those see has changed.  Where rows see all others, that is a
        ``full`` step if anything has changed.

        Args, raises: as :meth:`reuse` and :meth:`full`.
        """
        with self._taken() as store:
            if store.selects or store.chooses or store.keep is not None:
                raise StateError("with cache_keep, keys are chosen for some rows, and nothing is exact: call reuse()")
            shape = _shape_of(ids)
            wanted = rows_of(rows, *shape, ids.device)
            known = self._written if shape == self._shape and not self._differs else None
            if known is not None and store.is_proven:
                self._written = None
                try:
                    result = self._run(store, "exact", wanted, (ids, *more), named)
                except MissingStateError as missing:
                    logger.info("mosaic: a step computes all rows: %s", missing)
                    return self._full(store, (ids, *more), named)
                self._written = _copied(((ids, *more), named))
                return result
            if known is None or bool(_differs(known, ((ids, *more), named))):
                return self._full(store, (ids, *more), named)
            try:
                return self._reuse(store, wanted, (ids, *more), named)
            except MissingStateError as missing:
                logger.info("mosaic: a step computes all rows: %s", missing)
                return self._full(store, (ids, *more), named)

    @property
    def is_approximate(self) -> bool:
        """State was used with other arguments than it was kept with, in fewer bits than it was computed in
        (``cache_dtype``), or without all keys (``cache_keep``): results may differ from those of full steps."""
        return self._has_used_rounded or bool(self._differs)

    def _full(self, store: Store, args: Sequence[Any], named: Mapping[str, Any], rows: Tensor | None = None) -> Any:
        self._shape, self._written, self._differs = _shape_of(args[0]), None, False
        self._has_used_rounded = False
        result = self._run(store, "full", rows, args, named)
        self._written = _copied((args, named))
        return result

    def _reuse(
        self, store: Store, rows: Tensor, args: Sequence[Any], named: Mapping[str, Any], kind: str = "reuse"
    ) -> Any:
        if self._written is not None and self._differs is not True:
            differs = _differs(self._written, (args, named)) | store.has_invalid
            self._differs = self._differs | differs  # on a GPU, nobody waits for it
        return self._run(store, kind, rows, args, named)

    def _run(self, store: Store, kind: str, rows: Tensor | None, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
        try:
            return self._run_once(store, kind, rows, args, named)
        except MissingError:  # of a compiled function, another process had kept the graph, but no session was there
            logger.info("mosaic: the function is compiled again, for its kinds of steps")
            forget_compiled()
            with made_anew():
                return self._run_once(store, kind, rows, args, named)

    def _run_once(
        self, store: Store, kind: str, rows: Tensor | None, args: Sequence[Any], named: Mapping[str, Any]
    ) -> Any:
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
        self.computed_rows = store.computed
        self._has_used_rounded |= store.has_read_rounded
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


Call: TypeAlias = "tuple[Sequence[Any], Mapping[str, Any]]"
"""Arguments of a call, by position and by name."""


def _copied(call: Call) -> Call:
    """With copies of tensors, which their owner may write to."""
    args, named = tree_map_only(Tensor, lambda tensor: tensor.clone(), (tuple(call[0]), dict(call[1])))
    return args, named


def _differs(one: Call, other: Call) -> Tensor | bool:
    """Whether two calls have other arguments; of tensors on a GPU as a tensor there."""
    (first, spec), (second, other_spec) = (tree_flatten((tuple(args), dict(named))) for args, named in (one, other))
    if spec != other_spec:
        return True
    found: Tensor | bool = False
    for a, b in zip(first, second, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if type(a) is not type(b) or a != b:
                return True
        elif (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            return True
        elif a is not b:
            found = found | (a != b).any()
    return found


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
            known[key] = Owned(function, options)
        return known[key]
