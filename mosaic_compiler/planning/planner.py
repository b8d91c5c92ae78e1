"""From the lives of one graph to a plan for given sizes inside a budget: chunk sizes, then placement."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import sympy

from mosaic_compiler.errors import BudgetError
from mosaic_compiler.planning.budget import format_bytes
from mosaic_compiler.planning.buffers import PLACED, live_bytes, stacked
from mosaic_compiler.planning.chunks import ChunkModel, Evaluation, Shortfall, least, longest
from mosaic_compiler.planning.lives import LoopLives, Sizes, StepLives
from mosaic_compiler.planning.placement import DEADLINE, Interval, height_of, live_totals, place_blocks
from mosaic_compiler.planning.plan import MemoryPlan, PlannedLoop
from mosaic_compiler.planning.stack import Stack
from mosaic_compiler.planning.words import in_words

_TRIES = 8


@dataclass(frozen=True)
class Planned:
    """A plan, and the chunk sizes that it is for."""

    plan: MemoryPlan
    chunks: Mapping[sympy.Symbol, int]

    @cached_property
    def is_chunked(self) -> bool:
        """Some loop takes more than one iteration."""
        return any(loop.chunk < loop.rows for loop in self.plan.loops)


class Planner:
    """Plans one graph's step for any sizes.

    Args:
        lives: of the graph.
        counted: symbols of computed rows; they grow with the number of tokens.
        placement, deadline: see :func:`make_plan`.
        chunk_rows: force this many rows per chunk.
        guard: bytes to leave behind each arena buffer (poison mode keeps canaries there).
        meanings: what symbols mean, by their names, kept for the reader (see :class:`MemoryPlan`).
    """

    def __init__(
        self,
        lives: StepLives,
        *,
        counted: Collection[sympy.Symbol] = (),
        placement: str = "auto",
        deadline: float = DEADLINE,
        chunk_rows: int | None = None,
        guard: int = 0,
        meanings: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.lives, self.placement, self.chunk_rows, self.guard = lives, placement, chunk_rows, guard
        self.deadline = deadline
        self.counted = tuple(counted)
        self._placed: tuple[str, list[Interval], list[int]] | None = None
        self._stack: Stack | None = None
        self.model = ChunkModel(lives)
        self.symbols = lives.symbols
        self.meanings = tuple(pair for pair in meanings if pair[0] in map(str, self.symbols))
        self._blocks = {buffer.name: buffer.loop for buffer in lives.buffers if buffer.loop}
        self._elsewhere = {b.space for b in lives.buffers}.intersection(PLACED) - {"arena", "state"}
        self._state = [b for b in lives.buffers if b.space == "state"]
        self._loops = [(region.chunk, _described(region)) for region in lives.regions]

    @property
    def tokens(self) -> sympy.Symbol | None:
        """The symbol for the length of the sequence: what the loops go over."""
        rows = [rows for rows in self.lives.chunks.values() if isinstance(rows, sympy.Symbol)]
        found = [symbol for symbol in (*rows, *self.symbols) if symbol not in self.counted]
        return found[0] if found else None

    def plan(self, sizes: Sizes, budget: int | None = None) -> Planned:
        """The verified plan with the largest chunks that fit ``budget`` bytes (``None``: no limit).

        Raises:
            BudgetError: if not even the smallest chunks fit.
        """
        evaluation = self.model.at(sizes)
        target = budget
        for _ in range(_TRIES):
            chunks, reasons = self._choose(evaluation, target, budget)
            height, placed = self._place(evaluation, chunks)
            needed = height + evaluation.outside(chunks)
            if budget is None or target is None or needed <= budget or self.guard:
                return Planned(self._plan(evaluation, chunks, reasons, budget, *placed), chunks)
            target -= needed - budget  # placement did not reach the lower bound: leave room for the difference
        assert budget is not None
        raise self._error(evaluation, needed, budget, self._worst(evaluation, chunks))

    def _choose(
        self, evaluation: Evaluation, target: int | None, budget: int | None
    ) -> tuple[dict[sympy.Symbol, int], dict[sympy.Symbol, str]]:
        rows = evaluation.rows
        if self.chunk_rows is not None:
            chunks = {symbol: min(self.chunk_rows, count) for symbol, count in rows.items()}
            if budget is not None and not self.guard and evaluation.peak(chunks) > budget:
                raise self._error(evaluation, evaluation.peak(chunks), budget, self._worst(evaluation, chunks))
            return chunks, dict.fromkeys(rows, "chunk_rows asks for it")
        if target is None:
            return dict(rows), dict.fromkeys(rows, "no limit is known")
        found = evaluation.search(target)
        if isinstance(found, Shortfall) and budget is not None and found.needed <= budget:
            return evaluation.smallest(), dict.fromkeys(rows, "larger chunks do not fit as they are placed")
        if isinstance(found, Shortfall):
            raise self._error(evaluation, found.needed, budget or target, found.position)
        return dict(found.rows), dict(found.reasons)

    def _place(
        self, evaluation: Evaluation, chunks: Mapping[sympy.Symbol, int]
    ) -> tuple[int, tuple[str, Mapping[str, int]]]:
        """Height, algorithm and offsets."""
        nbytes = evaluation.nbytes(chunks).tolist()
        lives = [
            Interval(b.name, b.start, b.end, size + self.guard)
            for b, size in zip(self.model.kept, nbytes, strict=True)
            if b.space == "arena"
        ]
        if self.placement == "auto" and (again := self._stacked_again(lives)) is not None:
            return again
        name, offsets = place_blocks(lives, self._blocks, self.placement, deadline=self.deadline)
        self._placed, self._stack = (name, lives, [offsets[life.name] for life in lives]), None
        return height_of(lives, offsets), (name, offsets)

    def _stacked_again(self, lives: list[Interval]) -> tuple[int, tuple[str, Mapping[str, int]]] | None:
        """The last placement for these sizes, if it still reaches the lower bound."""
        if self._placed is None:
            return None
        name, placed, offsets = self._placed
        if self._stack is None:
            self._stack = Stack(placed, offsets)
        found = {life.name: at for life, at in zip(lives, self._stack.offsets([b.size for b in lives]), strict=True)}
        height = height_of(lives, found)
        return (height, (f"{name}, again", found)) if height == max(live_totals(lives)[1], default=0) else None

    def _plan(
        self,
        evaluation: Evaluation,
        chunks: Mapping[sympy.Symbol, int],
        reasons: Mapping[sympy.Symbol, str],
        budget: int | None,
        algorithm: str,
        offsets: Mapping[str, int],
    ) -> MemoryPlan:
        sizes = evaluation.sizes
        state, _ = stacked(sizes(b.nbytes) for b in self._state)
        offsets = {**offsets, **{b.name: at for b, at in zip(self._state, state, strict=True)}}
        buffers = self.lives.at(Sizes(sizes.symbols | dict(chunks)), offsets)
        for space in self._elsewhere:
            own = [buffer for buffer in buffers if buffer.space == space]
            _, found = place_blocks(own, self._blocks, self.placement, deadline=self.deadline)
            buffers = tuple(replace(b, offset=found.get(b.name, b.offset)) for b in buffers)
        if self.guard:
            buffers = tuple(replace(b, nbytes=b.nbytes + self.guard) if b.space == "arena" else b for b in buffers)
        nbytes, unchunked = evaluation.local_bytes(chunks), evaluation.local_bytes(evaluation.rows)
        return MemoryPlan(
            (*self.lives.given_at(sizes), *buffers),
            self.lives.schedule,
            symbols=self._numbers(sizes),
            algorithm=algorithm,
            budget=budget,
            device=self.lives.device_type,
            meanings=self.meanings,
            loops=tuple(
                replace(
                    loop,
                    rows=evaluation.rows[symbol],
                    chunk=chunks[symbol],
                    nbytes=nbytes[symbol],
                    unchunked=unchunked[symbol],
                    reason=reasons[symbol],
                )
                for symbol, loop in self._loops
            ),
        )

    def _numbers(self, sizes: Sizes) -> tuple[tuple[str, int], ...]:
        return tuple((str(symbol), sizes(symbol)) for symbol in self.symbols)

    # ---------------------------------------------------------------------------------------- errors
    def longest(self, sizes: Sizes, budget: int) -> int | None:
        """The most tokens that would fit, with computed rows in proportion; ``None`` if lengths are fixed."""
        main = self.tokens
        return None if main is None else longest(self.model, sizes, self.counted, main, budget)

    def _worst(self, evaluation: Evaluation, chunks: Mapping[sympy.Symbol, int]) -> int:
        inside, outside = evaluation.live(chunks)
        return int((inside + outside).argmax())

    def _error(self, evaluation: Evaluation, needed: int, budget: int, position: int) -> BudgetError:
        sizes = evaluation.sizes
        chunks = evaluation.smallest()
        buffers = self.lives.at(Sizes(sizes.symbols | chunks))
        live = [b for b in buffers if b.term != "call" and b.start <= position < b.end]
        total = live_bytes(live, len(self.lives.schedule))[position]
        worst = max(live, key=lambda b: b.size)
        main, fits = self.tokens, self.longest(sizes, budget)
        at = ", ".join(in_words(self._numbers(sizes), dict(self.meanings)))
        advice = "raise the budget or shorten the sequence"
        if main is not None and fits:
            advice += f"; about {fits} tokens (instead of {sizes(main)}) would fit"
        elif main is not None:  # shorter sequences do not help
            one = least(self.model, sizes, self.counted, main, 1)
            advice = f"no length fits it, even one token needs {one}: raise the budget to at least {needed} bytes"
        kept = sum(b.size for b in buffers if b.space == "state")
        share = f", {kept} ({format_bytes(kept)}) of them for state, which lives from step to step" if kept else ""
        return BudgetError(
            f"a step with {at or 'these sizes'} needs at least {needed} bytes ({format_bytes(needed)}){share}, its "
            f"memory budget is {budget} ({format_bytes(budget)}): {advice}. The "
            f"bottleneck, {format_bytes(worst.nbytes)} of {format_bytes(total)} live at the worst moment, is "
            f"{worst.describe()}",
            needed,
            budget,
            fits,
        )


def _described(region: LoopLives) -> PlannedLoop:
    """What a plan says about a loop whatever the sizes."""
    return PlannedLoop(
        name=region.name,
        start=region.start,
        end=region.end,
        rows=0,
        chunk=0,
        ops=region.ops,
        operands=region.operands,
        module=region.module,
        source=region.source,
    )
