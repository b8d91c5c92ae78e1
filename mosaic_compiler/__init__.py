"""mosaic_compiler: run one denoising step of a diffusion LLM inside a byte budget.

>>> step = torch.compile(step, backend="mosaic", dynamic=True)

Names are imported when they are first used: reading plans and asking what fits needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mosaic_compiler.registration import register

if TYPE_CHECKING:
    from mosaic_compiler.ahead.forecast import max_tokens
    from mosaic_compiler.errors import BudgetError, MosaicError, StateError
    from mosaic_compiler.options import MosaicOptions
    from mosaic_compiler.owned.function import compile
    from mosaic_compiler.planning import MemoryPlan
    from mosaic_compiler.report.explain import Report, explain
    from mosaic_compiler.runtime.pools import release_memory
    from mosaic_compiler.sampling.generation import generate
    from mosaic_compiler.sampling.result import Generation
    from mosaic_compiler.session import Session

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "Generation",
    "MemoryPlan",
    "MosaicError",
    "MosaicOptions",
    "Report",
    "Session",
    "StateError",
    "__version__",
    "compile",
    "explain",
    "generate",
    "max_tokens",
    "release_memory",
]

_HOME = {
    "BudgetError": "errors",
    "Generation": "sampling.result",
    "generate": "sampling.generation",
    "MemoryPlan": "planning",
    "MosaicError": "errors",
    "MosaicOptions": "options",
    "Report": "report.explain",
    "compile": "owned.function",
    "explain": "report.explain",
    "max_tokens": "ahead.forecast",
    "release_memory": "runtime.pools",
    "Session": "session",
    "StateError": "errors",
}


register(__version__)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
