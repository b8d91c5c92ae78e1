"""Which proposals are committed: the schedules of the published samplers, on [B, N] tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaic_compiler.sampling import noise
from mosaic_compiler.sampling.step import rank_of


def commit_best(ids: Tensor, proposed: Tensor, confidence: Tensor, counts: Tensor) -> Tensor:
    """The ``counts`` proposals of highest confidence in each row; ties go to the lower position.

    Args:
        ids, proposed: int64 [B, N].
        confidence: [B, N], -inf where nothing is proposed.
        counts: int64 [B].
    """
    chosen = (rank_of(confidence) < counts.unsqueeze(-1)) & (confidence > float("-inf"))
    return torch.where(chosen, proposed, ids)


def commit_confident(ids: Tensor, proposed: Tensor, confidence: Tensor, threshold: float) -> Tensor:
    """The best proposal of each row, and all others whose confidence is at least ``threshold`` (Fast-dLLM)."""
    best = (rank_of(confidence) == 0) & (confidence > float("-inf"))
    return torch.where(best | (confidence >= threshold), proposed, ids)


def commit_dynamic(ids: Tensor, proposed: Tensor, confidence: Tensor, counts: Tensor, threshold: float) -> Tensor:
    """All proposals whose confidence is above ``threshold``, if they are at least ``counts``; else the best ``counts``
    (SDAR's ``low_confidence_dynamic``)."""
    sure = confidence > threshold
    best = (rank_of(confidence) < counts.unsqueeze(-1)) & (confidence > float("-inf"))
    chosen = torch.where((sure.sum(1) >= counts).unsqueeze(-1), sure, best)
    return torch.where(chosen, proposed, ids)


def commit_surest(ids: Tensor, proposed: Tensor, confidence: Tensor, threshold: float) -> Tensor:
    """The best proposal of each row, and all others whose confidence is above ``threshold`` (Fast-dLLM v2)."""
    best = (rank_of(confidence) == 0) & (confidence > float("-inf"))
    return torch.where(best | (confidence > threshold), proposed, ids)


def commit_joint(
    ids: Tensor, proposed: Tensor, confidence: Tensor, masked: Tensor, *, fill: float, edit: float, mask: int
) -> tuple[Tensor, Tensor]:
    """Proposals above ``fill`` where ids are masked, or the best one there; others above ``edit`` (LLaDA2.1).

    Returns:
        int64 [B, N], the new ids; and bool [B, N], where one that was not masked is another one now.
    """
    of_masked = confidence.masked_fill(~masked, float("-inf"))
    best = (rank_of(of_masked) == 0) & (of_masked > float("-inf"))
    sure = of_masked > fill
    filled = torch.where(sure.any(1, keepdim=True), sure, best)
    edited = ~masked & (confidence > max(edit, float("-inf"))) & (proposed != ids) & (proposed != mask)
    edited &= confidence > float("-inf")
    return torch.where(filled | edited, proposed, ids), edited


def dream_count(masked: int, batch: int, step: int, steps: int, eps: float) -> int:
    """How many tokens Dream commits per row: the mean number of masked ones times the share of the time that passes.

    In float32, as published: other precisions give other schedules.
    """
    times = torch.linspace(1, eps, steps + 1)
    mean = torch.tensor(masked) / batch
    return int(mean) if step == steps - 1 else int(mean * (1 - times[step + 1] / times[step]))


def commit_dream(
    ids: Tensor, proposed: Tensor, confidence: Tensor, count: int, *, mask: int, temperature: float | None, keys: Tensor
) -> Tensor:
    """Dream's choice: the best ``count`` of each row, or drawn without replacement with softmax(confidence / T).

    A position that is picked though nothing is proposed there (a row with fewer masked tokens than others) is
    overwritten with the mask, as published.

    Args:
        ids, proposed, confidence: as in :func:`commit_best`.
        temperature: ``alg_temp``; ``None`` or 0: the best.
        keys: int64 [B * N] of the draw.
    """
    if not count:
        return ids
    score = confidence
    if temperature:
        weights = torch.softmax(confidence / temperature, -1).double()
        score = weights / noise.exponential(keys, 1).view_as(weights)
    picked = rank_of(score) < count
    return torch.where(picked, torch.where(confidence > float("-inf"), proposed, mask), ids)


def dream_origin(ids: Tensor, share: Tensor, masked: Tensor, keys: Tensor) -> Tensor:
    """bool [B, N]: masked positions that algorithm ``origin`` fills in, each with probability ``share``."""
    drawn = noise.uniform(keys, 1).float().view_as(ids)
    return masked & (drawn < share)
