"""From the logits of some rows to a proposed token and its confidence: the rules of the published samplers.

Pure modules over rows; each row is proposed by itself.  What is done with proposals is in ``commit.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mosaic_compiler.sampling import noise
from mosaic_compiler.sampling.request import EndTokens, Sampling

Numbers: TypeAlias = Mapping[str, Any]
"""What a sampler is told that changes from call to call, by name: ``temperature``, ``top_p`` and ``guidance`` as
float64 tensors without dims, ``top_k`` as a number.  They are inputs of the compiled proposal, so that another
temperature compiles nothing; a rule only knows which of them there are."""


def llada_rule(sampling: Sampling) -> nn.Module:
    """LLaDA's, with what changes its graph."""
    if sampling.remasking == "joint_threshold":
        return block_rule(sampling)
    return LLaDARule(sampling.temperature > 0, sampling.ends, wide=sampling.threshold is not None)


def block_rule(sampling: Sampling) -> nn.Module:
    """Of the samplers of block-causal models: as Dream's ``maskgit_plus`` where tokens are drawn."""
    if sampling.temperature > 0:
        return DreamRule(True, sampling.has_top_p, sampling.top_k is not None, "maskgit_plus")
    return LLaDARule(False, sampling.ends)


def dream_rule(sampling: Sampling) -> nn.Module:
    """Dream's, likewise."""
    is_hot, has_top_k = sampling.temperature > 0, sampling.top_k is not None
    return DreamRule(is_hot, sampling.has_top_p, has_top_k, sampling.algorithm)


def numbers_of(sampling: Sampling) -> Numbers:
    """What the rule and guidance are told in each call."""
    found: dict[str, Any] = {}
    for name, value, is_used in (
        ("temperature", sampling.temperature, sampling.temperature > 0),
        ("top_p", sampling.top_p, sampling.has_top_p),
        ("guidance", sampling.guidance, sampling.guidance > 0),
    ):
        if is_used:
            found[name] = torch.tensor(value, dtype=torch.float64)
    if sampling.top_k is not None:
        found["top_k"] = sampling.top_k
    return found


class LLaDARule(nn.Module):
    """LLaDA's (and Fast-dLLM's) proposal.

    Source: ``generate.py`` of ML-GSAI/LLaDA.  Temperature 0: argmax; else Gumbel noise in float64,
    ``exp(l) / (-log u) ** T``.  Confidence: the softmax probability of the token, without noise and temperature.

    Args:
        is_hot: the temperature is above 0.
        ends: see :class:`EndTokens`; ``None``: no special tokens.
        wide: softmax in float64, as Fast-dLLM takes it, instead of the logits' dtype.
    """

    def __init__(self, is_hot: bool, ends: EndTokens | None = None, *, wide: bool = False) -> None:
        super().__init__()
        self.is_hot, self.ends, self.wide = is_hot, ends, wide

    def forward(self, logits: Tensor, keys: Tensor, numbers: Numbers) -> tuple[Tensor, Tensor]:
        """[M, V] logits and int64 [M] keys -> int64 [M] tokens and [M] confidences."""
        ends = self.ends
        if ends is not None and ends.ban:
            logits = without(logits, ends.eos)
        if not self.is_hot:
            token = logits.argmax(-1)
        else:
            race = (-torch.log(noise.uniform(keys, logits.shape[-1]))) ** numbers["temperature"]
            token = (torch.exp(logits.double()) / race).argmax(-1)
        if ends is not None and ends.rule in ("code", "logits"):
            if ends.eot is not None:
                logits = without(logits, ends.eot)
            if not self.is_hot or ends.rule == "logits":
                logits = without(logits, ends.eos)
        wide = logits.double() if self.wide else logits
        confidence = torch.softmax(wide, -1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
        if ends is not None and ends.rule == "confidence":
            ended = token == ends.eos
            ended = ended if ends.eot is None else ended | (token == ends.eot)
            confidence = torch.where(ended, -1.0, confidence)
        return token, confidence


class DreamRule(nn.Module):
    """Dream's proposal.

    Source: ``sample_tokens`` in Dream's ``generation_utils.py``: temperature, top_p, top_k, softmax, in this order and
    in the logits' dtype; tokens drawn from it (temperature 0: its argmax).  Confidence: the token's probability
    (``maskgit_plus``), the margin between the two highest (``topk_margin``) or the negative entropy (``entropy``).

    Args:
        is_hot: the temperature is above 0.
        has_top_p: tokens are kept while the probability before them is not above ``top_p``.
        has_top_k: ``top_k`` tokens are kept (and those that equal the last one); not more than there are.
        algorithm: one of :data:`~mosaic_compiler.sampling.request.DREAM_ALGORITHMS`.
    """

    def __init__(self, is_hot: bool, has_top_p: bool, has_top_k: bool, algorithm: str) -> None:
        super().__init__()
        self.is_hot, self.has_top_p, self.has_top_k, self.algorithm = is_hot, has_top_p, has_top_k, algorithm

    def forward(self, logits: Tensor, keys: Tensor, numbers: Numbers) -> tuple[Tensor, Tensor]:
        """[M, V] logits and int64 [M] keys -> int64 [M] tokens and [M] confidences."""
        if self.is_hot:
            logits = logits / numbers["temperature"]
        if self.has_top_p:
            logits = _keep_top_p(logits, numbers["top_p"])
        if self.has_top_k:
            last = logits.topk(min(numbers["top_k"], logits.shape[-1])).values[:, -1:]
            logits = torch.where(logits < last, torch.finfo(logits.dtype).min, logits)
        probability = torch.softmax(logits, -1)
        if self.is_hot:
            token = (probability.double() / noise.exponential(keys, probability.shape[-1])).argmax(-1)
        else:
            token = probability.argmax(-1)
        return token, self._confidence(probability, token)

    def _confidence(self, probability: Tensor, token: Tensor) -> Tensor:
        if self.algorithm == "topk_margin":
            best = probability.topk(2).values
            return best[:, 0] - best[:, 1]
        if self.algorithm == "entropy":
            return (probability * torch.log(probability + 1e-10)).sum(-1)
        return probability.gather(-1, token.unsqueeze(-1)).squeeze(-1)


def _keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    mass = torch.softmax(ordered, -1).cumsum(-1)
    before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], -1)
    dropped = torch.empty_like(before, dtype=torch.bool).scatter(-1, order, before > top_p)
    return torch.where(dropped, torch.finfo(logits.dtype).min, logits)


def without(logits: Tensor, token: int) -> Tensor:
    """[M, V] with the column of one token at -inf."""
    return torch.where(torch.arange(logits.shape[-1], device=logits.device) == token, float("-inf"), logits)
