"""Linking: what a lowered graph says by name is found again: operators, dtypes, kernels, constants."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

from mosaic_compiler.book import Call, Emit, inplace_twin, native_out, open_book
from mosaic_compiler.errors import CaptureError
from mosaic_compiler.kernels import ops  # noqa: F401  (what is ours is registered)
from mosaic_compiler.kernels.fused import FusedUse
from mosaic_compiler.planning.lowered import (
    Kind,
    LoweredGraph,
    LoweredLoop,
    LoweredOp,
    LoweredStep,
    Named,
    Ref,
    TensorFacts,
)


@functools.cache
def function_of(name: str) -> Callable[..., Any]:
    """What ``lowering.lower.target_name`` named.

    Raises:
        CaptureError: if it is not there (a library of operators that is not loaded, say).
    """
    try:
        if name.startswith("python:"):
            module, _, attribute = name.removeprefix("python:").rpartition(".")
            found: Any = getattr(importlib.import_module(module), attribute)
        else:
            found = functools.reduce(getattr, name.split("."), torch.ops)
    except (AttributeError, ImportError) as error:
        raise CaptureError(f"{name} is not there: import what registers it ({error})") from None
    function: Callable[..., Any] = found
    return function


@functools.cache
def object_of(text: str) -> Any:
    """``torch.float32``, the device of ``device:cuda:0``, the operator of ``op:aten.mm.default``."""
    if text.startswith("device:"):
        return torch.device(text.removeprefix("device:"))
    if text.startswith("op:"):
        return function_of(text.removeprefix("op:"))
    return getattr(torch, text.removeprefix("torch."))


@dataclass(frozen=True)
class Output:
    """A tensor that is made in a given place: see :class:`TensorFacts`."""

    facts: TensorFacts
    dtype: torch.dtype
    device: torch.device


class Linked:
    """One op, with its function and arguments found.

    Attributes:
        op: what it was lowered to.
        function: what it calls (of loops, clusters and constants: nothing).
        emit: of a destination, the calls that write it.
        outputs: its tensors.
    """

    __slots__ = ("_args", "_kwargs", "emit", "function", "kind", "name", "op", "outputs")

    def __init__(self, op: LoweredOp, clusters: Mapping[str, FusedUse]) -> None:
        self.op, self.name, self.kind = op, op.name, op.kind
        self.function: Any = None
        self.emit: Emit | None = None
        if op.way == "kernel":
            self.emit = functools.partial(_emit_cluster, clusters[op.target])
        elif op.kind not in (Kind.LOOP, Kind.CONSTANT):
            self.function = function_of(op.target)
            if op.way:
                self.emit = _emit_of(self.function, op.way)
        self._args = [_linked(argument) for argument in op.args]
        self._kwargs = [(name, *_linked(argument)) for name, argument in op.kwargs.items()]
        self.outputs = tuple(
            None if facts is None else Output(facts, object_of(facts.dtype), object_of(f"device:{facts.device}"))
            for facts in op.outputs
        )

    def arguments(self, values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """What it is called with, where the values of other ops are known."""
        args = [_filled(given, values) if varies else given for given, varies in self._args]
        if not self._kwargs:
            return args, {}
        return args, {name: _filled(given, values) if varies else given for name, given, varies in self._kwargs}

    def others(self, count: int) -> tuple[list[Any], dict[str, Any]]:
        """Its arguments behind the first ``count``, none of which is another op's value."""
        return [given for given, _ in self._args[count:]], {name: given for name, given, _ in self._kwargs}


def _linked(argument: Any) -> tuple[Any, bool]:
    """The argument with PyTorch's own objects in it, and whether values of other ops are."""
    if isinstance(argument, Ref):
        return argument, True
    if isinstance(argument, Named):
        return object_of(argument.text), False
    if isinstance(argument, (list, tuple)):
        parts = [_linked(part) for part in argument]
        return type(argument)(part for part, _ in parts), any(varies for _, varies in parts)
    if isinstance(argument, dict):
        found = {name: _linked(part) for name, part in argument.items()}
        return {name: part for name, (part, _) in found.items()}, any(varies for _, varies in found.values())
    if isinstance(argument, slice):
        ends = [_linked(end) for end in (argument.start, argument.stop, argument.step)]
        return slice(*(end for end, _ in ends)), any(varies for _, varies in ends)
    return argument, False


def _filled(argument: Any, values: Mapping[str, Any]) -> Any:
    kind = type(argument)
    if kind is Ref:
        return values[argument.name]
    if kind is list or kind is tuple:
        return kind([_filled(part, values) for part in argument])
    if kind is dict:
        return {name: _filled(part, values) for name, part in argument.items()}
    if kind is slice:
        return slice(*(_filled(end, values) for end in (argument.start, argument.stop, argument.step)))
    return argument


def _emit_of(op: OpOverload, way: str) -> Emit:
    if way == "entry":
        emit = open_book().of(op).write
    elif way == "out":
        emit = functools.partial(_emit_out, *(native_out(op) or ()))
    else:
        emit = functools.partial(_emit_twin, inplace_twin(op))
    if emit is None:
        raise CaptureError(f"{op} has another entry in the book than where its step was lowered")
    return emit


def _emit_out(
    op: OpOverload, names: tuple[str, ...], outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> list[Call]:
    return [Call(op, tuple(args), (*kwargs.items(), *zip(names, outs, strict=True)))]


def _emit_twin(op: Any, outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    return [Call(torch.Tensor.copy_, (outs[0], args[0])), Call(op, (outs[0], *args[1:]), tuple(kwargs.items()))]


def _emit_cluster(use: FusedUse, outs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
    own = [out for out, into in zip(outs, use.into, strict=True) if into is None]
    return [Call(use.kernel, (*args, *own))]


class LinkedGraph:
    """A graph with all of its ops linked."""

    def __init__(self, graph: LoweredGraph, clusters: Mapping[str, FusedUse]) -> None:
        self.graph = graph
        self.ops = [Linked(op, clusters) for op in graph.ops]


class LinkedStep:
    """A step that can be bound.

    Args:
        step: as data.
        clusters: fused regions of each of its graphs, by name.
        constants: its attributes, by name.

    Attributes:
        uses: the fused regions, as given.
        clusters: all of them; ``fused``: with the ops that call them.
    """

    def __init__(
        self,
        step: LoweredStep,
        clusters: Mapping[LoweredGraph, Mapping[str, FusedUse]],
        constants: Mapping[str, Any],
    ) -> None:
        self.step, self.constants = step, constants
        self.device = torch.device(step.device)
        self.varying = step.graph.depending_on(frozenset(step.symbols))
        """Names of ops that depend on how many rows are computed."""
        self.early = [Linked(op, clusters[step.graph]) for op in step.early]
        linked = {graph: LinkedGraph(graph, clusters[graph]) for graph in step.graphs}
        self.graph = linked[step.graph]
        self.bodies = {name: linked[loop.body] for name, loop in step.loops.items()}
        self.uses = clusters
        self.fused = [
            (op, clusters[graph][op.target]) for graph in step.graphs for op in graph.ops if op.way == "kernel"
        ]
        self.clusters = tuple(use for graph in step.graphs for use in clusters[graph].values())

    def loop(self, name: str) -> LoweredLoop:
        """The loop that an op calls."""
        return self.step.loops[name]
