"""The invariants of the IR, in one place, checked after every pass, always.

========== ==================================================================================
topology   every operand is defined before its use; the graph lints
metadata   dtype, sizes, strides and device of every node agree with a fake-tensor re-run
signature  the outputs are those of the graph before: count, layout, and which inputs they alias
effects    random draws and writes to inputs are the same, in the same order
in-place   a write into a buffer of the step, or into state, is legal (``passes/in_place.py``, ``passes/reuse_rows.py``)
loops      operands and results of a loop agree with its body: the same tensors with c rows
clusters   operands and results of a cluster have the layout of its body's
quadratic  no value grows faster with the inputs' sizes than some value did before (no new N x N)
repeats    rows that may be computed more than once count once (``repeats.py``)
========== ==================================================================================

``facts.py`` reads off a graph what signature, effects and quadratic compare; ``legal_writes.py`` judges
in-place.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from mosaic_compiler import ir
from mosaic_compiler.book import without_out
from mosaic_compiler.compat.symbols import free_unbacked_symbols
from mosaic_compiler.compat.tensors import symbolic_kernel
from mosaic_compiler.errors import InvariantError
from mosaic_compiler.ir.clusters import Cluster, cluster_of
from mosaic_compiler.ir.loops import ChunkLoop, loop_of
from mosaic_compiler.passes.verifier.facts import Facts, facts_of, fastest_growing
from mosaic_compiler.passes.verifier.legal_writes import illegal_writes
from mosaic_compiler.passes.verifier.repeats import counted_repeats

INVARIANTS = ("topology", "metadata", "signature", "effects", "in-place", "loops", "clusters", "quadratic", "repeats")


class Verifier:
    """Checks one compilation's graphs; remembers fake-tensor results of equal operations.

    Example:
        >>> verifier = Verifier(module)
        >>> verifier.check(SomePass()(module), "some-pass")
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._seen: dict[int, _Seen] = {}
        self._reference = self._facts(module.graph, ir.StorageMap(module.graph))
        self._checked: tuple[Any, ...] = ()
        self._known: dict[Any, Any] = {}
        self._clusters: dict[Cluster, tuple[tuple[str, str], ...]] = {}
        self._bodies: dict[ChunkLoop, tuple[tuple[str, str], ...]] = {}

    def check(self, module: fx.GraphModule, pass_name: str) -> None:
        """Raise :class:`InvariantError` naming the pass and the invariant it broke.  (A pass that has nothing to do may
        return its argument, which was checked already.)"""
        checked = _fingerprint(module)
        if checked == self._checked:
            return

        def fail(invariant: str, detail: str) -> None:
            raise InvariantError(pass_name, invariant, detail)

        for problem in _topology(module.graph):
            fail("topology", problem)
        for problem in self._metadata(module):
            fail("metadata", problem)
        storage = ir.StorageMap(module.graph)
        facts = self._facts(module.graph, storage)
        if facts.outputs != self._reference.outputs:
            fail("signature", f"outputs were {self._reference.outputs}, now {facts.outputs}")
        if facts.effects != self._reference.effects:
            fail("effects", f"effects were {self._reference.effects}, now {facts.effects}")
        for problem in illegal_writes(module.graph, storage):
            fail("in-place", problem)
        for node in module.graph.nodes:
            for invariant, problem in self._loop(node):
                fail(invariant, problem)
        if facts.degree > self._reference.degree:
            fail(
                "quadratic",
                f"{fastest_growing(module.graph)} grows with degree {facts.degree}, before {self._reference.degree}",
            )
        for problem in counted_repeats(module.graph):
            fail("repeats", problem)
        self._checked = checked

    def _facts(self, graph: fx.Graph, storage: ir.StorageMap) -> Facts:
        seen = [self._see(ir.value_of(node)).unbacked for node in graph.nodes]
        return facts_of(graph, storage, set().union(*seen))

    # ----------------------------------------------------------------------------------- metadata
    def _metadata(self, module: fx.GraphModule) -> Iterator[str]:
        mode = ir.fake_mode_of(module)
        for node in module.graph.nodes:
            if node.op not in ("call_function", "call_module"):
                continue
            if "val" not in node.meta:
                if not (isinstance(node.target, OpOverload) and not node.target._schema.returns):
                    yield f"{node.name} has no metadata"
                continue
            if mode is None or not isinstance(node.target, OpOverload):
                if node.target is operator.getitem:
                    source, index = node.args
                    expected = ir.value_of(source)[index]
                    got, expected = ir.layout_of(ir.value_of(node)), ir.layout_of(expected)
                    if not ir.equal_layouts(got, expected):
                        yield f"{node.name} is {got}, a fake run gives {expected}"
                continue
            got = self._fake_run(mode, node)
            known = self._see(ir.value_of(node)).layout
            if got is not None and ir.alias_base(node) is None:
                got, known = _without_offsets(got), _without_offsets(known)
            if got is not None and not ir.equal_layouts(got, known):
                yield f"{node.name} is {known}, a fake run gives {got}"

    def _loop(self, node: fx.Node) -> Iterator[tuple[str, str]]:
        """A call of a loop, and (once for all calls) its body."""
        loop = loop_of(node)
        if loop is None:
            if node.op == "call_module":
                yield from self._cluster(node)
            return
        if loop not in self._bodies:
            body, storage = loop.body, ir.StorageMap(loop.body.graph)
            problems = [("topology", problem) for problem in _topology(body.graph)]
            problems = problems or [("metadata", problem) for problem in self._metadata(body)]
            problems += [("in-place", problem) for problem in illegal_writes(body.graph, storage)]
            problems += [
                found for inner in body.graph.nodes if inner.op == "call_module" for found in self._cluster(inner)
            ]
            effects = [inner for inner in body.graph.nodes if _is_effect_in_body(inner, storage)]
            problems += [("effects", f"{effect.name} has an effect") for effect in effects]
            self._bodies[loop] = tuple(problems)
        for invariant, problem in self._bodies[loop]:
            yield invariant, f"{node.name}: {problem}"
        for problem in _disagreements(node, loop):
            yield "loops", f"{node.name}: {problem}"

    def _cluster(self, node: fx.Node) -> Iterator[tuple[str, str]]:
        """A call of a cluster, and (once for all calls) its body."""
        cluster = cluster_of(node)
        if cluster is None:
            yield "loops", f"{node.name} calls a submodule that is neither a chunk loop nor a cluster"
            return
        if cluster not in self._clusters:
            body = cluster.body
            problems = [("topology", problem) for problem in _topology(body.graph)]
            problems = problems or [("metadata", problem) for problem in self._metadata(body)]
            effects = [n for n in body.graph.nodes if n.op == "call_function" and ir.has_effect(n)]
            self._clusters[cluster] = (*problems, *(("effects", f"{n.name} has an effect") for n in effects))
        for invariant, problem in self._clusters[cluster]:
            yield invariant, f"{node.name}: {problem}"
        inputs = [ir.value_of(n) for n in cluster.body.graph.nodes if n.op == "placeholder"]
        given = [ir.argument_value(n) for n in node.args]
        if ir.layout_of(tuple(given)) != ir.layout_of(tuple(inputs)):
            yield (
                "clusters",
                f"{node.name} is called with {ir.layout_of(tuple(given))}, not {ir.layout_of(tuple(inputs))}",
            )
        results: Any = cluster.body.graph.output_node().args[0]
        if ir.layout_of(ir.value_of(node)) != ir.layout_of(tuple(ir.value_of(n) for n in results)):
            yield "clusters", f"{node.name} does not have the layout of its results"

    def _fake_run(self, mode: Any, node: fx.Node) -> Any:
        if self._see(ir.value_of(node)).unbacked:
            return None  # a re-run would invent new symbols for the same data-dependent sizes
        if ir.BINDS in node.meta:
            return None
        assert isinstance(node.target, OpOverload)
        target = without_out(node.target)  # a fake destination would be written too: resized, or its sizes fixed
        names = {a.name for a in target._schema.arguments}
        args, kwargs = fx.node.map_arg((node.args, {k: v for k, v in node.kwargs.items() if k in names}), ir.value_of)
        key = (target, self._signature_of(args), self._signature_of(kwargs))
        if key not in self._known:
            with mode:
                self._known[key] = ir.layout_of(symbolic_kernel(target)(*args, **kwargs))
        return self._known[key]

    def _signature_of(self, value: Any) -> Any:
        if isinstance(value, dict):
            return tuple((name, self._signature_of(value[name])) for name in sorted(value))
        if isinstance(value, (tuple, list)):
            return tuple(self._signature_of(item) for item in value)
        if isinstance(value, torch.Tensor) or ir.is_symbolic_number(value):
            return self._see(value).layout
        return (type(value).__name__, repr(value))

    def _see(self, value: Any) -> _Seen:
        """What there is to know of a node's value; a node that a pass leaves alone keeps its value."""
        seen = self._seen.get(id(value))
        if seen is None:
            seen = self._seen[id(value)] = _Seen.of(value)
        return seen


