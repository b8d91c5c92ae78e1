"""``reuse-rows``: a loop's result overwrites, row by row, an operand that dies in the loop."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx

from mosaic_compiler import book, ir
from mosaic_compiler.ir.clusters import cluster_of
from mosaic_compiler.ir.loops import ChunkLoop, LoopOutput, loop_of, set_loop
from mosaic_compiler.ir.notes import kept_roots
from mosaic_compiler.passes.base import Pass
from mosaic_compiler.passes.in_place import covers_root


@dataclass(frozen=True)
class ReuseRowsPass(Pass):
    """``x = x + f(x)`` over chunks becomes ``x[c] += f(x[c])``: one residual stream instead of two.

    Legal when all of these hold (the verifier checks the same list, independently):

    - the operand has the result's dtype, sizes and strides, covers its whole storage, and is sliced along the
      result's rows;
    - its storage belongs to the step, is no output, and no alias of it is read after the loop or by another
      operand of the loop;
    - in the body, whatever reads the operand's slice comes before the node whose result overwrites it, or is that
      node and pointwise (it reads each element before it writes it).

    Requires: loops.  Guarantees: same outputs, bit for bit.

    Before::

        y = chunk_loop_1(x, k, v, w)        # body: h = norm(x[c]); ...; add(x[c], mm(..., w))

    After (y is x)::

        y = chunk_loop_1(x, k, v, w)        # its output goes into operand 0
    """

    name: ClassVar[str] = "reuse-rows"

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        module = ir.copy_graph(module)
        storage = ir.StorageMap(module.graph)
        kept = kept_roots(module, storage)
        variants: dict[Any, tuple[str, ChunkLoop]] = {}
        for node in module.graph.nodes:
            loop = loop_of(node)
            if loop is None:
                continue
            outputs = _placed(node, loop, storage, kept)
            if (loop, outputs) not in variants:
                taken = str(node.target) in {name for name, _ in variants.values()}
                name = f"{node.target}_{len(variants)}" if taken else str(node.target)
                variants[loop, outputs] = name, loop.with_outputs(outputs)
            set_loop(module, node, *variants[loop, outputs])
            storage.update(node)
        module.graph.lint()
        module.recompile()
        return module


def _placed(
    node: fx.Node, loop: ChunkLoop, storage: ir.StorageMap, kept: Collection[ir.Root | None]
) -> tuple[LoopOutput, ...]:
    """The loop's outputs, each in the memory of an operand where that is legal; what is kept goes where state is."""
    outputs = list(loop.outputs)
    free = list(loop.sliced())
    for index, spec in enumerate(outputs):
        if spec.scatter is not None or storage.roots(node)[index] in kept:
            continue
        position = next((i for i in free if _may_overwrite(node, loop, index, i, storage)), None)
        if position is not None:
            free.remove(position)
            outputs[index] = replace(spec, into=position)
    return tuple(outputs)


def _may_overwrite(node: fx.Node, loop: ChunkLoop, output: int, position: int, storage: ir.StorageMap) -> bool:
    operand = node.args[position]
    assert isinstance(operand, fx.Node)
    tensor, root, result = ir.tensor_of(operand), storage.root(operand), ir.tensors_of(node)[output]
    if tensor is None or result is None or root is None or not ir.is_computed(root):
        return False
    if loop.operands[position] != loop.outputs[output].dim or not ir.same_layout(tensor, result):
        return False
    if not covers_root(tensor, root):
        return False
    if sum(isinstance(other, fx.Node) and root in storage.roots(other) for other in node.args) > 1:
        return False
    later = node.next
    while True:
        if any(root in storage.roots(other) for other in later.all_input_nodes):
            return False
        if later.op == "output":
            break
        later = later.next
    return not late_readers(loop, output, position)


def late_readers(loop: ChunkLoop, output: int, position: int) -> list[fx.Node]:
    """Nodes of the body that read a sliced operand when the result that overwrites it has been written.

    The result is written by the node that creates its storage.  A pointwise node may read what it overwrites.
    """
    graph = loop.body.graph
    storage = ir.StorageMap(graph)
    operand = [node for node in graph.nodes if node.op == "placeholder"][1 + position]
    results: Any = graph.output_node().args[0]
    root = storage.root(results[output])
    if root is None or not ir.is_computed(root):
        return [graph.output_node()]
    slot = (operand, 0)
    found: list[fx.Node] = []
    written = False
    for node in graph.nodes:
        reads = [n for n in node.all_input_nodes if slot in storage.roots(n)]
        if written and reads:
            found.append(node)
        if node is root[0]:
            written = True
            elementwise = _is_elementwise(node) and reads == [operand] and _same_shape(node, operand)
            if reads and not elementwise:
                found.append(node)
    return found


def _is_elementwise(node: fx.Node) -> bool:
    cluster = cluster_of(node)
    return book.is_elementwise(node) and (cluster is None or len(cluster.into) == 1)


def _same_shape(node: fx.Node, operand: fx.Node) -> bool:
    result, source = ir.tensors_of(node)[0], ir.tensor_of(operand)
    return (
        result is not None
        and source is not None
        and [*map(ir.expr_of, result.shape)] == [*map(ir.expr_of, source.shape)]
    )
