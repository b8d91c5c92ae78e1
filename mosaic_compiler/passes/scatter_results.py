"""``scatter-results``: a loop puts its rows where they belong, chunk by chunk."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.ir import ops
from mosaic_compiler.ir.loops import ChunkLoop, Scatter, loop_of, set_loop
from mosaic_compiler.ir.notes import UNRULED
from mosaic_compiler.ir.sorting import sort_nodes
from mosaic_compiler.passes.base import Pass


@dataclass(frozen=True)
class ScatterResultsPass(Pass):
    """Where all that is done with a loop's result is to scatter its rows into zeros, the loop does it itself.

    Otherwise all rows would exist twice: side by side, and where they belong.

    Requires: loops.  Guarantees: the same outputs, bit for bit.

    Before (M rows)::

        rows = chunk_loop_2(h, w)                            # [M, V]: mm(h[c], w)
        logits = scatter_rows(rows, idx, N, pages, page)     # [N, V]

    After::

        logits = chunk_loop_2(h, w, idx, N, pages)           # [N, V]: mm(h[c], w) goes to rows idx[c]
    """

    name: ClassVar[str] = "scatter-results"

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        if not any(node.target is ops.scatter_rows for node in module.graph.nodes):
            return module
        module = ir.copy_graph(module)
        done = set()
        for node in list(module.graph.nodes):
            found = _scattered_result(node) if node.target is ops.scatter_rows else None
            if found is not None:
                _rewrite(module, node, *found)
                done.add(node.name)
        if done:
            UNRULED.write(module, tuple(entry for entry in UNRULED.of(module) if entry[0] not in done))
            ir.remove_dead_code(module.graph)
            sort_nodes(module.graph, {node: i for i, node in enumerate(module.graph.nodes)})
        module.graph.lint()
        module.recompile()
        return module


def _scattered_result(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The loop and the number of its result that a ``scatter_rows`` is the only reader of."""
    rows = node.args[0]
    assert isinstance(rows, fx.Node)
    wanted = ir.only_tensor(rows)
    while ir.is_view(rows) and len(rows.users) == 1:
        rows = rows.args[0]
        assert isinstance(rows, fx.Node)
    if rows.target is not operator.getitem or len(rows.users) != 1:
        return None
    source, result = rows.args
    assert isinstance(source, fx.Node)
    assert isinstance(result, int)
    loop = loop_of(source)
    if loop is None or loop.outputs[result].dim != 0 or not ir.same_layout(ir.only_tensor(rows), wanted):
        return None
    if sum(user.target is operator.getitem and user.args[1] == result for user in source.users) != 1:
        return None
    return source, result


def _rewrite(module: fx.GraphModule, node: fx.Node, source: fx.Node, result: int) -> None:
    loop = loop_of(source)
    assert loop is not None
    _, index, total, pages, page = node.args
    assert isinstance(page, int)
    operands: tuple[Any, ...] = (index, total, pages)
    first = len(source.args)
    spec = replace(loop.outputs[result], scatter=Scatter(first, first + 1, first + 2, page))
    outputs = [spec if i == result else output for i, output in enumerate(loop.outputs)]
    body, positions = _with_inputs(loop, operands), (*loop.operands, 0, None, None)  # only the row numbers are sliced
    scattering = ChunkLoop(body, positions, outputs, loop.chunk)
    taken = {str(other.target) for other in module.graph.nodes if other is not source}
    names = (str(source.target), *(f"{source.target}_scattering_{number}" for number in range(len(taken))))
    name = next(name for name in names if name not in taken)
    source.args = (*source.args, *operands)
    set_loop(module, source, name, scattering)
    values = list(ir.value_of(source))
    values[result] = ir.only_tensor(node)
    source.meta["val"] = tuple(values)
    with module.graph.inserting_after(source):
        scattered = module.graph.call_function(operator.getitem, (source, result))
    scattered.meta = {**node.meta, "val": values[result]}
    node.replace_all_uses_with(scattered, propagate_meta=False)


def _with_inputs(loop: ChunkLoop, operands: tuple[Any, ...]) -> fx.GraphModule:
    """The loop's body with inputs for the row numbers of a chunk and for two sizes: the loop reads them, not the
    body."""
    body = ir.copy_graph(loop.body)
    rows, *inputs = body.graph.find_nodes(op="placeholder")
    last = inputs[-1]
    count, tensor = ir.value_of(rows), ir.only_tensor(operands[0])
    with ir.fake_mode_of(body):
        chunk = torch.empty((count,), dtype=tensor.dtype, device=tensor.device)
    for label, value in (("index", chunk), ("total", operands[1]), ("pages", operands[2])):
        with body.graph.inserting_after(last):
            last = body.graph.placeholder(f"scatter_{label}")
        last.meta["val"] = ir.argument_value(value)
    body.recompile()
    return body
