"""``expand-mixtures``: the ops of a mixture of experts, one by one again."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.ir import ops
from mosaic_compiler.ir.emitter import Emitter
from mosaic_compiler.kernels.mixture import arguments, function_of, parse
from mosaic_compiler.passes.base import Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class ExpandMixturesPass(Pass):
    """Where all rows are computed at once, the ops of a mixture run by themselves: they are planned and fused.

    The contrary of ``mixtures``, which is there for what works row by row.  A mixture of rows that are picked in each
    step stays: some of them may be there twice, which its ops by themselves would count.  Guarantees: the same results.

    Before::

        y = mosaic.mixture([x, experts], [w], program)

    After::

        order = sort(experts.view(-1)).indices
        h = grouped_mm(x[order // k], w, counts(experts))
        ...
    """

    name: ClassVar[str] = "expand-mixtures"

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        if not any(map(_is_for_all_rows, module.graph.nodes)):
            return module
        module = ir.copy_graph(module)
        emitter = Emitter(module)
        for node in list(module.graph.nodes):
            if _is_for_all_rows(node):
                with module.graph.inserting_before(node):
                    node.replace_all_uses_with(_expanded(emitter, node))
        ir.remove_dead_code(module.graph)
        module.graph.lint()
        module.recompile()
        return module


def _is_for_all_rows(node: fx.Node) -> bool:
    return node.target is ops.mixture and not ir.free_symbols(node) & set(ir.numbers_of_rows(node.graph))


def _expanded(emitter: Emitter, node: fx.Node) -> fx.Node:
    rows, whole, program = node.args
    values: list[Any] = [*rows, *whole]  # type: ignore[misc]
    emitter.origin = node
    count = emitter.emit(aten.sym_size.int, values[0], 0)
    device = ir.only_tensor(values[0]).device

    def multiple(times: int) -> Any:
        return count if times == 1 else emitter.arithmetic(operator.mul, count, times)

    for step in parse(str(program)).steps:
        args, named = arguments(step, values, multiple, device)
        if step.target == "getitem":
            values.append(emitter.emit_getitem(*args))
        else:
            values.append(emitter.emit(function_of(step.target), *args, **named))
    result: fx.Node = values[-1]
    return result
