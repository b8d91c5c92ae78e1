"""State without a session: a compiled model finds out by itself which rows a call has to compute.

For loops that call a compiled model again and again (option ``cache``).  Rows are computed whose token is masked, or is
another one than in the call before; all others are as they were kept.  A call for another text is a full step: one of
other sizes, or where a token that was known is another one now.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mosaic_compiler.planning.caches import Policy, Refresh
from mosaic_compiler.runtime.kinds import Kinds
from mosaic_compiler.runtime.rows import numbers_in, with_rows_before
from mosaic_compiler.runtime.state import Block


class Automatic:
    """What one compiled graph keeps from call to call.

    Args:
        policy, refresh: which rows are computed, and when all are.
        mask: id of the mask token.
        shifted: what is in a row is read from the one before.
    """

    def __init__(self, policy: Policy, refresh: Refresh, mask: int, *, shifted: bool) -> None:
        self._policy, self._refresh, self._mask, self._shifted = policy, refresh, mask, shifted
        self._block: Block | None = None
        self._ids: Tensor | None = None
        self._since: int | None = None
        self._lock = threading.RLock()

    @property
    def is_exact(self) -> bool:
        """Only state that is proven to be what it would be is used."""
        return self._policy.is_exact

    def run(self, kinds: Kinds, inputs: Sequence[Any]) -> list[Any]:
        """Run the kind of step that is due."""
        assert kinds.ids is not None
        with self._lock:
            if self._block is None:
                self._block = Block(kinds)
            ids = inputs[kinds.ids]
            if self.is_exact:
                wanted = ids == self._mask
                return self._block.exact(inputs, with_rows_before(wanted) if self._shifted else wanted)
            rows = None if self._block.problem(inputs) else self._rows(ids)
            self._ids, since, self._since = None, self._since, None  # should this step fail, the next one is a full one
            if rows is None or self._refresh.is_due(since, begins_block=False):
                results, since = self._block.keep(inputs), 0
            else:
                results, since = self._block.run_rows(inputs, rows), (since or 0) + 1
            self._ids, self._since = ids.clone(), since
            return results

    def _rows(self, ids: Tensor) -> Tensor | None:
        """int64 [B, R]; ``None``: all rows."""
        last = self._ids
        if last is None or last.shape != ids.shape or last.device != ids.device:
            return None
        changed, masked = ids != last, ids == self._mask
        wanted = masked | changed
        if self._shifted:
            wanted = with_rows_before(wanted)
        is_other = (changed & ~masked & (last != self._mask)).any()
        most, other = torch.stack([wanted.sum(1).max(), is_other.to(torch.int64)]).tolist()
        if other:
            return None
        return numbers_in(wanted, most) if most else torch.zeros_like(ids[:, :1])
