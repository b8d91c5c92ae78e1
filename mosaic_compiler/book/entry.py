"""What the compiler knows of an operator: one :class:`Op` each, and the :class:`Book` that holds them.

Whatever an entry leaves out is "nothing is known", which is always safe: all rows of its operands, results that it
allocates itself, a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from mosaic_compiler import ir

FLAT = -1
Label: TypeAlias = "int | None"
Layout: TypeAlias = "tuple[Label, ...]"
Space: TypeAlias = "tuple[sympy.Expr, ...]"


@dataclass(frozen=True)
class Operand:
    """A tensor operand: where it stands in the node's arguments, and the layout it needs (None: FULL)."""

    node: fx.Node
    layout: Layout | None


Answer: TypeAlias = "list[Operand] | None"
RowRule: TypeAlias = "Callable[[fx.Node, int, Layout, Space], Answer]"
"""See ``book/rows.py``."""


@dataclass(frozen=True)
class Call:
    """One call to make: ``function(*args, **kwargs)``; arguments may be late-bound placeholders."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()


Emit: TypeAlias = "Callable[[Sequence[Any], Sequence[Any], dict[str, Any]], list[Call]]"
"""``emit(outputs, args, kwargs)`` -> the calls that write an op's results into ``outputs``."""


@dataclass(frozen=True)
class Work:
    """What one op of a fused kernel goes over.

    Attributes:
        elements: of its result; of its operand if it reduces.
        width: of the dim it reduces, else ``None``.
    """

    elements: sympy.Expr
    width: sympy.Expr | None


@dataclass(frozen=True)
class Op:
    """What is known of one operator.

    Attributes:
        family: ``pointwise``, ``reduction``, ``norm``, ``view``, ``copy``, ``fill``, ``empty``, ``lookup``, ``matmul``,
            ``attention``, ...; empty if nothing is known.
        rows: which rows of its operands it needs for some rows of its result.
        write: how its results get into given buffers; ``None``: by its own ``out=``, if that is trusted.
        can_write: whether ``write`` does for a node.
        trusted: its hand-written ``out=`` overload is the functional op, written somewhere else (``None``: if it is
            one of PyTorch's that are tagged as pointwise).
        trusted_twin: so is its in-place twin, called on a copy of the first operand.
        is_accounted: where it allocates its results, it allocates nothing but them and its scratch.
        scratch: bytes that it uses inside and frees before it returns.
        fused: what it goes over as a part of a fused kernel; ``None`` if it cannot be one.
        fused_scratch: bytes per row that a fused kernel keeps of its result (of a norm, whose result has the operand's
            size: per row of that).
        is_kept_on_cpu: a fused kernel for the CPU keeps its result in memory, rather than to compute it twice.
        is_looked_through: a view that a fused kernel can look through.
        takes_elements: each element of its (first) result is an element of its first operand.
        fill: the number that its result is filled with, or (``"arg1"``) the argument that says which.
        positions: which of its results has positions along the dim that it searches.
        compares: what it asks of each element and a number.
        logic: ``and``, ``or``, ``not`` of booleans.
        choice: it takes each element from one operand or another: the position of the mask, and those of the operands
            with what the mask is where theirs are taken.
        moves_rows: its result consists of whole rows of its first operand.
        shape_at: the position of an argument that says the result's sizes.
        is_heavy: worth a loop over chunks of rows.
        is_dear: never computed twice.
        mask: of an attention, the name of the argument that hides keys.
        groups_heads: an attention that takes fewer key and value heads than query heads.
    """

    family: str = ""
    rows: RowRule | None = None
    write: Emit | None = None
    can_write: Callable[[fx.Node], bool] = lambda node: True
    trusted: bool | None = None
    trusted_twin: bool = False
    is_accounted: bool = False
    scratch: Callable[[fx.Node], sympy.Expr] | None = None
    fused: Callable[[fx.Node, torch.device], Work | None] | None = None
    fused_scratch: int = 0
    is_kept_on_cpu: bool = False
    is_looked_through: bool = False
    takes_elements: bool = False
    fill: float | str | None = None
    positions: int | None = None
    compares: Callable[[Any, Any], bool] | None = None
    logic: str = ""
    choice: tuple[int, tuple[tuple[int, bool], ...]] | None = None
    moves_rows: bool = False
    shape_at: int | None = None
    is_heavy: bool = False
    is_dear: bool = False
    mask: str | None = None
    groups_heads: bool = False


NOTHING = Op()


class Book:
    """Entries by operator overload.

    Args:
        entries: the operators that something is known of.
        pointwise: the entry of an operator that only its tag says to be pointwise.
    """

    def __init__(self, entries: Mapping[OpOverload, Op], pointwise: Op) -> None:
        self._entries = dict(entries)
        self._pointwise = pointwise

    def __iter__(self) -> Iterator[tuple[OpOverload, Op]]:
        return iter(self._entries.items())

    def of(self, target: Any) -> Op:
        """The entry of what a node calls; an empty one for what is no operator, or not in the book."""
        found = self._entries.get(target)
        if found is None:
            is_pointwise = isinstance(target, OpOverload) and ir.is_pointwise(target)
            return self._pointwise if is_pointwise else NOTHING
        return found

    def teach(self, entries: Mapping[OpOverload, Op]) -> None:
        """Add operators, or replace their entries."""
        self._entries.update(entries)

    def copy(self) -> Book:
        """A book of its own with the same entries."""
        return Book(self._entries, self._pointwise)


_open = [Book({}, NOTHING)]


def shelve(book: Book) -> None:
    """Make a book the one that is read where nobody asks for another one."""
    _open[0] = book


def open_book() -> Book:
    """The book that passes, lowering and kernels read."""
    return _open[-1]


@contextmanager
def using(book: Book) -> Iterator[Book]:
    """Read another book inside of the ``with`` block, in all threads (workers bind steps, too)."""
    _open.append(book)
    try:
        yield book
    finally:
        _open.remove(book)


def entry(node: fx.Node) -> Op:
    """What is known of the operator that a node calls."""
    return open_book().of(node.target)
