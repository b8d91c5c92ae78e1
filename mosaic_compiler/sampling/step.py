"""One denoising step: a model forward and the choice of which masked tokens to commit.

Written so that the graph shows which rows are read: everything behind the logits goes through a
``where`` on the mask.
"""

from __future__ import annotations

import logging
import warnings

import torch
from torch import Tensor, nn

from mosaic_compiler.compat.dynamo import has_given_up
from mosaic_compiler.errors import FallbackError
from mosaic_compiler.sampling.bidirectional import form_of
from mosaic_compiler.sampling.calls import call_for, logits_of, said_to
from mosaic_compiler.settings import read_settings

logger = logging.getLogger("mosaic_compiler")


class DenoisingStep(nn.Module):
    """LLaDA's low-confidence remasking at temperature 0, as one compilable module.

    At every masked position of the window the model's most likely token is proposed; the ``count``
    proposals with the highest softmax probability are committed, the others stay masked.  Ties go to
    the lower position.

    Source: Nie et al., "Large Language Diffusion Models" (2025), algorithm 5, and its ``generate.py``.

    Args:
        model: anything with ``model(input_ids).logits`` of shape [B, N, vocabulary] (a transformers
            masked LM or a bidirectional causal LM), or that returns the logits themselves.
        mask_token_id: the id of the mask token.
        block_causal: rows see their own block of so many tokens, and all before it: the mask of block-causal models.
    """

    def __init__(self, model: nn.Module, mask_token_id: int, *, block_causal: int | None = None) -> None:
        super().__init__()
        if block_causal is not None and block_causal < 1:
            raise ValueError(f"block_causal must be the tokens of a block, at least 1, got {block_causal}")
        self.model = model
        self.mask_token_id = mask_token_id
        self._says = said_to(model)
        self._call = None
        if block_causal is not None:
            form = form_of(model, mask_token_id, block_causal)
            self._call = call_for(model, padded=False, block=block_causal, form=form)
        self._has_said_eager = False

    def forward(self, input_ids: Tensor, window: Tensor, count: Tensor) -> Tensor:
        """Denoise once.

        Args:
            input_ids: int64 [B, N].
            window: bool [B, N] or [1, N], the positions that may change (see :func:`block_window`).
            count: int64 [B], how many tokens to commit per sequence.

        Returns:
            int64 [B, N], the new ids.
        """
        if not torch.compiler.is_compiling():
            self._say_if_given_up()
        masked = (input_ids == self.mask_token_id) & window  # [B, N]
        if self._call is None:
            logits = logits_of(self.model(input_ids, **self._says))  # [B, N, V]
        else:
            logits = self._call(self.model, input_ids, None)
        token = logits.argmax(dim=-1)  # [B, N]
        probability = torch.softmax(logits, dim=-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
        confidence = torch.where(masked, probability, float("-inf"))
        commit = masked & (rank_of(confidence) < count.unsqueeze(-1))
        return torch.where(commit, token, input_ids)

    def _say_if_given_up(self) -> None:
        """A compiled step that runs in eager PyTorch says so: Dynamo only logs that it has reached its limit.

        Raises:
            FallbackError: in strict mode.
        """
        if self._has_said_eager or not has_given_up():
            return
        reason = (
            "eager: this step was compiled with too many different options, so Dynamo runs it in eager PyTorch, "
            "outside of any plan or budget. Compile it once and reuse it, call torch._dynamo.reset(), raise "
            "torch._dynamo.config.recompile_limit, or use mosaic_compiler.generate(), whose budgets need no compilation"
        )
        if read_settings().strict:
            raise FallbackError(f"strict mode: {reason}")
        self._has_said_eager = True
        logger.warning("mosaic: %s", reason)
        warnings.warn(reason, stacklevel=3)


def rank_of(score: Tensor) -> Tensor:
    """Rank of each score in its row, 0 for the highest; equal scores rank by position.  [B, N] -> int64."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    positions = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, positions)


def block_window(length: int, start: int, end: int, device: torch.device | str = "cpu") -> Tensor:
    """bool [1, length], True in [start, end)."""
    positions = torch.arange(length, device=device)
    return ((positions >= start) & (positions < end)).unsqueeze(0)
