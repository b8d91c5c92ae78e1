"""The program of a mixture of experts as data, and the bytes that it takes inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class MixtureStep:
    """One operator.

    Attributes:
        target: its name; ``getitem`` for one result of several.
        args, kwargs: see ``kernels/mixture.py``.
        per_row, fixed: bytes of its results: for each row of the mixture, and besides; 0 for views.
    """

    target: str
    args: list[Any]
    kwargs: dict[str, Any]
    per_row: int
    fixed: int


@dataclass(frozen=True)
class Program:
    """What a mixture computes.

    Attributes:
        steps: in order; the last one's result is the mixture's.
        dead: values that nobody reads behind each step (operands come first).
        peak: bytes that are live at once, without the result: (for each row, besides), of which the largest counts.
    """

    steps: tuple[MixtureStep, ...]
    dead: tuple[tuple[int, ...], ...]
    peak: tuple[tuple[int, int], ...]

    def written(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Program:
        """From JSON."""
        steps = tuple(MixtureStep(**step) for step in given["steps"])
        dead = tuple(tuple(numbers) for numbers in given["dead"])
        return cls(steps, dead, tuple((a, b) for a, b in given["peak"]))
