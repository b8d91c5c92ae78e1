"""``Buffer``: bytes with a space, a term, a life and perhaps a place; who is live when, and who overlaps whom.

A buffer lies in a *space* and lives for a *term*:

    space     arena: planned, on the step's device     host: planned, in the machine's memory
              heap: allocated while the step runs      caller: given by whoever calls
              state: a session's, on the step's device
    term      op: while one op runs                    step: within the step
              call: in the caller's hands behind it    state: from step to step      model: as long as the model

Spaces with planned memory have offsets and a height of their own each.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mosaic_compiler.errors import PlanError

ALIGNMENT = 512  # bytes: what CUDA's caching allocator and vectorised kernels expect
SPACES = ("arena", "host", "state", "heap", "caller")
PLACED = ("arena", "host", "state")
"""Spaces whose memory is planned: their buffers have offsets."""
ON_DEVICE = ("arena", "heap", "state")
"""Spaces of which a step takes memory on its device: what a budget and a peak count."""
TERMS = ("op", "step", "call", "state", "model")

_KINDS = {
    ("arena", "step"): "arena",
    ("heap", "step"): "transient",
    ("heap", "op"): "scratch",
    ("heap", "call"): "output",
    ("state", "state"): "state",
    ("caller", "call"): "input",
    ("caller", "model"): "weight",
}
"""What people call the usual ones."""


def align(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """``nbytes`` rounded up to the alignment: align(1) == 512, align(512) == 512, align(0) == 0."""
    return -(-nbytes // alignment) * alignment


def stacked(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Offsets of buffers that all live at once, one behind the other in this order, and the end of the last one.

    stacked([100, 600, 1]) == ([0, 512, 1536], 2048)
    """
    offsets, end = [], 0
    for nbytes in sizes:
        offsets.append(end)
        end += align(nbytes)
    return offsets, end


@dataclass(frozen=True)
class Buffer:
    """One storage of the step.

    Attributes:
        name: the node that creates it (``mm_3``; ``sort.1`` for the second output).
        space, term: which memory it is in, and how long; see :data:`SPACES` and :data:`TERMS`.
        nbytes: exact bytes.  Planning rounds them up to 512.
        start, end: half-open life in schedule positions.
        offset: byte offset in its space, ``None`` where memory is not planned, and before placement.
        op, dtype, shape, module, source: what it is and where it comes from.
    """

    name: str
    space: str
    nbytes: int
    start: int
    end: int
    dtype: str = "uint8"
    shape: tuple[int, ...] = ()
    op: str = ""
    module: str = ""
    source: str = ""
    offset: int | None = None
    term: str = "step"

    @property
    def kind(self) -> str:
        """Space and term in a word: ``arena``, ``transient`` (allocated by an op), ``scratch`` (inside of one op),
        ``output``, ``state`` (lives from step to step), ``input``, ``weight``."""
        return _KINDS.get((self.space, self.term), f"{self.term} in {self.space}")

    @property
    def is_given(self) -> bool:
        """It is the caller's, and takes no memory of the step's."""
        return self.space == "caller"

    @property
    def size(self) -> int:
        """Bytes it takes up in a plan: ``nbytes`` rounded up to 512."""
        return align(self.nbytes)

    def describe(self) -> str:
        where = f" at {self.offset}" if self.offset is not None else ""
        origin = ", ".join(part for part in (self.module, self.source) if part)
        return f"{self.name} [{self.start}, {self.end}) {self.nbytes} bytes{where}" + (f" ({origin})" if origin else "")


def live_bytes(buffers: Iterable[Buffer], positions: int) -> list[int]:
    """Bytes live at each of ``positions`` schedule positions (sizes rounded up to 512)."""
    delta = [0] * (positions + 1)
    for buffer in buffers:
        delta[buffer.start] += buffer.size
        delta[min(buffer.end, positions)] -= buffer.size
    total, timeline = 0, []
    for change in delta[:positions]:
        total += change
        timeline.append(total)
    return timeline


def lower_bound(buffers: Iterable[Buffer]) -> int:
    """No placement can be lower than the most bytes that are live at once."""
    buffers = list(buffers)
    return max(live_bytes(buffers, max((b.end for b in buffers), default=0)), default=0)


def check_overlaps(buffers: Sequence[Buffer]) -> None:
    """Raise :class:`PlanError` with both buffers if two share a byte at a time.

    A sweep over time that keeps the live buffers sorted by offset; each newcomer is compared with its
    two neighbours only, which suffices because the live ones are disjoint.
    """
    placed = [b for b in buffers if b.size > 0]
    events = sorted([(b.end, 0, i) for i, b in enumerate(placed)] + [(b.start, 1, i) for i, b in enumerate(placed)])
    live: list[tuple[int, int]] = []
    for _, is_start, index in events:
        buffer = placed[index]
        assert buffer.offset is not None
        entry = (buffer.offset, index)
        if not is_start:
            del live[bisect_left(live, entry)]
            continue
        at = bisect_left(live, entry)
        for neighbour in live[max(at - 1, 0) : at + 1]:
            other = placed[neighbour[1]]
            assert other.offset is not None
            if other.offset < buffer.offset + buffer.size and buffer.offset < other.offset + other.size:
                raise PlanError(f"buffers overlap: {other.describe()} and {buffer.describe()}")
        insort(live, entry)
