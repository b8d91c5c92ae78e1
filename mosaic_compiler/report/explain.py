"""``explain()``: compile and run a function once, and say what was done and why."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

import sympy
import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from mosaic_compiler.ahead.forecast import capture_step, fresh_caller, unwrap
from mosaic_compiler.backend import kept_of, mosaic, observing
from mosaic_compiler.ir import Provenance
from mosaic_compiler.ir.notes import UNRULED
from mosaic_compiler.kept_graphs import not_kept
from mosaic_compiler.kernels.gather_logits import Choice
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.owned.function import Owned
from mosaic_compiler.passes.gather_logits import GATHER_CHOICES
from mosaic_compiler.passes.pipeline import PassRecord
from mosaic_compiler.passes.reorder import NOMINAL, ORDERS, OrderDecision
from mosaic_compiler.passes.row_demand import ROW_DECISIONS, RowDecision
from mosaic_compiler.planning.budget import format_bytes
from mosaic_compiler.planning.facts import Shown, StateShown
from mosaic_compiler.planning.plan import Fallback, MemoryPlan
from mosaic_compiler.planning.selection import kept_keys
from mosaic_compiler.report import tables
from mosaic_compiler.runtime.engine import Step, running
from mosaic_compiler.runtime.step import CompiledStep


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph: its plan (``None`` if it never ran), passes with times, fallbacks by name."""

    plan: MemoryPlan | None
    passes: tuple[PassRecord, ...]
    fallbacks: tuple[Fallback, ...]
    rows: tuple[RowDecision, ...] = ()
    """For each matmul and attention that ``row-demand`` shrank: rows computed, and who forced them.  If it
    shrank none: the largest matmul, and the consumer that demanded all of its rows."""
    projections: tuple[tuple[str, Choice], ...] = ()
    """For each product of gathered rows: which implementation runs, and why."""
    unruled: tuple[tuple[str, str, Provenance], ...] = ()
    """Ops without a row rule that read matrices of rows (name, op, origin): they need all rows at once."""
    orders: tuple[OrderDecision, ...] = ()
    """Orders of the ops that ``reorder`` compared, for the step and for loop bodies."""
    state: str = ""
    """What could be kept from step to step (``Session``, ``cache``), or why nothing can; empty without products."""


@dataclass(frozen=True)
class Report:
    """What :func:`explain` returns; ``print`` it.

    Attributes:
        graphs: one entry per captured graph (more than one after a graph break).
        result: what the function returned.
    """

    graphs: tuple[GraphReport, ...]
    result: Any

    @property
    def plan(self) -> MemoryPlan:
        """The plan with the highest peak.  Raises :class:`ValueError` if nothing was compiled."""
        plans = [graph.plan for graph in self.graphs if graph.plan is not None]
        if not plans:
            raise ValueError("nothing was compiled: the function ran no tensor operation")
        return max(plans, key=lambda plan: plan.peak)

    @property
    def peak(self) -> int:
        """Bytes that all graphs need together, at the most: they run one after another, in one arena, and what a graph
        returns may live as long as any behind it."""
        most = kept = 0
        for graph in self.graphs:
            if graph.plan is not None:
                most = max(most, kept + graph.plan.peak)
                kept += sum(buffer.nbytes for buffer in graph.plan.of_kind("output"))
        return most

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        return tuple(fallback for graph in self.graphs for fallback in graph.fallbacks)

    @property
    def rows(self) -> tuple[RowDecision, ...]:
        return tuple(decision for graph in self.graphs for decision in graph.rows)

    @property
    def passes(self) -> tuple[PassRecord, ...]:
        return tuple(record for graph in self.graphs for record in graph.passes)

    def __str__(self) -> str:
        console = Console(width=118, no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if len(self.graphs) > 1:
            yield Text(
                f"{len(self.graphs)} graphs; peak of all together: at most {format_bytes(self.peak)}", style="bold"
            )
        for number, graph in enumerate(self.graphs):
            yield Text(f"graph {number + 1} of {len(self.graphs)}", style="bold underline")
            if graph.plan is not None:
                yield from tables.plan_lines(graph.plan)
            if graph.rows:
                yield _row_table(graph.rows, dict(graph.plan.meanings) if graph.plan is not None else {})
                yield Text()
            for name, choice in graph.projections:
                yield Text(f"{name}: {choice.kernel} ({choice.reason})")
            for name, op, origin in graph.unruled:
                yield Text(f"{name} ({op}) needs all rows at once: it has no row rule  {origin.source}")
            yield from map(_order_line, graph.orders)
            if graph.state:
                yield Text(graph.state)
            yield _pass_table(graph.passes)
            yield Text()
            yield tables.fallbacks(graph.fallbacks)


def _row_table(decisions: tuple[RowDecision, ...], meanings: Mapping[str, str]) -> Table:
    def said(expression: str) -> str:
        return re.sub(r"\b[a-zA-Z]\w*", lambda match: meanings.get(match[0], match[0]), expression)

    table = Table(
        title="rows computed (M is known when the step starts)", title_justify="left", box=None, padding=(0, 1)
    )
    for column in ("operation", "rows", "of", "because of", "in"):
        table.add_column(column, overflow="fold")
    for decision in decisions:
        where = decision.module or decision.source
        table.add_row(decision.node, said(decision.rows), said(decision.total), decision.consumer, where)
    return table


def _order_line(decision: OrderDecision) -> Text:
    estimates = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in decision.estimates.items())
    return Text(f"order of {decision.graph}: {decision.chosen} (live at once, at {NOMINAL} per size: {estimates})")