@dataclass(frozen=True)
class _Seen:
    """A value (kept, so that its ``id`` stays its own), its layout, and the symbols in it that only the data knows."""

    value: Any
    layout: Any
    unbacked: frozenset[sympy.Symbol]

    @classmethod
    def of(cls, value: Any) -> _Seen:
        numbers = filter(ir.is_symbolic_number, ir.numbers_in(value))
        return cls(value, ir.layout_of(value), frozenset().union(*map(free_unbacked_symbols, numbers)))


def _without_offsets(layout: Any) -> Any:
    """A layout (of several tensors) in storage of its own, where it is planned to begin at 0: some fake kernels place a
    result where their operand lies in its own storage (``slice_scatter``)."""
    if isinstance(layout, tuple) and len(layout) == 5 and isinstance(layout[0], str):
        return layout[:4]
    return tuple(map(_without_offsets, layout)) if isinstance(layout, tuple) else layout


def _is_effect_in_body(node: fx.Node, storage: ir.StorageMap) -> bool:
    """A body runs once per chunk: it may write its own buffers, and nothing else."""
    if node.op != "call_function" or not ir.has_effect(node):
        return False
    roots = [root for written in ir.mutated_arguments(node) for root in storage.roots(written)]
    return not roots or any(root is None or not ir.is_computed(root) for root in roots)


