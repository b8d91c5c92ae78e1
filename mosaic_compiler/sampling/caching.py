"""Which kind of step comes next in a generation, and which rows it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaic_compiler.planning.caches import POLICIES, Policy, Refresh
from mosaic_compiler.runtime.rows import numbers_in, with_rows_before
from mosaic_compiler.sampling.filling import Wanted


class Schedule:
    """The word of steps, full and reuse, that a policy spells over a generation.

    Args:
        shifted: position n is predicted from row n - 1.

    Attributes:
        counts: how many steps of each kind there were.
        selects: a step for all rows chooses keys for the rows of those that follow.
        chooses: all keys are kept, and the first steps for the rows of a block choose among them.
    """

    def __init__(self, policy: Policy, refresh: Refresh, mask: int, *, shifted: bool) -> None:
        self._policy, self._refresh, self._mask, self._shifted = policy, refresh, mask, shifted
        self.selects, self.chooses, self._delay, self._waits = False, False, 0, 0
        self._since: int | None = None
        self._block: slice | None = None
        self._last: Tensor | None = None
        self.counts = {"full": 0, "reuse": 0}

    def next(self, ids: Tensor, wanted: Wanted, needed: Tensor) -> tuple[str, Tensor | None]:
        """The kind of the next step, and the rows that it computes.

        Args:
            ids: int64 [B, N].
            needed: int64 [M], rows that proposals are made of, numbered through all sequences.

        Returns:
            ``full`` and ``None`` (or the rows that keys are chosen for); ``plain`` and ``None``: all rows, and nothing
            is kept; ``reuse`` or ``choose`` and int64 [B, R]; or ``exact`` and bool [B, N], those that are needed (what
            was computed is to be told to :meth:`ran`).
        """
        if self._policy.is_exact:
            read = torch.zeros_like(ids, dtype=torch.bool)
            read.view(-1)[needed] = True
            return "exact", read
        kind, rows = "full", None
        if self._policy.is_kept:
            begins = wanted.block != self._block
            due = self._refresh.is_due(self._since, begins) or (self.selects and begins and self._is_one_block)
            if self.chooses:
                kind = self._kind_of_choosing(due, begins)
            else:
                self._waits = self._delay if due and begins else max(self._waits - 1, 0) if due else 0
                kind = "plain" if self._waits else "full" if due else "reuse"
            if kind in ("reuse", "choose") or (kind == "full" and self.selects):
                rows = self.rows_for(ids, wanted, needed)
        self._since = {"full": 0, "plain": None}.get(kind, (self._since or 0) + 1)
        self._block, self._last = wanted.block, ids
        self._count(kind)
        return kind, rows

    def _kind_of_choosing(self, due: bool, begins: bool) -> str:
        """Where all keys are kept: behind a step for all rows, and where a block begins, keys are chosen."""
        if due or begins:
            self._waits = self._delay + 1
        if due:
            return "full"
        self._waits -= 1
        return "choose" if self._waits >= 0 else "reuse"

    def _count(self, kind: str) -> None:
        kind = kind if kind in ("reuse", "choose") else "full"
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def rows_for(self, ids: Tensor, wanted: Wanted, needed: Tensor) -> Tensor:
        """int64 [B, R]: the rows that the policy says, and those that are needed (as of :meth:`next`)."""
        computed = self._rows(ids, wanted.block)
        computed.view(-1)[needed] = True
        return numbers_in(computed, max(int(computed.sum(1).max()), 1))

    def choose(self, delay: int | None, *, evicts: bool = True) -> None:
        """From now on keys are chosen, after so many steps of a block that keep nothing (or, where all keys are kept,
        read all of them); ``None``: all are kept and read."""
        self.selects, self.chooses = delay is not None and evicts, delay is not None and not evicts
        self._delay, self._waits = delay or 0, 0

    def keep_nothing(self) -> None:
        """From now on every step computes all rows."""
        self._policy = POLICIES["none"]

    @property
    def _is_one_block(self) -> bool:
        """Rows of one block know nothing of those of the next."""
        return self._policy.begins is not None and self._policy.ends == "block"

    def ran(self, rows: int, length: int) -> None:
        """An ``exact`` step has computed so many rows of each sequence; 0: all of them, keeping nothing."""
        self.counts["full" if rows in (0, length) else "reuse"] += 1

    def all_rows(self, kind: str) -> str:
        """The step that was said to be a ``reuse`` (or ``choose``) is a ``full`` one after all."""
        self.counts[kind] -= 1
        self.counts["full"] += 1
        self._since, self._waits = 0, self._delay + 1
        return "full"

    def _rows(self, ids: Tensor, block: slice | None) -> Tensor:
        """bool [B, N]: what the policy says."""
        policy, rows = self._policy, torch.zeros_like(ids, dtype=torch.bool)
        if policy.begins is not None and block is None:
            rows[:] = True
        elif policy.begins is not None and block is not None:
            rows[:, block.start : block.stop if policy.ends == "block" else None] = True
        if policy.takes_masked:
            rows |= ids == self._mask
        if policy.takes_changed and self._last is not None:
            rows |= ids != self._last
        return with_rows_before(rows) if self._shifted else rows
