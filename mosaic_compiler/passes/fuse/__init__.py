"""``fuse``: pointwise ops and row reductions that run together become one kernel."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.ir.clusters import Cluster, set_cluster
from mosaic_compiler.ir.keys import structural_key
from mosaic_compiler.ir.loops import rewrite_bodies
from mosaic_compiler.ir.sorting import sort_nodes
from mosaic_compiler.passes.base import Pass
from mosaic_compiler.passes.fuse.grouping import Group, find_groups, is_absorbed_view, makes_constant


@dataclass(frozen=True)
class FusePass(Pass):
    """Replace each group of ops that ``grouping.py`` finds by one call of a cluster (``ir/clusters.py``).

    Norms, rotary embeddings, gated activations, residuals with the norm behind them, casts and the sampler's arithmetic
    become one kernel each, in loop bodies too.  Equal clusters share one submodule, and compile once.

    Requires: a functional graph (``in-place`` comes later).
    Guarantees: run as a graph, the same outputs, bit for bit; the kernels do not round between ops (so reduced
    precision gets more precise), and may sum a row in another order.

    Before::

        y = add(x, o)
        n = mul(y, rsqrt(add(mean(pow(y, 2), [-1], True), 1e-6)))
        return y, mm(n, w)

    After::

        fused_0 = fused_0(x, o)             # body: y = add(x, o); ...; return y, n
        y, n = fused_0[0], fused_0[1]
        return y, mm(n, w)
    """

    name: ClassVar[str] = "fuse"

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        device = ir.main_device_of(module)
        module = _fused(module, device)
        rewrite_bodies(module, lambda body: _fused(body, device))
        module.graph.lint()
        module.recompile()
        return module


def _fused(module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """A copy of one graph with its groups replaced."""
    module = ir.copy_graph(module)
    graph = module.graph
    position = {node: index for index, node in enumerate(graph.nodes)}
    groups = find_groups(graph, device)
    if not groups:
        return module
    known: dict[Any, tuple[str, Cluster]] = {}
    for group in groups:
        contents = _Contents(group)
        node = _replace(module, contents, known)
        for part in (node, *node.users):
            position[part] = position[group.nodes[-1]]
    sort_nodes(graph, position)
    graph.lint()
    module.recompile()
    return module


class _Contents:
    """The nodes of one cluster: its ops, the views between them, the constants they use; operands and results."""

    def __init__(self, group: Group) -> None:
        self.members = set(group.nodes)
        self.inner: list[fx.Node] = []
        self.operands: list[fx.Node] = []
        self._seen: set[fx.Node] = set()
        for node in group.nodes:
            self._visit(node)
        self.results = [node for node in group.nodes if self._is_needed(node)]

    def _visit(self, node: fx.Node) -> None:
        if node in self._seen:
            return
        self._seen.add(node)
        if node in self.members or makes_constant(node) or self._is_inner_view(node):
            for operand in node.all_input_nodes:
                self._visit(operand)
            self.inner.append(node)
        else:
            self.operands.append(node)

    def _is_inner_view(self, node: fx.Node) -> bool:
        while is_absorbed_view(node):
            node = node.args[0]  # type: ignore[assignment]
            if node in self.members:
                return True
        return False

    def _is_needed(self, node: fx.Node) -> bool:
        """Somebody outside reads it, directly or through views."""
        return any(
            user not in self.members and (not is_absorbed_view(user) or self._is_needed(user)) for user in node.users
        )

    def structure(self) -> Any:
        """Everything that the body is made from, in a comparable form."""
        index = {node: i for i, node in enumerate((*self.operands, *self.inner))}
        operands = tuple(ir.layout_of(ir.value_of(node)) for node in self.operands)
        inner = structural_key(self.inner, lambda _: index.__getitem__, lambda node: ir.layout_of(ir.value_of(node)))
        return operands, inner, tuple(index[node] for node in self.results)

    def build(self, root: fx.GraphModule) -> Cluster:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for number, operand in enumerate(self.operands):
            copies[operand] = graph.placeholder(f"operand_{number}")
            copies[operand].meta["val"] = ir.value_of(operand)
        for node in self.inner:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = dict(node.meta)
        output = graph.output(tuple(copies[node] for node in self.results))
        output.meta["val"] = tuple(ir.value_of(node) for node in self.results)
        return Cluster(ir.graph_module(root, graph), [None] * len(self.results))


def _replace(module: fx.GraphModule, contents: _Contents, known: dict[Any, tuple[str, Cluster]]) -> fx.Node:
    graph, last = module.graph, contents.inner[-1]
    key = contents.structure()
    if key not in known:
        known[key] = f"fused_{len(known)}", contents.build(module)
    name, cluster = known[key]
    with graph.inserting_before(last):
        node = graph.create_node("call_module", name, tuple(contents.operands), {}, name=name)
        set_cluster(module, node, name, cluster)
        node.meta |= {k: v for k, v in last.meta.items() if k in ("stack_trace", "nn_module_stack")}
        node.meta["val"] = tuple(ir.value_of(result) for result in contents.results)
        for index, result in enumerate(contents.results):
            part = graph.call_function(operator.getitem, (node, index))
            part.meta = {k: v for k, v in result.meta.items() if k in ("stack_trace", "nn_module_stack", "val")}
            result.replace_all_uses_with(part, lambda user: user not in contents.members, propagate_meta=False)
    for old in reversed(contents.inner):
        if not old.users:
            graph.erase_node(old)
    return node
