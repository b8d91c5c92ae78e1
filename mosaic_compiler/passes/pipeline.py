"""Running passes: one list of them, or all that the graphs of a step need.  Their order stands in ``recipes.py``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from mosaic_compiler import ir
from mosaic_compiler import recipes as recipe_book
from mosaic_compiler.ir.loops import loop_of
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes.base import Machine, Pass
from mosaic_compiler.passes.canonicalize import CanonicalizePass
from mosaic_compiler.passes.causal_first import CausalFirstPass
from mosaic_compiler.passes.chunk_loops import ChunkLoopsPass
from mosaic_compiler.passes.expand_mixtures import ExpandMixturesPass
from mosaic_compiler.passes.fuse import FusePass
from mosaic_compiler.passes.gather_logits import GatherLogitsPass
from mosaic_compiler.passes.in_place import InPlacePass
from mosaic_compiler.passes.mixtures import MixturesPass
from mosaic_compiler.passes.needed_rows import NeededRowsPass
from mosaic_compiler.passes.reorder import ReorderPass
from mosaic_compiler.passes.reuse_rows import ReuseRowsPass
from mosaic_compiler.passes.row_demand import RowDemandPass
from mosaic_compiler.passes.scatter_results import ScatterResultsPass
from mosaic_compiler.passes.sparse_outputs import SparseOutputsPass
from mosaic_compiler.passes.split_attention import SplitAttentionPass
from mosaic_compiler.passes.verifier import Verifier
from mosaic_compiler.passes.visible_keys import VisibleKeysPass
from mosaic_compiler.passes.vocabulary_tiles import VocabularyTilesPass
from mosaic_compiler.recipes import LOOPS, Recipe
from mosaic_compiler.waiting import now

_KNOWN: tuple[type[Pass], ...] = (
    NeededRowsPass,
    CanonicalizePass,
    VisibleKeysPass,
    SplitAttentionPass,
    MixturesPass,
    RowDemandPass,
    GatherLogitsPass,
    VocabularyTilesPass,
    SparseOutputsPass,
    ExpandMixturesPass,
    CausalFirstPass,
    ChunkLoopsPass,
    ScatterResultsPass,
    FusePass,
    ReorderPass,
    InPlacePass,
    ReuseRowsPass,
)
_BY_NAME: Mapping[str, type[Pass]] = {known.name: known for known in _KNOWN}


def passes_of(recipe: Recipe, options: MosaicOptions | None = None, machine: Machine | None = None) -> tuple[Pass, ...]:
    """The passes of a recipe, with the parameters that options and the machine set."""
    options, machine = options or MosaicOptions(), machine or Machine()
    return tuple(_BY_NAME[name].of(options, machine) for name in recipe.passes)


def passes_until(name: str, options: MosaicOptions) -> tuple[Pass, ...]:
    """The first passes of all graphs of a step, up to one."""
    return tuple(_BY_NAME[each].of(options, Machine()) for each in LOOPS.passes[: LOOPS.passes.index(name) + 1])


PASSES: tuple[Pass, ...] = passes_of(LOOPS)


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: wall time of the pass and of its verification, node counts."""

    name: str
    seconds: float
    verify_seconds: float
    nodes_before: int
    nodes_after: int


def run_passes(
    module: fx.GraphModule,
    *,
    passes: Sequence[Pass] = PASSES,
    disable: Sequence[str] = (),
    observe: Callable[[fx.GraphModule, PassRecord], None] = lambda module, record: None,
) -> tuple[fx.GraphModule, tuple[PassRecord, ...]]:
    """Run the passes in order, verifying after each; ``observe`` sees every intermediate graph.

    Raises:
        InvariantError: naming the pass that broke an invariant, and which one.
    """
    verifier = Verifier(module)
    records: list[PassRecord] = []
    for number, current in enumerate(passes):
        if current.name in disable:
            continue
        now(f"pass {current.name}", number, len(passes))
        before = len(module.graph.nodes)
        started = time.perf_counter()
        result = current(module)
        passed = time.perf_counter()
        verifier.check(result, current.name)
        checked = time.perf_counter()
        record = PassRecord(current.name, passed - started, checked - passed, before, len(result.graph.nodes))
        records.append(record)
        observe(result, record)
        module = result
    return module, tuple(records)


@dataclass(frozen=True)
class Family:
    """The graphs of one step.

    Attributes:
        graphs: by the names of their recipes, the preferred ones first; the last is always there.
        records: what the passes of the last one did.
    """

    graphs: Mapping[str, fx.GraphModule]
    records: tuple[PassRecord, ...]


def make_family(
    module: fx.GraphModule,
    options: MosaicOptions,
    machine: Machine,
    *,
    recipes: Sequence[Recipe] | None = None,
    observe: Callable[[fx.GraphModule, PassRecord], None] = lambda module, record: None,
) -> Family:
    """All graphs of a step.  One that would be the same as the last one, or has another prologue, is left out.

    Args:
        recipes: the preferred ones first (default: ``recipes.RECIPES``); ``observe`` sees the graphs of the last one.

    Raises:
        InvariantError: naming the pass that broke an invariant, and which one.
    """
    *others, main = recipe_book.RECIPES if recipes is None else recipes
    stages = [module]

    def see(graph: fx.GraphModule, record: PassRecord) -> None:
        stages.append(graph)
        observe(graph, record)

    ordered = _enabled(passes_of(main, options, machine), options)
    final, records = run_passes(module, passes=ordered, observe=see)
    graphs: dict[str, fx.GraphModule] = {}
    for recipe in others:
        wanted = _enabled(passes_of(recipe, options, machine), options)
        shared = _shared(ordered, wanted)
        here = stages[shared]
        wanted = [given for given in wanted if given in ordered or given(here) is not here]
        if not _differs(ordered, wanted, stages):
            continue
        graph, _ = run_passes(stages[shared], passes=wanted[shared:])
        if _early_names(graph) == _early_names(final):
            graphs[recipe.name] = graph
    return Family({**graphs, main.name: final}, records)


def _enabled(passes: Sequence[Pass], options: MosaicOptions) -> list[Pass]:
    return [given for given in passes if given.name not in options.disable]


def _shared(first: Sequence[Pass], second: Sequence[Pass]) -> int:
    """How many passes two lists have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(first), len(second)))


def _differs(ordered: Sequence[Pass], wanted: Sequence[Pass], stages: Sequence[fx.GraphModule]) -> bool:
    """``wanted`` is not just ``ordered`` without passes that changed nothing."""
    before_and_after = zip(ordered, stages, stages[1:], strict=False)
    return [given for given, *graphs in before_and_after if given in wanted or _changes(*graphs)] != wanted


def _changes(before: fx.GraphModule, after: fx.GraphModule) -> bool:
    def nodes(module: fx.GraphModule) -> list[Any]:  # a loop that was rewritten is another one
        return [
            (node.name, node.target, loop_of(node), [operand.name for operand in node.all_input_nodes])
            for node in module.graph.nodes
        ]

    return after is not before and nodes(after) != nodes(before)


def _early_names(module: fx.GraphModule) -> set[str]:
    return {node.name for node in ir.prologue_nodes(module.graph)}
