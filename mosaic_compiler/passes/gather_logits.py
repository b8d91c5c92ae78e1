"""``gather-logits``: projections of gathered rows run in one fused kernel where that is faster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.ir import ops
from mosaic_compiler.ir.notes import Note
from mosaic_compiler.kernels import gather_logits as kernel
from mosaic_compiler.passes.base import Pass

aten = torch.ops.aten

GATHER_CHOICES: Note[Mapping[str, kernel.Choice]] = Note("gather_choices", MappingProxyType({}))
"""Which implementation each projection got, and why."""


@dataclass(frozen=True)
class GatherLogitsPass(Pass):
    """Replace ``mm(index_select(h, 0, idx), t(w))`` by the kernel that gathers while it multiplies.

    Attributes:
        force: use the kernel even where it was measured slower, or was not measured (for tests).

    Requires: row-demand has run.  Guarantees: the same product, up to the rounding of another matmul.
    ``explain()`` shows which implementation runs for each projection and why.

    Before::

        rows = index_select(h, 0, idx)      # [M, D], read by nothing else
        logits = mm(rows, t(w))             # [M, V]

    After::

        logits = gather_logits(h, idx, w)
    """

    force: bool = False
    name: ClassVar[str] = "gather-logits"

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        module = ir.copy_graph(module)
        choices: dict[str, kernel.Choice] = {}
        for node in list(module.graph.nodes):
            found = _gathered_projection(node)
            if found is None:
                continue
            hidden, index, weight = found
            tensor = ir.tensor_of(weight)
            assert tensor is not None
            vocabulary, depth = (ir.expr_of(size) for size in tensor.shape)
            if vocabulary.is_Integer and depth.is_Integer:
                choice = kernel.choose(tensor.device, tensor.dtype, int(depth), int(vocabulary))
            else:
                choice = kernel.Choice("index_select + mm", "the weight's sizes are not known when compiling")
            if self.force:
                choice = kernel.Choice("gather_logits", "forced")
            choices[node.name] = choice
            if choice.kernel == "gather_logits":
                with module.graph.inserting_before(node):
                    fused = module.graph.call_function(ops.gather_logits, (hidden, index, weight))
                fused.meta = dict(node.meta)
                node.replace_all_uses_with(fused, propagate_meta=False)
                for dead in (node, node.args[0], node.args[1]):
                    while isinstance(dead, fx.Node) and not dead.users and dead.op == "call_function":
                        source = dead.args[0]
                        module.graph.erase_node(dead)
                        dead = source
        GATHER_CHOICES.write(module, choices)
        module.graph.lint()
        module.recompile()
        return module


def _gathered_projection(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(h, idx, w) of ``mm(view(index_select(view(h), dim, idx)), t(w))`` with w an input of the step."""
    if node.target is not aten.mm.default:
        return None
    rows, transposed = node.args
    if not isinstance(transposed, fx.Node) or transposed.target is not aten.t.default:
        return None
    weight = transposed.args[0]
    while isinstance(rows, fx.Node) and rows.target is aten.view.default and len(rows.users) == 1:
        rows = rows.args[0]
    if not isinstance(rows, fx.Node) or rows.target is not aten.index_select.default or len(rows.users) != 1:
        return None
    hidden, dim, index = rows.args
    if not isinstance(weight, fx.Node) or not isinstance(hidden, fx.Node) or not isinstance(index, fx.Node):
        return None
    tensor = ir.tensor_of(hidden)
    if tensor is None or dim != 0 or tensor.dim() != 2 or not ir.is_contiguous(tensor):
        return None
    if ir.lazy_bits(tensor) or ir.lazy_bits(ir.only_tensor(weight)):
        return None  # the kernel reads raw memory
    return hidden, index, weight
