"""How each node gets its result: as a view, into a given buffer, in place, or opaquely.

This is where an ATen operator's calling convention is decided, once, for planning and for running.

- ``DESTINATION``: the result is written into a buffer that the plan places in the arena.  A native
  ``out=`` overload is used where there is one that is the functional op (``trusted_out.py``).  Generated ``out=``
  overloads (tagged ``torch.Tag.generated``) compute functionally and then copy, so they are never used.
- ``OPAQUE``: the op allocates its own outputs (SDPA, random numbers, layer norm); the plan counts
  them as transients.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx
from torch._ops import OpOverload

from mosaic_compiler import ir
from mosaic_compiler.clusters import Cluster, cluster_of
from mosaic_compiler.kernels import ops
from mosaic_compiler.kernels.fused import kernel_for
from mosaic_compiler.kernels.gather_logits import gather_logits_triton
from mosaic_compiler.kernels.head_statistics import head_statistics_
from mosaic_compiler.loops import loop_of
from mosaic_compiler.planning.trusted_out import has_trusted_out, has_trusted_twin

aten = torch.ops.aten
prims = torch.ops.prims


@dataclass(frozen=True)
class Call:
    """One call to make: ``function(*args, **kwargs)``; arguments may be late-bound placeholders."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()


Emit: TypeAlias = "Callable[[Sequence[Any], Sequence[Any], dict[str, Any]], list[Call]]"
"""``emit(outputs, args, kwargs)`` -> the calls that write an op's results into ``outputs``."""


class Kind(enum.Enum):
    NUMBER = "number"  # a size computed from symbols, or getitem: nothing to run
    CONSTANT = "constant"  # a get_attr of the graph module
    VIEW = "view"  # shares an operand's storage
    MUTATION = "mutation"  # writes an operand
    DESTINATION = "destination"  # writes into a planned buffer
    OPAQUE = "opaque"  # allocates its own outputs
    LOOP = "loop"  # runs a body for chunks of rows; its results are planned buffers


@dataclass(frozen=True)
class Form:
    kind: Kind
    emit: Emit | None = None


# Ops that allocate their outputs and, apart from the scratch that planning/scratch.py knows, nothing
# else (random draws do too).  An op that is opaque and not in this list is a named fallback.
ACCOUNTED_OPAQUE = frozenset(
    {
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._grouped_mm.default,
        aten.native_layer_norm.default,
    }
)

# Native out= overloads that nevertheless allocate temporaries as large as their input.
_ALLOCATING_OUT = frozenset(
    {aten.logsumexp.default, aten.linalg_vector_norm.default, aten.var.correction, aten.std.correction}
)

_COPIES = frozenset(
    {
        aten.clone.default,
        aten._to_copy.default,
        aten.lift_fresh_copy.default,
        prims.convert_element_type.default,
    }
)

_EMPTIES = frozenset(
    {aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default}
)

# fill value: a constant, or the position of the argument that holds it
_FILLS: dict[OpOverload, float | str] = {
    aten.zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.new_zeros.default: 0,
    aten.ones.default: 1,
    aten.ones_like.default: 1,
    aten.new_ones.default: 1,
    aten.full.default: "arg1",
    aten.full_like.default: "arg1",
    aten.new_full.default: "arg2",
    aten.fill.Scalar: "arg1",
    aten.scalar_tensor.default: "arg0",
}


