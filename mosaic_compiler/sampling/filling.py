"""What samplers work on: the ids so far, the steps that they ask for, and the blocks that they fill in."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from mosaic_compiler.sampling.request import Sampling


@dataclass
class State:
    """What a sampler works on.

    Attributes:
        ids: int64 [B, N], the prompt and what was committed behind it.
        start: where the prompt ends.
    """

    sampling: Sampling
    ids: Tensor
    start: int

    @property
    def masked(self) -> Tensor:
        """bool [B, N]."""
        return self.ids == self.sampling.mask

    @property
    def to_fill(self) -> slice:
        """From the first masked position to the last one."""
        found = self.masked.any(0).nonzero().flatten().tolist() or [0]
        return slice(found[0], found[-1] + 1)

    def masked_before(self, end: int) -> Tensor:
        """bool [B, N]: masked positions before the end of a block."""
        return self.masked & (torch.arange(self.ids.shape[1], device=self.ids.device) < end)


@dataclass(frozen=True)
class Wanted:
    """One step.

    Attributes:
        where: bool [B, N], where proposals are wanted.
        step: its number, for random draws.
        block: the positions that are being filled in; ``None``: all.
        is_greedy: the most likely tokens are wanted, whatever the temperature is.
        may_end: nothing that is known already can change any more.
    """

    where: Tensor
    step: int
    block: slice | None = None
    is_greedy: bool = False
    may_end: bool = True


Proposals: TypeAlias = "tuple[Tensor, Tensor]"
"""Ids int64 [B, N] and their confidence [B, N]; -inf where nothing was wanted."""

Sampler: TypeAlias = "Generator[Wanted, Proposals, None]"


def blocks_of(state: State) -> list[tuple[slice, int]]:
    """Positions of each block, from left to right, and how many steps it takes.

    For block-causal models, blocks end at multiples of ``block_length`` in the sequence (the first one may be shorter),
    and each has steps in proportion.  Where nothing is appended, blocks are runs of ``block_length`` positions, each
    from the first masked one that no block before it has; they share the steps, the first ones get those that are left
    over.

    Raises:
        ValueError: for fewer steps than blocks, unless as many are taken as it takes (``threshold``).
    """
    given, length = state.sampling, state.ids.shape[1]
    if given.length and given.block_causal:
        step = given.block_length
        begins = [state.start, *range((state.start // step + 1) * step, length, step)]
    elif given.length:
        begins = list(range(state.start, length, given.block_length))
    else:
        begins = []
        for position in state.masked.any(0).nonzero().flatten().tolist():
            if not begins or position >= begins[-1] + given.block_length:
                begins.append(position)
    if given.steps < len(begins) and given.threshold is None and not given.is_open_ended:
        raise ValueError(
            f"steps {given.steps} are fewer than the {len(begins)} blocks that hold masked tokens: take at least "
            f"{len(begins)}, or a block_length above {given.block_length}"
        )
    if given.length and given.block_causal:
        ends = [*begins[1:], length]
        share = [round(given.steps * (end - state.start) / given.length) for end in ends]
        counts = [max(last - first, 1) for first, last in zip([0, *share], share, strict=False)]
        return [(slice(*ends), count) for *ends, count in zip(begins, ends, counts, strict=True)]
    each, more = divmod(given.steps, max(len(begins), 1))
    return [
        (slice(begin, min(begin + given.block_length, length)), each + (number < more))
        for number, begin in enumerate(begins)
    ]
