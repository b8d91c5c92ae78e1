"""``mosaic fit --cache``: steps that keep state, and steps that use it: bytes, longest sequence, predicted times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy

from mosaic_compiler.errors import BudgetError, ConfigError
from mosaic_compiler.planning.buffers import align
from mosaic_compiler.planning.lives import Sizes
from mosaic_compiler.planning.outline import StepOutline
from mosaic_compiler.planning.plan import MemoryPlan
from mosaic_compiler.planning.room import capacity
from mosaic_compiler.planning.selection import kept_keys

if TYPE_CHECKING:
    from torch import fx

    from mosaic_compiler.runtime.step import CompiledStep

MATMULS, ATTENTION, WEIGHTS, STATE, FEW_QUERIES = 0.7, 0.6, 0.7, 0.9, 0.44
"""Shares of a card's published rates that steps reach (measured on an H100, bf16: ``benchmarks/results/reuse.json``):
products and attention of all rows; reading weights, and state; attention of a few rows."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a step's products and of its attention, as expressions in its sizes."""

    products: sympy.Expr
    attention: sympy.Expr


@dataclass(frozen=True)
class Stateful:
    """What is known of the two kinds of steps of a model.

    Attributes:
        full, reuse: as planning sees them.
        work: of both, by kind.
        chosen: where keys are chosen: which symbols of both are the number of rows that they are chosen for, and the
            number of keys.
    """

    full: StepOutline
    reuse: StepOutline
    work: Mapping[str, Work]
    chosen: tuple[tuple[sympy.Symbol, ...], tuple[sympy.Symbol, ...]] = ((), ())

    def sizes(self, tokens: int, rows: int, row_share: float, keep: float | int | None = None) -> dict[str, Sizes]:
        """Sizes of both kinds of steps: ``rows`` of them are computed in a ``reuse`` step, and needed; of other keys a
        share or number is kept, where keys are chosen."""
        full = dict(self.full.sizes_for(tokens, row_share).symbols)
        values = {symbol: full.get(symbol, rows) for symbol in self.reuse.hints}
        values |= {number.symbol: capacity(rows) for number in self.reuse.selected}
        keys = kept_keys(1.0 if keep is None else keep, tokens, rows)
        for number, symbols in zip((rows, keys), self.chosen, strict=True):
            full |= {symbol: number for symbol in symbols if symbol in full}
            values |= {symbol: number for symbol in symbols if symbol in values}
        return {"full": Sizes(full), "reuse": Sizes(values)}


@dataclass(frozen=True)
class CachedAnswer:
    """For one length: plans of both kinds (``None`` if they do not fit), and predicted seconds (``None``: the card is
    not known)."""

    tokens: int
    full: MemoryPlan | None
    reuse: MemoryPlan | None
    problem: str
    state: int
    seconds: Mapping[str, float | None]


def stateful(captured: CompiledStep) -> Stateful:
    """Both kinds of steps of a captured one.

    Raises:
        ConfigError: if nothing can be kept.
    """
    kinds: Any = captured.kinds
    if not kinds.keeps:
        raise ConfigError(f"this model has nothing to keep from step to step: {kinds.why}")
    steps = {"full": kinds.full, "reuse": kinds.reuse}
    outlines = {name: step.outline.data() for name, step in steps.items()}
    work = {name: _work(next(iter(step.graphs.values()))) for name, step in steps.items()}
    return Stateful(outlines["full"], outlines["reuse"], work, _chosen(kinds) if kinds.selects else ((), ()))


def _chosen(kinds: Any) -> tuple[tuple[sympy.Symbol, ...], tuple[sympy.Symbol, ...]]:
    """Symbols of both kinds of steps: how many rows keys are chosen for, and how many keys."""
    rows, keys = [], []
    for step, note in zip((kinds.full, kinds.reuse), kinds.notes, strict=True):
        inputs = step.main_graph.inputs
        rows.append(inputs[note.rows].tensor.shape[1])
        keys.append(inputs[note.places[0].input].tensor.shape[2])
    return tuple(rows), tuple(keys)


def _work(module: fx.GraphModule) -> Work:
    from mosaic_compiler import book, ir

    products = attention = sympy.Integer(0)
    for node in module.graph.nodes:
        if book.is_attention(node):
            query, key = (ir.only_tensor(operand).shape for operand in node.args[:2])
            attention += 4 * sympy.prod([*map(ir.expr_of, query)]) * ir.expr_of(key[2])
        elif book.is_matmul(node):
            inner = ir.only_tensor(node.all_input_nodes[-1]).shape[-2]
            products += 2 * sympy.prod([*map(ir.expr_of, ir.only_tensor(node).shape)]) * ir.expr_of(inner)
    return Work(products, attention)


def answer_cached(
    model: Stateful,
    weights: int,
    tokens: int,
    room: int,
    *,
    rows: int = 32,
    row_share: float = 0.5,
    keep: float | int | None = None,
    speed: tuple[float, float] | None = None,
) -> CachedAnswer:
    """Plans for one length in ``room`` bytes besides weights.

    Args:
        weights: bytes of the model's parameters.
        rows: that a ``reuse`` step computes.
        keep: other keys that are kept, where keys are chosen.
        speed: of the card: bytes and floating-point operations per second.
    """
    sizes = model.sizes(tokens, rows, row_share, keep)
    state = sum(align(sizes["full"](b.nbytes)) for b in model.full.planner.lives.buffers if b.space == "state")
    seconds: dict[str, float | None] = dict.fromkeys(sizes)
    if speed is not None:
        bandwidth, rate = speed
        work, times = model.work["full"], sizes["full"]
        seconds["full"] = times(work.products) / (MATMULS * rate) + times(work.attention) / (ATTENTION * rate)
        few = sizes["reuse"](model.work["reuse"].attention) / (FEW_QUERIES * rate)
        seconds["reuse"] = weights / (WEIGHTS * bandwidth) + max(state / (STATE * bandwidth), few)
    plans: dict[str, MemoryPlan | None] = dict.fromkeys(sizes)
    problem = "" if room > 0 else "no room is left beside the weights"
    if not problem:
        try:
            outlines = {"full": model.full, "reuse": model.reuse}
            plans.update({kind: outline.choose(sizes[kind], room)[1].plan for kind, outline in outlines.items()})
        except BudgetError as error:
            problem = str(error)
    return CachedAnswer(tokens, plans["full"], plans["reuse"], problem, state, seconds)


def longest_cached(
    model: Stateful, room: int, row_share: float = 0.5, rows: int = 32, keep: float | int | None = None
) -> int:
    """The most tokens whose full step fits ``room`` bytes besides weights, with what it keeps (a ``reuse`` step takes
    less)."""
    if room <= 0:
        return 0
    if not any(model.chosen):
        return model.full.longest(room, row_share)

    def fits(tokens: int) -> bool:
        try:
            model.full.planner.plan(model.sizes(tokens, rows, row_share, keep)["full"], room)
        except BudgetError:
            return False
        return True

    return longest_that(fits, 2 * rows)


def longest_that(fits: Callable[[int], bool], first: int = 1) -> int:
    """The most tokens that fit, up to a thousandth; 0 if no length that was tried does.

    Args:
        first: the length that is tried first.
    """
    low, high = 0, first
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(low // 1000, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
