"""``ChunkLoop``: a region of the graph that runs for consecutive slices of rows.

It is the submodule behind a ``call_module`` node, and plain PyTorch can run it: operands are sliced or passed
whole, the body runs once per chunk, and its results are written side by side into full-length outputs::

    x = chunk_loop_0(ids, table, w)       operands (1, None, None), outputs (0,), rows N
        body(rows, ids[:, a:b], table, w)   for [a, b) = [0, c), [c, 2c), ..., [.., N)

The chunk size is a symbol in the body's metadata.  Planning gives it a value; ``chunk_rows`` here is only for
running the graph by itself (``None``: all rows at once).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from mosaic_compiler.planning.lowered import LoopOutput, Scatter

__all__ = ["ChunkLoop", "LoopOutput", "Scatter", "loop_of", "rewrite_bodies", "set_loop"]


class ChunkLoop(nn.Module):
    """A loop over chunks of rows (see the module docstring).

    Args:
        body: a GraphModule over ``(rows, *operands)`` that returns a tuple of chunks.
        operands: per operand the dim that is sliced, or ``None`` for one that every iteration sees whole.
        outputs: how the chunks are put together.
        chunk: the symbol of the chunk size in the body's metadata.
    """

    def __init__(
        self,
        body: nn.Module,
        operands: Sequence[int | None],
        outputs: Sequence[LoopOutput],
        chunk: sympy.Symbol,
    ) -> None:
        super().__init__()
        self.body: Any = body
        self.operands = tuple(operands)
        self.outputs = tuple(outputs)
        self.chunk = chunk
        self.chunk_rows: int | None = None

    def with_body(self, body: fx.GraphModule) -> ChunkLoop:
        """The same loop around another body."""
        return ChunkLoop(body, self.operands, self.outputs, self.chunk)

    def with_outputs(self, outputs: Sequence[LoopOutput]) -> ChunkLoop:
        """The same loop with its results put elsewhere."""
        return ChunkLoop(self.body, self.operands, outputs, self.chunk)

    def sliced(self) -> tuple[int, ...]:
        """Positions of the operands that are sliced."""
        return tuple(index for index, dim in enumerate(self.operands) if dim is not None)

    def forward(self, *operands: Any) -> tuple[Tensor, ...]:
        first = self.sliced()[0]
        rows = operands[first].shape[self.operands[first]]
        if not rows:
            return self._empty(operands)
        step = max(min(self.chunk_rows or rows, rows), 1)
        results: list[Tensor] = []
        for start in range(0, rows, step):
            count = min(step, rows - start)
            parts = self.body(count, *self._cut(operands, start, count))
            if not results:
                results = [
                    self._whole(spec, part, rows, operands) for spec, part in zip(self.outputs, parts, strict=True)
                ]
            for spec, part, whole in zip(self.outputs, parts, results, strict=True):
                if spec.scatter is None:
                    whole.narrow(spec.dim, start, count).copy_(part)
                else:
                    whole.index_copy_(spec.dim, operands[spec.scatter.index].narrow(0, start, count), part)
        return tuple(results)

    def _cut(self, operands: Sequence[Any], start: int, count: int) -> list[Any]:
        return [
            operand if dim is None else operand.narrow(dim, start, count)
            for operand, dim in zip(operands, self.operands, strict=True)
        ]

    def _whole(self, spec: LoopOutput, part: Tensor, rows: int, operands: Sequence[Any]) -> Tensor:
        if spec.into is not None:
            result: Tensor = operands[spec.into]
            return result
        if spec.scatter is not None:
            return part.new_zeros((operands[spec.scatter.total], *part.shape[1:]))
        shape = list(part.shape)
        shape[spec.dim] = rows
        dense = part.new_empty([shape[dim] for dim in spec.order])
        return dense.permute([spec.order.index(dim) for dim in range(len(shape))])

    def _empty(self, operands: Sequence[Any]) -> tuple[Tensor, ...]:
        """No rows: only shapes are asked for, and some kernels cannot be called with no rows."""
        shapes = [o.to("meta") if isinstance(o, Tensor) else o for o in operands]
        parts = self.body(0, *shapes)
        device = next(o.device for o in operands if isinstance(o, Tensor))
        return tuple(
            self._whole(spec, torch.empty(part.shape, dtype=part.dtype, device=device), 0, operands)
            for spec, part in zip(self.outputs, parts, strict=True)
        )

    def extra_repr(self) -> str:
        return f"chunk={self.chunk}, operands={self.operands}, outputs={self.outputs}"


def set_loop(module: fx.GraphModule, node: fx.Node, name: str, loop: ChunkLoop) -> None:
    """Make ``node`` run ``loop``, which the module then holds under ``name``."""
    module.add_submodule(name, loop)
    node.target = name
    node.meta["loop"] = loop


def rewrite_bodies(module: fx.GraphModule, rewrite: Callable[[fx.GraphModule], fx.GraphModule]) -> None:
    """Give every loop of ``module`` (changed in place) a rewritten body; loops that are shared stay shared."""
    rewritten: dict[ChunkLoop, ChunkLoop] = {}
    for node in module.graph.nodes:
        loop = loop_of(node)
        if loop is not None:
            if loop not in rewritten:
                rewritten[loop] = loop.with_body(rewrite(loop.body))
            set_loop(module, node, str(node.target), rewritten[loop])


def loop_of(node: fx.Node) -> ChunkLoop | None:
    """The loop that a node runs, or ``None`` if it is no loop."""
    loop = node.meta.get("loop") if node.op == "call_module" else None
    return loop if isinstance(loop, ChunkLoop) else None
