"""``Sampling``: everything that a sampler can be told, checked.

Without torch: the command line checks what it was given before it loads anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

MASKS = re.compile(" ?(?:<mask>|___)")
"""What people write where a token is missing.  The space in front of a word is part of its token."""

EOS_RULES = ("code", "logits", "confidence")
ROPE_FACTORS = ("auto", "longllada", "ultrallada")
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

    Before there is a model, which decides it, ``sampler`` is ``auto`` and ``mask`` -1.  A ``length`` of 0: nothing is
    appended, the prompt's own masked tokens are filled in.
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
    block_causal: int = 0
    edit_threshold: float | None = None
    max_post_steps: int = 16
    sub_block_length: int = 8

    def check(self) -> None:
        """Raise :class:`ValueError` for what makes no sense."""
        for name in ("length", "steps", "block_length", "max_post_steps", "sub_block_length"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int):
                said = "gen_length" if name == "length" else name
                raise ValueError(f"{said} must be a whole number, got {value!r}")
        if self.length < 0:
            raise ValueError(f"gen_length must be at least 1, or 0 to fill in masked tokens only, got {self.length}")
        if self.stop_at_eos and not self.length:
            raise ValueError("stop_at_eos ends new text: leave it out where masked tokens are filled in (gen_length=0)")
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
        if self.block_causal < 0:
            raise ValueError(f"block_causal must be the tokens of a block, at least 1, got {self.block_causal}")
        if self.block_causal and self.guidance:
            raise ValueError("cfg_scale masks the prompt, which block-causal models were not trained for: leave it out")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {self.threshold}")
        if self.edit_threshold is not None and self.remasking != "joint_threshold":
            raise ValueError("edit_threshold is for remasking='joint_threshold': leave it out")
        if self.edit_threshold is not None and not 0 <= self.edit_threshold <= 1:
            raise ValueError(f"edit_threshold must be from 0 to 1 (1: nothing is edited), got {self.edit_threshold}")
        if self.max_post_steps < 0:
            raise ValueError(f"max_post_steps must be at least 0, got {self.max_post_steps}")
        CHECKS[self.sampler](self)

    @property
    def is_open_ended(self) -> bool:
        """It takes as many steps as it takes."""
        return self.sampler == "fast_dllm_v2" or self.remasking == "joint_threshold"

    @property
    def has_top_p(self) -> bool:
        """It leaves tokens out."""
        return self.top_p is not None and self.top_p < 1


def check_factor(factor: float | str | None) -> None:
    """Raise :class:`ValueError` for what is no ``rope_factor``."""
    if factor is None or factor in ROPE_FACTORS:
        return
    if isinstance(factor, bool | str) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise ValueError(f"rope_factor must be a number above 0 or one of {', '.join(ROPE_FACTORS)}, got {factor!r}")


def _check_dream(given: Sampling) -> None:
    if given.algorithm not in DREAM_ALGORITHMS:
        raise ValueError(f"alg must be one of {', '.join(DREAM_ALGORITHMS)}, got {given.algorithm!r}")
    if not 0 <= given.eps < 1:
        raise ValueError(f"eps must be at least 0 and below 1, got {given.eps}")
    if given.guidance or given.threshold is not None:
        raise ValueError("cfg_scale and threshold are LLaDA's: leave them out, or take sampler='llada'")


def _check_llada(given: Sampling) -> None:
    if given.top_p is not None or given.top_k is not None:
        raise ValueError("top_p and top_k are Dream's: leave them out, or give alg (one of Dream's)")
    _check_blocks(given)


def _check_sub_blocks(given: Sampling) -> None:
    if given.ends is not None or given.guidance or given.remasking != "low_confidence":
        raise ValueError(
            "logits_eos_inf, confidence_eos_eot_inf, cfg_scale and remasking are LLaDA's: leave them out, or take "
            "sampler='llada'"
        )
    if not given.block_causal:
        raise ValueError(
            "Fast-dLLM v2's sampler is for block-causal models: say how long their blocks are (block_causal)"
        )
    if given.sub_block_length < 1:
        raise ValueError(f"sub_block_length must be at least 1, got {given.sub_block_length}")


REMASKING = ("low_confidence", "random", "low_confidence_dynamic", "joint_threshold")


def _check_blocks(given: Sampling) -> None:
    if given.remasking not in REMASKING:
        raise ValueError(f"remasking must be one of {', '.join(REMASKING)}, got {given.remasking!r}")
    if given.block_length < 1:
        raise ValueError(f"block_length must be at least 1, got {given.block_length}")
    if given.remasking == "joint_threshold" and given.ends is not None and given.temperature > 0:
        raise ValueError("logits_eos_inf and confidence_eos_eot_inf are LLaDA's: leave them out with joint_threshold")
    if given.block_causal or given.is_open_ended:
        return  # blocks end at multiples of their length, wherever the prompt does
    if given.length % given.block_length:
        raise ValueError(
            f"gen_length {given.length} must be a multiple of block_length {given.block_length}: "
            f"take {-(-given.length // given.block_length) * given.block_length} tokens"
        )
    blocks = given.length // given.block_length
    if blocks and given.steps % blocks:
        raise ValueError(
            f"steps {given.steps} must be a multiple of the {blocks} blocks: take {-(-given.steps // blocks) * blocks}"
        )


CHECKS: Mapping[str, Callable[[Sampling], None]] = MappingProxyType(
    {"auto": _check_blocks, "llada": _check_llada, "dream": _check_dream, "fast_dllm_v2": _check_sub_blocks}
)
"""What makes no sense for a sampler, by its name; ``auto``: which one it is the model will say."""
