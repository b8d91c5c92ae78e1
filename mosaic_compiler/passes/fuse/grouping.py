"""Which ops run together as one kernel.

A cluster's ops go over the same elements: T of them, or, behind a reduction over the last dim of width W, T / W rows.
Three rules keep a cluster one kernel that computes nothing twice:

- a computed value is not broadcast inside of a cluster, unless it comes from the cluster's own reduction (cos and sin
  of [rows, d] are not computed again for every head);
- all reductions are over the last dim, and have the same width; or over a few elements, which are added one by one;
- clusters do not depend on each other in a circle.

Rows gathered from what a cluster computes, and slices of it, are computed where they are needed, each once: the
weighted results of a token's experts are picked from sorted order and added up without ever being stored.

Views of what a cluster computes are part of it; views of anything else are operands, and cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from mosaic_compiler import book, ir
from mosaic_compiler.book import MOST_ADDED, Work
from mosaic_compiler.kernels.fused import supports
from mosaic_compiler.lowering.forms import form_of
from mosaic_compiler.planning.lowered import Kind

aten = torch.ops.aten

MOST_OPS = 48
"""Ops in one cluster: larger kernels run out of registers."""


@dataclass
class Group:
    """Ops that become one kernel.

    Attributes:
        nodes: in graph order, without the views between them.
        elements, width: of all of them (see :class:`Work`).
    """

    nodes: list[fx.Node]
    elements: sympy.Expr
    width: sympy.Expr | None

    def takes(self, work: Work) -> bool:
        if self.width is not None and work.width is None and work.elements * self.width == self.elements:
            return True  # behind the reduction
        return bool(work.elements == self.elements) and (work.width in (None, self.width) or self.width is None)


def find_groups(graph: fx.Graph, device: torch.device) -> list[Group]:
    """All clusters of two ops or more, and single ops that only a kernel of its own can write into a given buffer."""
    return _Finder(graph, device).find()


class _Finder:
    def __init__(self, graph: fx.Graph, device: torch.device) -> None:
        self.graph, self.device = graph, device
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.group: dict[fx.Node, Group] = {}
        storage = ir.StorageMap(graph)
        written = ir.written_roots(graph, storage)
        self.early = set(ir.prologue_nodes(graph))
        self.unsafe = {node for node in graph.nodes if written.intersection(storage.roots(node))}

    def find(self) -> list[Group]:
        for node in self.graph.nodes:
            work = work_of(node, self.device)
            if work is None or node in self.early or self.unsafe.intersection((node, *node.all_input_nodes)):
                continue
            group = Group([node], work.elements, work.width)
            self.group[node] = group
            for producer in self._producers(node):
                other = self.group[producer]
                if other is not group and self._may_join(other, group, node, producer, work):
                    self._merge(other, group)
                    group = other
                elif other is not group and self._shrinks(other, group, node, producer, work):
                    self._merge(other, group)
                    group = other
                    group.elements = work.elements
            if book.entry(node).fused is book.rows_gathered and len(group.nodes) == 1:
                del self.group[node]  # of something in memory: a library's call is as quick
        found = {id(group): group for group in self.group.values()}
        return [group for group in found.values() if len(group.nodes) > 1 or needs_kernel(group.nodes[0])]

    def _producers(self, node: fx.Node) -> list[fx.Node]:
        """Ops of groups whose results this one reads, views between them left out; the latest first."""
        found = {source for operand in node.all_input_nodes if (source := self._base(operand)) in self.group}
        return sorted(found, key=lambda n: -self.order[n])

    def _base(self, node: fx.Node) -> fx.Node:
        while is_absorbed_view(node):
            node = node.args[0]  # type: ignore[assignment]
        return node

    def _may_join(self, other: Group, group: Group, node: fx.Node, producer: fx.Node, work: Work) -> bool:
        if len(other.nodes) + len(group.nodes) > MOST_OPS:
            return False
        if len(group.nodes) == 1:
            fits = other.takes(work) or (node.target is aten.cat.default and self._is_part_of(other, work))
        else:
            alike = group.width == other.width or None in (group.width, other.width)
            fits = bool(group.elements == other.elements) and alike
        return fits and not self._broadcasts(node, producer, other) and not self._circle(other, group)

    def _shrinks(self, other: Group, group: Group, node: fx.Node, producer: fx.Node, work: Work) -> bool:
        """The op reads a few elements of the other group's for each of its own: slices of them, or a small sum."""
        few = other.elements / work.elements
        if other.width is not None or len(group.nodes) > 1 or not (few.is_Integer and 1 < few <= MOST_ADDED):
            return False
        alike = all(
            (found := work_of(reader, self.device)) and found.elements == work.elements
            for reader in self._readers(producer)
        )
        return alike and len(other.nodes) < MOST_OPS and not self._circle(other, group)

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        """Who reads a value, views between left out."""
        found = []
        for user in node.users:
            found += self._readers(user) if is_absorbed_view(user) else [user]
        return found

    def _is_part_of(self, other: Group, work: Work) -> bool:
        """Pieces that a ``cat`` puts together: computed where they are needed, if they are just a negation or so."""
        smaller = other.width is None and len(other.nodes) <= 4
        return smaller and bool((work.elements / other.elements).is_Number)

    def _broadcasts(self, node: fx.Node, producer: fx.Node, other: Group) -> bool:
        """The producer's value is smaller than what the op goes over, and not the result of a reduction."""
        if node.target is aten.cat.default:
            return False
        size = book.elements_of(ir.only_tensor(producer))
        if size == other.elements:
            return False
        return other.width is None or size * other.width != other.elements

    def _circle(self, other: Group, group: Group) -> bool:
        """Something outside of both would lie between them."""
        members = {*other.nodes, *group.nodes}
        first = min(self.order[other.nodes[0]], self.order[group.nodes[0]])
        todo = [n for member in group.nodes for n in member.all_input_nodes]
        todo += [n for member in other.nodes for n in member.all_input_nodes]
        seen: set[fx.Node] = set()
        while todo:
            node = todo.pop()
            unit = self.group[node].nodes if node in self.group else [node]
            if node in seen or self._base(node) in members or self.order[unit[-1]] < first:
                continue
            seen.update(unit)
            operands = [n for member in unit for n in member.all_input_nodes]
            if any(self._base(n) in members for n in operands):
                return True
            todo += operands
        return False

    def _merge(self, into: Group, group: Group) -> None:
        into.nodes = sorted({*into.nodes, *group.nodes}, key=self.order.__getitem__)
        into.elements = max(into.elements, group.elements, key=ir.magnitude)
        into.width = into.width if into.width is not None else group.width
        for node in group.nodes:
            self.group[node] = into


