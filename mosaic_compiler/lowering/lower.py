"""From a graph and its lives to data: :class:`~mosaic_compiler.planning.lowered.LoweredStep`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from mosaic_compiler import ir
from mosaic_compiler.compat.tracing import tree_flatten
from mosaic_compiler.ir.clusters import Cluster, own_clusters
from mosaic_compiler.ir.loops import ChunkLoop
from mosaic_compiler.kernels import attention
from mosaic_compiler.lowering.forms import Form
from mosaic_compiler.lowering.scopes import Lives, Scope
from mosaic_compiler.planning.lowered import (
    GETITEM,
    Input,
    Kind,
    LoweredCluster,
    LoweredGraph,
    LoweredLoop,
    LoweredOp,
    LoweredStep,
    Named,
    Ref,
    TensorFacts,
)


def lower(module: fx.GraphModule, lives: Lives) -> LoweredStep:
    """The step of a graph after all passes, as data."""
    graph = module.graph
    varying = frozenset(ir.numbers_of_rows(graph))
    members = set(lives.prologue)
    bodies: dict[ChunkLoop, LoweredGraph] = {}

    def body_of(loop: ChunkLoop, scope: Scope) -> LoweredGraph:
        if loop not in bodies:
            bodies[loop] = _graph(loop.body, scope, varying)
        return bodies[loop]

    loops = {
        node.name: LoweredLoop(
            body_of(span.loop, span.scope), span.loop.operands, span.loop.outputs, span.loop.chunk, span.rows
        )
        for node, span in lives.loops.items()
    }
    early_scope = Scope(lives.prologue, {n: Form(Kind.OPAQUE) for n in lives.prologue}, lives.scope.storage, {}, {})
    return LoweredStep(
        graph=_graph(module, lives.scope, varying),
        early=tuple(_op(node, early_scope, {}, varying) for node in lives.prologue),
        early_results=tuple(node.name for node in lives.prologue if not members.issuperset(node.users)),
        loops=loops,
        constants=tuple(dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "get_attr")),
        device=str(lives.device),
    )


def _graph(module: fx.GraphModule, scope: Scope, varying: Collection[sympy.Symbol]) -> LoweredGraph:
    results, _ = tree_flatten(module.graph.output_node().args[0])
    deaths = scope.deaths
    return LoweredGraph(
        inputs=tuple(map(_input, module.graph.find_nodes(op="placeholder"))),
        ops=tuple(_op(node, scope, deaths, varying) for node in scope.nodes),
        results=tuple(map(_argument, results)),
        clusters={name: _cluster(cluster) for name, cluster in own_clusters(module).items()},
        places={_root(root): _local(buffer.name, buffer.loop) for root, buffer in scope.root_buffers.items()},
        direct={_root(root): index for root, index in scope.direct.items()},
    )


def _root(root: ir.Root) -> tuple[str, int]:
    """A storage by the name of the node that makes it."""
    node, index = root
    return node.name, index


def _local(name: str, loop: str) -> str:
    """A buffer's name inside of the body that it is local to."""
    return name.removeprefix(f"{loop}.") if loop else name


def _input(node: fx.Node) -> Input:
    """A placeholder, as data."""
    value, tensor = ir.value_of(node), ir.tensor_of(node)
    number = ir.expr_of(value) if ir.is_symbolic_number(value) or isinstance(value, (int, float)) else None
    if tensor is None or tensor.layout != torch.strided:
        return Input(node.name, None, number)
    return Input(node.name, _tensor(tensor, tensor.stride(), ir.expr_of(tensor.storage_offset())), number)


def _tensor(tensor: torch.Tensor, strides: Any, offset: sympy.Expr) -> TensorFacts:
    sizes, steps = tuple(map(ir.expr_of, tensor.shape)), tuple(map(ir.expr_of, strides))
    return TensorFacts(str(tensor.dtype), str(tensor.device), sizes, steps, ir.lazy_bits(tensor), offset)


