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


class NotADiffusionModelError(ValueError):
    """The model attends causally."""


@dataclass(frozen=True)
class ModelCall:
    """Calls a model on whole sequences.

    Attributes:
        convention: ``plain`` (``model(ids)``, masks as ``attention_mask``), ``bias`` (masks as ``attention_bias``, as
            in LLaDA's remote code) or ``dream`` (``model(ids, "full" | mask, positions)``).
        padded: the call has a mask of padding.
        says: further keyword arguments, see :func:`said_to`.
    """

    convention: str
    padded: bool
    says: tuple[tuple[str, Any], ...] = ()

    def __call__(self, model: nn.Module, ids: Tensor, real: Tensor | None) -> Tensor:
        """Logits [B, N, V].

        Args:
            ids: int64 [B, N].
            real: bool [B, N], False for padding; only read if ``padded``.
        """
        says = dict(self.says)
        if not self.padded or real is None:
            output: Any = model(ids, "full", **says) if self.convention == "dream" else model(ids, **says)
        else:
            seen = real[:, None, None, :]  # keys that may be seen, the same for all queries: no N x N mask
            if self.convention == "dream":
                positions = (real.cumsum(-1) - 1).masked_fill(~real, 1)
                output = model(ids, seen, positions, **says)
            elif self.convention == "bias":
                bias = torch.zeros(seen.shape, device=ids.device).masked_fill(~seen, torch.finfo(torch.float32).min)
                output = model(ids, attention_bias=bias, **says)
            else:
                output = model(ids, attention_mask=seen, **says)
        return logits_of(output)


def logits_of(output: Any) -> Tensor:
    """Logits from what a model returns: a tensor, an object with ``.logits``, or a tuple that begins with them."""
    if isinstance(output, Tensor):
        return output
    found = output.logits if hasattr(output, "logits") else output[0]
    assert isinstance(found, Tensor)
    return found


def call_for(model: nn.Module, padded: bool) -> ModelCall:
    """The convention of a model."""
    plain = "bias" if "attention_bias" in _parameters(model) else "plain"
    return ModelCall("dream" if is_dream_like(model) else plain, padded, tuple(said_to(model).items()))


def said_to(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments that say what a model would otherwise look up in its config: asked for ``use_return_dict``,
    transformers 5 logs a warning, and that breaks Dynamo's graph in front of the head."""
    return {"return_dict": True} if "return_dict" in _parameters(model) else {}


def is_dream_like(model: nn.Module) -> bool:
    """It can do what Dream's remote code does: a ``diffusion_generate`` of its own, and a mask in ``forward``."""
    return callable(getattr(model, "diffusion_generate", None)) and "attention_mask" in _parameters(model)


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def check_bidirectional(model: nn.Module) -> None:
    """Raise :class:`NotADiffusionModelError` if the config says that the model attends causally, or, where it says
    nothing, if a part of the model does."""
    declared = getattr(getattr(model, "config", None), "is_causal", None)
    if declared is False:
        return
    causal = next((name for name, part in model.named_modules() if getattr(part, "is_causal", False) is True), None)
    if declared or causal is not None:
        where = f"its {causal}" if causal else "its config"
        raise NotADiffusionModelError(
            f"{type(model).__name__} is no diffusion language model: {where} attends causally. If its weights are of "
            "one, load it with is_causal=False: AutoModelForCausalLM.from_pretrained(path, is_causal=False), or "
            'put "is_causal": false into its config.json'
        )
