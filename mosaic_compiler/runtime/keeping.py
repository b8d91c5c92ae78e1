"""Compiled graphs as data, and steps that run of such data: nobody traces them, and no pass runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from mosaic_compiler.errors import CacheError
from mosaic_compiler.ir.notes import StateNote, StatePlace
from mosaic_compiler.kernels.fused import FusedUse, KeptUse
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.planning.facts import Constant, GraphFacts, KeptKinds, KernelUse, Note, Place
from mosaic_compiler.planning.lowered import LoweredGraph, LoweredStep
from mosaic_compiler.planning.reach import Reach
from mosaic_compiler.runtime.instructions import GUARD
from mosaic_compiler.runtime.kinds import Kinds
from mosaic_compiler.runtime.link import LinkedStep, object_of
from mosaic_compiler.runtime.loading import cluster_from
from mosaic_compiler.runtime.named import NamedStep
from mosaic_compiler.runtime.programs import Variant

_MOST = 16 << 20
"""Bytes of a graph's constants, above which it is not kept."""


def facts_of(step: NamedStep) -> GraphFacts:
    """A compiled graph as data.

    Raises:
        CacheError: if it has constants that are large, or no plain tensors.
    """
    constants: dict[str, Any] = {}
    for variant in step.variants.values():
        constants |= variant.linked.constants
    kernels = {
        name: tuple(
            {
                cluster: KernelUse(use.kernel.key, use.kernel.facts, tuple(sorted(use.spans, key=str)))
                for cluster, use in variant.linked.uses[graph].items()
            }
            for graph in variant.linked.step.graphs
        )
        for name, variant in step.variants.items()
    }
    tensors = {name: _written(name, value) for name, value in constants.items()}
    if sum(len(tensor.data) for tensor in tensors.values()) > _MOST:
        raise CacheError("its constants are larger than what it is worth to keep")
    return GraphFacts(step.kept.data(), kernels, tensors, step.planned_fallbacks, step.replays)


def step_from(
    facts: GraphFacts,
    options: MosaicOptions,
    derive: Callable[[], Kinds] = Kinds,
    prove: Callable[[], Reach | None] = lambda: None,
) -> NamedStep:
    """A step that runs.

    Args:
        options: those of running (``memory_budget``, ``chunk_rows``, ``poison``, ``placement``, ``strict``, ...); what
            passes did is done.
    """
    outline = replace(
        facts.kept.outline,
        guard=GUARD if options.poison else 0,
        chunk_rows=options.chunk_rows,
        placement=options.placement,
        deadline=options.placement_deadline,
    )
    constants = {name: _read(tensor) for name, tensor in facts.constants.items()}
    variants = {
        name: Variant(LinkedStep(lowered, _uses(lowered, facts.kernels[name]), constants))
        for name, lowered in facts.kept.variants.items()
    }
    step = NamedStep(replace(facts.kept, outline=outline), variants, options, facts.fallbacks, derive, prove)
    step.replays = facts.replays
    return step


def _uses(
    lowered: LoweredStep, kernels: tuple[Mapping[str, KernelUse], ...]
) -> dict[LoweredGraph, dict[str, FusedUse]]:
    found: dict[LoweredGraph, dict[str, FusedUse]] = {}
    for graph, uses in zip(lowered.graphs, kernels, strict=True):
        found[graph] = {
            name: KeptUse(use, graph.clusters[name].into, functools.partial(cluster_from, graph.clusters[name]))
            for name, use in uses.items()
        }
    return found


def kinds_facts(kinds: Kinds) -> KeptKinds:
    """Kinds of steps as data."""
    full, reuse, choose = (
        None if step is None else facts_of(_named(step)) for step in (kinds.full, kinds.reuse, kinds.choose)
    )
    notes = tuple(
        Note(tuple(Place(place.input, place.output) for place in note.places), note.rows) for note in kinds.notes
    )
    return KeptKinds(
        full, reuse, notes, tuple(kinds.space), kinds.origins, kinds.problem, kinds.is_heavy, kinds.ids,
        kinds.weights, kinds.reach, kinds.parts, kinds.is_rounded, kinds.selects, choose,
        kinds.has_residual,
    )  # fmt: skip


def kinds_from(facts: KeptKinds, options: MosaicOptions) -> Kinds:
    """Kinds of steps that run."""
    given = replace(options, needed_rows="all", cache="none", dump=None)
    full, reuse, choose = (
        None if known is None else step_from(known, given) for known in (facts.full, facts.reuse, facts.choose)
    )
    notes = tuple(
        StateNote(tuple(StatePlace(place.input, place.output) for place in note.places), note.rows)
        for note in facts.notes
    )
    return Kinds(
        full, reuse, notes, facts.space, facts.origins, facts.problem, facts.is_heavy, facts.ids,
        facts.weights, facts.reach, facts.parts, facts.is_rounded, facts.selects, choose,
        facts.has_residual,
    )  # fmt: skip


def _named(step: Any) -> NamedStep:
    assert isinstance(step, NamedStep)
    return step


def _written(name: str, value: Any) -> Constant:
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout is not torch.strided:
        raise CacheError(f"its constant {name} is a {type(value).__name__}, which cannot be kept")
    plain = value.detach().contiguous().cpu()
    if value.is_conj() or value.is_neg() or value.stride() != plain.stride():
        raise CacheError(f"its constant {name} is no plain tensor, which cannot be kept")
    data = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return Constant(str(value.dtype), str(value.device), tuple(value.shape), data)


def _read(known: Constant) -> torch.Tensor:
    dtype = object_of(known.dtype)
    if not known.data:
        return torch.empty(known.shape, dtype=dtype, device=known.device)
    flat = torch.frombuffer(bytearray(known.data), dtype=torch.uint8).view(dtype)
    return flat.reshape(known.shape).to(known.device)
