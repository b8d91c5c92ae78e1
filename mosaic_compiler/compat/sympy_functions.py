"""PyTorch's own functions in size expressions, by name."""

from __future__ import annotations

from typing import Any

from torch.utils._sympy import functions

_NAMES = (
    "FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv",
    "LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "IsNonOverlappingAndDenseIndicator",
    "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat", "Identity", "Max", "Min",
)  # fmt: skip

FUNCTIONS: dict[str, Any] = {f"torch.{name}": getattr(functions, name) for name in _NAMES if hasattr(functions, name)}
"""By the name that files have for them."""
