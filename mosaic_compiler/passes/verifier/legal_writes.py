"""Which writes into buffers of a step are legal (``passes/in_place.py`` and ``passes/reuse_rows.py`` make them)."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx
from torch._ops import OpOverload

from mosaic_compiler import book, ir
from mosaic_compiler.ir.clusters import Cluster, cluster_of
from mosaic_compiler.ir.loops import loop_of
from mosaic_compiler.passes.reuse_rows import late_readers

aten = torch.ops.aten

_SIZES = {aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int}
"""What they say of a tensor stays the same, whatever is written into it."""


def illegal_writes(graph: fx.Graph, storage: ir.StorageMap) -> Iterator[str]:
    """Writes into storage of the step, or into state, that somebody could notice.  Judged from the graph alone."""
    escaping_values = graph.output_node().all_input_nodes
    order = {node: index for index, node in enumerate(graph.nodes)}
    readers: dict[ir.Root, list[fx.Node]] = {}
    for node in graph.nodes:
        for operand in node.all_input_nodes if node.target not in _SIZES else ():
            for root in storage.roots(operand):
                if root is not None:
                    readers.setdefault(root, []).append(node)
    for node in graph.nodes:
        for argument in ir.mutated_arguments(node):
            root = storage.root(argument)
            if root is None or not (ir.is_computed(root) or ir.STATE_MEMORY in root[0].meta):
                continue
            successors = _derived_from(node, root, storage)
            for reader in readers.get(root, []):
                late = order[reader] > order[node] or reader.op == "output"
                through = any(
                    operand not in successors and storage.root(operand) == root for operand in reader.all_input_nodes
                )
                if late and through:
                    yield f"{node.name} overwrites {root[0].name}, which {reader.name} reads later"
            if any(value not in successors and storage.root(value) == root for value in escaping_values):
                yield f"{node.name} overwrites {root[0].name}, which is returned"
            yield from _overlapping_operands(node, argument, storage)
            yield from _overlapping_rows(node, argument, storage)


def _derived_from(node: fx.Node, root: ir.Root, storage: ir.StorageMap) -> set[fx.Node]:
    """The node and everything that is a view of, or a later write to, its result."""
    found = {node}
    todo = [node]
    while todo:
        for user in todo.pop().users:
            item = user.target is operator.getitem and storage.roots(user) == (root,)
            if user not in found and (item or ir.alias_base(user) in found or found & set(ir.mutated_arguments(user))):
                found.add(user)
                todo.append(user)
    return found


def _overlapping_rows(node: fx.Node, written: fx.Node, storage: ir.StorageMap) -> Iterator[str]:
    """A loop that overwrites an operand's rows: the same rows, and not before they have been read."""
    loop = loop_of(node)
    if loop is None:
        return
    root = storage.root(written)
    sharing = [arg for arg in node.args if isinstance(arg, fx.Node) and root in storage.roots(arg)]
    if len(sharing) > 1:
        yield f"{node.name} overwrites {written.name} and has another operand in the same storage"
    for index, spec in enumerate(loop.outputs):
        if spec.into is None or node.args[spec.into] is not written:
            continue
        target, result = ir.tensor_of(written), ir.tensors_of(node)[index]
        if target is None or result is None or not ir.same_layout(target, result):
            yield f"{node.name} overwrites {written.name}, whose layout is not that of the result"
        if loop.operands[spec.into] != spec.dim:
            yield f"{node.name} overwrites rows of {written.name} other than those that it reads"
        for reader in late_readers(loop, index, spec.into):
            yield f"{node.name}: {reader.name} reads rows of {written.name} that are overwritten already"


def _overlapping_cluster(node: fx.Node, cluster: Cluster, written: fx.Node, storage: ir.StorageMap) -> Iterator[str]:
    """A cluster that overwrites an operand: element by element, and no other operand in the same storage."""
    results = [tensor for tensor, into in zip(ir.tensors_of(node), cluster.into, strict=True) if into is not None]
    target = ir.only_tensor(written)
    if not book.is_elementwise_cluster(cluster) or any(t is None or not ir.same_layout(t, target) for t in results):
        yield f"{node.name} overwrites {written.name}, and is not element by element the same"
    if sum(storage.root(operand) == storage.root(written) for operand in node.all_input_nodes) > 1:
        yield f"{node.name} overwrites {written.name} and has another operand in the same storage"


def _overlapping_operands(node: fx.Node, written: fx.Node, storage: ir.StorageMap) -> Iterator[str]:
    cluster = cluster_of(node)
    if cluster is not None:
        yield from _overlapping_cluster(node, cluster, written, storage)
    if not (isinstance(node.target, OpOverload) and any(a.is_out for a in node.target._schema.arguments)):
        return  # ops that mutate by themselves (copy_, index_put_) define their own overlap rules
    pointwise = book.is_pointwise(node)
    target, out = ir.tensor_of(written), ir.tensor_of(node)
    if target is None or out is None or not ir.same_layout(target, out):
        yield f"{node.name} writes {written.name}, whose layout is not that of the result"
    for operand in node.all_input_nodes:
        if storage.root(operand) != storage.root(written):
            continue
        if operand is not written:
            yield f"{node.name} reads {operand.name} while it overwrites {written.name} in the same storage"
        elif not pointwise:
            reads = sum(1 for argument in node.args if argument is operand)
            if reads:
                yield f"{node.name} is not pointwise and reads {written.name} while it overwrites it"
