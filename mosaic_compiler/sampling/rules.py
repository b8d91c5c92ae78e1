"""From the logits of some rows to a proposed token and its confidence: the rules of the published samplers.

Pure modules over rows; each row is proposed by itself.  What is done with proposals is in ``commit.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mosaic_compiler.sampling import noise
from mosaic_compiler.sampling.request import EndTokens


class LLaDARule(nn.Module):
    """LLaDA's (and Fast-dLLM's) proposal.

    Source: ``generate.py`` of ML-GSAI/LLaDA.  Temperature 0: argmax; else Gumbel noise in float64,
    ``exp(l) / (-log u) ** T``.  Confidence: the softmax probability of the token, without noise and temperature.

    Args:
        temperature: at least 0.
        ends: see :class:`EndTokens`; ``None``: no special tokens.
        wide: softmax in float64, as Fast-dLLM takes it, instead of the logits' dtype.
    """

    def __init__(self, temperature: float, ends: EndTokens | None = None, *, wide: bool = False) -> None:
        super().__init__()
        self.temperature, self.ends, self.wide = temperature, ends, wide

    def forward(self, logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """[M, V] logits and int64 [M] keys -> int64 [M] tokens and [M] confidences."""
        ends = self.ends
        if ends is not None and ends.ban:
            logits = without(logits, ends.eos)
        if self.temperature == 0:
            token = logits.argmax(-1)
        else:
            race = (-torch.log(noise.uniform(keys, logits.shape[-1]))) ** self.temperature
            token = (torch.exp(logits.double()) / race).argmax(-1)
        if ends is not None and ends.rule in ("code", "logits"):
            if ends.eot is not None:
                logits = without(logits, ends.eot)
            if self.temperature == 0 or ends.rule == "logits":
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
        temperature: at least 0.
        top_p: tokens are kept while the probability before them is not above it; ``None`` or 1: all.
        top_k: this many tokens are kept (and those that equal the last one); ``None``: all.
        algorithm: one of :data:`~mosaic_compiler.sampling.request.DREAM_ALGORITHMS`.
    """

    def __init__(self, temperature: float, top_p: float | None, top_k: int | None, algorithm: str) -> None:
        super().__init__()
        self.temperature, self.top_p, self.top_k, self.algorithm = temperature, top_p, top_k, algorithm

    def forward(self, logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """[M, V] logits and int64 [M] keys -> int64 [M] tokens and [M] confidences."""
        if self.temperature > 0:
            logits = logits / self.temperature
        if self.top_p is not None and self.top_p < 1:
            logits = _keep_top_p(logits, self.top_p)
        if self.top_k is not None:
            last = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = torch.where(logits < last, torch.finfo(logits.dtype).min, logits)
        probability = torch.softmax(logits, -1)
        if self.temperature > 0:
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


def _keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    mass = torch.softmax(ordered, -1).cumsum(-1)
    before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], -1)
    dropped = torch.empty_like(before, dtype=torch.bool).scatter(-1, order, before > top_p)
    return torch.where(dropped, torch.finfo(logits.dtype).min, logits)


def without(logits: Tensor, token: int) -> Tensor:
    """[M, V] with the column of one token at -inf."""
    return torch.where(torch.arange(logits.shape[-1], device=logits.device) == token, float("-inf"), logits)
