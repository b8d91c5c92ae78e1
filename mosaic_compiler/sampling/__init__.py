"""Samplers of diffusion LLMs, written so that their graphs show which rows are read.

Names are imported when they are first used: what a sampler can be told is checked (``request.py``) without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mosaic_compiler.sampling.generation import generate
    from mosaic_compiler.sampling.loop import denoise, transfer_counts
    from mosaic_compiler.sampling.result import Generation
    from mosaic_compiler.sampling.step import DenoisingStep, block_window

__all__ = ["DenoisingStep", "Generation", "block_window", "denoise", "generate", "transfer_counts"]

_HOME = {
    "DenoisingStep": "step",
    "Generation": "result",
    "block_window": "step",
    "denoise": "loop",
    "generate": "generation",
    "transfer_counts": "loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
