"""How models are called: the conventions of transformers, of LLaDA's and of Dream's remote code.

Found by looking at the signature of ``forward`` and at what the model can do, never at its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelCall:
    """Calls a model on whole sequences.

    Attributes:
        convention: ``plain`` (``model(ids)``, masks as ``attention_mask``), ``bias`` (masks as ``attention_bias``, as
            in LLaDA's remote code) or ``dream`` (``model(ids, "full" | mask, positions)``).
        padded: the call has a mask of padding.
        block: rows see their own block of so many tokens, and all before it; 0: all others.
        form: how masks of rows that see some others are written, one of :data:`MASK_FORMS`.
        says: further keyword arguments, see :func:`said_to`.
    """

    convention: str
    padded: bool
    says: tuple[tuple[str, Any], ...] = ()
    block: int = 0
    form: str = "bool"

    def __call__(self, model: nn.Module, ids: Tensor, real: Tensor | None) -> Tensor:
        """Logits [B, N, V].

        Args:
            ids: int64 [B, N].
            real: bool [B, N], False for padding; only read if ``padded``.
        """
        says = dict(self.says)
        is_padded = self.padded and real is not None
        if not is_padded and not self.block:
            output: Any = model(ids, "full", **says) if self.convention == "dream" else model(ids, **says)
        else:
            seen = self._seen(ids, real if is_padded else None)
            if self.convention == "dream":
                positions = None
                if real is not None:
                    positions = (real.cumsum(-1) - 1).masked_fill(~real, 1)
                output = model(ids, seen, positions, **says)
            elif self.convention == "bias":
                bias = torch.zeros(seen.shape, device=ids.device).masked_fill(~seen, torch.finfo(torch.float32).min)
                output = model(ids, attention_bias=bias, **says)
            else:
                output = model(ids, attention_mask=self._written(seen, model), **says)
        return logits_of(output)

    def _written(self, seen: Tensor, model: nn.Module) -> Tensor:
        if self.form == "plane":
            return seen[:, 0]
        if self.form == "additive":
            dtype = next(model.parameters()).dtype
            return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, float("-inf"))
        return seen

    def _seen(self, ids: Tensor, real: Tensor | None) -> Tensor:
        """Keys that may be seen: bool [B or 1, 1, 1 or N, N]."""
        padding = None if real is None else real[:, None, None, :]  # the same for all queries: no N x N mask
        if not self.block:
            assert padding is not None
            return padding
        block = torch.arange(ids.shape[1], device=ids.device) // self.block
        seen = (block[:, None] >= block[None, :]).expand(ids.shape[0], 1, -1, -1)
        return seen if padding is None else seen & padding


def logits_of(output: Any) -> Tensor:
    """Logits from what a model returns: a tensor, an object with ``.logits``, or a tuple that begins with them."""
    if isinstance(output, Tensor):
        return output
    found = output.logits if hasattr(output, "logits") else output[0]
    assert isinstance(found, Tensor)
    return found


MASK_FORMS = ("bool", "additive", "plane")
"""bool [B, 1, N, N]; 0 and -inf, [B, 1, N, N] (LLaDA2.x); bool [B, N, N] (SDAR)."""


def call_for(model: nn.Module, padded: bool, block: int = 0, form: str = MASK_FORMS[0]) -> ModelCall:
    """The convention of a model."""
    plain = "bias" if "attention_bias" in _parameters(model) else "plain"
    return ModelCall("dream" if is_dream_like(model) else plain, padded, tuple(said_to(model).items()), block, form)


def said_to(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments that say what a model would otherwise look up in its config: asked for ``use_return_dict``,
    transformers 5 logs a warning, and that breaks Dynamo's graph in front of the head; ``use_cache`` is not in every
    config any more, and a cache of keys and values that were seen once is of no use."""
    return {name: value for name, value in (("return_dict", True), ("use_cache", False)) if name in _parameters(model)}


def kind_of(model: nn.Module) -> str:
    """The sampler that a model was published with, as far as it can be told: LLaDA's, unless it says otherwise."""
    if isinstance(getattr(getattr(model, "config", None), "bd_size", None), int):
        return "fast_dllm_v2"
    return "dream" if is_dream_like(model) else "llada"


def is_dream_like(model: nn.Module) -> bool:
    """It can do what Dream's remote code does: a ``diffusion_generate`` of its own, and a mask in ``forward``."""
    return callable(getattr(model, "diffusion_generate", None)) and "attention_mask" in _parameters(model)


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters
