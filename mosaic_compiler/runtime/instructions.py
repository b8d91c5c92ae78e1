"""Instructions: calls with everything bound that can be bound.

What cannot is read from ``slots`` when the instruction runs: the caller's inputs, outputs (fresh memory per
call, because the caller keeps them) and results of opaque ops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from mosaic_compiler.book import Call
from mosaic_compiler.compat.tracing import tree_map_only
from mosaic_compiler.errors import CanaryError
from mosaic_compiler.kernels.fused import FusedKernel
from mosaic_compiler.planning.buffers import ALIGNMENT, Buffer
from mosaic_compiler.runtime.arena import Arena

Instruction: TypeAlias = "Callable[[], Any]"

DEAD = 0xFF  # poison: NaN in every floating-point format, -1 in every integer
CANARY = 0xA5
GUARD = ALIGNMENT  # poison mode keeps this many bytes of canary behind each buffer


@dataclass(frozen=True)
class Slot:
    """A value that is only known during a call: ``slots[index]``."""

    index: int


def drop(slots: list[Any], indices: Sequence[int]) -> None:
    for index in indices:
        slots[index] = None


def check_canary(arena: Arena, buffer: Buffer) -> None:
    assert buffer.offset is not None
    end = buffer.offset + buffer.nbytes
    wrong = arena.find_other(end - GUARD, end, CANARY)
    if wrong is not None:
        raise CanaryError(f"something wrote {wrong - (end - GUARD)} bytes behind the end of {buffer.describe()}")
    arena.fill(buffer.offset, end, DEAD)


def store(slots: list[Any], index: int, make: Instruction) -> Instruction:
    def instruction() -> None:
        slots[index] = make()

    return instruction


def store_all(slots: list[Any], indices: Sequence[int], make: Instruction) -> Instruction:
    def instruction() -> None:
        for index, value in zip(indices, make(), strict=True):
            slots[index] = value

    return instruction


_PLAIN = frozenset({torch.Tensor, int, float, bool, str, type(None), torch.dtype, torch.device})


def has_slot(value: Any) -> bool:
    """There is a slot among nested lists, tuples and dicts.  (Asked for every argument of every call that is bound.)"""
    kind = type(value)
    if kind in _PLAIN:
        return False
    if kind is Slot:
        return True
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return False
    for item in value:  # noqa: SIM110  (a generator takes three times as long)
        if has_slot(item):
            return True
    return False


def bound_call(call: Call, slots: list[Any]) -> Instruction:
    """A prebound call; arguments that are slots are read when it runs and never kept."""
    kwargs = dict(call.kwargs)
    if not has_slot(call.args) and not has_slot(kwargs):
        if isinstance(call.function, FusedKernel):
            return call.function.bind(*call.args)
        return functools.partial(call.function, *call.args, **kwargs)
    function = call.function
    nested = any(has_slot(v) for v in (*call.args, *kwargs.values()) if not isinstance(v, Slot))
    if nested:

        def general() -> Any:
            args, named = tree_map_only(Slot, lambda slot: slots[slot.index], (list(call.args), kwargs))
            return function(*args, **named)

        return general
    late_args = [(i, v.index) for i, v in enumerate(call.args) if isinstance(v, Slot)]
    late_kwargs = [(k, v.index) for k, v in kwargs.items() if isinstance(v, Slot)]
    fixed_args = list(call.args)

    def instruction() -> Any:
        args = fixed_args.copy()
        for position, index in late_args:
            args[position] = slots[index]
        if not late_kwargs:
            return function(*args, **kwargs)
        named = kwargs.copy()
        for name, index in late_kwargs:
            named[name] = slots[index]
        return function(*args, **named)

    return instruction
