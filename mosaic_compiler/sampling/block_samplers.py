"""Samplers that were published with block-causal models: LLaDA2.1's, and Fast-dLLM v2's."""

from __future__ import annotations

import torch

from mosaic_compiler.sampling import commit
from mosaic_compiler.sampling.filling import Sampler, State, Wanted, blocks_of

FILL, EDIT = 0.95, 0.9
"""LLaDA2.1's thresholds, where none are given."""
IDLE = 8
"""Steps that change nothing, where tokens are drawn: the model proposes the mask itself, and would for ever."""


def joint_threshold(state: State) -> Sampler:
    """LLaDA2.1: one step fills masked tokens in and edits those of its block that it has committed before.

    Masked tokens are filled in where confidence is above ``threshold``, or else the best one; other new tokens of the
    block change where another token is more likely and its confidence is above ``edit_threshold``.  A block is done
    when a step that found nothing masked changes nothing, or after ``max_post_steps`` such steps.

    Source: ``generate`` of inclusionAI/LLaDA2.1-mini (``modeling_llada2_moe.py``), for one sequence; here each of a
    batch is done by itself.  Other than there, no token is edited into the mask.
    """
    given, forwards = state.sampling, 0
    fill = FILL if given.threshold is None else given.threshold
    edit = EDIT if given.edit_threshold is None else given.edit_threshold
    is_new = state.masked
    for within, _ in blocks_of(state):
        inside = torch.zeros_like(is_new)
        inside[:, within] = is_new[:, within]
        is_open = inside.any(1)
        after, idle = torch.zeros_like(is_open, dtype=torch.int64), torch.zeros_like(is_open, dtype=torch.int64)
        patience = 1 if given.temperature == 0 else IDLE
        while True:
            masked = state.masked & inside
            is_full = ~masked.any(1)
            after += is_full
            is_open = is_open & ~(is_full & (after > given.max_post_steps))
            if not bool(is_open.any()):
                break
            before = state.ids
            proposed, confidence = yield Wanted(inside & is_open[:, None], forwards, within, may_end=False)
            state.ids, edited = commit.commit_joint(
                before, proposed, confidence, masked, fill=fill, edit=edit, mask=given.mask
            )
            forwards += 1
            is_open = is_open & ~(is_full & ~edited.any(1))
            idle = torch.where(is_full | (state.ids != before).any(1), 0, idle + 1)
            is_open = is_open & (idle < patience)


def sub_blocks(state: State) -> Sampler:
    """Fast-dLLM v2: the first token of a block is the most likely one, from the last row of the block before it, which
    is done by then; sub-block by sub-block, of the others all are filled in that are above ``threshold``, and the best.

    Source: ``generate`` of NVlabs/Fast-dLLM (``v2/generation_functions.py``), without its cache within a block, which
    is an approximation.  Position n is predicted from row n - 1.
    """
    given, forwards, length = state.sampling, 0, state.ids.shape[1]
    size, part = given.block_causal or given.block_length, given.sub_block_length
    threshold = 1.0 if given.threshold is None else given.threshold
    for begin in range(state.to_fill.start // size * size, length, size):
        within = slice(begin, min(begin + size, length))
        if begin and bool((first := _only(state, slice(begin, begin + 1))).any()):
            proposed, confidence = yield Wanted(first, forwards, within, is_greedy=True)
            state.ids = commit.commit_surest(state.ids, proposed, confidence, threshold)
            forwards += 1
        for at in range(begin, within.stop, part):
            patience = 1 if given.temperature == 0 else IDLE
            while patience and bool((masked := _only(state, slice(at, min(at + part, within.stop)))).any()):
                before = state.ids
                proposed, confidence = yield Wanted(masked, forwards, within)
                state.ids = commit.commit_surest(before, proposed, confidence, threshold)
                forwards += 1
                patience -= torch.equal(before, state.ids)


def _only(state: State, within: slice) -> torch.Tensor:
    """bool [B, N]: what is masked there."""
    found = torch.zeros_like(state.masked)
    found[:, within] = state.masked[:, within]
    return found
