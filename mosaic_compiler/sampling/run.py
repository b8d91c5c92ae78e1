"""``Run``: the loop of one call of ``generate()``, and what it calls at each step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mosaic_compiler.planning.outline import capacity
from mosaic_compiler.planning.plan import Fallback, MemoryPlan
from mosaic_compiler.sampling import commit, noise
from mosaic_compiler.sampling.calls import call_for
from mosaic_compiler.sampling.compiled import Proposer
from mosaic_compiler.sampling.loop import transfer_counts
from mosaic_compiler.sampling.request import Sampling
from mosaic_compiler.sampling.rules import numbers_of, rule_of


class Run:
    """One call of :func:`generate`: the ids so far, and how the next ones are made.

    Args:
        options: of the backend.
        is_compiled: ``False``: run in eager PyTorch.
    """

    def __init__(
        self,
        model: nn.Module,
        prompt: Tensor,
        attention_mask: Tensor | None,
        sampling: Sampling,
        options: Mapping[str, Any],
        is_compiled: bool,
    ) -> None:
        self.sampling = sampling
        batch, self.start = prompt.shape
        new = prompt.new_full((batch, sampling.length), sampling.mask)
        self.ids = torch.cat([prompt, new], 1)
        self.given = self.ids != sampling.mask
        self.real: Tensor | None = None
        if attention_mask is not None and not bool(attention_mask.bool().all()):
            self.real = torch.cat([attention_mask.bool().to(prompt.device), torch.ones_like(new, dtype=torch.bool)], 1)
        self.forwards = self._room = 0
        self._numbers = numbers_of(sampling)
        self._proposer = Proposer(
            model, call_for(model, self.real is not None), rule_of(sampling), options, is_compiled
        )

    @property
    def plan(self) -> MemoryPlan | None:
        """The plan with the highest peak."""
        return self._proposer.plan

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """What ran in another way than asked for."""
        return self._proposer.fallbacks

    def ids_by_step(self) -> Iterator[Tensor]:
        """Run; the ids after each forward pass."""
        blocks = self._dream() if self.sampling.sampler == "dream" else self._llada()
        for _ in blocks:
            yield self.ids
            if self.sampling.stop_at_eos and self._ended():
                return

    # ------------------------------------------------------------------------------------ samplers
    def _llada(self) -> Iterator[None]:
        given = self.sampling
        blocks = given.length // given.block_length
        per_block = given.steps // blocks
        for block in range(blocks):
            end = self.start + (block + 1) * given.block_length
            within = slice(end - given.block_length, end)
            counts = transfer_counts((self.ids[:, within] == given.mask).sum(1), per_block)
            if given.threshold is not None:
                while bool((self.ids[:, within] == given.mask).any()):
                    before = self.ids
                    proposed, confidence = self._proposals(self._masked(end), self.forwards)
                    self.ids = commit.commit_confident(before, proposed, confidence, given.threshold)
                    self.forwards += 1
                    yield
                    if given.temperature == 0 and torch.equal(before, self.ids):
                        break  # the model proposes the mask itself, and would for ever
                continue
            for number in range(per_block):
                step = block * per_block + number
                masked = self._masked(end)
                if bool(counts[:, number].any()) and bool(masked.any()):
                    proposed, confidence = self._proposals(masked, step)
                    self.ids = commit.commit_best(self.ids, proposed, confidence, counts[:, number])
                    self.forwards += 1
                    yield

    def _masked(self, end: int) -> Tensor:
        """bool [B, N]: masked positions before the end of a block."""
        return (self.ids == self.sampling.mask) & (torch.arange(self.ids.shape[1], device=self.ids.device) < end)

    def _dream(self) -> Iterator[None]:
        given, batch = self.sampling, self.ids.shape[0]
        times = torch.linspace(1, given.eps, given.steps + 1)
        everywhere = torch.arange(self.ids.numel(), device=self.ids.device)
        for step in range(given.steps):
            masked = self.ids == given.mask
            if given.algorithm == "origin":
                last = step == given.steps - 1
                share = torch.ones(()) if last else 1 - times[step + 1] / times[step]
                keys = noise.row_keys(given.seed, noise.TRANSFER, step, everywhere)
                chosen = commit.dream_origin(self.ids, share.to(self.ids.device), masked, keys)
                if not bool(chosen.any()):
                    continue
                proposed, _ = self._proposals(chosen, step)
                self.ids = torch.where(chosen, proposed, self.ids)
            else:
                count = commit.dream_count(int(masked.sum()), batch, step, given.steps, given.eps)
                if not count:
                    continue
                proposed, confidence = self._proposals(masked, step)
                keys = noise.row_keys(given.seed, noise.CHOICE, step, everywhere)
                self.ids = commit.commit_dream(
                    self.ids, proposed, confidence, count,
                    mask=given.mask, temperature=given.algorithm_temperature, keys=keys,
                )  # fmt: skip
            self.forwards += 1
            yield

    def _proposals(self, wanted: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Proposed ids and their confidence, [B, N]; -inf where nothing was wanted."""
        given, length = self.sampling, self.ids.shape[1]
        cells = wanted.flatten().nonzero().squeeze(1)
        rows = cells
        if given.sampler == "dream":  # position n is predicted from row n - 1
            rows = torch.where(cells % length > 0, cells - 1, cells)
        keys = noise.row_keys(given.seed, noise.TOKENS, step, cells)
        room = self._room_for(len(cells)) - len(cells)  # some rows again, so that one program serves many steps
        padded = [torch.cat([tensor, tensor[:1].expand(room)]) for tensor in (rows, keys)]
        unguided = torch.where(self.given, given.mask, self.ids) if given.guidance > 0 else None
        token, confidence = self._proposer(self.ids, *padded, self._numbers, unguided, self.real)
        token, confidence = token[: len(cells)], confidence[: len(cells)]
        if given.sampler == "llada" and given.remasking == "random":
            drawn = noise.uniform(noise.row_keys(given.seed, noise.CONFIDENCE, step, cells), 1).squeeze(1).float()
            confidence = torch.where(confidence < 0, -1.0, drawn)  # below 0: see EndTokens
        proposed, scores = self.ids.flatten().clone(), confidence.new_full((self.ids.numel(),), float("-inf"))
        proposed[cells], scores[cells] = token, confidence
        return proposed.view_as(self.ids), scores.view_as(self.ids)

    def _room_for(self, count: int) -> int:
        """How many rows to compute where ``count`` are needed: as in the step before, down to half."""
        needed = capacity(count)
        if not needed <= self._room <= 2 * needed:
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
        self.ids = torch.cat([self.ids[:, : self.start], torch.where(behind, eos, new)], 1)
        return True
