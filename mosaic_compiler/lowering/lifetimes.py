"""From a schedule to buffer lives: who needs which bytes, from when to when.

A life is the half-open interval ``[start, end)`` of schedule positions; position ``i`` is the i-th node
of the graph that is neither a placeholder nor the output.  Worked example::

    position 0   a = mm(x, w)        a: [0, 2)   read last at position 1
    position 1   b = relu(a)         b: [1, 3)   a and b must coexist at position 1
    position 2   c = add_out(b, 1, out=b)        in place: c is b, no new buffer
    output (c,)                      b: [1, 3) is of term "call": it outlives the step

A view extends the life of the storage it looks into, so lives belong to storages (alias groups), never
to nodes.

A chunk loop takes the positions of its body: what it reads lives to its end, its full-length results live from
its start, and what is local to the body lives in body positions, with the bytes of one chunk, because every
iteration uses the same bytes again::

    position 5   mm_4 = mm(x[c], w)     x: [.., 7)      chunk_loop_1.mm_4: [5, 7)
    position 6   relu(mm_4)             the result of the loop, full length: [5, ..)
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from mosaic_compiler import book, ir
from mosaic_compiler.ir import prologue_nodes
from mosaic_compiler.ir.loops import ChunkLoop, loop_of
from mosaic_compiler.ir.notes import STATE, STATIC_INPUTS, kept_roots
from mosaic_compiler.kernels.scatter_rows import shared_pages
from mosaic_compiler.lowering.forms import Form, form_of
from mosaic_compiler.lowering.scopes import Lives, LoopSpan, Scope
from mosaic_compiler.lowering.scratch import scratch_bytes
from mosaic_compiler.planning.lives import LoopLives, SymbolicBuffer
from mosaic_compiler.planning.lowered import Kind


def find_lives(module: fx.GraphModule) -> Lives:
    """Compute the lives of every storage that the graph creates, in its schedule order."""
    return _Finder(module).find()


@dataclass(frozen=True)
class _BodyLives:
    """Lives inside of a loop body, counted from its start, for all calls of the loop."""

    scope: Scope
    buffers: tuple[tuple[str, SymbolicBuffer], ...]  # with the node that each belongs to


class _Finder:
    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self.device = ir.main_device_of(module)
        self.early = prologue_nodes(self.graph)
        self.unsized: list[fx.Node] = []
        self.elsewhere: list[fx.Node] = []
        self._bodies: dict[ChunkLoop, _BodyLives] = {}

    def find(self) -> Lives:
        first = set(self.early)
        order = self.early + [n for n in self.graph.nodes if n.op not in ("placeholder", "output") and n not in first]
        schedule: list[str] = []
        start: dict[fx.Node, int] = {}
        end: dict[fx.Node, int] = {}
        for node in order:
            start[node] = len(schedule)
            loop = loop_of(node)
            names = [node.name] if loop is None else [f"{node.name}.{n.name}" for n in self._body(loop).scope.nodes]
            schedule += names
            end[node] = max(len(schedule), len(self.early)) if node in first else len(schedule)
        forms = {node: Form(Kind.OPAQUE) if node in first else form_of(node, self.device) for node in order}
        storage = ir.StorageMap(self.graph)
        escaping = ir.escaping_roots(self.graph, storage)
        state = _state(self.module, len(schedule))
        kept = {root: state[number] for root, number in kept_roots(self.module, storage).items()}
        buffers, root_buffers = self._buffers(order, forms, storage, start, end, escaping, len(schedule), kept)
        nodes = tuple(node for node in order if node not in first)
        spans: dict[fx.Node, LoopSpan] = {}
        for node in nodes:
            loop = loop_of(node)
            if loop is not None:
                span, local = self._span(node, loop, start[node], end[node])
                spans[node] = span
                buffers += local
        return Lives(
            buffers=(*state, *buffers, *_scalar_arguments(self.module, len(schedule))),
            given=_given(self.module, len(schedule)),
            schedule=tuple(schedule),
            device_type=self.device.type,
            regions=tuple(_region(span) for span in spans.values()),
            prologue=tuple(self.early),
            device=self.device,
            scope=Scope(nodes, forms, storage, root_buffers, {}),
            loops=spans,
            unsized=tuple(dict.fromkeys(self.unsized)),
            elsewhere=tuple(dict.fromkeys(self.elsewhere)),
        )

    def _buffers(
        self,
        order: Sequence[fx.Node],
        forms: Mapping[fx.Node, Form],
        storage: ir.StorageMap,
        start: Mapping[fx.Node, int],
        end: Mapping[fx.Node, int],
        escaping: Collection[ir.Root],
        last: int,
        kept: Mapping[ir.Root, SymbolicBuffer] = MappingProxyType({}),
    ) -> tuple[list[SymbolicBuffer], dict[ir.Root, SymbolicBuffer]]:
        """Buffers of one graph; what escapes lives to position ``last``, what is ``kept`` has a buffer already."""
        ends: dict[ir.Root, int] = {}
        for node in order:
            touched = [root for operand in node.all_input_nodes for root in storage.roots(operand)]
            for root in (*touched, *storage.roots(node)):
                if root is not None:
                    ends[root] = end[node]
        buffers: list[SymbolicBuffer] = []
        root_buffers: dict[ir.Root, SymbolicBuffer] = {}
        for node in order:
            form = forms[node]
            if form.kind not in (Kind.DESTINATION, Kind.OPAQUE, Kind.MUTATION, Kind.LOOP):
                continue
            outputs = ir.tensors_of(node)
            for index, tensor in enumerate(outputs):
                root = (node, index)
                if tensor is None or storage.roots(node)[index] != root:
                    continue
                if root in kept:
                    assert form.kind in (Kind.DESTINATION, Kind.LOOP), f"{node.name} is kept, and allocates its result"
                    root_buffers[root] = kept[root]
                    continue
                if ir.has_unbacked(node):
                    self.unsized.append(node)
                    continue
                if tensor.device != self.device:
                    self.elsewhere.append(node)
                    continue
                space = "arena" if form.kind in (Kind.DESTINATION, Kind.LOOP) and root not in escaping else "heap"
                buffer = _buffer(
                    node,
                    name=node.name if len(outputs) == 1 else f"{node.name}.{index}",
                    space=space,
                    term="call" if root in escaping else "step",
                    nbytes=_resident(node, index, tensor),
                    start=start[node],
                    end=last if root in escaping else ends[root],
                    tensor=tensor,
                )
                buffers.append(buffer)
                root_buffers[root] = buffer
            scratch = sympy.Integer(0) if ir.has_unbacked(node) else scratch_bytes(node)
            if scratch != 0:
                buffers.append(
                    _buffer(node, f"{node.name}.scratch", "heap", scratch, start[node], start[node] + 1, None, "op")
                )
        return buffers, root_buffers

    # ------------------------------------------------------------------------------------------ loops
    def _body(self, loop: ChunkLoop) -> _BodyLives:
        if loop not in self._bodies:
            self._bodies[loop] = self._find_body(loop)
        return self._bodies[loop]

    def _find_body(self, loop: ChunkLoop) -> _BodyLives:
        graph = loop.body.graph
        nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
        forms = {node: form_of(node, self.device) for node in nodes}
        storage = ir.StorageMap(graph)
        start = {node: i for i, node in enumerate(nodes)}
        end = {node: i + 1 for node, i in start.items()}
        buffers, root_buffers = self._buffers(nodes, forms, storage, start, end, (), len(nodes))
        direct = _direct_results(loop, forms, storage)
        results = ir.escaping_roots(graph, storage)  # copied out when the chunk is done
        kept = {root: b for root, b in root_buffers.items() if root not in direct}
        kept = {root: replace(b, end=len(nodes)) if root in results else b for root, b in kept.items()}
        names = {buffer.name: buffer for buffer in kept.values()}
        owned = [(root[0].name, names[buffer.name]) for root, buffer in root_buffers.items() if buffer.name in names]
        owned += [(b.name.removesuffix(".scratch"), b) for b in buffers if b.term == "op"]
        return _BodyLives(Scope(tuple(nodes), forms, storage, kept, direct), tuple(owned))

    def _span(self, node: fx.Node, loop: ChunkLoop, start: int, end: int) -> tuple[LoopSpan, list[SymbolicBuffer]]:
        body = self._body(loop)
        origins: Mapping[str, ir.Provenance] = node.meta.get("origins", {})
        made: dict[str, SymbolicBuffer] = {}
        for owner, buffer in body.buffers:
            origin = origins.get(owner)
            made[buffer.name] = replace(
                buffer,
                name=f"{node.name}.{buffer.name}",
                loop=node.name,
                start=start + buffer.start,
                end=start + buffer.end,
                module=origin.module if origin is not None else buffer.module,
                source=origin.source if origin is not None else buffer.source,
            )
        own = replace(body.scope, root_buffers={root: made[b.name] for root, b in body.scope.root_buffers.items()})
        return LoopSpan(node, loop, ir.rows_of_loop(node), start, end, own), list(made.values())


def _region(span: LoopSpan) -> LoopLives:
    """What planning has to know of a loop."""
    origin = ir.provenance(span.node)
    return LoopLives(
        name=span.node.name,
        chunk=span.loop.chunk,
        rows=span.rows,
        start=span.start,
        end=span.end,
        work=_work_per_row(span),
        ops=tuple(_kind_of(node) for node in span.scope.nodes if book.entry(node).is_heavy),
        operands=_operands(span),
        module=origin.module,
        source=origin.source,
    )


def _kind_of(node: fx.Node) -> str:
    """What a plan calls a heavy op."""
    assert isinstance(node.target, OpOverload)
    return "attention" if book.is_attention(node) else node.target._schema.name.partition("::")[2]


def _work_per_row(span: LoopSpan) -> int:
    """Multiplications of one row with the weights of a loop's matmuls."""
    total = 0
    for node in span.scope.nodes:
        for operand in node.all_input_nodes if book.is_matmul(node) else ():
            sizes = [
                ir.expr_of(size) for tensor in ir.tensors_of(operand) if tensor is not None for size in tensor.shape
            ]
            if len(sizes) == 2 and all(size.is_Integer for size in sizes):
                total += int(sizes[0] * sizes[1])
    return total