def _disagreements(node: fx.Node, loop: ChunkLoop) -> Iterator[str]:
    """Operands and results of a call against the body's inputs and outputs, with all rows for a chunk's."""
    inputs = [n for n in loop.body.graph.nodes if n.op == "placeholder"][1:]
    if len(inputs) != len(node.args) or len(loop.operands) != len(inputs) or not loop.sliced():
        yield f"{len(node.args)} operands for a body with {len(inputs)}"
        return
    rows = ir.rows_of_loop(node)

    def whole(tensor: torch.Tensor, dim: int | None) -> Any:
        sizes = [ir.expr_of(size) for size in tensor.shape]
        if dim is not None:
            if sizes[dim] != loop.chunk:
                return f"no chunk of rows in dim {dim} of {sizes}"
            sizes[dim] = rows
        return tensor.dtype, tensor.device, tuple(sizes)

    for operand, entry, dim in zip(node.args, inputs, loop.operands, strict=True):
        given, expected = ir.argument_value(operand), ir.value_of(entry)
        if isinstance(expected, torch.Tensor):
            if not isinstance(given, torch.Tensor) or whole(given, None) != whole(expected, dim):
                yield f"operand {operand} is {ir.layout_of(given)}, its body takes {ir.layout_of(expected)}"
        elif ir.expr_of(given) != ir.expr_of(expected):
            yield f"operand {operand} is {given}, its body takes {expected}"
    results: Any = loop.body.graph.output_node().args[0]
    if not len(results) == len(loop.outputs) == len(ir.tensors_of(node)):
        yield f"{len(results)} results of the body, {len(loop.outputs)} outputs"
        return
    for index, (part, spec, result) in enumerate(zip(results, loop.outputs, ir.tensors_of(node), strict=True)):
        chunk = ir.tensor_of(part)
        expected = None if chunk is None else whole(chunk, spec.dim)
        if spec.scatter is not None:
            for problem in _misplaced(node, loop, index):
                yield f"result {index}: {problem}"
            if isinstance(expected, tuple):
                rows_in_all = ir.expr_of(ir.argument_value(node.args[spec.scatter.total]))
                expected = (*expected[:2], (rows_in_all, *expected[2][1:]))
        if result is None or expected != whole(result, None):
            yield f"result {index} is {ir.layout_of(result)}, its chunks are {ir.layout_of(chunk)}"


def _misplaced(node: fx.Node, loop: ChunkLoop, output: int) -> Iterator[str]:
    """Rows that are scattered: by a sliced int64 index (as many as there are rows: see the operands' check), into
    memory of their own."""
    spec = loop.outputs[output]
    assert spec.scatter is not None
    index = node.args[spec.scatter.index]
    tensor = ir.tensor_of(index) if isinstance(index, fx.Node) else None
    if tensor is None or tensor.dtype != torch.int64 or tensor.dim() != 1 or loop.operands[spec.scatter.index] != 0:
        yield f"{index} is no sliced int64 index"
    if spec.into is not None or spec.dim != 0:
        yield "scattered rows have dim 0, and memory of their own"


def _fingerprint(module: fx.GraphModule) -> tuple[Any, ...]:
    """Equal for one module in one state."""
    nodes = module.graph.nodes
    return module, [(node, node.target, node.args, dict(node.kwargs), id(node.meta.get("val"))) for node in nodes]


# --------------------------------------------------------------------------------------- topology
def _topology(graph: fx.Graph) -> Iterator[str]:
    defined: set[fx.Node] = set()
    outputs = 0
    for node in graph.nodes:
        for operand in node.all_input_nodes:
            if operand not in defined:
                yield f"{node.name} uses {operand.name}, which is not defined before it"
                return
        defined.add(node)
        outputs += node.op == "output"
    if outputs != 1:
        yield f"the graph has {outputs} output nodes"
        return
    try:
        graph.lint()
    except (RuntimeError, ValueError) as error:
        yield str(error)
