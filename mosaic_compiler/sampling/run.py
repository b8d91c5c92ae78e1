"""``Run``: one call of ``generate()``: a sampler's steps, and the proposals that each of them asks for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mosaic_compiler.errors import BudgetError, MissingStateError, StateError
from mosaic_compiler.planning.caches import Policy, Refresh
from mosaic_compiler.planning.ladder import Rung
from mosaic_compiler.planning.plan import Fallback, MemoryPlan
from mosaic_compiler.planning.room import capacity, serves
from mosaic_compiler.planning.selection import SCORES, Selection
from mosaic_compiler.runtime.store import Store, stepping
from mosaic_compiler.sampling import noise
from mosaic_compiler.sampling.caching import Schedule
from mosaic_compiler.sampling.calls import ModelCall
from mosaic_compiler.sampling.compiled import Proposer
from mosaic_compiler.sampling.filling import State, Wanted
from mosaic_compiler.sampling.inputs import has_padding
from mosaic_compiler.sampling.request import Sampling
from mosaic_compiler.sampling.rules import numbers_of
from mosaic_compiler.sampling.samplers import SAMPLERS

logger = logging.getLogger("mosaic_compiler")

COLD = 1e-6
"""A temperature at which the most likely token is drawn."""


class Run:
    """One call of :func:`generate`: the ids so far, and how the next ones are made.

    Args:
        call: how to call the model.
        options: of the backend.
        is_compiled: ``False``: run in eager PyTorch.
        policy, refresh: which rows steps compute, see ``planning/caches.py``.
        rungs: what is kept, the first of them that fits, see ``planning/ladder.py``.
        selection: how keys are chosen, where some are, see ``planning/selection.py``.
        residual: rows at the end that are kept as they are computed, where the others are not.

    Attributes:
        schedule: which kinds of steps there were.
        state_bytes: the most that lived from step to step.
        is_rounded: it lived in fewer bits than it was computed in.
        rung: what was kept at last.
    """

    def __init__(
        self,
        model: nn.Module,
        call: ModelCall,
        prompt: Tensor,
        attention_mask: Tensor | None,
        sampling: Sampling,
        options: Mapping[str, Any],
        is_compiled: bool,
        policy: Policy,
        refresh: Refresh,
        rungs: Sequence[Rung] = (Rung(),),
        selection: Selection | None = None,
        residual: int = 0,
    ) -> None:
        self.sampling = sampling
        batch, self.start = prompt.shape
        new = prompt.new_full((batch, sampling.length), sampling.mask)
        self.state = State(sampling, torch.cat([prompt, new], 1), self.start)
        self.given = ~self.state.masked
        self.real: Tensor | None = None
        if attention_mask is not None and has_padding(attention_mask):
            self.real = torch.cat([attention_mask.bool().to(prompt.device), torch.ones_like(new, dtype=torch.bool)], 1)
        self.forwards = self._room = 0
        self._kind, self._numbers = SAMPLERS[sampling.sampler], numbers_of(sampling)
        self.schedule = Schedule(policy, refresh, sampling.mask, shifted=self._kind.is_shifted)
        self._store = Store() if policy.is_kept or (policy.is_exact and is_compiled) else None
        self.state_bytes, self.is_rounded = 0, False
        self._has_said = False
        self._rungs, self._selection, self._residual = list(rungs), selection or Selection(), residual
        self._proposes = model, call, self._kind.rule(sampling)
        self._options, self._is_compiled = dict(options), is_compiled
        self._go_down()

    def _go_down(self) -> None:
        """Take the next rung."""
        self.rung = self._rungs.pop(0)
        more: dict[str, Any] = {} if self.rung.precision is None else {"cache_dtype": self.rung.precision}
        self.schedule.choose(None)
        if self.rung.keep is not None:
            more |= self._selection.options
            self.schedule.choose(SCORES[self._selection.score].delay, evicts=self._selection.evicts)
        if self._residual and self.rung.precision is not None and self.rung.keep is None:
            more["cache_residual"] = 1  # how many is no matter of what is compiled
        if self._store is not None:
            self._store.keep, self._store.residual = self.rung.keep, self._residual or None
        if not self.rung.is_kept:
            self._store = None
            self.schedule.keep_nothing()
        self._proposer = Proposer(*self._proposes, {**self._options, **more}, self._is_compiled)

    @property
    def plan(self) -> MemoryPlan | None:
        """The plan with the highest peak."""
        return self._proposer.plan

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """What ran in another way than asked for."""
        return self._proposer.fallbacks

    @property
    def ids(self) -> Tensor:
        """int64 [B, N]: the prompt, and what is known of the rest."""
        return self.state.ids

    def ids_by_step(self) -> Iterator[Tensor]:
        """Run; the ids after each forward pass."""
        sampler = self._kind.steps(self.state)
        wanted = next(sampler, None)
        while wanted is not None:
            proposals = self._proposals(wanted)
            self.forwards += 1
            served = wanted
            try:
                wanted = sampler.send(proposals)
            except StopIteration:
                wanted = None
            yield self.ids
            may_end = served.may_end or wanted is None or wanted.block != served.block
            if self.sampling.stop_at_eos and may_end and self._ended():
                return

    def look_again(self) -> None:
        """Somebody else's code has run between two steps."""
        self._proposer.look_again()

    def close(self) -> None:
        """Give the memory of state back."""
        if self._store is not None:
            self._store.release()

    def _proposals(self, wanted: Wanted) -> tuple[Tensor, Tensor]:
        """Proposed ids and their confidence, [B, N]; -inf where nothing was wanted."""
        given, length, step = self.sampling, self.ids.shape[1], wanted.step
        cells = wanted.where.flatten().nonzero().squeeze(1)
        rows = cells
        if self._kind.is_shifted:
            rows = torch.where(cells % length > 0, cells - 1, cells)
        keys = noise.row_keys(given.seed, noise.TOKENS, step, cells)
        room = self._room_for(len(cells)) - len(cells)  # some rows again, so that one program serves many steps
        padded = [torch.cat([tensor, tensor[:1].expand(room)]) for tensor in (rows, keys)]
        unguided = torch.where(self.given, given.mask, self.ids) if given.guidance > 0 else None
        numbers = self._numbers
        if wanted.is_greedy and "temperature" in numbers:
            numbers = {**numbers, "temperature": torch.full_like(numbers["temperature"], COLD)}
        token, confidence = self._propose(wanted, rows, (self.ids, *padded, numbers, unguided, self.real))
        token, confidence = token[: len(cells)], confidence[: len(cells)]
        if self._kind.may_draw and given.remasking == "random":
            drawn = noise.uniform(noise.row_keys(given.seed, noise.CONFIDENCE, step, cells), 1).squeeze(1).float()
            confidence = torch.where(confidence < 0, -1.0, drawn)  # below 0: see EndTokens
        proposed, scores = self.ids.flatten().clone(), confidence.new_full((self.ids.numel(),), float("-inf"))
        proposed[cells], scores[cells] = token, confidence
        return proposed.view_as(self.ids), scores.view_as(self.ids)

    def _propose(self, wanted: Wanted, rows: Tensor, arguments: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """A step of the kind that is due; ``rows`` (flat) are those that proposals are made of."""
        kind, computed = self.schedule.next(self.ids, wanted, rows)
        store = self._store
        if store is None or kind == "plain":
            if store is not None:
                store.release()  # the next step keeps anew
            if kind == "exact":
                self.schedule.ran(0, self.ids.shape[1])
            return self._proposer(*arguments)
        has_begun_anew = False
        while True:
            try:
                result = self._with_state(store, kind, computed, arguments)
                break
            except MissingStateError as missing:
                # the model was compiled again (its graph is another one in its second call), or its weights changed
                if has_begun_anew:
                    raise
                has_begun_anew = True
                logger.info("mosaic: step %d computes all rows: %s", self.forwards + 1, missing)
            except (BudgetError, StateError) as error:  # too much, or nothing that this model can keep so
                if not self._rungs:
                    raise
                before = self.rung
                self._go_down()
                logger.warning("mosaic: kept from step to step: %s, and not %s: %s", self.rung, before, error)
            store.release()
            if kind in ("reuse", "choose"):
                kind = self.schedule.all_rows(kind)
            if not self.rung.is_kept:
                return self._proposer(*arguments)
            if kind != "exact":
                computed = self.schedule.rows_for(self.ids, wanted, rows) if self.schedule.selects else None
        if kind == "exact":
            self.schedule.ran(store.computed, self.ids.shape[1])
            if not store.computed:
                self._say_what_would_save()
        self.state_bytes = max(self.state_bytes, store.nbytes)
        self.is_rounded |= store.has_read_rounded
        return result

    def _with_state(
        self, store: Store, kind: str, computed: Tensor | None, arguments: Sequence[Any]
    ) -> tuple[Tensor, Tensor]:
        with stepping(store, kind, (self.ids.shape[0], self.ids.shape[1]), computed):
            result = self._proposer(*arguments)
            if kind != "exact":
                store.check_kept()
        return result

    def _say_what_would_save(self) -> None:
        """What is exact computes every row in every step here; how much less an approximation would."""
        if self._has_said:
            return
        self._has_said = True
        given, length = self.sampling, self.ids.shape[1]
        block = given.block_length if given.sampler == "llada" else len(range(*self.state.to_fill.indices(length)))
        logger.info(
            "mosaic: cache='exact' computes all %d rows in every step, because each sees all others, for all that is "
            "known; cache='dual', an approximation, would compute %d in all but the first step of a block",
            length,
            min(block, length),
        )

    def _room_for(self, count: int) -> int:
        """How many rows to compute where ``count`` are needed: as in the step before, down to half."""
        needed = capacity(count)
        if not serves(self._room, needed):
            self._room = needed
        return self._room

    def _ended(self) -> bool:
        """Every sequence has an end token with nothing masked before it; if so, it is repeated to the end."""
        eos, new = self.sampling.eos, self.ids[:, self.start :]
        assert eos is not None
        ends = new == eos
        first = torch.where(ends.any(1), ends.int().argmax(1), new.shape[1])
        behind = torch.arange(new.shape[1], device=new.device) > first.unsqueeze(1)
        if not bool(ends.any(1).all()) or bool(((new == self.sampling.mask) & ~behind).any()):
            return False
        self.state.ids = torch.cat([self.ids[:, : self.start], torch.where(behind, eos, new)], 1)
        return True
