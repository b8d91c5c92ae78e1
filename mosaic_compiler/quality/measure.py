"""A model with what is kept approximately, against the same model without a cache, on the same sequences."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mosaic_compiler.planning.selection import keep_text
from mosaic_compiler.quality.sequences import BLOCK, Asked
from mosaic_compiler.sampling.bidirectional import check_bidirectional, check_block_causal
from mosaic_compiler.sampling.calls import ModelCall, call_for
from mosaic_compiler.sampling.generation import generate
from mosaic_compiler.session import Session


@dataclass(frozen=True)
class Method:
    """What is kept, and how.

    Attributes:
        cache_dtype, cache_keep, cache_score, cache_sets, cache_evict, cache_residual: as
            :func:`~mosaic_compiler.generate` takes them.
    """

    cache_dtype: str | None = None
    cache_keep: float | int | None = None
    cache_score: str = "probability"
    cache_sets: str | None = None
    cache_evict: bool = True
    cache_residual: int = 0

    @property
    def name(self) -> str:
        """For people."""
        if self.cache_keep is None:
            last = f", last {self.cache_residual} as computed" if self.cache_residual else ""
            return (self.cache_dtype or "as computed") + last
        score = "" if self.cache_score == "probability" else f" by {self.cache_score}"
        sets = " per layer" if self.cache_sets == "layer" and not score else ""
        read = "" if self.cache_evict else " read"
        return f"{keep_text(self.cache_keep)}{read}{score}{sets}" + (
            f", {self.cache_dtype}" if self.cache_dtype else ""
        )

    @property
    def options(self) -> dict[str, Any]:
        """Those of a session."""
        return {name: given for name, given in dataclasses.asdict(self).items() if given is not None}


@dataclass(frozen=True)
class Figures:
    """What one method gives.

    Attributes:
        method: its name; ``no cache`` is what the others are compared with.
        bytes_per_token: of what is kept.
        right: by kind of sequence the share of right answers: of facts, or of words.
        agreement: share of masked tokens with the same most likely token as without a cache.
        divergence: mean KL(without a cache || with it), nats, over masked tokens.
        steps: mean number of steps until the last block is filled in, all tokens above 0.9 at once.
    """

    method: str
    bytes_per_token: float
    right: dict[str, float]
    agreement: float
    divergence: float
    steps: float | None = None


class _Answers(nn.Module):
    """Logits of some rows."""

    def __init__(self, model: nn.Module, call: ModelCall) -> None:
        super().__init__()
        self.model, self._call = model, call

    def forward(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Float32 [B, M, V], of rows int64 [M]."""
        return self._call(self.model, ids, None).index_select(1, rows).float()


def measure(
    model: nn.Module,
    mask: int,
    asked: dict[str, Asked],
    methods: Sequence[Method],
    *,
    block_causal: int = 0,
    generated: int = 0,
    options: dict[str, Any] | None = None,
    on_sequence: Callable[[int, int], None] | None = None,
) -> list[Figures]:
    """Figures without a cache, then of each method.

    The cache is filled by a step for all rows, with masks in the last block; then the last 32 rows are computed
    against it, and asked.  Whatever differs from the step for all rows, the method has cost.

    Args:
        asked: by name, sequences [S, N] of one length.
        block_causal: tokens of a block, for models whose rows see their own block and all before it; 0: all.
        generated: of so many sequences of each kind count the steps until the block is filled in.
        options: of the backend.
        on_sequence: called with how many are done, of how many.

    Raises:
        NotADiffusionModelError: for a model that attends causally.
    """
    example = next(iter(asked.values()))
    device = next(model.parameters()).device
    form = "bool"
    if block_causal:
        form = check_block_causal(model, example.ids[:1].to(device), mask, block_causal)
    else:
        check_bidirectional(model, example.ids[:1].to(device), mask, example.ids.shape[1])
    answers = _Answers(model, call_for(model, False, block_causal, form))
    total = sum(len(sequences.ids) for sequences in asked.values()) * len(methods)
    done = itertools.count(1)
    found: list[Figures] = []
    for method in methods:
        given = {**(options or {}), **method.options}
        whole: dict[str, Tensor] = {}
        reused: dict[str, Tensor] = {}
        for name, sequences in asked.items():
            pairs = []
            for shown, masked in zip(sequences.shown(mask).to(device), sequences.masked.to(device), strict=True):
                *pair, bytes_per_token = _answered(answers, method, given, shown[None], masked.nonzero()[:, 0])
                pairs.append(pair)
                if on_sequence is not None:
                    on_sequence(next(done), total)
            whole[name], reused[name] = (torch.stack(each) for each in zip(*pairs, strict=True))
        if not found:
            without = whole
            steps = _steps(model, mask, asked, generated, block_causal, None)
            found.append(_figures("no cache", 0.0, asked, without, without, steps))
        steps = _steps(model, mask, asked, generated, block_causal, method)
        found.append(_figures(method.name, bytes_per_token, asked, without, reused, steps))
    return found


def _answered(
    answers: nn.Module, method: Method, options: dict[str, Any], ids: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Logits [M, V] of rows of a sequence, of a step for all rows and of one for the last block; bytes kept a token."""
    with Session(answers, options=options) as session:
        last = range(max(ids.shape[1] - BLOCK, 0), ids.shape[1])
        whole = session.full(ids, rows, rows=last if method.cache_keep is not None else None)[0].cpu()
        if method.cache_keep is not None and not method.cache_evict:
            session.choose(ids, last, rows)
        return whole, session.reuse(ids, last, rows)[0].cpu(), session.nbytes / ids.shape[1]


def _figures(
    name: str,
    bytes_per_token: float,
    asked: dict[str, Asked],
    without: dict[str, Tensor],
    logits: dict[str, Tensor],
    steps: float | None,
) -> Figures:
    right = {kind: sequences.right(logits[kind].argmax(-1)) for kind, sequences in asked.items()}
    before = torch.cat([without[kind].flatten(0, 1) for kind in asked])
    after = torch.cat([logits[kind].flatten(0, 1) for kind in asked])
    agreement = float((before.argmax(-1) == after.argmax(-1)).float().mean())
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    divergence = max(float((p.exp() * (p - q)).sum(-1).mean()), 0.0)
    return Figures(name, bytes_per_token, right, agreement, divergence, steps)


def _steps(
    model: nn.Module, mask: int, asked: dict[str, Asked], count: int, block_causal: int, method: Method | None
) -> float | None:
    """Mean steps until the masks of a block are filled in."""
    if not count:
        return None
    device, steps = next(model.parameters()).device, []
    for sequences in asked.values():
        for shown in sequences.shown(mask)[:count]:
            kept: dict[str, Any] = {"cache": "none"} if method is None else {"cache": "dual", **method.options}
            result = generate(
                model, shown[None].to(device), gen_length=0, block_length=BLOCK, threshold=0.9, mask_token_id=mask,
                block_causal=block_causal or None, **kept,
            )  # fmt: skip
            steps.append(result.steps)
    return sum(steps) / len(steps)
