"""``in-place``: a pointwise result takes over the buffer of an operand that dies there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from mosaic_compiler import book, ir
from mosaic_compiler.book import inplace_twin, native_out
from mosaic_compiler.ir.clusters import cluster_of, set_cluster
from mosaic_compiler.ir.loops import rewrite_bodies
from mosaic_compiler.ir.notes import kept_roots
from mosaic_compiler.passes.base import Pass


@dataclass(frozen=True)
class InPlacePass(Pass):
    """Rewrite ``c = op(a, b)`` to ``c = op.out(a, b, out=a)`` where nobody can tell the difference.

    Legal when all of these hold (the verifier checks the same list, independently):

    - ``op`` is pointwise (or a cluster of such ops with one result): element i of the result is computed from
      element i of each operand;
    - ``a`` has the result's dtype, sizes and strides, and covers its whole storage;
    - ``a``'s storage belongs to the step: it is no input, weight or constant, and no output;
    - no alias of ``a`` is read later, and no other operand overlaps ``a`` with another layout
      (``add(x, x)`` is fine, ``add(x, x.flip)`` through a view is not).

    Likewise inside of loop bodies, except for the results of a loop: those are written straight into the
    full-length value (``passes/reuse_rows.py`` decides whose memory that is).

    Requires: a canonical graph.  Guarantees: same outputs, bit for bit.

    Before::

        a = mm(x, w)
        b = mul(a, 2)
        c = add(b, a)

    After (a is still read by c, so b gets a buffer; b and a both die in c, which takes the first)::

        a = mm(x, w)
        b = mul(a, 2)
        c = add.out(b, a, out=b)
    """

    name: ClassVar[str] = "in-place"

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        module = ir.copy_graph(module)
        _Rewriter(module, results_may_move=True).run()
        rewrite_bodies(module, _rewritten)
        module.graph.lint()
        module.recompile()
        return module


def _rewritten(body: fx.GraphModule) -> fx.GraphModule:
    body = ir.copy_graph(body)
    _Rewriter(body, results_may_move=False).run()
    body.graph.lint()
    body.recompile()
    return body


class _Rewriter:
    """Rewrites one graph in place (see the pass)."""

    def __init__(self, module: fx.GraphModule, *, results_may_move: bool) -> None:
        graph = module.graph
        self.module, self.graph, self.results_may_move = module, graph, results_may_move
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.storage = ir.StorageMap(graph)
        self.escaping = ir.escaping_roots(graph, self.storage)
        self.kept = kept_roots(module, self.storage) if results_may_move else {}
        self.last_read: dict[ir.Root, int] = {}
        for node in graph.nodes:
            for operand in node.all_input_nodes:
                for root in self.storage.roots(operand):
                    if root is not None:
                        self.last_read[root] = self.order[node]

    def run(self) -> None:
        storage, last_read = self.storage, self.last_read
        for node in list(self.graph.nodes):
            operand = self._operand_to_reuse(node)
            if operand is None:
                if node.op in ("call_function", "call_module"):
                    storage.add(node)  # a view of something that was rewritten above
                continue
            own, reused = storage.root(node), storage.root(operand)
            assert own is not None
            assert reused is not None
            self._write_into(node, operand)
            storage.alias(node, reused)
            last_read[reused] = max(last_read[reused], last_read.get(own, self.order[node]))
            if own in self.escaping:
                self.escaping.add(reused)

    def _operand_to_reuse(self, node: fx.Node) -> fx.Node | None:
        cluster = cluster_of(node)
        first_only = False
        if cluster is not None:
            if len(cluster.into) > 1 or not book.is_elementwise_cluster(cluster):
                return None
        else:
            if node.op != "call_function" or not book.is_pointwise(node) or ir.alias_base(node) is not None:
                return None
            assert isinstance(node.target, OpOverload)
            native, twin = native_out(node.target), inplace_twin(node.target)
            if native is None and twin is None:
                return None
            first_only = native is None
        out = ir.tensors_of(node)[0]
        if len(ir.tensors_of(node)) > 1 or out is None or out.dim() == 0:
            return None
        if not self.results_may_move and self.storage.root(node) in self.escaping:
            return None
        if self.storage.root(node) in self.kept:
            return None  # written where state is
        for operand in node.all_input_nodes:
            tensor, root = ir.tensor_of(operand), self.storage.root(operand)
            if tensor is None or root is None or root in self.escaping or not ir.is_computed(root):
                continue
            if first_only and operand is not node.args[0]:
                continue
            if (
                self.last_read[root] != self.order[node]
                or not ir.same_layout(tensor, out)
                or not covers_root(tensor, root)
            ):
                continue
            if any(self.storage.root(other) == root for other in node.all_input_nodes if other is not operand):
                continue
            return operand
        return None

    def _write_into(self, node: fx.Node, operand: fx.Node) -> None:
        cluster = cluster_of(node)
        if cluster is not None:
            into = node.args.index(operand)
            name = f"{node.target}_into_{into}"
            known = getattr(self.module, name, None)
            set_cluster(self.module, node, name, cluster.with_into([into]) if known is None else known)
            return
        assert isinstance(node.target, OpOverload)
        native = native_out(node.target)
        if native is not None:
            overload, names = native
            node.target = overload
            node.kwargs = {**node.kwargs, names[0]: operand}
        else:
            twin = inplace_twin(node.target)
            assert twin is not None
            node.target = twin


def covers_root(tensor: torch.Tensor, root: ir.Root) -> bool:
    """The tensor is dense and as large as the storage it lives in, so no byte is written twice."""
    whole = ir.tensors_of(root[0])[root[1]]
    if whole is None or ir.expr_of(tensor.storage_offset()) != 0:
        return False
    elements = sympy.expand(sympy.prod([ir.expr_of(size) for size in tensor.shape]) * tensor.dtype.itemsize)
    return bool(elements == ir.storage_extent(whole))