def _pass_table(passes: tuple[PassRecord, ...]) -> Table:
    table = Table(title="passes", title_justify="left", box=None, padding=(0, 1))
    for column in ("pass", "nodes", "ms", "verified in ms"):
        table.add_column(column)
    for record in passes:
        nodes = f"{record.nodes_before} -> {record.nodes_after}"
        table.add_row(record.name, nodes, f"{record.seconds * 1e3:.1f}", f"{record.verify_seconds * 1e3:.1f}")
    return table


def explain(
    fn: Callable[..., Any],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    tokens: int | None = None,
    row_share: float = 1.0,
    device: str = "cpu",
    **options: Any,
) -> Report:
    """Compile ``fn`` with the ``mosaic`` backend, run it once on ``args``, and report.

    Args:
        fn: a function or module (already compiled ones are unwrapped).
        args: its arguments; tensor sizes become symbols.
        kwargs: its keyword arguments.  Those that are called like none of these and like no option may as well be
            given as they are: ``explain(model, ids, attention_mask=mask)``.
        tokens: plan for a sequence of this length instead, and run nothing.  Weights and arguments may then be on the
            meta device.
        row_share: with ``tokens``: the share of rows that masks select (1.0: every row's logits are computed).
        device: with ``tokens``: what meta tensors are planned for.
        options: as in ``torch.compile(..., options={...})``; see :class:`MosaicOptions`.

    Returns:
        A :class:`Report`: ``.plan``, ``.fallbacks``, ``.passes``, ``.graphs``, ``.result``.

    Raises:
        OptionsError: for an unknown or malformed option.
        BudgetError: if the step does not fit ``memory_budget``.
        CaptureError: with ``tokens``, if the function cannot be captured as one graph.
    """
    own, options = _divided(fn, options)
    own.update(kwargs or {})
    parsed = MosaicOptions.parse(options)  # a clear error before anything is traced
    if tokens is not None:
        step = capture_step(fn, args, options, kwargs=own, device=device)
        return Report((_graph_report(step, step.outline.plan_for(tokens, row_share, parsed.budget).plan),), None)

    def compiler() -> Callable[..., Any]:
        def backend(module: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            return mosaic(module, example_inputs, options=options)

        return functools.partial(torch.compile(fresh_caller(), backend=backend, dynamic=True), unwrap(fn))

    owned = Owned(unwrap(fn), options, compiler=compiler, is_direct=False)  # it says what Dynamo makes of it
    steps: list[CompiledStep] = []
    ran: list[Step] = []
    with observing(steps.append), running(ran.append), torch.no_grad():
        result = owned(*args, **own)
    if not steps and len(ran) == 1:  # compiled by another process
        known = owned.noted("shown")
        if isinstance(known, Shown):
            return Report((_report_of(known, ran[0].plan, ran[0].fallbacks),), result)
        with observing(steps.append), not_kept(), torch.no_grad():  # kept by something else than this
            result = compiler()(*args, **own)
    if len(steps) == 1:
        owned.note("shown", _shown(steps[0]))
    return Report(tuple(_graph_report(step, step.plan) for step in steps), result)


def _divided(fn: Callable[..., Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments that are the function's own, and the backend's options."""
    names = {field.name for field in fields(MosaicOptions)}
    unwrapped = unwrap(fn)
    called = unwrapped.forward if isinstance(unwrapped, torch.nn.Module) else unwrapped
    formal: Mapping[str, Any] = {}
    with suppress(TypeError, ValueError):  # written in C
        formal = inspect.signature(called).parameters
    own = {name: value for name, value in given.items() if name in formal and name not in names}
    return own, {name: value for name, value in given.items() if name not in own}


def _graph_report(step: CompiledStep, plan: MemoryPlan | None) -> GraphReport:
    return _report_of(_shown(step), plan, step.fallbacks)


def _report_of(shown: Shown, plan: MemoryPlan | None, fallbacks: Sequence[Fallback]) -> GraphReport:
    return GraphReport(
        plan, shown.passes, tuple(fallbacks), shown.rows, shown.projections, shown.unruled, shown.orders,
        _state_line(shown.state, plan),
    )  # fmt: skip


def _shown(step: CompiledStep) -> Shown:
    """What is said of a graph whatever it is planned for."""
    module, kept = step.module, kept_of(step.captured, step.options)
    selection = "" if kept.selection is None else str(kept.selection)
    is_asked = step.options.cache_dtype is not None or kept.selection is not None
    rungs = () if is_asked or kept.cut.problem else kept.rungs()
    state = StateShown(
        kept.is_heavy, kept.cut.problem, len(kept.cut.values), kept.nbytes, kept.reach, selection, kept.key_nbytes,
        tuple((rung.short, rung.keep, nbytes) for rung, nbytes in rungs),
        kept.cut.space[-1] if kept.cut.space else sympy.Integer(0),
        kept.selection is None or kept.selection.evicts,
    )  # fmt: skip
    projections = tuple(GATHER_CHOICES.of(module).items())
    return Shown(step.passes, ROW_DECISIONS.of(module), projections, UNRULED.of(module), ORDERS.of(module), state)


_BLOCK = 32
"""Rows of a block, for what is said of chosen keys."""


def _state_line(state: StateShown, plan: MemoryPlan | None) -> str:
    """What this graph would keep from step to step, with the bytes at a plan's sizes."""
    if not state.is_heavy:
        return ""
    if state.problem or not state.values:
        return f"state: nothing can be kept from step to step: {state.problem or 'each row depends on itself only'}"
    numbers = dict(plan.symbols) if plan is not None else {}

    def at(expr: sympy.Expr) -> sympy.Expr:
        return expr.xreplace({s: sympy.Integer(numbers[str(s)]) for s in expr.free_symbols if str(s) in numbers})

    def said_bytes(expr: sympy.Expr) -> str:
        nbytes = at(expr)
        return format_bytes(int(nbytes)) if nbytes.is_Integer else f"{nbytes} bytes"

    size = said_bytes(state.nbytes)
    if state.selection:
        each = said_bytes(state.key_nbytes)
        kept = f"{each} for each that is kept" if state.evicts else f"{size}, and {each} for each that is read"
        return f"state: keys can be chosen ({state.selection}), {kept}; an approximation"
    proof = "only where no row that they see has changed since"
    if state.reach is not None:
        proof += f", and rows do not see all others: {state.reach.says}"
    said = f"state: {state.values} values can be kept from step to step, {size}; steps for some rows are exact {proof}"
    length = at(state.length)
    if not length.is_Integer or not state.rungs:
        return said
    rungs = []
    for short, keep, expr in state.rungs:
        each = at(expr) * (1 if keep is None else kept_keys(keep, int(length), _BLOCK))
        rungs.append(f"{short} {format_bytes(int(each))}")
    ladder = "; ".join(rungs)
    return f"{said}\nwhat cache='auto' tries, for blocks of {_BLOCK} rows: {ladder} (times: mosaic fit --cache auto)"
