"""Samplers: generators of steps.  Each asks for proposals at some positions, is sent them, and commits some of them.

    sampler = llada(state)
    wanted = next(sampler)                              # the first step: where proposals are wanted
    wanted = sampler.send((proposed, confidence))       # state.ids have changed; the next step
    ...                                                 # StopIteration: nothing is masked, or no steps are left

To add one: a generator like these and a rule (``rules.py``) in :data:`SAMPLERS`, and what it can be told in
``request.CHECKS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from mosaic_compiler.sampling import commit, noise
from mosaic_compiler.sampling.block_samplers import joint_threshold, sub_blocks
from mosaic_compiler.sampling.filling import Sampler, State, Wanted, blocks_of
from mosaic_compiler.sampling.loop import transfer_counts
from mosaic_compiler.sampling.request import Sampling
from mosaic_compiler.sampling.rules import block_rule, dream_rule, llada_rule

SURE = 0.85
"""SDAR's threshold, where none is given."""


def llada(state: State) -> Sampler:
    """Block by block, the most confident proposals first (https://github.com/ML-GSAI/LLaDA, ``generate.py``); with
    ``low_confidence_dynamic`` more of them where the model is sure (https://github.com/JetAstra/SDAR, ``generate.py``).
    """
    given, forwards, begun = state.sampling, 0, 0
    if given.remasking == "joint_threshold":
        yield from joint_threshold(state)
        return
    is_dynamic = given.remasking == "low_confidence_dynamic"
    for within, steps in blocks_of(state):
        end = within.stop
        if given.threshold is not None and not is_dynamic:
            while bool(state.masked[:, within].any()):
                before = state.ids
                proposed, confidence = yield Wanted(state.masked_before(end), forwards, within)
                state.ids = commit.commit_confident(before, proposed, confidence, given.threshold)
                forwards += 1
                if given.temperature == 0 and torch.equal(before, state.ids):
                    break  # the model proposes the mask itself, and would for ever
            continue
        counts = transfer_counts(state.masked[:, within].sum(1), steps)
        for number in range(steps):
            masked = state.masked_before(end)
            if bool(counts[:, number].any()) and bool(masked.any()):
                proposed, confidence = yield Wanted(masked, begun + number, within)
                count = counts[:, number]
                if is_dynamic:
                    threshold = SURE if given.threshold is None else given.threshold
                    state.ids = commit.commit_dynamic(state.ids, proposed, confidence, count, threshold)
                else:
                    state.ids = commit.commit_best(state.ids, proposed, confidence, count)
                forwards += 1
        begun += steps


def dream(state: State) -> Sampler:
    """All masked positions at once, a share of them in each step (https://github.com/DreamLM/Dream,
    ``generation_utils.py``)."""
    given, batch = state.sampling, state.ids.shape[0]
    times = torch.linspace(1, given.eps, given.steps + 1)
    everywhere = torch.arange(state.ids.numel(), device=state.ids.device)
    within = state.to_fill
    for step in range(given.steps):
        masked = state.masked
        if given.algorithm == "origin":
            last = step == given.steps - 1
            share = torch.ones(()) if last else 1 - times[step + 1] / times[step]
            keys = noise.row_keys(given.seed, noise.TRANSFER, step, everywhere)
            chosen = commit.dream_origin(state.ids, share.to(state.ids.device), masked, keys)
            if not bool(chosen.any()):
                continue
            proposed, _ = yield Wanted(chosen, step, within)
            state.ids = torch.where(chosen, proposed, state.ids)
        else:
            count = commit.dream_count(int(masked.sum()), batch, step, given.steps, given.eps)
            if not count:
                continue
            proposed, confidence = yield Wanted(masked, step, within)
            keys = noise.row_keys(given.seed, noise.CHOICE, step, everywhere)
            state.ids = commit.commit_dream(
                state.ids, proposed, confidence, count,
                mask=given.mask, temperature=given.algorithm_temperature, keys=keys,
            )  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A sampler, with all that belongs to it.

    Attributes:
        steps: the generator.
        rule: from logits to proposals, for what it is told.
        is_shifted: position n is predicted from row n - 1.
        may_draw: with ``remasking="random"``, confidence is drawn.
    """

    steps: Callable[[State], Sampler]
    rule: Callable[[Sampling], nn.Module]
    is_shifted: bool = False
    may_draw: bool = False


SAMPLERS: Mapping[str, Published] = MappingProxyType(
    {
        "llada": Published(llada, llada_rule, may_draw=True),
        "dream": Published(dream, dream_rule, is_shifted=True),
        "fast_dllm_v2": Published(sub_blocks, block_rule, is_shifted=True),
    }
)
"""By name; ``request.CHECKS`` has the same names."""
