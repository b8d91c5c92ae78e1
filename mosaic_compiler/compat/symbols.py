"""Symbolic sizes: what PyTorch knows of them beside their expressions."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, free_unbacked_symbols, guard_scalar
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod
from torch.utils._sympy.symbol import SymT, symbol_is_type

__all__ = [
    "FloorDiv",
    "Max",
    "Min",
    "Mod",
    "PythonMod",
    "ShapeEnv",
    "bounds_of",
    "conditions_in",
    "expression_of",
    "free_unbacked_symbols",
    "guard_scalar",
    "has_hint",
    "hint_of",
    "is_float",
    "name_of",
    "new_number",
    "replace_symbol",
    "size_of",
    "sources_in",
    "values_in",
]


def expression_of(number: Any) -> sympy.Expr:
    """The expression of a SymInt, SymFloat or SymBool, after replacements."""
    return number.node.expr


def name_of(number: Any) -> str:
    """The expression of a symbolic number as it was made, before replacements."""
    return str(number.node._expr)


def has_hint(number: Any) -> bool:
    """The example has a value for it."""
    return bool(number.node.has_hint())


def hint_of(number: Any) -> Any:
    """The example's value of a symbolic number; a number itself."""
    return number.node.hint if isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)) else number


def new_number(environment: ShapeEnv, name: str, hint: int) -> tuple[sympy.Symbol, torch.SymInt]:
    """A new symbol for a size that no input has, and its number."""
    source: Any = ConstantSource(name)
    symbol = environment.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    number: Any = environment.create_symintnode(symbol, hint=hint, source=source)
    return symbol, number


def size_of(environment: ShapeEnv, expr: sympy.Expr, hint: int) -> torch.SymInt:
    """A size computed from symbols of an environment."""
    number: torch.SymInt = environment.create_symintnode(expr, hint=hint)  # type: ignore[assignment]
    return number


def replace_symbol(environment: ShapeEnv, symbol: sympy.Symbol, by: sympy.Expr, reason: str) -> None:
    """Let a symbol be something else from now on, with a guard."""
    environment._set_replacement(symbol, by, reason)


def bounds_of(number: torch.SymInt) -> tuple[sympy.Expr, sympy.Expr]:
    """The least and the largest value that guards let a size have."""
    known = number.node.shape_env.bound_sympy(number.node.expr)
    return known.lower, known.upper


def sources_in(environment: ShapeEnv | None, symbol: sympy.Symbol) -> list[str]:
    """Where Dynamo says that a symbol comes from: ``L['ids'].size()[1]``."""
    known = {} if environment is None else environment.var_to_sources
    return [source.name for source in known.get(symbol, ())]


def values_in(environment: ShapeEnv | None) -> dict[sympy.Symbol, Any]:
    """The example's value of every symbol of an environment."""
    return {} if environment is None else dict(environment.backed_var_to_val)


def is_float(symbol: sympy.Symbol) -> bool:
    """The symbol stands for a Python float."""
    return symbol_is_type(symbol, SymT.FLOAT)


def conditions_in(environment: ShapeEnv | None) -> list[Any]:
    """What was taken for granted of the sizes of a graph's inputs, as sympy has it."""
    if environment is None:
        return []
    found = [environment.replace(guard.expr) for guard in environment.guards]
    for symbol, known in environment.var_to_range.items():
        if symbol in environment.backed_var_to_val and environment.replace(symbol) == symbol:
            if known.lower.is_Integer:
                found.append(sympy.Ge(symbol, known.lower, evaluate=False))
            if known.upper.is_Integer:
                found.append(sympy.Le(symbol, known.upper, evaluate=False))
    return found
