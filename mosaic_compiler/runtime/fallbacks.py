"""What a plan does not fully cover, by name."""

from __future__ import annotations

from torch import fx

from mosaic_compiler import book, ir
from mosaic_compiler.ir import ops
from mosaic_compiler.ir.notes import UNMET_ROWS
from mosaic_compiler.kernels import coded_attention, interval_attention
from mosaic_compiler.lowering.scopes import Lives
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.planning.lowered import Kind
from mosaic_compiler.planning.plan import Fallback
from mosaic_compiler.runtime.pools import arena_problem
from mosaic_compiler.runtime.sparse import page_bytes


def find_fallbacks(lives: Lives) -> tuple[Fallback, ...]:
    """Name everything that the plan does not fully cover."""
    found: list[Fallback] = []

    def add(name: str, node: fx.Node, reason: str) -> None:
        found.append(Fallback(name, node.name, str(node.target), reason, ir.provenance(node).source))

    for node in set(lives.unsized).difference(lives.prologue):
        add("data-dependent-size", node, "its bytes are known only while the step runs")
    if lives.nodes and (problem := arena_problem(lives.device)) is not None:
        reason = f"one allocation, moved when it grows, because {problem}"
        found.append(Fallback("plain-arena", "", "", reason, ""))
    for node in lives.elsewhere:
        tensors = [tensor for tensor in ir.tensors_of(node) if tensor is not None]
        if any(tensor.dim() > 0 for tensor in tensors):
            add("other-device", node, f"lives on {tensors[0].device}, the plan is for {lives.device}")
    named = {*lives.unsized, *lives.elsewhere, *lives.prologue}
    for node, form in lives.forms.items():
        if form.kind is Kind.OPAQUE and node not in named and not _is_accounted(node):
            add("opaque-op", node, "has no out= form; memory that it uses inside is not in the plan")
        if (why := interval_attention.why_tiled(node) or coded_attention.why_tiled(node)) is not None:
            add("tiled-attention", node, why)
    return tuple(found)


def unmet_options(module: fx.GraphModule, options: MosaicOptions) -> tuple[Fallback, ...]:
    """What ``needed_rows`` asked for and this graph cannot have."""
    problem = UNMET_ROWS.of(module)
    if problem:
        return (Fallback("all-rows", "", "", problem, ""),)
    device = ir.main_device_of(module)
    if options.needed_rows == "all" or page_bytes(device) is not None:
        return ()
    reason = arena_problem(device) or f"there is no virtual memory for results on {device.type} devices"
    return (Fallback("dense-logits", "", "", f"zeros of unneeded rows take memory, because {reason}", ""),)


def uncomputed_rows(module: fx.GraphModule) -> tuple[Fallback, ...]:
    """Who reads all rows of a value of which only some are computed, other than to return them."""
    found: dict[str, Fallback] = {}
    put_back = [node for node in module.graph.nodes if node.target is ops.put_rows]
    todo = [(node, node) for node in put_back if not _are_numbers(node.args[0])]
    while todo:
        put, node = todo.pop()
        for user in node.users:
            if ir.is_view(user):
                todo.append((put, user))
            elif user.op != "output" and not book.entry(user).moves_rows and ir.tensors_of(user) != (None,):
                reason = f"reads all rows of {put.name}, of which this step computes some: the others are zeros there"
                source = ir.provenance(user).source
                found.setdefault(user.name, Fallback("uncomputed-rows", user.name, str(user.target), reason, source))
    return tuple(found.values())


def _are_numbers(rows: fx.Node) -> bool:
    """Of rows, that ``row-demand`` looks positions up in."""
    while ir.is_view(rows) and rows.all_input_nodes:
        rows = rows.all_input_nodes[0]
    return book.entry(rows).family == "numbers"


def _is_accounted(node: fx.Node) -> bool:
    """Its outputs and scratch are all it allocates, or it makes no tensor at all."""
    makes_none = all(tensor is None for tensor in ir.tensors_of(node))
    return makes_none or book.entry(node).is_accounted or ir.is_random(node)
