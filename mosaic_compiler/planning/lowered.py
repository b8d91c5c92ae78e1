"""A lowered step: what a graph does, as data.  No graph and no tensors; it can be pickled, printed, and needs no torch.

``lowering/lower.py`` makes it of a graph.  Values have names (those of the graph's nodes); PyTorch's own objects,
such as operators, dtypes and devices, are said by name.  ``runtime/link.py`` finds them again where the step is to run.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import sympy

_ZERO = sympy.Integer(0)

GETITEM = "python:_operator.getitem"
"""The target of an op that is one result of an op with several."""

Root: TypeAlias = "tuple[str, int]"
"""A storage: the value that creates it, and which of its results it is."""


class Kind(enum.Enum):
    """How an op gets its result."""

    NUMBER = "number"  # a size computed from symbols, or a result out of several: nothing to run
    CONSTANT = "constant"  # an attribute of the graph
    VIEW = "view"  # shares an operand's storage
    MUTATION = "mutation"  # writes an operand
    DESTINATION = "destination"  # writes into a planned buffer
    OPAQUE = "opaque"  # allocates its own outputs
    LOOP = "loop"  # runs a body for chunks of rows; its results are planned buffers


@dataclass(frozen=True)
class Ref:
    """The value of that name, as an argument."""

    name: str


@dataclass(frozen=True)
class Named:
    """An object of PyTorch's, as an argument: ``torch.float32``, ``device:cuda:0``, ``op:aten.mm.default``."""

    text: str


@dataclass(frozen=True)
class TensorFacts:
    """One tensor: dtype and device by name, sizes, strides and offset in its storage, lazy bits (``ir.lazy_bits``)."""

    dtype: str
    device: str
    shape: tuple[sympy.Expr, ...]
    strides: tuple[sympy.Expr, ...]
    bits: str = ""
    offset: sympy.Expr = _ZERO


@dataclass(frozen=True)
class Scatter:
    """Rows go where an index says, into zeros with ``total`` rows; pages of memory without such rows are not resident.

    Attributes:
        index: position of the operand (int64 [rows], sliced) with the number of each row in the result.
        total, pages: positions of the operands that say how many rows the result has, and pages of ``page`` bytes the
            rows lie in.
    """

    index: int
    total: int
    pages: int
    page: int


@dataclass(frozen=True)
class LoopOutput:
    """One full-length result of a loop.

    Attributes:
        dim: the dim that holds the rows.
        order: its dims from the largest stride to the smallest.
        into: position of the operand whose memory it takes over (rows are overwritten as they are done with).
        scatter: its rows do not stand side by side.
    """

    dim: int
    order: tuple[int, ...]
    into: int | None = None
    scatter: Scatter | None = None


@dataclass(frozen=True)
class Attention:
    """An attention of cuDNN's, or FlashAttention.

    Attributes:
        shapes: of queries, keys and values, each [B, heads, rows, depth].
        strides: likewise.
        dtype: of all three.
        varies: other kernels can compute it as well, and how many queries there are only the data (or an input) says.
        is_cudnn: cuDNN computes it, unless another kernel is chosen.
        scale: of the scores; ``None``: the usual one.
    """

    shapes: tuple[tuple[sympy.Expr, ...], ...]
    strides: tuple[tuple[sympy.Expr, ...], ...]
    dtype: str
    varies: bool
    is_cudnn: bool = True
    scale: float | None = None


@dataclass(frozen=True, eq=False)
class LoweredOp:
    """One op.

    Attributes:
        name: of its value.
        kind: how it gets its result.
        target: the operator (``aten.mm.default``), function (``python:_operator.mul``), attribute, loop or cluster.
        args, kwargs: nested; values are :class:`Ref`, objects of PyTorch's :class:`Named`.
        way: who writes into its destination: ``entry`` (the book's), ``out``, ``twin`` or ``kernel``.
        outputs: its tensors; ``None`` for what is none.
        is_list: it has several results (or a tuple of one).
        has_lists: some of them are lists themselves.
        number: what a number is, as an expression or itself; ``None``: it is computed, as Python does.
        roots: the storage of each result.
        buffers: the buffer of each result that it creates.
        dies: storages that nobody uses behind it.
        base: the value whose memory it shares.
        into: of a loop or cluster, for each result the operand whose memory it takes over.
        scatters: for each result whose rows are scattered into zeros: the row numbers, pages, and bytes of a page.
        read: which of several results somebody reads.
        symbols: in its results' sizes and strides.
        depends: in those, and in its operands'.
        operands: values that it reads.
        can_be_empty: for some sizes it has nothing to do.
        binds: the symbol for the number that it gives (or for its result's first size), if it is of the prologue.
        may_repeat: the rows that it numbers may be numbered more than once.
        attention: facts of an attention that cuDNN makes plans for.
        source: file and line.
    """

    name: str
    kind: Kind
    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    way: str = ""
    outputs: tuple[TensorFacts | None, ...] = ()
    is_list: bool = False
    has_lists: bool = False
    number: Any = None
    roots: tuple[Root | None, ...] = ()
    buffers: tuple[str | None, ...] = ()
    dies: tuple[Root, ...] = ()
    base: str | None = None
    into: tuple[int | None, ...] | None = None
    scatters: tuple[tuple[Ref, Any, int] | None, ...] = ()
    read: frozenset[int] = frozenset()
    symbols: frozenset[sympy.Symbol] = frozenset()
    depends: frozenset[sympy.Symbol] = frozenset()
    operands: tuple[str, ...] = ()
    can_be_empty: bool = False
    binds: sympy.Symbol | None = None
    may_repeat: bool = False
    attention: Attention | None = None
    source: str = ""

    def __str__(self) -> str:
        given = [_text(argument) for argument in self.args]
        given += [f"{name}={_text(argument)}" for name, argument in self.kwargs.items()]
        places = [f"-> {buffer}" for buffer in self.buffers if buffer]
        return " ".join((f"{self.name} = {self.target}({', '.join(given)})", f"[{self.kind.value}]", *places))