def _emit_copy(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    return [Call(torch.Tensor.copy_, (outs[0], args[0]))]


def _emit_nothing(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    return []


def _emit_fill(value: float | str, outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    filler = args[int(value[3:])] if isinstance(value, str) else value
    return [Call(torch.Tensor.fill_, (outs[0], filler))]


def _emit_arange(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    start, end, step = {1: (0, *args, 1), 2: (*args, 1), 3: tuple(args)}[len(args)]
    return [Call(aten.arange.start_out, (start, end, step), (("out", outs[0]),))]


def _write_slice(out: torch.Tensor, source: torch.Tensor, dim: int, start: Any, end: Any, step: Any) -> None:
    aten.slice.Tensor(out, dim, start, end, step).copy_(source)


def _emit_slice_scatter(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    given = dict(zip(("dim", "start", "end", "step"), args[2:], strict=False)) | kwargs
    place = tuple(given.get(key, default) for key, default in (("dim", 0), ("start", None), ("end", None), ("step", 1)))
    return [Call(torch.Tensor.copy_, (outs[0], args[0])), Call(_write_slice, (outs[0], args[1], *place))]


def _write_select(out: torch.Tensor, source: torch.Tensor, dim: int, index: int) -> None:
    aten.select.int(out, dim, index).copy_(source)


def _emit_select_scatter(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    return [Call(torch.Tensor.copy_, (outs[0], args[0])), Call(_write_select, (outs[0], *args[1:4]))]


def _emit_gather_logits(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    return [Call(gather_logits_triton, (*args, outs[0]))]


def _emit_head_statistics(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    return [Call(head_statistics_, (list(outs), *args[:5]))]


def _emit_cluster(cluster: Cluster, outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    own = [out for out, into in zip(outs, cluster.into, strict=True) if into is None]
    return [Call(kernel_for(cluster), (*args, *own))]


def _emit_scatter_rows(outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    rows, index = args[:2]
    return [Call(torch.Tensor.index_copy_, (outs[0], 0, index, rows))]


_SPECIAL: dict[OpOverload, Emit] = {
    ops.scatter_rows: _emit_scatter_rows,
    ops.gather_logits: _emit_gather_logits,
    ops.head_statistics: _emit_head_statistics,
    aten.arange.default: _emit_arange,
    aten.arange.start: _emit_arange,
    aten.arange.start_step: _emit_arange,
    aten.slice_scatter.default: _emit_slice_scatter,
    aten.select_scatter.default: _emit_select_scatter,
}


def _signature(op: OpOverload, *, outs: bool) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in op._schema.arguments if outs or not a.is_out]


@functools.cache
def native_out(op: OpOverload) -> tuple[OpOverload, tuple[str, ...]] | None:
    """The hand-written ``out=`` overload of a functional op and the names of its out arguments."""
    if op in _ALLOCATING_OUT or not has_trusted_out(op, torch.Tag.pointwise in op.tags):
        return None
    for candidate in ir.overloads_of(op):
        names = tuple(a.name for a in candidate._schema.arguments if a.is_out)
        if not names or torch.Tag.generated in candidate.tags:
            continue
        if any(a.is_out and str(a.type) != "Tensor" for a in candidate._schema.arguments):
            continue  # a list of tensors
        if _signature(candidate, outs=False) == _signature(op, outs=True):
            return candidate, names
    return None


@functools.cache
def without_out(op: OpOverload) -> OpOverload:
    """``aten.mul.Tensor`` for ``aten.mul.out``: what is computed, written nowhere.  Other ops: themselves."""
    if any(a.is_out for a in op._schema.arguments):
        for candidate in ir.overloads_of(op):
            if _signature(candidate, outs=True) == _signature(op, outs=False):
                return candidate
    return op


@functools.cache
def inplace_twin(op: OpOverload) -> OpOverload | None:
    """``aten.relu_.default`` for ``aten.relu.default``: same arguments, first one written."""
    if not has_trusted_twin(op):
        return None
    namespace, _, name = op._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), f"{name}_", None)
    twin = getattr(packet, op._overloadname, None) if packet is not None else None
    if twin is None or torch.Tag.generated in twin.tags:
        return None
    same = _signature(twin, outs=True) == _signature(op, outs=True)
    return twin if same and twin._schema.arguments[0].is_write else None


def _emit_out(
    op: OpOverload, names: tuple[str, ...], outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> list[Call]:
    return [Call(op, tuple(args), (*kwargs.items(), *zip(names, outs, strict=True)))]


def _emit_twin(op: OpOverload, outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    return [Call(torch.Tensor.copy_, (outs[0], args[0])), Call(op, (outs[0], *args[1:]), tuple(kwargs.items()))]


def _destination(node: fx.Node) -> Emit | None:
    op = node.target
    assert isinstance(op, OpOverload)
    if op in _COPIES:
        return _emit_copy
    if op in _EMPTIES:
        if any(stride == 0 for stride in ir.only_tensor(node).stride()):
            return None  # elements that share a place, as asked for
        return _emit_nothing
    if op in _FILLS:
        return functools.partial(_emit_fill, _FILLS[op])
    if op in _SPECIAL:
        return _SPECIAL[op]
    if op in ACCOUNTED_OPAQUE:
        return None
    native = native_out(op)
    if native is not None and len(native[1]) == len(ir.tensors_of(node)):
        return functools.partial(_emit_out, *native)
    twin = inplace_twin(op)
    first = node.args[0] if node.args else None
    out = ir.tensor_of(node)
    if twin is not None and out is not None and isinstance(first, fx.Node):
        source = ir.tensor_of(first)
        if source is not None and source.dtype == out.dtype:
            return functools.partial(_emit_twin, twin)
    return None


def form_of(node: fx.Node, main_device: torch.device) -> Form:
    """Classify a node (not a placeholder or output).

    A tensor on another device than ``main_device``, or with a data-dependent size, is opaque: its
    bytes cannot be placed in this arena's plan.
    """
    if node.op == "get_attr":
        return Form(Kind.CONSTANT)
    if loop_of(node) is not None:
        return Form(Kind.LOOP)
    if (cluster := cluster_of(node)) is not None:
        return Form(Kind.DESTINATION, functools.partial(_emit_cluster, cluster))
    outputs = ir.tensors_of(node)
    if not any(t is not None for t in outputs):
        effect = ir.has_effect(node)
        return Form(Kind.OPAQUE if effect or not _computable(node) else Kind.NUMBER)
    if not isinstance(node.target, OpOverload):
        return Form(Kind.NUMBER if _is_getitem(node) else Kind.OPAQUE)
    if ir.mutated_arguments(node):
        return Form(Kind.MUTATION)
    if ir.is_view(node):
        return Form(Kind.VIEW)
    if ir.alias_base(node) is not None or ir.has_unbacked(node):
        return Form(Kind.OPAQUE)
    if any(t is None or t.device != main_device or t.layout != torch.strided for t in outputs):
        return Form(Kind.OPAQUE)
    emit = _destination(node)
    return Form(Kind.OPAQUE) if emit is None else Form(Kind.DESTINATION, emit)


def _is_getitem(node: fx.Node) -> bool:
    import operator

    return node.target is operator.getitem


def _computable(node: fx.Node) -> bool:
    """A symbolic number whose value follows from the sizes of the inputs."""
    value = ir.value_of(node)
    if isinstance(value, (bool, int, float)):
        return True
    return ir.is_symbolic_number(value) and not ir.has_unbacked(node)


def main_device_of(module: fx.GraphModule) -> torch.device:
    """The device that holds most tensors of the graph (a lone CPU scalar does not count)."""
    counts: dict[torch.device, int] = {}
    for node in module.graph.nodes:
        for tensor in ir.tensors_of(node):
            if tensor is not None and tensor.dim() > 0:
                counts[tensor.device] = counts.get(tensor.device, 0) + 1
    return max(counts, key=lambda d: counts[d]) if counts else torch.device("cpu")
