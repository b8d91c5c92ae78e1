"""The one ordered list of passes, and how they are run.

Order matters:

1. ``needed-rows`` first: it says what the step has to compute; all others only say how.
2. ``canonicalize`` before the rest: every later pass matches one spelling per operation.
3. ``row-demand`` before ``in-place``: it calls ops again on fewer rows, which only pure ops allow.
4. ``gather-logits``, ``vocabulary-tiles`` and ``sparse-outputs`` behind ``row-demand``: they match the head, and what
   is done with its rows, as it left them.
5. ``chunk-loops`` when all graph-wide rewrites are done: those match nodes, not loop bodies.
6. ``scatter-results`` behind ``chunk-loops``: it matches a loop and the reader of its result.
7. ``fuse`` behind both: what a loop computes is known by then, and clusters hide ops from it.
8. ``reorder`` behind ``fuse``: it sees the ops that will run; and before anything is written.
9. ``in-place`` and ``reuse-rows`` last: they introduce writes, and no other pass moves or merges nodes around a
   write.  ``reuse-rows`` behind ``in-place``, because it must see when a body's results are written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.ir.loops import loop_of
from mosaic_compiler.passes.base import Pass
from mosaic_compiler.passes.canonicalize import CanonicalizePass
from mosaic_compiler.passes.chunk_loops import ChunkLoopsPass
from mosaic_compiler.passes.fuse import FusePass
from mosaic_compiler.passes.gather_logits import GatherLogitsPass
from mosaic_compiler.passes.in_place import InPlacePass
from mosaic_compiler.passes.needed_rows import NeededRowsPass
from mosaic_compiler.passes.reorder import ReorderPass
from mosaic_compiler.passes.reuse_rows import ReuseRowsPass
from mosaic_compiler.passes.row_demand import RowDemandPass
from mosaic_compiler.passes.scatter_results import ScatterResultsPass
from mosaic_compiler.passes.sparse_outputs import SparseOutputsPass
from mosaic_compiler.passes.verifier import Verifier
from mosaic_compiler.passes.vocabulary_tiles import VocabularyTilesPass

PASSES: tuple[Pass, ...] = (
    NeededRowsPass(),
    CanonicalizePass(),
    RowDemandPass(),
    GatherLogitsPass(),
    VocabularyTilesPass(),
    SparseOutputsPass(),
    ChunkLoopsPass(),
    ScatterResultsPass(),
    FusePass(),
    ReorderPass(),
    InPlacePass(),
    ReuseRowsPass(),
)


def passes_for(
    *,
    vocabulary_tile: int | None = None,
    needed_rows: str = "all",
    mask_token_id: int | None = None,
    page_bytes: int | None = None,
) -> tuple[Pass, ...]:
    """The passes with the parameters that options and the device set."""

    def with_parameters(given: Pass) -> Pass:
        if isinstance(given, VocabularyTilesPass):
            return replace(given, tile=vocabulary_tile)
        if isinstance(given, NeededRowsPass):
            return replace(given, rows=needed_rows, mask=mask_token_id)
        return replace(given, page=page_bytes) if isinstance(given, SparseOutputsPass) else given

    return tuple(map(with_parameters, PASSES))


def pass_names() -> tuple[str, ...]:
    return tuple(p.name for p in PASSES)


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
    for current in passes:
        if current.name in disable:
            continue
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


def without_loops(
    stages: Mapping[str, fx.GraphModule], final: fx.GraphModule, disable: Sequence[str] = ()
) -> fx.GraphModule | None:
    """The graph that ``final`` would be without its loops: what runs where nothing needs chunks.

    Args:
        stages: the graph after each pass, by the pass's name, in order.
        final: the graph after all passes.

    Returns:
        ``None`` if ``final`` has no loops, or its prologue is another one.
    """
    names = list(stages)
    if ChunkLoopsPass.name not in names or not any(map(loop_of, final.graph.nodes)):
        return None
    before = stages[names[names.index(ChunkLoopsPass.name) - 1]]
    flat, _ = run_passes(before, passes=(FusePass(), ReorderPass(), InPlacePass()), disable=disable)
    early, own = ({n.name for n in ir.prologue_nodes(graph)} for graph in (final.graph, flat.graph))
    return flat if early == own else None