def _operands(span: LoopSpan) -> tuple[str, ...]:
    """Tensors that an iteration sees: ``x[rows]`` for rows of it, ``k`` for all of it; weights are left out."""
    found = []
    for operand, dim in zip(span.node.args, span.loop.operands, strict=True):
        if not isinstance(operand, fx.Node) or ir.tensor_of(operand) is None:
            continue
        if dim is not None:
            found.append(f"{operand.name}[rows]")
        elif ir.free_symbols(operand):
            found.append(operand.name)
    return tuple(found)


def _direct_results(loop: ChunkLoop, forms: Mapping[fx.Node, Form], storage: ir.StorageMap) -> dict[ir.Root, int]:
    """Results that the body's ops can write straight into the loop's: a chunk of them is dense there, because
    their rows are the outermost dim in memory."""
    found: dict[ir.Root, int] = {}
    results: tuple[fx.Node, ...] = loop.body.graph.output_node().args[0]
    for index, (node, spec) in enumerate(zip(results, loop.outputs, strict=True)):
        root, tensor = storage.root(node), ir.tensor_of(node)
        if root is None or tensor is None or root in found or not ir.is_computed(root) or spec.scatter is not None:
            continue
        outer = spec.order[: spec.order.index(spec.dim)]
        dense = all(ir.expr_of(tensor.shape[dim]) == 1 for dim in outer)
        whole = node is root[0] or (node.target is operator.getitem and node.args[0] is root[0])
        if dense and whole and forms[root[0]].kind is Kind.DESTINATION:
            found[root] = index
    return found