def is_absorbed_view(node: fx.Node) -> bool:
    """A view that a kernel can look through."""
    return book.entry(node).is_looked_through


def makes_constant(node: fx.Node) -> bool:
    """A constant that each cluster makes for itself."""
    has_operands = any(ir.tensor_of(operand) is not None for operand in node.all_input_nodes)
    return book.entry(node).fill is not None and not has_operands


def needs_kernel(node: fx.Node) -> bool:
    """An op that allocates its results unless it is compiled."""
    tensor = ir.tensor_of(node)
    return tensor is not None and form_of(node, tensor.device).kind is Kind.OPAQUE


def work_of(node: fx.Node, device: torch.device) -> Work | None:
    """What a fusable op goes over; ``None`` for all others."""
    if not isinstance(node.target, OpOverload) or ir.has_effect(node) or makes_constant(node):
        return None
    out = ir.tensor_of(node)
    operands = [ir.tensor_of(operand) for operand in node.all_input_nodes if ir.tensors_of(operand) != (None,)]
    if out is None or out.device != device or out.dim() == 0 or out.dtype.is_complex or ir.lazy_bits(out):
        return None
    if not operands or not all(_is_readable(tensor, device) for tensor in operands):
        return None
    if any(isinstance(ir.value_of(operand), torch.SymFloat) for operand in node.all_input_nodes):
        return None  # a kernel's own symbols are whole numbers
    if ir.has_unbacked(node):
        return None  # its result has no place in a plan
    known = book.entry(node)
    if known.fused is None or not supports(node.target):
        return None
    if device.type == "cpu" and known.is_kept_on_cpu and len(node.users) > 1:
        return None
    return known.fused(node, device)


def _is_readable(tensor: torch.Tensor | None, device: torch.device) -> bool:
    """On the device, or a number on the CPU (Dynamo passes floats as such)."""
    if tensor is None or tensor.dtype.is_complex or ir.lazy_bits(tensor):
        return False  # kernels read raw memory
    return tensor.device == device or (tensor.dim() == 0 and tensor.device.type == "cpu")
