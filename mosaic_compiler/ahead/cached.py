"""``mosaic fit --cache``: steps that keep state, and steps that use it: bytes, longest sequence, predicted times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy

from mosaic_compiler.ahead.rates import Rates, sorted_bytes
from mosaic_compiler.errors import BudgetError, ConfigError
from mosaic_compiler.planning.buffers import align
from mosaic_compiler.planning.lives import Sizes
from mosaic_compiler.planning.outline import StepOutline
from mosaic_compiler.planning.plan import MemoryPlan
from mosaic_compiler.planning.precisions import PRECISIONS
from mosaic_compiler.planning.room import capacity
from mosaic_compiler.planning.selection import kept_keys

if TYPE_CHECKING:
    from torch import fx

    from mosaic_compiler.runtime.step import CompiledStep


@dataclass(frozen=True)
class Work:
    """What a step has to do, as expressions in its sizes.

    Attributes:
        products, attention: floating-point operations.
        coded: of attention to codes, by their bits.
        choosing: of scoring keys.
        scores: numbers that keys are chosen by.
        special: how many attentions read codes, or chosen keys.
    """

    products: sympy.Expr
    attention: sympy.Expr
    coded: Mapping[int, sympy.Expr]
    choosing: sympy.Expr
    scores: sympy.Expr
    special: int

    def seconds_of_all_rows(self, sizes: Sizes, rates: Rates) -> float:
        """Of a step for all rows."""
        found = sizes(self.products) / rates.products + sizes(self.attention) / rates.attention
        return found + sizes(self.choosing) / rates.choosing + sorted_bytes(sizes(self.scores)) / rates.sorted

    def seconds_of_few_rows(self, sizes: Sizes, rates: Rates, weights: int, state: int) -> float:
        """Of a step for some rows: reading weights and state, or the arithmetic of attention, whichever is slower."""
        arithmetic = sizes(self.attention) / rates.few
        arithmetic += sum(sizes(coded) / rates.coded(bits) for bits, coded in self.coded.items())
        return weights / rates.weights + max(state / rates.state, arithmetic) + self.special * rates.extra


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
    is_chosen = kinds.selects or kinds.choose is not None
    work = {
        name: _work(next(iter(step.graphs.values())), is_chosen and name == "reuse") for name, step in steps.items()
    }
    return Stateful(outlines["full"], outlines["reuse"], work, _chosen(kinds) if is_chosen else ((), ()))


def _chosen(kinds: Any) -> tuple[tuple[sympy.Symbol, ...], tuple[sympy.Symbol, ...]]:
    """Symbols of the steps that read chosen keys, or choose them first: how many rows they are chosen for, and how many
    keys."""
    steps, position = [(kinds.full, kinds.notes[0]), (kinds.reuse, kinds.notes[1])], 0
    if kinds.choose is not None:  # positions lie behind all that is kept
        steps, position = steps[1:], len(kinds.notes[0].places)
    rows, keys = [], []
    for step, note in steps:
        inputs = step.main_graph.inputs
        rows.append(inputs[note.rows].tensor.shape[1])
        keys.append(inputs[note.places[position].input].tensor.shape[2])
    return tuple(rows), tuple(keys)


def _work(module: fx.GraphModule, is_chosen: bool) -> Work:
    from mosaic_compiler import book, ir
    from mosaic_compiler.ir import ops

    products = attention = choosing = scores = sympy.Integer(0)
    coded: dict[int, sympy.Expr] = {}
    special = 0
    for node in module.graph.nodes:
        reads_codes, chooses = node.target is ops.coded_attention, node.target is ops.select_keys
        if book.is_attention(node) or reads_codes or chooses:
            query, key = (ir.only_tensor(operand).shape for operand in node.args[:2])
            found = 4 * sympy.prod([*map(ir.expr_of, query)]) * ir.expr_of(key[2])
            special += not chooses and (is_chosen or reads_codes)
            if chooses:
                choosing += found
                scores += sympy.prod([*map(ir.expr_of, ir.only_tensor(node).shape[:2])]) * ir.expr_of(key[2])
            elif reads_codes:
                bits = PRECISIONS[node.args[12]].bits
                coded[bits] = coded.get(bits, sympy.Integer(0)) + found
            else:
                attention += found
        elif book.is_matmul(node):
            inner = ir.only_tensor(node.all_input_nodes[-1]).shape[-2]
            products += 2 * sympy.prod([*map(ir.expr_of, ir.only_tensor(node).shape)]) * ir.expr_of(inner)
    return Work(products, attention, coded, choosing, scores, special)


def answer_cached(
    model: Stateful,
    weights: int,
    tokens: int,
    room: int,
    *,
    rows: int = 32,
    row_share: float = 0.5,
    keep: float | int | None = None,
    rates: Rates | None = None,
) -> CachedAnswer:
    """Plans for one length in ``room`` bytes besides weights.

    Args:
        weights: bytes of the model's parameters.
        rows: that a ``reuse`` step computes.
        keep: other keys that are kept, where keys are chosen.
        rates: of the card; ``None``: not known.
    """
    sizes = model.sizes(tokens, rows, row_share, keep)
    state = max(
        sum(align(sizes[kind](buffer.nbytes)) for buffer in outline.planner.lives.buffers if buffer.space == "state")
        for kind, outline in (("full", model.full), ("reuse", model.reuse))
    )
    seconds: dict[str, float | None] = dict.fromkeys(sizes)
    if rates is not None:
        seconds["full"] = model.work["full"].seconds_of_all_rows(sizes["full"], rates)
        seconds["reuse"] = model.work["reuse"].seconds_of_few_rows(sizes["reuse"], rates, weights, state)
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