def _resident(node: fx.Node, index: int, tensor: torch.Tensor) -> sympy.Expr:
    """Bytes of memory that a result takes: of scattered rows the pages that they lie in."""
    scatter = ir.scatter_of(node, index)
    if scatter is None:
        return ir.storage_extent(tensor)
    _, pages, page = scatter
    own = ir.expr_of(ir.argument_value(pages))
    return page * sympy.Min(sympy.ceiling(ir.storage_extent(tensor) / page), own + shared_pages(tensor.device))


def _scalar_arguments(module: fx.GraphModule, positions: int) -> tuple[SymbolicBuffer, ...]:
    """Dynamo passes Python floats as fresh 0-dim tensors, and operators wrap numbers in some: a few
    bytes each, for the whole step.  They are counted, so that a plan is never below what is measured."""
    scalars = [
        n for n in module.graph.nodes if n.op == "placeholder" and (t := ir.tensor_of(n)) is not None and not t.dim()
    ]
    if not scalars or not positions:
        return ()
    return (_buffer(scalars[0], "scalar_arguments", "heap", sympy.Integer(64 * len(scalars)), 0, positions, None),)


def _state(module: fx.GraphModule, positions: int) -> tuple[SymbolicBuffer, ...]:
    """What lives from step to step: a session's, mapped while the step runs."""
    placeholders = module.graph.find_nodes(op="placeholder")
    nodes = [placeholders[place.input] for place in STATE.of(module).places] if positions else []
    return tuple(
        _buffer(node, node.name, "state", ir.storage_extent(tensor), 0, positions, tensor, "state")
        for node in nodes
        for tensor in (ir.only_tensor(node),)
    )


def _given(module: fx.GraphModule, positions: int) -> tuple[SymbolicBuffer, ...]:
    """Inputs and weights: the caller's."""
    found = []
    state = {place.input for place in STATE.of(module).places}
    for index, node in enumerate(module.graph.find_nodes(op="placeholder")):
        tensor = ir.tensor_of(node)
        if index not in state and tensor is not None and tensor.layout == torch.strided and positions:
            term = "model" if index in STATIC_INPUTS.of(module) else "call"
            found.append(_buffer(node, node.name, "caller", ir.storage_extent(tensor), 0, positions, tensor, term))
    return tuple(found)


def _buffer(
    node: fx.Node,
    name: str,
    space: str,
    nbytes: sympy.Expr,
    start: int,
    end: int,
    tensor: torch.Tensor | None,
    term: str = "step",
) -> SymbolicBuffer:
    origin = ir.provenance(node)
    return SymbolicBuffer(
        name=name,
        space=space,
        term=term,
        nbytes=nbytes,
        start=start,
        end=end,
        dtype="uint8" if tensor is None else str(tensor.dtype).removeprefix("torch."),
        shape=(nbytes,) if tensor is None else tuple(ir.expr_of(size) for size in tensor.shape),
        op="" if node.op == "placeholder" else str(node.target),
        module=origin.module,
        source=origin.source,
    )
