"""The prologue: the few nodes that say how many rows a step computes, run before anything is planned.

``row-demand`` puts masks and ``nonzero`` at the front of the graph.  They run functionally (a handful of
small tensors, planned as transients), and then all sizes of the step are numbers.  On a GPU this is where a
step waits for the device, and the only place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mosaic_compiler.planning.lowered import Kind
from mosaic_compiler.runtime.link import LinkedStep


class Prologue:
    """Runs the prologue of one graph.

    Attributes:
        results: names of those of its values that the rest of the step reads.
        symbols: the symbols that it binds, in order.
    """

    def __init__(self, linked: LinkedStep) -> None:
        self._ops = linked.early
        self.results, self.symbols = linked.step.early_results, linked.step.symbols
        self._inputs = [given.name for given in linked.step.graph.inputs]
        constants = (op for op in linked.step.graph.ops if op.kind is Kind.CONSTANT)
        self._constants = {op.name: linked.constants[op.target] for op in constants}

    def run(
        self, inputs: Sequence[Any], room: Callable[[int, int], int] = lambda position, count: count
    ) -> tuple[dict[str, Any], tuple[int, ...]]:
        """Run the prologue.

        Args:
            inputs: of the step.
            room: the number of rows to compute for the symbol at a position of ``symbols``, where so many are needed:
                no fewer.  It is asked where row numbers may be repeated; all rows are the most that is computed.

        Returns:
            The values of its ops by name, and the numbers for ``symbols``.
        """
        if not self._ops:
            return {}, ()
        values: dict[str, Any] = self._constants | dict(zip(self._inputs, inputs, strict=True))
        counts: list[int] = []
        with torch.no_grad():
            for linked in self._ops:
                args, kwargs = linked.arguments(values)
                found, op = linked.function(*args, **kwargs), linked.op
                if op.may_repeat:
                    count, most = found.shape[0], values[op.operands[0]].numel()
                    found = _repeated(found, min(room(len(counts), count), most))
                if op.binds is not None:
                    counts.append(found if isinstance(found, int) else found.shape[0])
                values[op.name] = found
        return {linked.name: values[linked.name] for linked in self._ops}, tuple(counts)


def _repeated(numbers: Tensor, size: int) -> Tensor:
    """Row numbers int64 [M, 1] with the last one repeated: [size, 1]."""
    missing = size - numbers.shape[0]
    return torch.cat((numbers, numbers[-1:].expand(missing, -1))) if missing > 0 else numbers
