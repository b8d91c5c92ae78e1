"""``Sampling``: everything that a sampler can be told, checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mosaic_compiler.sampling.rules import DREAM_ALGORITHMS, DreamRule, EndTokens, LLaDARule, Numbers


@dataclass(frozen=True)
class Sampling:
    """Everything that a sampler can be told; see :func:`generate`."""

    sampler: str
    length: int
    steps: int
    block_length: int
    mask: int
    temperature: float
    guidance: float
    remasking: str
    threshold: float | None
    ends: EndTokens | None
    eos: int | None
    stop_at_eos: bool
    algorithm: str
    algorithm_temperature: float | None
    top_p: float | None
    top_k: int | None
    eps: float
    seed: int

    def check(self) -> None:
        """Raise :class:`ValueError` for what makes no sense."""
        if self.length < 1:
            raise ValueError(f"gen_length must be at least 1, got {self.length}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.guidance < 0:
            raise ValueError(f"cfg_scale must be at least 0, got {self.guidance}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {self.threshold}")
        if self.sampler == "dream":
            if self.algorithm not in DREAM_ALGORITHMS:
                raise ValueError(f"alg must be one of {', '.join(DREAM_ALGORITHMS)}, got {self.algorithm!r}")
            if not 0 <= self.eps < 1:
                raise ValueError(f"eps must be at least 0 and below 1, got {self.eps}")
            return
        if self.remasking not in ("low_confidence", "random"):
            raise ValueError(f"remasking must be low_confidence or random, got {self.remasking!r}")
        if self.block_length < 1 or self.length % self.block_length:
            raise ValueError(
                f"gen_length {self.length} must be a multiple of block_length {self.block_length}: "
                f"take {-(-self.length // max(self.block_length, 1)) * max(self.block_length, 1)} tokens"
            )
        blocks = self.length // self.block_length
        if self.steps % blocks:
            raise ValueError(
                f"steps {self.steps} must be a multiple of the {blocks} blocks: "
                f"take {-(-self.steps // blocks) * blocks}"
            )

    @property
    def rule(self) -> nn.Module:
        """The rule for proposals."""
        is_hot = self.temperature > 0
        if self.sampler == "dream":
            return DreamRule(is_hot, self._has_top_p, self.top_k is not None, self.algorithm)
        return LLaDARule(is_hot, self.ends, wide=self.threshold is not None)

    @property
    def numbers(self) -> Numbers:
        """What the rule and guidance are told in each call."""
        found: dict[str, Tensor | int] = {}
        dream = self.sampler == "dream"
        for name, value, used in (
            ("temperature", self.temperature, self.temperature > 0),
            ("top_p", self.top_p, dream and self._has_top_p),
            ("guidance", self.guidance, self.guidance > 0),
        ):
            if used:
                found[name] = torch.tensor(value, dtype=torch.float64)
        if dream and self.top_k is not None:
            found["top_k"] = self.top_k
        return found

    @property
    def _has_top_p(self) -> bool:
        return self.top_p is not None and self.top_p < 1
