"""What lowering finds out of a graph: facts of its tensors, one scope per graph that runs, lives with their nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import sympy
import torch
from torch import fx

from mosaic_compiler import ir
from mosaic_compiler.ir.loops import ChunkLoop
from mosaic_compiler.lowering.forms import Form
from mosaic_compiler.planning.lives import StepLives, SymbolicBuffer


@dataclass(frozen=True)
class Scope:
    """One graph that runs: the step's, or the body of one call of a loop.

    Attributes:
        nodes: what runs, in schedule order (of the step: behind the prologue).
        forms: how each node gets its result.
        root_buffers: the buffer of each storage root (roots of inputs and constants have none).
        direct: roots of a body whose memory is a slice of the loop's result, by the position of that result.
    """

    nodes: tuple[fx.Node, ...]
    forms: Mapping[fx.Node, Form]
    storage: ir.StorageMap
    root_buffers: Mapping[ir.Root, SymbolicBuffer]
    direct: Mapping[ir.Root, int]

    @cached_property
    def deaths(self) -> dict[fx.Node, list[ir.Root]]:
        """Roots by the node that uses them last; outputs never die."""
        escaping = ir.escaping_roots(self.nodes[0].graph, self.storage) if self.nodes else set()
        last: dict[ir.Root, fx.Node] = {}
        for node in self.nodes:
            for user in (node, *node.all_input_nodes):
                for root in self.storage.roots(user):
                    if root is not None and ir.is_computed(root) and root not in escaping:
                        last[root] = node
        found: dict[fx.Node, list[ir.Root]] = {}
        for root, node in last.items():
            found.setdefault(node, []).append(root)
        return found


@dataclass(frozen=True)
class LoopSpan:
    """One call of a loop in the schedule.

    Attributes:
        node, loop: the call, and what it runs.
        rows: how many rows it goes over.
        start, end: schedule positions of its body.
    """

    node: fx.Node
    loop: ChunkLoop
    rows: sympy.Expr
    start: int
    end: int
    scope: Scope


@dataclass(frozen=True)
class Lives(StepLives):
    """Lives of every buffer of a graph, and the nodes behind them.

    Attributes:
        prologue: the nodes that run before sizes are known (see ``runtime/prologue.py``); they come first in
            the schedule, and their values live at least until the prologue has ended.
        scope: the step's own nodes.
        loops: the loops, by the node that calls them, in schedule order.
        unsized: nodes whose bytes depend on data; they run, but outside of the plan.
        elsewhere: nodes whose results live on another device than the plan's.
    """

    device: torch.device
    prologue: tuple[fx.Node, ...] = field(repr=False)
    scope: Scope = field(repr=False)
    loops: Mapping[fx.Node, LoopSpan] = field(repr=False)
    unsized: tuple[fx.Node, ...] = ()
    elsewhere: tuple[fx.Node, ...] = ()

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The step's own nodes behind the prologue."""
        return self.scope.nodes

    @property
    def forms(self) -> Mapping[fx.Node, Form]:
        """How each node gets its result, those of loop bodies included."""
        every = dict(self.scope.forms)
        for span in self.loops.values():
            every.update(span.scope.forms)
        return every
