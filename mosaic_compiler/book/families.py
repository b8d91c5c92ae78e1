"""Entries by family: what operators of one kind have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mosaic_compiler.book import fusing, rows, scratch, whole_operands, writes
from mosaic_compiler.book.entry import Op, RowRule


def pointwise(**more: Any) -> Op:
    """Element i of the result depends on element i of each (broadcast) operand only."""
    return Op("pointwise", rows=rows.pointwise_rows, scratch=scratch.cpu_casts, fused=fusing.pointwise, **more)


def comparison(compares: Callable[[Any, Any], bool]) -> Op:
    """Each element with a number."""
    return pointwise(compares=compares)


def reduction(**more: Any) -> Op:
    """A dim, or some, of the operand become one element."""
    return Op("reduction", **{"rows": rows.reduction_rows, **more})


def fused_reduction(**more: Any) -> Op:
    """A reduction that fused kernels can have inside, in 8 bytes per row."""
    return reduction(**{"trusted": True, "fused": fusing.reduced, "fused_scratch": 8, **more})


def norm() -> Op:
    """As large as the operand, with reductions over a dim inside (softmax)."""
    return Op("norm", rows=rows.along_rows, trusted=True, fused=fusing.normed, fused_scratch=16)


def scan(**more: Any) -> Op:
    """Works along one dim, for each index of the others by itself (sort, cumsum, topk)."""
    return Op("scan", rows=rows.along_rows, **more)


def view(rule: RowRule | None = None, *, is_looked_through: bool = True, **more: Any) -> Op:
    """Shares its operand's memory; each element is one of the operand's."""
    return Op("view", rows=rule, is_looked_through=is_looked_through, takes_elements=True, **more)


def copy(**more: Any) -> Op:
    """The operand's elements in memory of their own, perhaps in another dtype."""
    return Op("copy", rows=rows.same_rows, write=writes.copied, fused=fusing.copied, **more)


def fill(number: float | str, rule: RowRule | None = None, **more: Any) -> Op:
    """One number everywhere; ``"arg1"``: the one in that argument."""
    return Op("fill", rows=rule, write=writes.filled(number), fill=number, **more)


def empty() -> Op:
    """Memory as it is."""
    return Op("empty", write=writes.nothing, can_write=writes.shares_no_place)


def lookup(rule: RowRule | None, **more: Any) -> Op:
    """Elements, or rows, that indices say; whole rows of one operand can be told by their numbers."""
    return Op("lookup", rows=rule, trusted=True, takes_elements=True, moves_rows=True, **more)


def matmul(rule: RowRule | None) -> Op:
    """A product with a matrix."""
    return Op("matmul", rows=rule, trusted=True, is_heavy=True, is_dear=True)


def attention(**more: Any) -> Op:
    """Scaled dot-product attention of [B, heads, rows, depth]; allocates its results."""
    given = {"rows": whole_operands.attention_rows, "is_accounted": True, "is_heavy": True, "is_dear": True, **more}
    return Op("attention", **given)


POINTWISE = pointwise()
"""Of operators that have the tag, and no entry of their own."""
