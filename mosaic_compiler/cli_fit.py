"""``mosaic fit``: does a model run at so many tokens on such a card?"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mosaic_compiler.cli_values import parse_bytes, parse_card, parse_dtype, parse_keep, parse_tokens
from mosaic_compiler.errors import ConfigError
from mosaic_compiler.planning.budget import format_bytes
from mosaic_compiler.planning.ladder import Rung, rungs_of
from mosaic_compiler.planning.plan import MemoryPlan
from mosaic_compiler.planning.selection import DEFAULT_KEEP, SCORES, Selection, selection_of
from mosaic_compiler.report import tables
from mosaic_compiler.report.known_cards import SPEEDS

if TYPE_CHECKING:
    from mosaic_compiler.ahead.cached import CachedAnswer
    from mosaic_compiler.ahead.fit import Traced
    from mosaic_compiler.ahead.rates import Rates

_FOR_BOTH = " for state and steps"

HERE = "here"
"""As a card: the GPU of this machine, measured."""


def fit(
    config: Annotated[
        str, typer.Option(help="LLaDA-8B, LLaDA2.0-mini, ... (all are named where there is none), or a config.json")
    ],
    tokens: Annotated[str, typer.Option(help="length of the sequence; several: 4k,32k,128k (k is 1,024)")] = "32k",
    gpu: Annotated[
        str, typer.Option(help="memory of the card, or its name: 24GiB, RTX4090, A100-80GB; here: this machine's")
    ] = "24GiB",
    dtype: Annotated[
        str, typer.Option(help="of the weights: bfloat16, float16 or float32 (or bf16, fp16, fp32)")
    ] = "bf16",
    masked: Annotated[float, typer.Option(help="share of the rows whose logits are needed", min=0, max=1)] = 0.5,
    reserve: Annotated[str, typer.Option(help="what CUDA itself takes of the card")] = "600MiB",
    device: Annotated[
        str, typer.Option(help="whose kernels: cuda, cpu, or auto (a GPU's where there is one)")
    ] = "auto",
    cache: Annotated[
        str,
        typer.Option(
            help="what is kept from step to step, as in generate: none, prefix, dual, select, delayed; auto: each rung"
        ),
    ] = "none",
    cache_dtype: Annotated[
        str | None, typer.Option(help="with --cache: precision of what is kept: bf16, fp8, int8, int4")
    ] = None,
    cache_keep: Annotated[
        str | None, typer.Option(help="with --cache: other keys that are kept: a share (0.05), a number (2048), or all")
    ] = None,
    cache_score: Annotated[str, typer.Option(help=f"how they are chosen: {', '.join(SCORES)}")] = "probability",
    cache_sets: Annotated[str | None, typer.Option(help="chosen for each head, or each layer")] = None,
    cache_evict: Annotated[
        bool, typer.Option(help="the other keys are not kept; else all are, and so many are read")
    ] = True,
    rows: Annotated[int, typer.Option(help="with --cache: rows that a step computes (those of a block)", min=1)] = 32,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="write the plan of the longest of them")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """Does a model run at so many tokens on such a card?  Needs neither weights nor a GPU."""
    from mosaic_compiler.ahead.configs import load_config
    from mosaic_compiler.planning.caches import policy_of
    from mosaic_compiler.planning.precisions import precision_of

    lengths = parse_tokens(tokens)
    (card, memory), kept = _card(gpu), parse_bytes("--reserve", reserve)
    described = load_config(config)
    is_auto = cache == "auto"
    try:
        policy = policy_of(cache)
        precision_of(None if cache_dtype == "auto" else cache_dtype)
        selection = selection_of(cache_score, cache_sets, cache_evict)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    keep = parse_keep(cache_keep)
    if keep is None and policy.chooses and cache_keep is None:
        keep = DEFAULT_KEEP
    for name, given in (("dtype", cache_dtype), ("keep", keep)):
        if given is not None and not policy.is_kept:
            raise ConfigError(f"--cache-{name} {given} is for what is kept: choose --cache, dual for example")
    request = _Request(
        config, described, parse_dtype(dtype), device, card, memory - kept, lengths, masked, rows, selection
    )
    if cache_dtype == "auto" and not is_auto:
        raise ConfigError("--cache-dtype auto is for --cache auto, which shows what each precision takes")
    if not cache_evict and (keep is None or is_auto):
        raise ConfigError("--no-cache-evict keeps all keys and reads chosen ones: say how many with --cache-keep")
    if is_auto:
        _fit_rungs(request, rungs_of("auto", cache_dtype, keep), output, as_json)
    elif policy.is_kept:
        _fit_with_state(request, Rung(cache_dtype, keep), output, as_json)
    else:
        _fit_plain(request, output, as_json)


@dataclass(frozen=True)
class _Request:
    """What was asked for.

    Attributes:
        memory: bytes of the card, less what CUDA takes.
    """

    config: str
    described: Mapping[str, Any]
    dtype: str
    device: str
    card: str
    memory: int
    lengths: list[int]
    masked: float
    rows: int
    selection: Selection

    def traced(self, rung: Rung | None) -> Traced:
        """The model; ``rung``: with steps that keep values so."""
        from mosaic_compiler.ahead.fit import traced

        return traced(
            self.described, self.dtype, self.device, on_trace=_say_tracing, with_state=rung is not None,
            precision=None if rung is None else rung.precision,
            selection=None if rung is None or rung.keep is None else self.selection,
        )  # fmt: skip

    @functools.cached_property
    def rates(self) -> Rates | None:
        """Of the card; ``None``: nobody knows."""
        from mosaic_compiler.ahead.rates import by_data_sheet, rates_here

        if self.card.startswith(HERE):
            return rates_here()
        return by_data_sheet(self.card, *SPEEDS[self.card]) if self.card in SPEEDS else None

    def answers(self, model: Traced, rung: Rung) -> list[CachedAnswer]:
        """For each length, of steps that keep values so."""
        from mosaic_compiler.ahead.cached import answer_cached

        assert model.stateful is not None
        room, rates = self.memory - model.weights, self.rates
        return [
            answer_cached(
                model.stateful, model.weights, length, room,
                rows=self.rows, row_share=self.masked, keep=rung.keep, rates=rates,
            )
            for length in self.lengths
        ]  # fmt: skip

    def write(self, output: Path | None, plans: Sequence[MemoryPlan | None], problem: str) -> None:
        """The plan of the longest length that fits.

        Raises:
            ConfigError: if none does.
        """
        from mosaic_compiler.ahead.configs import name_of

        fits = [plan for plan in plans if plan is not None]
        if output is None:
            return
        if not fits:
            raise ConfigError(f"none of these lengths fits, so there is no plan to write to {output}: {problem}")
        output.write_text(replace(fits[-1], title=f"{name_of(self.config)}, {self.dtype}").to_json())

    def head(self, weights: int, what: str = "") -> str:
        """What is left beside the weights."""
        room = format_bytes(max(self.memory - weights, 0))
        return f"{self.config}, {self.dtype}: weights {format_bytes(weights)}; {room} of {self.card} are left{what}"

    def of_times(self) -> str:
        """Where predicted times are from."""
        rates = self.rates
        if rates is None:
            return f"how fast {self.card} is is not known: name the card (--gpu RTX4090) for predicted times"
        return f"seconds are predicted: rates {rates.source}"


def _card(given: str) -> tuple[str, int]:
    """What to call a card, and its bytes."""
    if given != HERE:
        return parse_card(given)
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("--gpu here: this machine has no GPU; give the bytes of one, or its name: 24GiB, RTX4090")
    found = torch.cuda.get_device_properties(0)
    return f"{HERE} ({found.name})", found.total_memory


def _fit_with_state(request: _Request, rung: Rung, output: Path | None, as_json: bool) -> None:
    """Steps that keep state, and steps for some rows that use it."""
    from mosaic_compiler.ahead.cached import longest_cached

    model = request.traced(rung)
    assert model.stateful is not None
    room, answers = request.memory - model.weights, request.answers(model, rung)
    most = longest_cached(model.stateful, room, request.masked, request.rows, rung.keep)
    request.write(output, [a.full for a in answers], answers[-1].problem)
    if as_json:
        found = [_as_data(a, request.rows) for a in answers]
        print(json.dumps({"weights": model.weights, "room": room, "longest": most, "answers": found}, indent=1))
        return
    console = Console()
    console.print(request.head(model.weights, _FOR_BOTH))
    table = _table("tokens", "fits", "state", "peak of a full step", f"of {request.rows} rows", "seconds",
                   f"of {request.rows} rows")  # fmt: skip
    for a in answers:
        table.add_row(f"{a.tokens:,}", *_cells(a))
    console.print(table)
    what = "all of it" if rung.keep is None else "chosen keys"
    console.print(f"longest sequence: {most:,} tokens with {what} kept (predicted)")
    console.print(request.of_times())
    _say_problems(console, answers)


def _fit_rungs(request: _Request, rungs: Sequence[Rung], output: Path | None, as_json: bool) -> None:
    """Each rung of the ladder that ``cache="auto"`` goes down, and which one it would take."""
    from mosaic_compiler.ahead.fit import answer

    weights, found = 0, []
    for rung in rungs:
        model = request.traced(rung if rung.is_kept else None)
        weights = model.weights
        if rung.is_kept:
            found.append((rung, request.answers(model, rung)))
            continue
        plain = [answer(model, length, request.memory - weights, request.masked) for length in request.lengths]
        found.append((rung, [_all_rows(a.tokens, a.plan, a.problem, found[0][1]) for a in plain]))
    taken = {}
    for number, length in enumerate(request.lengths):
        taken[length] = next((str(rung) for rung, answers in found if answers[number].full is not None), None)
    plans = [
        answers[number].full
        for number, length in enumerate(request.lengths)
        for rung, answers in found
        if str(rung) == taken[length]
    ]
    request.write(output, plans, found[-1][1][-1].problem)
    if as_json:
        told = [{"kept": str(rung), "answers": [_as_data(a, request.rows) for a in each]} for rung, each in found]
        head = {"weights": weights, "room": request.memory - weights, "taken": taken}
        print(json.dumps({**head, "rungs": told}, indent=1))
        return
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    console.print(request.head(weights, _FOR_BOTH))
    table = _table("tokens", "kept", "fits", "state", "peak, full", f"{request.rows} rows", "seconds, full",
                   f"{request.rows} rows", "")  # fmt: skip
    for number, length in enumerate(request.lengths):
        for rung, answers in found:
            mark = "taken" if str(rung) == taken[length] else ""
            table.add_row(f"{length:,}", rung.short, *_cells(answers[number]), mark)
    console.print(table)
    console.print(request.of_times())
    _say_problems(console, found[-1][1])


def _all_rows(tokens: int, plan: MemoryPlan | None, problem: str, kept: Sequence[CachedAnswer]) -> CachedAnswer:
    """Of steps that keep nothing: each takes what a full one does."""
    from mosaic_compiler.ahead.cached import CachedAnswer

    seconds = next(a.seconds["full"] for a in kept if a.tokens == tokens)
    return CachedAnswer(tokens, plan, plan, problem, 0, {"full": seconds, "reuse": seconds})


def _as_data(a: CachedAnswer, rows: int) -> dict[str, Any]:
    peaks = {kind: plan.peak for kind, plan in (("full", a.full), ("reuse", a.reuse)) if plan is not None}
    return {
        "tokens": a.tokens, "fits": a.full is not None, "state": a.state, "problem": a.problem, "rows": rows,
        "peaks": peaks, "seconds": dict(a.seconds),
    }  # fmt: skip


def _cells(a: CachedAnswer) -> list[Any]:
    peaks = [format_bytes(plan.peak) if plan else "-" for plan in (a.full, a.reuse)]
    times = [_seconds(a.seconds[kind]) for kind in ("full", "reuse")]
    return [_yes(a.full is not None), format_bytes(a.state), *peaks, *times]


def _seconds(given: float | None) -> str:
    return "-" if given is None else f"{given:.3g}"


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _say_problems(console: Console, answers: Sequence[CachedAnswer]) -> None:
    for a in answers:
        if a.problem:
            console.print(f"{a.tokens:,} tokens: {a.problem}", style="red")


def _fit_plain(request: _Request, output: Path | None, as_json: bool) -> None:
    """Steps for all rows."""
    from mosaic_compiler.ahead.configs import positions
    from mosaic_compiler.ahead.fit import answer, longest

    model = request.traced(None)
    room = request.memory - model.weights
    answers = [answer(model, length, room, request.masked) for length in request.lengths]
    most, eager = longest(model, room, request.masked)
    trained = positions(request.described)
    request.write(output, [a.plan for a in answers], answers[-1].problem)
    if as_json:
        found = [
            {
                "tokens": a.tokens, "fits": a.plan is not None, "peak": a.plan.peak if a.plan else None,
                "workspace": a.plan.workspace if a.plan else None, "problem": a.problem, "eager_peak": a.eager_peak,
                "eager_fits": a.eager_peak <= room, "chunks": chunk_sizes(a.plan) if a.plan else None,
            }
            for a in answers
        ]  # fmt: skip
        head = {"weights": model.weights, "room": room, "longest": most, "longest_eager": eager, "positions": trained}
        print(json.dumps({**head, "answers": found}, indent=1))
        return
    console = Console()
    console.print(request.head(model.weights))
    table = _table("tokens", "fits", "peak", "rows per chunk", "eager needs", "fits")
    for a in answers:
        peak, chunks = (format_bytes(a.plan.peak), chunk_text(a.plan)) if a.plan else ("-", "-")
        table.add_row(
            f"{a.tokens:,}",
            _yes(a.plan is not None),
            peak,
            chunks,
            format_bytes(a.eager_peak),
            _yes(a.eager_peak <= room),
        )
    console.print(table)
    console.print(f"longest sequence: {most:,} tokens with mosaic, {eager:,} in eager PyTorch (predicted)")
    if trained is not None and trained < max(most, *request.lengths):
        console.print(
            f"the config gives the model {trained:,} positions: more tokens than that may fit in memory, but the model "
            "was not trained for them"
        )
    for a in answers:
        if a.plan is None:
            console.print(f"{a.tokens:,} tokens: {a.problem}", style="red")


def _say_tracing() -> None:
    print("mosaic: tracing the model; the next time it is remembered", file=sys.stderr)


def chunk_sizes(plan: MemoryPlan) -> dict[str, list[int]]:
    """Rows and rows per chunk of each kind of loop, by the name of the first."""
    return {loop.name: [loop.rows, loop.chunk] for loop, _ in tables.alike(plan.loops)}


def chunk_text(plan: MemoryPlan) -> str:
    """The chunk sizes of the loops that are chunked."""
    sizes = sorted({loop.chunk for loop in plan.loops if loop.chunk < loop.rows})
    return ", ".join(map(str, sizes)) if sizes else "not chunked"


def _yes(value: bool) -> Text:
    return Text("yes", style="green") if value else Text("no", style="red")
