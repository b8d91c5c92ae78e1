"""The book of ops: one entry per operator, with everything that the compiler knows of it.

Passes, lowering and kernels ask ``book.entry(node)``; nobody else has a table of operators.  To teach the compiler a
new one, add its entry to ``aten.py`` (``kernels/ops.py`` for those of our own).
"""

from mosaic_compiler.book.aten import ENTRIES
from mosaic_compiler.book.entry import (
    FLAT,
    NOTHING,
    Answer,
    Book,
    Call,
    Emit,
    Label,
    Layout,
    Op,
    Operand,
    Space,
    Work,
    entry,
    open_book,
    shelve,
    using,
)
from mosaic_compiler.book.families import POINTWISE
from mosaic_compiler.book.fusing import MOST_ADDED, elements_of, is_small_sum, rows_gathered
from mosaic_compiler.book.kinds import (
    is_attention,
    is_copy,
    is_elementwise,
    is_elementwise_cluster,
    is_matmul,
    is_mixture,
    is_pointwise,
)
from mosaic_compiler.book.overloads import inplace_twin, native_out, trusted_ops, without_out
from mosaic_compiler.book.trusted import TRUSTED

STANDARD = Book({**TRUSTED, **ENTRIES}, POINTWISE)
"""What there is; see :func:`using` for another one."""

_double = sorted(str(op) for op in TRUSTED.keys() & ENTRIES.keys())
assert not _double, f"two entries: {_double}"
shelve(STANDARD)

__all__ = [
    "FLAT",
    "MOST_ADDED",
    "NOTHING",
    "STANDARD",
    "Answer",
    "Book",
    "Call",
    "Emit",
    "Label",
    "Layout",
    "Op",
    "Operand",
    "Space",
    "Work",
    "elements_of",
    "entry",
    "inplace_twin",
    "is_attention",
    "is_copy",
    "is_elementwise",
    "is_elementwise_cluster",
    "is_matmul",
    "is_mixture",
    "is_pointwise",
    "is_small_sum",
    "native_out",
    "open_book",
    "rows_gathered",
    "trusted_ops",
    "using",
    "without_out",
]
