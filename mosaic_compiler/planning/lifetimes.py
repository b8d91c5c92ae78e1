"""From a schedule to buffer lives: who needs which bytes, from when to when.

A life is the half-open interval ``[start, end)`` of schedule positions; position ``i`` is the i-th node
of the graph that is neither a placeholder nor the output.  Worked example::

    position 0   a = mm(x, w)        a: [0, 2)   read last at position 1
    position 1   b = relu(a)         b: [1, 3)   a and b must coexist at position 1
    position 2   c = add_out(b, 1, out=b)        in place: c is b, no new buffer
    output (c,)                      b: [1, 3) becomes kind "output": it outlives the step

A view extends the life of the storage it looks into, so lives belong to storages (alias groups), never
to nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.ir import prologue_nodes
from mosaic_compiler.planning.forms import Form, Kind, form_of, has_unbacked, main_device_of
from mosaic_compiler.planning.plan import Buffer
from mosaic_compiler.planning.scratch import scratch_bytes


class Sizes:
    """Evaluates size expressions for one binding of the symbols, remembering every result.

    Raises :class:`KeyError` naming the symbol if an expression has one that is not bound.
    """

    def __init__(self, symbols: Mapping[sympy.Symbol, int]) -> None:
        self.symbols = dict(symbols)
        self._known: dict[sympy.Expr, int] = {}

    def __call__(self, size: object) -> int:
        if isinstance(size, int):
            return size
        expr = size if isinstance(size, sympy.Basic) else ir.expr_of(size)
        known = self._known.get(expr)
        if known is None:
            missing = expr.free_symbols - self.symbols.keys()
            if missing:
                raise KeyError(f"size {expr} needs {', '.join(sorted(map(str, missing)))}")
            value = expr.xreplace({s: sympy.Integer(v) for s, v in self.symbols.items()})
            known = self._known[expr] = int(bool(value)) if isinstance(value, Boolean) else int(value)
        return known


@dataclass(frozen=True)
class SymbolicBuffer:
    """A buffer whose bytes and shape are still expressions; see :class:`plan.Buffer` for the fields."""

    name: str
    kind: str
    nbytes: sympy.Expr
    start: int
    end: int
    dtype: str
    shape: tuple[sympy.Expr, ...]
    op: str
    module: str
    source: str

    def at(self, sizes: Sizes) -> Buffer:
        return Buffer(
            name=self.name,
            kind=self.kind,
            nbytes=sizes(self.nbytes),
            start=self.start,
            end=self.end,
            dtype=self.dtype,
            shape=tuple(sizes(size) for size in self.shape),
            op=self.op,
            module=self.module,
            source=self.source,
        )


@dataclass(frozen=True)
class Lives:
    """Lives of every buffer of a graph, before any number is known.

    Attributes:
        buffers: one per storage the step creates, plus one per op with scratch.
        schedule: node names by position.
        nodes: the nodes behind the prologue, in schedule order.
        prologue: the nodes that run before sizes are known (see ``runtime/prologue.py``); they come first in
            the schedule, and their values live at least until the prologue has ended.
        forms: how each node gets its result.
        root_buffers: the buffer of each storage root (roots of inputs and constants have none).
        unsized: nodes whose bytes depend on data; they run, but outside of the plan.
        elsewhere: nodes whose results live on another device than the plan's.
    """

    buffers: tuple[SymbolicBuffer, ...]
    schedule: tuple[str, ...]
    device: torch.device
    nodes: tuple[fx.Node, ...] = field(repr=False)
    prologue: tuple[fx.Node, ...] = field(repr=False)
    forms: Mapping[fx.Node, Form] = field(repr=False)
    storage: ir.StorageMap = field(repr=False)
    root_buffers: Mapping[ir.Root, SymbolicBuffer] = field(repr=False)
    unsized: tuple[fx.Node, ...] = ()
    elsewhere: tuple[fx.Node, ...] = ()

    @property
    def symbols(self) -> tuple[sympy.Symbol, ...]:
        """The symbols that buffer sizes depend on, by name."""
        found: set[sympy.Symbol] = set()
        for buffer in self.buffers:
            found |= buffer.nbytes.free_symbols
            for size in buffer.shape:
                found |= size.free_symbols
        return tuple(sorted(found, key=str))

    def at(self, sizes: Sizes) -> tuple[Buffer, ...]:
        """The buffers with concrete bytes."""
        return tuple(buffer.at(sizes) for buffer in self.buffers)


def find_lives(module: fx.GraphModule) -> Lives:
    """Compute the lives of every storage that the graph creates, in its schedule order."""
    graph = module.graph
    device = main_device_of(module)
    early = prologue_nodes(graph)
    first = set(early)
    schedule = early + [n for n in graph.nodes if n.op not in ("placeholder", "output") and n not in first]
    position = {node: index for index, node in enumerate(schedule)}
    storage = ir.StorageMap(graph)
    forms = {node: Form(Kind.OPAQUE) if node in first else form_of(node, device) for node in schedule}
    escaping = ir.escaping_roots(graph, storage)

    ends: dict[ir.Root, int] = {}
    for node in schedule:
        done = len(early) if node in first else 0
        touched = [root for operand in node.all_input_nodes for root in storage.roots(operand)]
        for root in (*touched, *storage.roots(node)):
            if root is not None:
                ends[root] = max(position[node] + 1, done)

    buffers: list[SymbolicBuffer] = []
    root_buffers: dict[ir.Root, SymbolicBuffer] = {}
    unsized: list[fx.Node] = []
    elsewhere: list[fx.Node] = []
    for node in schedule:
        form = forms[node]
        if form.kind not in (Kind.DESTINATION, Kind.OPAQUE, Kind.MUTATION):
            continue
        outputs = ir.tensors_of(node)
        for index, tensor in enumerate(outputs):
            root = (node, index)
            if tensor is None or storage.roots(node)[index] != root:
                continue
            if has_unbacked(node):
                unsized.append(node)
                continue
            if tensor.device != device:
                elsewhere.append(node)
                continue
            kind = "arena" if form.kind is Kind.DESTINATION else "transient"
            buffer = _buffer(
                node,
                name=node.name if len(outputs) == 1 else f"{node.name}.{index}",
                kind="output" if root in escaping else kind,
                nbytes=ir.storage_extent(tensor),
                start=position[node],
                end=len(schedule) if root in escaping else ends[root],
                tensor=tensor,
            )
            buffers.append(buffer)
            root_buffers[root] = buffer
        scratch = sympy.Integer(0) if has_unbacked(node) else scratch_bytes(node)
        if scratch != 0:
            buffers.append(
                _buffer(node, f"{node.name}.scratch", "scratch", scratch, position[node], position[node] + 1, None)
            )
    arguments = _scalar_arguments(module, len(schedule))
    return Lives(
        buffers=tuple(buffers) + arguments,
        schedule=tuple(node.name for node in schedule),
        nodes=tuple(node for node in schedule if node not in first),
        prologue=tuple(early),
        device=device,
        forms=forms,
        storage=storage,
        root_buffers=root_buffers,
        unsized=tuple(dict.fromkeys(unsized)),
        elsewhere=tuple(dict.fromkeys(elsewhere)),
    )


def _scalar_arguments(module: fx.GraphModule, positions: int) -> tuple[SymbolicBuffer, ...]:
    """Dynamo passes Python floats as fresh 0-dim tensors, and operators wrap numbers in some: a few
    bytes each, for the whole step.  They are counted, so that a plan is never below what is measured."""
    scalars = [
        n for n in module.graph.nodes if n.op == "placeholder" and (t := ir.tensor_of(n)) is not None and not t.dim()
    ]
    if not scalars or not positions:
        return ()
    return (_buffer(scalars[0], "scalar_arguments", "transient", sympy.Integer(64 * len(scalars)), 0, positions, None),)


def _buffer(
    node: fx.Node, name: str, kind: str, nbytes: sympy.Expr, start: int, end: int, tensor: torch.Tensor | None
) -> SymbolicBuffer:
    origin = ir.provenance(node)
    return SymbolicBuffer(
        name=name,
        kind=kind,
        nbytes=nbytes,
        start=start,
        end=end,
        dtype="uint8" if tensor is None else str(tensor.dtype).removeprefix("torch."),
        shape=(nbytes,) if tensor is None else tuple(ir.expr_of(size) for size in tensor.shape),
        op=str(node.target),
        module=origin.module,
        source=origin.source,
    )
