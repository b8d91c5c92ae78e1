"""mosaic_compiler: run one denoising step of a diffusion LLM inside a byte budget.

>>> step = torch.compile(step, backend="mosaic", dynamic=True)
"""

from mosaic_compiler.errors import BudgetError, MosaicError
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.planning import MemoryPlan
from mosaic_compiler.report.explain import Report, explain
from mosaic_compiler.report.forecast import max_tokens
from mosaic_compiler.runtime.arena import release_memory

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "MemoryPlan",
    "MosaicError",
    "MosaicOptions",
    "Report",
    "__version__",
    "explain",
    "max_tokens",
    "release_memory",
]
