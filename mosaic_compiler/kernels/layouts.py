"""Sizes of a kernel's arguments, and whether they have the layouts that it was compiled for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch

from mosaic_compiler.errors import ArenaError
from mosaic_compiler.planning.facts import KernelFacts


class Layouts:
    """Reads the sizes of a kernel off its arguments."""

    def __init__(self, facts: KernelFacts) -> None:
        self._facts = facts
        self._dtypes = [None if known is None else _dtype(known.dtype) for known in facts.layouts]
        self._expected: dict[tuple[int, ...], list[Any]] = {}

    def sizes(self, arguments: Sequence[Any]) -> list[int]:
        """The values of the symbols.

        Raises:
            ArenaError: if a tensor does not have the layout that the kernel is compiled for (it would write elsewhere).
        """
        values = [read(arguments) for read in self._facts.sources]
        key = tuple(values)
        if key not in self._expected:
            self._expected[key] = self.at(values)
        for argument, expected in zip(arguments, self._expected[key], strict=True):
            if expected is None:
                continue
            dtype, shape, strides = expected
            found = [step for step, size in zip(argument.stride(), shape, strict=True) if size > 1]
            wanted = [step for step, size in zip(strides, shape, strict=True) if size > 1]
            if argument.dtype != dtype or list(argument.shape) != shape or found != wanted:
                raise ArenaError(
                    f"a fused kernel for {dtype} {shape} with strides {strides} was given {argument.dtype} "
                    f"{list(argument.shape)} with strides {list(argument.stride())}"
                )
        return values

    def at(self, values: Sequence[int]) -> list[Any]:
        """Dtype, sizes and strides of each operand and destination, for values of the symbols."""
        known = dict(zip(self._facts.symbols, map(sympy.Integer, values), strict=True))
        return [
            None if layout is None else (dtype, *(_numbers(part, known) for part in (layout.shape, layout.strides)))
            for layout, dtype in zip(self._facts.layouts, self._dtypes, strict=True)
        ]


def _numbers(part: Sequence[sympy.Expr], known: dict[sympy.Symbol, sympy.Integer]) -> list[int]:
    return [int(number.xreplace(known)) for number in part]


def _dtype(text: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, text.removeprefix("torch."))
    return found
