"""A mixture of experts as one operator, which is row-parallel as a whole: its ops are a program, in data.

Inside, rows are sorted by their experts, so no row of what is computed there belongs to a row of the operands; but what
comes out does, and for some rows it is what it is for all of them.  A program is JSON: steps of an operator and its
arguments, of which ``{"v": i}`` are values (operands, then results of steps), ``{"n": k}`` is k times the number of
rows.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mosaic_compiler.planning.mixture import MixtureStep, Program


def mixture(rows: Sequence[Tensor], whole: Sequence[Tensor], program: str) -> Tensor:
    """Run a program.

    Args:
        rows: each [N, ...].
        whole: weights, and what else is the same for all rows.
        program: see :class:`~mosaic_compiler.planning.mixture.Program`.

    Returns:
        [N, ...], in memory of its own.
    """
    count = rows[0].shape[0]
    parsed = parse(program)
    values: list[Any] = [*rows, *whole]
    for number, step in enumerate(parsed.steps):
        args, named = arguments(step, values, lambda times: times * count, rows[0].device)
        values.append(function_of(step.target)(*args, **named))
        for dead in parsed.dead[number]:
            values[dead] = None
    result: Tensor = values[-1]
    return result


@functools.lru_cache(maxsize=1024)
def parse(program: str) -> Program:
    """A program, read."""
    return Program.read(json.loads(program))


@functools.cache
def function_of(target: str) -> Any:
    """An operator by its name, ``aten.sort.default``."""
    if target == "getitem":
        return operator.getitem
    found: Any = torch.ops
    for part in target.split("."):
        found = getattr(found, part)
    return found


def arguments(
    step: MixtureStep, values: Sequence[Any], multiple: Callable[[int], Any], device: torch.device
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a step.

    Args:
        values: of the steps before, behind the operands.
        multiple: what so many times the number of rows is.
    """

    def decoded(given: Any) -> Any:
        if isinstance(given, list):
            return [decoded(part) for part in given]
        if not isinstance(given, dict):
            return given
        ((kind, what),) = given.items()
        if kind == "v":
            return values[what]
        if kind == "n":
            return multiple(what)
        return device if kind == "device" else getattr(torch, what)

    return decoded(step.args), {name: decoded(given) for name, given in step.kwargs.items()}
