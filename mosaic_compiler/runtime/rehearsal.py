"""Rehearsal: what cuDNN prepares for a length that it has not seen, it prepares while the step is planned and bound.

cuDNN makes an execution plan for each new shape of an attention (``kernels/attention.py``), outside of Python and for
about as long as planning and binding a step take.  The first N x N attention of a step is therefore called once with
whatever lies in the arena, whose bytes nobody needs between two steps, while another thread prepares the step.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from threading import get_ident

import sympy
import torch

from mosaic_compiler.kernels import attention
from mosaic_compiler.kernels.cluster_form import span
from mosaic_compiler.planning.lives import Sizes
from mosaic_compiler.runtime.arena import Arena
from mosaic_compiler.runtime.link import LinkedGraph, object_of

_MOST_WORK = 1 << 42
"""Floating-point operations of an attention that is rehearsed: 7 ms on an H100."""


@dataclass(frozen=True)
class _Operand:
    """A tensor as the attention gets it, at some sizes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return span(self.shape, self.strides) * self.dtype.itemsize if math.prod(self.shape) else 0


class Rehearsal:
    """The first attention of a graph that cuDNN makes a plan for, if there is one.

    Args:
        graph: of a step.
        known: symbols with values before a step is planned.
    """

    def __init__(self, graph: LinkedGraph, known: Collection[sympy.Symbol]) -> None:
        self.node = next((linked for linked in graph.ops if attention.makes_plan(linked.op.attention, known)), None)
        self._seen: set[tuple[int, tuple[_Operand, ...]]] = set()

    def of(self, sizes: Sizes, arena: Arena, budget: int | None) -> Callable[[], None] | None:
        """The call of the attention at these sizes, or ``None``.

        There is nothing to rehearse at sizes that this thread has seen (cuDNN's plans belong to a thread), where an
        attention is so much work that calling it costs more than it saves, or where there are no bytes for it.
        """
        if self.node is None:
            return None
        query, key, value = operands = self._operands(sizes)
        if attention.work(query.shape, key.shape) > _MOST_WORK or (get_ident(), operands) in self._seen:
            return None
        self._seen.add((get_ident(), operands))  # if it is not rehearsed, then it is prepared in the step
        result = math.prod(query.shape) * query.dtype.itemsize
        has_room = budget is None or arena.reserved + result <= budget
        if arena.moves or not has_room or max(query.nbytes, key.nbytes, value.nbytes) > arena.reserved:
            return None
        return functools.partial(self._run, operands, arena)

    def _operands(self, sizes: Sizes) -> tuple[_Operand, ...]:
        assert self.node is not None
        facts = self.node.op.attention
        assert facts is not None
        layouts = zip(facts.shapes, facts.strides, strict=True)
        dtype = object_of(facts.dtype)
        return tuple(
            _Operand(dtype, tuple(map(sizes, shape)), tuple(map(sizes, strides))) for shape, strides in layouts
        )

    def _run(self, operands: Sequence[_Operand], arena: Arena) -> None:
        """All operands are the arena's first bytes: it does not matter what they hold."""
        assert self.node is not None
        with torch.inference_mode(False), torch.no_grad(), contextlib.suppress(torch.OutOfMemoryError):
            views = [arena.tensor(0, o.dtype, o.shape, o.strides, arena.reserved) for o in operands]
            others, kwargs = self.node.others(len(views))
            self.node.function(*views, *others, **kwargs)
