"""``Sampling``: everything that a sampler can be told, checked.

Without torch: the command line checks what it was given before it loads anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

EOS_RULES = ("code", "logits", "confidence")
DREAM_ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")


@dataclass(frozen=True)
class EndTokens:
    """How LLaDA's options treat the tokens that end a text.

    Attributes:
        eos, eot: their ids; ``eot`` may be ``None``.
        ban: ``logits_eos_inf``: EOS is never proposed.
        rule: what ``confidence_eos_eot_inf`` does; ``None``: nothing.  ``code``: as the published code does it: behind
            the choice of the token, EoT's logit (and EOS's too, at temperature 0 only) is -inf in the softmax.
            ``logits``: both, at any temperature.  ``confidence``: as its documentation says: rows that propose EOS or
            EoT rank behind all others, whose confidence stays.
    """

    eos: int
    eot: int | None = None
    ban: bool = False
    rule: str | None = None


@dataclass(frozen=True)
class Sampling:
    """Everything that a sampler can be told; see :func:`generate`.

    Before there is a model, which decides it, ``sampler`` is ``auto`` and ``mask`` -1.
    """

    sampler: str
    length: int
    steps: int
    block_length: int
    temperature: float
    guidance: float
    remasking: str
    threshold: float | None
    algorithm: str
    top_p: float | None
    top_k: int | None
    mask: int = -1
    algorithm_temperature: float | None = None
    ends: EndTokens | None = None
    eos: int | None = None
    stop_at_eos: bool = False
    eps: float = 1e-3
    seed: int = 0

    def check(self) -> None:
        """Raise :class:`ValueError` for what makes no sense."""
        if self.length < 1:
            raise ValueError(f"gen_length must be at least 1, got {self.length}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        scales = {"temperature": self.temperature, "cfg_scale": self.guidance, "alg_temp": self.algorithm_temperature}
        for name, scale in scales.items():
            if scale is not None and not 0 <= scale < math.inf:
                raise ValueError(f"{name} must be a number from 0, got {scale}")
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
            if self.guidance or self.threshold is not None:
                raise ValueError("cfg_scale and threshold are LLaDA's: leave them out, or take sampler='llada'")
            return
        if self.sampler == "llada" and (self.top_p is not None or self.top_k is not None):
            raise ValueError("top_p and top_k are Dream's: leave them out, or give alg (one of Dream's)")
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
    def has_top_p(self) -> bool:
        """It leaves tokens out."""
        return self.top_p is not None and self.top_p < 1