def _text(argument: Any) -> str:
    if isinstance(argument, Ref):
        return f"%{argument.name}"
    if isinstance(argument, Named):
        return argument.text
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(map(_text, argument))}]"
    return repr(argument)


@dataclass(frozen=True)
class Input:
    """A placeholder: a strided tensor, a number (an expression), or neither (a sparse tensor, say)."""

    name: str
    tensor: TensorFacts | None
    number: sympy.Expr | None = None


@dataclass(frozen=True, eq=False)
class LoweredGraph:
    """One graph that runs: the step's, or the body of a loop.

    Attributes:
        inputs: its placeholders.
        ops: what runs, in order (of a step: behind the prologue).
        results: what it returns, flat: :class:`Ref`, numbers, ``None``.
        clusters: fused regions, by the names under which its ops call them.
        places: the buffer of each storage that it creates.
        direct: of a body: storages that are a slice of the loop's result, by the position of that result.
    """

    inputs: tuple[Input, ...]
    ops: tuple[LoweredOp, ...]
    results: tuple[Any, ...]
    clusters: Mapping[str, LoweredCluster]
    places: Mapping[Root, str]
    direct: Mapping[Root, int] = field(default_factory=dict)

    def depending_on(self, symbols: frozenset[sympy.Symbol]) -> tuple[str, ...]:
        """Ops whose results, or something they read, have sizes with these symbols."""
        found: dict[str, None] = {}
        for op in self.ops:
            if op.depends & symbols or any(name in found for name in op.operands):
                found[op.name] = None
        return tuple(found)

    @cached_property
    def result_of(self) -> dict[int, Root]:
        """For each result of a loop that is written in place, the storage in the body."""
        return {index: root for root, index in self.direct.items()}


@dataclass(frozen=True, eq=False)
class LoweredLoop:
    """One call of a loop: its body, and how operands are cut and results put together (see ``ir.loops.ChunkLoop``)."""

    body: LoweredGraph
    operands: tuple[int | None, ...]
    outputs: tuple[LoopOutput, ...]
    chunk: sympy.Symbol
    rows: sympy.Expr


@dataclass(frozen=True, eq=False)
class LoweredCluster:
    """A fused region: ops over operands, what it returns, and which results go into an operand."""

    inputs: tuple[Input, ...]
    ops: tuple[LoweredOp, ...]
    results: tuple[str, ...]
    into: tuple[int | None, ...]


@dataclass(frozen=True)
class Reading:
    """Where the value of a symbol stands: the ``what`` (``value``, ``size``, ``stride``, ``offset``) of an input."""

    symbol: sympy.Symbol
    what: str
    index: int
    dim: int = 0


@dataclass(frozen=True, eq=False)
class LoweredStep:
    """One graph of a step, ready to be bound and run.

    Attributes:
        graph: what runs.
        early: the prologue: what runs before sizes are known.
        early_results: those of its values that the rest reads.
        loops: by the name of the op that calls them.
        constants: names of the attributes that it reads.
        device: where it runs.
    """

    graph: LoweredGraph
    early: tuple[LoweredOp, ...]
    early_results: tuple[str, ...]
    loops: Mapping[str, LoweredLoop]
    constants: tuple[str, ...]
    device: str

    @property
    def graphs(self) -> tuple[LoweredGraph, ...]:
        """Its own graph, and the bodies of its loops (those that several calls share, once)."""
        return tuple(dict.fromkeys((self.graph, *(loop.body for loop in self.loops.values()))))

    @property
    def symbols(self) -> tuple[sympy.Symbol, ...]:
        """The numbers that the prologue gives, in order."""
        return tuple(op.binds for op in self.early if op.binds is not None)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        """The step as text, bodies of loops indented below their calls."""
        for op in self.early:
            yield f"early: {op}"
        for op in self.graph.ops:
            yield str(op)
            if op.name in self.loops:
                yield from (f"    {inner}" for inner in self.loops[op.name].body.ops)
        yield f"return {', '.join(map(_text, self.graph.results))}"
