"""The prologue: the few nodes that say how many rows a step computes, run before anything is planned.

``row-demand`` puts masks and ``nonzero`` at the front of the graph.  They run functionally (a handful of
small tensors, planned as transients), and then all sizes of the step are numbers.  On a GPU this is where a
step waits for the device, and the only place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from mosaic_compiler.ir import BINDS, MAY_REPEAT, prologue_nodes


class Prologue:
    """Runs the prologue of one graph.

    Attributes:
        nodes: the prologue, in order.
        results: those of its nodes that the rest of the step reads.
        symbols: the symbols that it binds, in order.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = prologue_nodes(graph)
        members = set(self.nodes)
        self.results = [node for node in self.nodes if not members.issuperset(node.users)]
        self.symbols: tuple[sympy.Symbol, ...] = tuple(n.meta[BINDS] for n in self.nodes if BINDS in n.meta)
        self._placeholders = [node for node in graph.nodes if node.op == "placeholder"]

    def run(
        self, inputs: Sequence[Any], room: Callable[[int, int], int] = lambda position, count: count
    ) -> tuple[dict[str, Any], tuple[int, ...]]:
        """Run the prologue.

        Args:
            inputs: of the step.
            room: the number of rows to compute for the symbol at a position of ``symbols``, where so many are needed:
                no fewer.  It is asked where row numbers may be repeated; all rows are the most that is computed.

        Returns:
            The values of ``nodes`` by name, and the numbers for ``symbols``.
        """
        if not self.nodes:
            return {}, ()
        values: dict[fx.Node, Any] = dict(zip(self._placeholders, inputs, strict=True))
        counts: list[int] = []
        with torch.no_grad():
            for node in self.nodes:
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                if MAY_REPEAT in node.meta:
                    count, most = values[node].shape[0], values[node.all_input_nodes[0]].numel()
                    values[node] = _repeated(values[node], min(room(len(counts), count), most))
                if BINDS in node.meta:
                    found = values[node]
                    counts.append(found if isinstance(found, int) else found.shape[0])
        return {node.name: values[node] for node in self.nodes}, tuple(counts)


def _repeated(numbers: Tensor, size: int) -> Tensor:
    """Row numbers int64 [M, 1] with the last one repeated: [size, 1]."""
    missing = size - numbers.shape[0]
    return torch.cat((numbers, numbers[-1:].expand(missing, -1))) if missing > 0 else numbers
