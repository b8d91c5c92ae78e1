"""``MemoryPlan``: a value that says where every byte of a step lives, and for how long.

A plan is frozen, comparable, hashable and round-trips through JSON (schema in ``docs/plan-schema.md``).  It is verified
on construction, always.  A :class:`~mosaic_compiler.planning.planner.Planner` makes one from lives in symbols, sizes
and a budget, :func:`mosaic_compiler.planning.make_plan` one from buffers with known bytes.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mosaic_compiler.errors import PlanError
from mosaic_compiler.planning.buffers import (
    ALIGNMENT,
    ON_DEVICE,
    PLACED,
    SPACES,
    TERMS,
    Buffer,
    check_overlaps,
    live_bytes,
    lower_bound,
)
from mosaic_compiler.planning.words import in_words

SCHEMA = "mosaic.plan"
SCHEMA_VERSION = 4


@dataclass(frozen=True)
class PlannedLoop:
    """One chunk loop of the step.

    Attributes:
        name: the loop's call (its buffers are called ``name.node``).
        start, end: schedule positions of its body, half-open.
        rows: rows it goes over.
        chunk: rows per iteration; ``rows`` if it is not chunked.
        nbytes: most bytes that its body's own buffers hold at once.
        unchunked: the same with all rows in one chunk.
        reason: why this chunk size.
        ops: its matmuls (``mm``, ``gather_logits``) and attentions (``attention``), in order.
        operands: what it is called with, and whether rows of it or all of it are seen by an iteration.
        module, source: where its last result comes from.
    """

    name: str
    start: int
    end: int
    rows: int
    chunk: int
    nbytes: int = 0
    unchunked: int = 0
    reason: str = ""
    ops: tuple[str, ...] = ()
    operands: tuple[str, ...] = ()
    module: str = ""
    source: str = ""

    @property
    def computes(self) -> str:
        """Its ops with how often they occur: ``4 mm, attention``."""
        counts = Counter(self.ops)
        return ", ".join(op if count == 1 else f"{count} {op}" for op, count in counts.items())


@dataclass(frozen=True)
class Fallback:
    """Something that runs in a slower or fatter way than planned memory would allow.

    ``name`` says what; ``docs/environment.md`` lists all of them.
    """

    name: str
    node: str
    op: str
    reason: str
    source: str


@dataclass(frozen=True)
class MemoryPlan:
    """Offsets and lives of one step for one set of sizes.

    Attributes:
        buffers: every buffer, in schedule order of birth, those that the caller gives (inputs, weights) included.
        schedule: node names by position.
        symbols: the sizes this plan was made for, such as ``(("s27", 8192),)``.
        algorithm: the placement that was chosen.
        loops: the chunk loops, in schedule order.
        budget: the bytes that :attr:`workspace` had to fit; ``None`` if there was no limit.
        fallbacks: what the plan does not fully cover.
        title: the model it is for, in words; empty if nobody said.
        device: the device whose kernels it is for, such as ``cuda``; empty if unknown.
        meanings: of the symbols, as said behind their numbers, such as ``(("s27", "tokens"),)``.
    """

    buffers: tuple[Buffer, ...]
    schedule: tuple[str, ...]
    symbols: tuple[tuple[str, int], ...] = ()
    algorithm: str = ""
    loops: tuple[PlannedLoop, ...] = ()
    budget: int | None = None
    fallbacks: tuple[Fallback, ...] = ()
    title: str = ""
    device: str = ""
    meanings: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        self.verify()

    @cached_property
    def sizes(self) -> tuple[str, ...]:
        """The sizes it was made for, in words: ``("4,096 tokens", "2,048 masked rows")``."""
        return tuple(in_words(self.symbols, dict(self.meanings)))

    # ------------------------------------------------------------------------------------ figures
    def of_kind(self, *kinds: str) -> tuple[Buffer, ...]:
        return tuple(buffer for buffer in self.buffers if buffer.kind in kinds)

    @cached_property
    def own(self) -> tuple[Buffer, ...]:
        """What the step takes memory for: all but inputs and weights."""
        return tuple(buffer for buffer in self.buffers if not buffer.is_given)

    def in_space(self, *spaces: str) -> tuple[Buffer, ...]:
        return tuple(buffer for buffer in self.buffers if buffer.space in spaces)

    @cached_property
    def heights(self) -> dict[str, int]:
        """Bytes that this plan uses of each space whose memory is planned, by its name; empty ones are left out."""
        tops: dict[str, int] = {}
        for buffer in self.in_space(*PLACED):
            if buffer.offset is not None:
                tops[buffer.space] = max(tops.get(buffer.space, 0), buffer.offset + buffer.size)
        return tops

    @cached_property
    def height(self) -> int:
        """Arena bytes this plan uses."""
        return self.heights.get("arena", 0)

    @cached_property
    def lower_bound(self) -> int:
        """Most arena bytes live at once; ``height`` can never be lower."""
        return lower_bound(self.in_space("arena"))

    @cached_property
    def naive(self) -> int:
        """Arena bytes without any reuse."""
        return sum(buffer.size for buffer in self.in_space("arena"))

    @cached_property
    def timeline(self) -> tuple[int, ...]:
        """Live bytes by schedule position, of all that the step takes memory for on its device."""
        return tuple(live_bytes(self.in_space(*ON_DEVICE), len(self.schedule)))

    @cached_property
    def outside(self) -> tuple[int, ...]:
        """Live bytes outside of the arena (transients, scratch, outputs, state) by schedule position."""
        return tuple(live_bytes(self.in_space("heap", "state"), len(self.schedule)))

    @cached_property
    def given(self) -> dict[str, int]:
        """Bytes of what the caller gives, by term: ``{"call": inputs, "model": weights}``."""
        found: dict[str, int] = {}
        for buffer in self.in_space("caller"):
            found[buffer.term] = found.get(buffer.term, 0) + buffer.nbytes
        return found

    @property
    def state(self) -> int:
        """Bytes that live from step to step."""
        return self.heights.get("state", 0)

    @cached_property
    def peak(self) -> int:
        """Most bytes the step holds at once besides weights and inputs: arena + what is outside of it."""
        return self.height + max(self.outside, default=0)

    @cached_property
    def workspace(self) -> int:
        """What a memory budget has to cover: arena + what is live outside of it, the returned outputs left out."""
        inside = (buffer for buffer in self.in_space("heap", "state") if buffer.term != "call")
        outside = live_bytes(inside, len(self.schedule))
        return self.height + max(outside, default=0)

    @cached_property
    def par(self) -> float:
        """Peak-to-average ratio of live bytes over the step (1.0 for an empty step)."""
        average = sum(self.timeline) / max(len(self.timeline), 1)
        return max(self.timeline) / average if average else 1.0

    # --------------------------------------------------------------------------------- invariants
    def verify(self) -> None:
        """Raise :class:`PlanError` naming the buffers if two live ones overlap or a field is off."""
        names: set[str] = set()
        for buffer in self.buffers:
            if buffer.space not in SPACES:
                known = ", ".join(SPACES)
                raise PlanError(f"{buffer.describe()}: unknown kind of space, {buffer.space!r} (one of {known})")
            if buffer.term not in TERMS:
                raise PlanError(f"{buffer.describe()}: unknown term {buffer.term!r} (one of {', '.join(TERMS)})")
            if buffer.name in names:
                raise PlanError(f"two buffers are called {buffer.name}")
            names.add(buffer.name)
            if buffer.nbytes < 0 or not 0 <= buffer.start < buffer.end <= len(self.schedule):
                raise PlanError(f"{buffer.describe()}: not a life within [0, {len(self.schedule)})")
            if (buffer.space in PLACED) != (buffer.offset is not None):
                raise PlanError(f"{buffer.describe()}: exactly the buffers in planned memory have an offset")
            if buffer.offset is not None and (buffer.offset < 0 or buffer.offset % ALIGNMENT):
                raise PlanError(f"{buffer.describe()}: offset is not a multiple of {ALIGNMENT}")
        for space in PLACED:
            check_overlaps(self.in_space(space))
        for name, _ in self.meanings:
            if name not in dict(self.symbols):
                raise PlanError(f"{name} has a meaning, but is no symbol of this plan")
        for loop in self.loops:
            if not 0 <= loop.start <= loop.end <= len(self.schedule) or not 0 <= loop.chunk <= loop.rows:
                raise PlanError(f"loop {loop.name}: {loop.chunk} of {loop.rows} rows at [{loop.start}, {loop.end})")

    # --------------------------------------------------------------------------------------- JSON
    def to_json(self, *, indent: int | None = 1) -> str:
        """Serialise; :meth:`from_json` gives back an equal plan."""
        body = {
            "schema": SCHEMA,
            "version": SCHEMA_VERSION,
            "alignment": ALIGNMENT,
            "algorithm": self.algorithm,
            "title": self.title,
            "device": self.device,
            "symbols": dict(self.symbols),
            "meanings": dict(self.meanings),
            "budget": self.budget,
            "summary": {
                "height": self.height,
                "heights": self.heights,
                "given": self.given,
                "lower_bound": self.lower_bound,
                "naive": self.naive,
                "peak": self.peak,
                "workspace": self.workspace,
                "state": self.state,
                "par": round(self.par, 4),
            },
            "schedule": list(self.schedule),
            "loops": [dataclasses.asdict(loop) for loop in self.loops],
            "buffers": [dataclasses.asdict(buffer) for buffer in self.buffers],
            "timeline": list(self.timeline),
            "fallbacks": [dataclasses.asdict(fallback) for fallback in self.fallbacks],
        }
        return json.dumps(body, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> MemoryPlan:
        """Parse and verify.  Raises :class:`PlanError` saying what is wrong with the file."""
        try:
            body = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"not a plan: no valid JSON ({error})") from None
        if not isinstance(body, dict) or body.get("schema") != SCHEMA:
            raise PlanError(f"not a plan: no 'schema': '{SCHEMA}' in it; write one with options={{'dump': DIR}}")
        if body.get("version") != SCHEMA_VERSION:
            raise PlanError(
                f"this plan has schema version {body.get('version')}, and what reads it has {SCHEMA_VERSION}: write it "
                "again, with options={'dump': DIR} or mosaic fit -o"
            )
        try:
            plan = cls(
                buffers=tuple(_buffer_from(entry) for entry in body["buffers"]),
                schedule=tuple(body["schedule"]),
                symbols=tuple((str(k), int(v)) for k, v in body["symbols"].items()),
                algorithm=str(body["algorithm"]),
                loops=tuple(_loop_from(entry) for entry in body["loops"]),
                budget=None if body["budget"] is None else int(body["budget"]),
                fallbacks=tuple(Fallback(**entry) for entry in body["fallbacks"]),
                title=str(body.get("title", "")),  # files from before there were these three load as well
                device=str(body.get("device", "")),
                meanings=tuple((str(k), str(v)) for k, v in body.get("meanings", {}).items()),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"malformed plan: {type(error).__name__}: {error}") from None
        if list(plan.timeline) != body.get("timeline"):
            raise PlanError("malformed plan: the timeline does not follow from the buffers")
        return plan


def _buffer_from(entry: dict[str, Any]) -> Buffer:
    return Buffer(**{**entry, "shape": tuple(entry["shape"])})


def _loop_from(entry: dict[str, Any]) -> PlannedLoop:
    return PlannedLoop(**{**entry, "ops": tuple(entry["ops"]), "operands": tuple(entry["operands"])})