def _op(
    node: fx.Node, scope: Scope, deaths: Mapping[fx.Node, list[ir.Root]], varying: Collection[sympy.Symbol]
) -> LoweredOp:
    value, form, outputs = ir.value_of(node), scope.forms[node], _outputs(node)
    tensors = [facts for facts in outputs if facts is not None]
    roots = scope.storage.roots(node)
    base = ir.alias_base(node) if node.op == "call_function" else None
    owned = [scope.root_buffers.get((node, index)) for index in range(len(roots))]
    own = set(ir.free_symbols(node))
    return LoweredOp(
        name=node.name,
        kind=form.kind,
        target=target_name(node),
        args=tuple(map(_argument, node.args)),
        kwargs={name: _argument(given) for name, given in node.kwargs.items()},
        way=form.way,
        outputs=outputs,
        is_list=isinstance(value, (tuple, list)),
        has_lists=isinstance(value, (tuple, list)) and any(isinstance(part, (tuple, list)) for part in value),
        number=_number(value),
        roots=tuple(None if root is None else _root(root) for root in roots),
        buffers=tuple(None if buffer is None else _local(buffer.name, buffer.loop) for buffer in owned),
        dies=tuple(map(_root, deaths.get(node, ()))),
        base=None if base is None else base.name,
        into=ir.taken_over(node),
        scatters=tuple(_scatter(node, index) for index in range(len(ir.tensors_of(node)))),
        read=frozenset(user.args[1] for user in node.users if target_name(user) == GETITEM),  # type: ignore[misc]
        symbols=frozenset(s for facts in tensors for n in (*facts.shape, *facts.strides) for s in n.free_symbols),
        depends=frozenset(own.union(*(ir.free_symbols(operand) for operand in node.all_input_nodes))),
        operands=tuple(operand.name for operand in node.all_input_nodes),
        can_be_empty=bool(tensors) and not any(map(_is_filled, tensors)) and not ir.has_effect(node),
        binds=node.meta.get(ir.BINDS),
        may_repeat=ir.MAY_REPEAT in node.meta,
        attention=attention.facts_of(node, varying),
        source=ir.provenance(node).source,
    )


def _outputs(node: fx.Node) -> tuple[TensorFacts | None, ...]:
    """Its tensors, in storage of their own."""
    return tuple(
        None if t is None else _tensor(t, ir.own_strides(t) if t.layout == torch.strided else (), sympy.Integer(0))
        for t in ir.tensors_of(node)
    )


def _is_filled(facts: TensorFacts) -> bool:
    """It has elements, whatever the sizes are."""
    return all(size.is_Integer and size != 0 for size in facts.shape)


def _number(value: Any) -> Any:
    """A number as itself or as an expression; ``None`` for what Python computes (floats) and what is none."""
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (torch.SymInt, torch.SymBool)):
        return ir.expr_of(value)
    return None


def _scatter(node: fx.Node, index: int) -> tuple[Ref, Any, int] | None:
    found = ir.scatter_of(node, index)
    return None if found is None else (Ref(found[0].name), _argument(found[1]), found[2])


def target_name(node: fx.Node) -> str:
    """What a node calls, by name: ``aten.mm.default``, ``python:_operator.mul``, ``fused_0``."""
    target = node.target
    if isinstance(target, (OpOverload, str)):
        return str(target)
    if isinstance(target, HigherOrderOperator):
        return f"higher_order.{target}"
    home = getattr(target, "__module__", None) or "builtins"
    return f"python:{home}.{getattr(target, '__qualname__', getattr(target, '__name__', ''))}"


_NAMED = (torch.dtype, torch.layout, torch.memory_format)


def _argument(given: Any) -> Any:
    if isinstance(given, fx.Node):
        return Ref(given.name)
    if isinstance(given, torch.device):
        return Named(f"device:{given}")
    if isinstance(given, _NAMED):
        return Named(str(given))
    if isinstance(given, tuple):
        return tuple(map(_argument, given))
    if isinstance(given, list):
        return list(map(_argument, given))
    if isinstance(given, dict):
        return {name: _argument(value) for name, value in given.items()}
    if isinstance(given, slice):
        return slice(*(map(_argument, (given.start, given.stop, given.step))))
    if isinstance(given, OpOverload):  # what a mutable custom op is wrapped in is called with it
        return Named(f"op:{given}")
    return given  # numbers, strings; of anything else there is no name, and a step that has it cannot be kept on disk


def _cluster(cluster: Cluster) -> LoweredCluster:
    graph = cluster.body.graph
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    scope = Scope(tuple(nodes), {n: Form(Kind.OPAQUE) for n in nodes}, ir.StorageMap(graph), {}, {})
    results: Any = graph.output_node().args[0]
    return LoweredCluster(
        inputs=tuple(map(_input, graph.find_nodes(op="placeholder"))),
        ops=tuple(_op(node, scope, {}, ()) for node in nodes),
        results=tuple(node.name for node in results),
        into=cluster.into,
    )
