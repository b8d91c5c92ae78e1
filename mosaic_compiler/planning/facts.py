"""What is kept on disk of a compiled graph besides its lowered steps, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy

from mosaic_compiler.planning.kept import KeptStep
from mosaic_compiler.planning.plan import Fallback
from mosaic_compiler.planning.reach import Reach


@dataclass(frozen=True)
class Source:
    """Where a number is read off a kernel's arguments: the ``what`` (``size``, ``stride``, ``number``) of one of them,
    divided by ``divisor``."""

    what: str
    index: int
    dim: int = 0
    divisor: int = 1

    def __call__(self, arguments: Sequence[Any]) -> int:
        given = arguments[self.index]
        found = given if self.what == "number" else (given.shape if self.what == "size" else given.stride())[self.dim]
        return int(found) // self.divisor

    def divided(self, divisor: int) -> Source:
        """A part of the number."""
        return Source(self.what, self.index, self.dim, self.divisor * divisor)


@dataclass(frozen=True)
class Layout:
    """Dtype, sizes and strides of a tensor, in symbols."""

    dtype: str
    shape: tuple[sympy.Expr, ...]
    strides: tuple[sympy.Expr, ...]


@dataclass(frozen=True)
class KernelFacts:
    """What is known of a fused kernel without the graph that it is compiled from.

    Attributes:
        operands: how many arguments are no destinations.
        symbols, sources: its sizes, and where each is read off the arguments.
        layouts: of operands and destinations; ``None`` for what is no tensor.
        has_wide_rows: it has 64-bit indices from the start.
        problem: why sizes cannot be read; empty if they can.
        device: where it runs.
    """

    operands: int
    symbols: tuple[sympy.Symbol, ...]
    sources: tuple[Source, ...]
    layouts: tuple[Layout | None, ...]
    has_wide_rows: bool
    problem: str
    device: str


@dataclass(frozen=True)
class KernelUse:
    """A kernel in a graph.

    Attributes:
        key, facts: of the kernel.
        spans: elements of its tensors in the graph's symbols, which decide about the width of its indices.
    """

    key: str
    facts: KernelFacts
    spans: tuple[sympy.Expr, ...]


@dataclass(frozen=True)
class Constant:
    """A tensor that is part of a graph."""

    dtype: str
    device: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class GraphFacts:
    """One compiled graph: what runs it where nobody traces it.

    Attributes:
        kept: the step.
        kernels: for each graph of each variant (in the order of ``LoweredStep.graphs``), its kernels by name.
        constants: tensors of the graphs, by name.
        fallbacks: what the plan does not fully cover.
        replays: programs are recorded and replayed on a GPU.
    """

    kept: KeptStep
    kernels: Mapping[str, tuple[Mapping[str, KernelUse], ...]]
    constants: Mapping[str, Constant]
    fallbacks: tuple[Fallback, ...]
    replays: bool = False


@dataclass(frozen=True)
class Place:
    """A value that lives from step to step: the input that is its memory, and the result that is written there."""

    input: int
    output: int | None


@dataclass(frozen=True)
class Note:
    """State of one kind of step: see ``ir.notes.StateNote``."""

    places: tuple[Place, ...]
    rows: int | None


@dataclass(frozen=True)
class KeptKinds:
    """The kinds of steps of one graph; see ``runtime.kinds.Kinds``."""

    full: GraphFacts | None
    reuse: GraphFacts | None
    notes: tuple[Note, ...]
    space: tuple[Any, ...]
    origins: tuple[str, ...]
    problem: str
    is_heavy: bool
    ids: int | None
    weights: tuple[int, ...]
    reach: Reach | None
    parts: tuple[Any, ...]
    is_rounded: bool
    selects: bool
    choose: GraphFacts | None = None
    has_residual: bool = False


@dataclass(frozen=True)
class Bindings:
    """Where a graph's inputs come from when its function is called, and what becomes of its results.

    Attributes:
        inputs: for each: ``("argument", i)``, the i-th leaf of the arguments; ``("tensor", i)``, the i-th that the
            function refers to; ``("size", reading)``, what a tensor among the inputs says; ``("value", v)``;
            ``("float", v)``, a number in a tensor.
        outputs: for each leaf of what the function returns: ``("result", i)``, ``("argument", i)``, ``("value", v)``.
        spec: how the leaves are put together, as ``torch.utils._pytree`` writes it.
        conditions: what has to hold of the sizes.
        arguments: how many leaves of the arguments there are.
        unread: (number, sizes, whether it is contiguous) of tensors among them that the graph does not get, but its
            trace may have looked at; a size is a number, a symbol, or ``None``: any from 2 on.
        exact: (number, value) of whole numbers among them of which that is so.
    """

    inputs: tuple[tuple[str, Any], ...]
    outputs: tuple[tuple[str, Any], ...]
    spec: str
    conditions: tuple[Any, ...]
    arguments: int
    unread: tuple[tuple[int, tuple[Any, ...], bool], ...] = ()
    exact: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class StateShown:
    """What ``explain()`` says of state: how many values could be kept, and their bytes, or those of each key that is
    chosen; or why none can.

    Attributes:
        rungs: of the ladder: what is kept, the share of the keys (``None``: all), bytes of them (or of each).
        length: of the sequence.
        evicts: keys that are not chosen are not kept.
    """

    is_heavy: bool
    problem: str
    values: int
    nbytes: sympy.Expr
    reach: Reach | None
    selection: str = ""
    key_nbytes: sympy.Expr = field(default_factory=lambda: sympy.Integer(0))
    rungs: tuple[tuple[str, float | None, sympy.Expr], ...] = ()
    length: sympy.Expr = field(default_factory=lambda: sympy.Integer(0))
    evicts: bool = True


@dataclass(frozen=True)
class Shown:
    """What ``explain()`` says of a graph besides its plan; see ``report.explain.GraphReport``."""

    passes: tuple[Any, ...]
    rows: tuple[Any, ...]
    projections: tuple[Any, ...]
    unruled: tuple[Any, ...]
    orders: tuple[Any, ...]
    state: StateShown
