"""A kept step is checked before it runs: what its ops read is there, and nothing is read that is dead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mosaic_compiler.errors import CacheError
from mosaic_compiler.planning.kept import KeptStep
from mosaic_compiler.planning.lives import StepLives
from mosaic_compiler.planning.lowered import Kind, LoweredGraph, LoweredOp, LoweredStep, Ref, Root


def check_lowered(kept: KeptStep) -> None:
    """Raise :class:`CacheError` if a step does not hold together."""
    if not kept.variants or kept.variants.keys() != kept.outline.variants.keys():
        raise CacheError("its graphs and their lives are not the same ones")
    for name, lowered in kept.variants.items():
        _check_step(name, lowered, kept.outline.variants[name])
    count = len(kept.inputs)
    if any(not 0 <= number < count for number in (*kept.static, *(reading.index for reading in kept.readings))):
        raise CacheError("it has fewer inputs than it reads")


def _check_step(name: str, lowered: LoweredStep, lives: StepLives) -> None:
    placed = {buffer.name: buffer for buffer in lives.buffers}
    if len(placed) != len(lives.buffers):
        raise CacheError(f"{name}: two buffers have one name")
    early = {op.name for op in lowered.early}
    if not set(lowered.early_results) <= early:
        raise CacheError(f"{name}: results of the prologue that it does not have")
    inputs = {given.name for given in lowered.graph.inputs}
    _check_ops(name, lowered.early, set(inputs), lowered)
    known = _check_ops(name, lowered.graph.ops, inputs | set(lowered.early_results), lowered)
    _check_results(name, lowered.graph, known)
    _check_deaths(name, lowered.graph)
    for op in lowered.graph.ops:
        for buffer in filter(None, op.buffers):
            if buffer not in placed:
                raise CacheError(f"{name}: {op.name} writes to {buffer}, which has no place")
    for call, loop in lowered.loops.items():
        label = f"{name}, body of {call}"
        body = _check_ops(label, loop.body.ops, {given.name for given in loop.body.inputs}, lowered)
        _check_results(label, loop.body, body)
        _check_deaths(label, loop.body)


def _check_ops(label: str, ops: Sequence[LoweredOp], known: set[str], lowered: LoweredStep) -> set[str]:
    """Each op reads what is there; the names of all values behind them."""
    for op in ops:
        missing = [ref for ref in _refs((op.args, dict(op.kwargs))) if ref not in known]
        if missing:
            raise CacheError(f"{label}: {op.name} reads {missing[0]}, which is not there")
        if op.name in known:
            raise CacheError(f"{label}: there are two values {op.name}")
        if op.kind is Kind.LOOP and op.name not in lowered.loops:
            raise CacheError(f"{label}: {op.name} is a loop without a body")
        known.add(op.name)
    return known


def _check_results(label: str, graph: LoweredGraph, known: set[str]) -> None:
    for ref in _refs(graph.results):
        if ref not in known:
            raise CacheError(f"{label}: it returns {ref}, which is not there")
    for op in graph.ops:
        if op.way == "kernel" and op.target not in graph.clusters:
            raise CacheError(f"{label}: {op.name} calls {op.target}, which is not there")


def _check_deaths(label: str, graph: LoweredGraph) -> None:
    """What is dead is not read: neither a storage nor a view of it."""
    roots: dict[str, set[Root]] = {}
    dead: set[Root] = set()
    for op in graph.ops:
        for ref in _refs((op.args, dict(op.kwargs))):
            if gone := roots.get(ref, set()) & dead:
                raise CacheError(f"{label}: {op.name} reads {ref} of {next(iter(gone))}, which is dead")
        roots[op.name] = {root for root in op.roots if root is not None}
        dead.update(op.dies)
    for ref in _refs(graph.results):
        if roots.get(ref, set()) & dead:
            raise CacheError(f"{label}: it returns {ref}, which is dead")


def _refs(argument: Any) -> Iterator[str]:
    """Names of the values in nested arguments."""
    if isinstance(argument, Ref):
        yield argument.name
    elif isinstance(argument, (list, tuple)):
        for part in argument:
            yield from _refs(part)
    elif isinstance(argument, dict):
        for part in argument.values():
            yield from _refs(part)
    elif isinstance(argument, slice):
        yield from _refs((argument.start, argument.stop, argument.step))
