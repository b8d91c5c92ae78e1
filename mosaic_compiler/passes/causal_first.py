"""``causal-first``: of runs of keys that reach beyond the query's own, cuDNN takes those up to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.ir import ops
from mosaic_compiler.ir.emitter import Emitter
from mosaic_compiler.kernels import few_queries
from mosaic_compiler.kernels.interval_attention import depth_of
from mosaic_compiler.passes.base import Pass
from mosaic_compiler.passes.visible_keys.arithmetic import elements_of
from mosaic_compiler.passes.visible_keys.formulas import OpaqueError
from mosaic_compiler.passes.visible_keys.intervals import bounds_for
from mosaic_compiler.planning.reach import QUERY

aten = torch.ops.aten

CUDNN = aten._scaled_dot_product_cudnn_attention.default
CPU = aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True)
class CausalFirstPass(Pass):
    """Split attention of runs of keys that begin at the first one and reach beyond the query's own.

    On an H100 cuDNN's causal attention does 620 TFLOP/s where our kernel, which any run of keys suits, does 540
    (``benchmarks/results/visibility.json``).  What is behind a query's own key in its block is little.

    Attributes:
        force: also on the CPU, with its kernel, where it is not worth it (for tests).

    Requires: visible-keys has run; as many queries as keys, and ends of runs that the graph says for each query (not in
    loops, not for picked rows).
    Guarantees: the same result, up to the rounding of another attention kernel.

    Before::

        out = interval_attention(q, k, v, None, last, None, scale)      # last[n] > n

    After::

        done, sums = cudnn_attention(q, k, v, is_causal=True, scale)
        out = attention_behind(q, k, v, done, sums, last, scale)        # keys [n + 1, last[n])
    """

    force: bool = False
    name: ClassVar[str] = "causal-first"

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        found = {node.name: last for node in module.graph.nodes if (last := self._last(node)) is not None}
        if not found:
            return module
        module = ir.copy_graph(module)
        emitter = Emitter(module)
        for node in list(module.graph.nodes):
            if node.name in found:
                _split(emitter, node, is_causal=found[node.name] == QUERY + 1)
        ir.remove_dead_code(module.graph)
        module.graph.lint()
        module.recompile()
        return module

    def _last(self, node: fx.Node) -> sympy.Expr | None:
        """Before which key a query's run ends, where that is behind its own."""
        if node.target is not ops.interval_attention:
            return None
        query, key, _, first, last, only = node.args[:6]
        if first is not None or only is not None or not isinstance(last, fx.Node):
            return None
        asked, given = ir.only_tensor(query), ir.only_tensor(key)  # type: ignore[arg-type]
        is_fast = asked.device.type == "cuda" and asked.dtype in few_queries.DTYPES and depth_of(asked) in (64, 128)
        if not is_fast and not (self.force and asked.device.type == "cpu"):
            return None
        entries, _, queries, _ = map(ir.expr_of, asked.shape)
        sizes = [ir.expr_of(size) for size in ir.only_tensor(last).shape]
        if queries != ir.expr_of(given.shape[2]) or sizes != [1, 1, queries, 1]:
            return None
        bounds = bounds_for(queries, queries, entries)
        zero = sympy.Integer(0)
        try:
            cases = elements_of(bounds).number(last, (zero, zero, QUERY, zero))
        except OpaqueError:
            return None
        if len(cases) != 1 or not bounds.is_positive_or_zero(cases[0][1] - QUERY - 1):
            return None
        return cases[0][1]


def _split(emitter: Emitter, node: fx.Node, *, is_causal: bool) -> None:
    emitter.origin = node
    query, key, value, _, last, _, scale, order = node.args
    named: dict[str, Any] = {} if scale is None else {"scale": scale}
    with emitter.graph.inserting_before(node):
        if ir.only_tensor(node).device.type == "cpu":
            both = emitter.emit(CPU, query, key, value, 0.0, True, **named)
        else:
            both = emitter.emit(CUDNN, query, key, value, None, not is_causal, 0.0, True, **named)
        out = emitter.emit_getitem(both, 0)
        if is_causal:
            out = emitter.laid_out(out, list(order))  # type: ignore[arg-type]
        else:
            sums = emitter.emit_getitem(both, 1)
            out = emitter.emit(ops.attention_behind, query, key, value, out, sums, last, scale, order)
    node.replace_all_uses_with(out, propagate_meta=False)
