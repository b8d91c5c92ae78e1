"""``mosaic``: plans on the command line.

Errors are one line on stderr and exit code 2.  Nothing here imports torch before it has to.
"""

from __future__ import annotations

import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mosaic_compiler import cli_cache
from mosaic_compiler.cli_generate import generate
from mosaic_compiler.cli_quality import quality
from mosaic_compiler.cli_values import parse_bytes, parse_card, parse_dtype, parse_keep, parse_tokens
from mosaic_compiler.errors import ConfigError, MosaicError, OptionsError, PlanError
from mosaic_compiler.planning.budget import format_bytes
from mosaic_compiler.planning.plan import MemoryPlan
from mosaic_compiler.planning.selection import DEFAULT_KEEP, SCORES, selection_of
from mosaic_compiler.report import tables
from mosaic_compiler.report.known_cards import SPEEDS

if TYPE_CHECKING:
    from mosaic_compiler.ahead.fit import Traced

app = typer.Typer(
    name="mosaic",
    help="Plans for diffusion LLMs: what fits, what a plan says, what this machine can do.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_PLAN = Annotated[Path, typer.Argument(help="a plan.json", show_default=False)]


def main() -> None:
    """The console script."""
    try:
        app()
    except MosaicError as error:
        print(f"mosaic: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def read_plan(path: Path) -> MemoryPlan:
    """Raises :class:`PlanError` if there is no plan in the file."""
    try:
        text = path.read_text()
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise PlanError(
            f"{path}: not a plan: no text; write one with options={{'dump': DIR}} or mosaic fit -o"
        ) from None
    try:
        return MemoryPlan.from_json(text)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def _fit_with_state(
    model: Traced, config: str, dtype: str, card: str, room: int, lengths: list[int], rows: int, masked: float,
    precision: str | None, keep: float | int | None, output: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """``fit --cache``: steps that keep state, and steps for some rows that use it."""
    from mosaic_compiler.ahead.cached import answer_cached, longest_cached
    from mosaic_compiler.ahead.configs import name_of

    assert model.stateful is not None
    is_measured = precision is None and keep is None  # what reading codes, or choosing keys takes was not
    speed = SPEEDS.get(card) if is_measured else None
    answers = [
        answer_cached(model.stateful, model.weights, length, room, rows=rows, row_share=masked, keep=keep, speed=speed)
        for length in lengths
    ]
    most = longest_cached(model.stateful, room, masked, rows, keep)
    if output is not None:
        plans = [a.full for a in answers if a.full is not None]
        if not plans:
            raise ConfigError(
                f"none of these lengths fits: there is no plan to write to {output}: {answers[-1].problem}"
            )
        output.write_text(replace(plans[-1], title=f"{name_of(config)}, {parse_dtype(dtype)}").to_json())
    if as_json:
        found = [
            {
                "tokens": a.tokens, "fits": a.full is not None, "state": a.state, "problem": a.problem, "rows": rows,
                "peaks": {kind: plan.peak for kind, plan in (("full", a.full), ("reuse", a.reuse)) if plan is not None},
                "seconds": dict(a.seconds),
            }
            for a in answers
        ]  # fmt: skip
        print(json.dumps({"weights": model.weights, "room": room, "longest": most, "answers": found}, indent=1))
        return
    console = Console()
    console.print(
        f"{config}, {dtype}: weights {format_bytes(model.weights)}; {format_bytes(max(room, 0))} of {card} are left "
        "for state and steps"
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("tokens", "fits", "state", "peak of a full step", f"of {rows} rows", "seconds", f"of {rows} rows"):
        table.add_column(column, justify="right")
    for a in answers:
        peaks = [format_bytes(plan.peak) if plan else "-" for plan in (a.full, a.reuse)]
        times = [_seconds(a.seconds[kind]) for kind in ("full", "reuse")]
        table.add_row(f"{a.tokens:,}", _yes(a.full is not None), format_bytes(a.state), *peaks, *times)
    console.print(table)
    what = "all of it" if keep is None else "chosen keys"
    console.print(f"longest sequence: {most:,} tokens with {what} kept (predicted)")
    if not is_measured:
        console.print(f"no times are predicted: none were measured for steps that read {precision or 'chosen keys'}")
    elif speed is None:
        console.print(f"how fast {card} is is not known: name the card (--gpu RTX4090) for predicted times")
    for a in answers:
        if a.problem:
            console.print(f"{a.tokens:,} tokens: {a.problem}", style="red")


def _seconds(given: float | None) -> str:
    return "-" if given is None else f"{given:.3g}"


@app.command()
def fit(
    config: Annotated[
        str, typer.Option(help="LLaDA-8B, LLaDA2.0-mini, ... (all are named where there is none), or a config.json")
    ],
    tokens: Annotated[str, typer.Option(help="length of the sequence; several: 4k,32k,128k (k is 1,024)")] = "32k",
    gpu: Annotated[str, typer.Option(help="memory of the card, or its name: 24GiB, RTX4090, A100-80GB")] = "24GiB",
    dtype: Annotated[
        str, typer.Option(help="of the weights: bfloat16, float16 or float32 (or bf16, fp16, fp32)")
    ] = "bf16",
    masked: Annotated[float, typer.Option(help="share of the rows whose logits are needed", min=0, max=1)] = 0.5,
    reserve: Annotated[str, typer.Option(help="what CUDA itself takes of the card")] = "600MiB",
    device: Annotated[
        str, typer.Option(help="whose kernels: cuda, cpu, or auto (a GPU's where there is one)")
    ] = "auto",
    cache: Annotated[
        str, typer.Option(help="what is kept from step to step, as in generate: none, prefix, dual, select or delayed")
    ] = "none",
    cache_dtype: Annotated[
        str | None, typer.Option(help="with --cache: precision of what is kept: bf16, fp8, int8, int4")
    ] = None,
    cache_keep: Annotated[
        str | None, typer.Option(help="with --cache: other keys that are kept: a share (0.05), a number (2048), or all")
    ] = None,
    cache_score: Annotated[str, typer.Option(help=f"how they are chosen: {', '.join(SCORES)}")] = "probability",
    cache_sets: Annotated[str | None, typer.Option(help="chosen for each head, or each layer")] = None,
    rows: Annotated[int, typer.Option(help="with --cache: rows that a step computes (those of a block)", min=1)] = 32,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="write the plan of the longest of them")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """Does a model run at so many tokens on such a card?  Needs neither weights nor a GPU."""
    from mosaic_compiler.ahead.configs import load_config, name_of, positions
    from mosaic_compiler.ahead.fit import answer, longest, traced
    from mosaic_compiler.planning.caches import policy_of
    from mosaic_compiler.planning.precisions import precision_of

    lengths = parse_tokens(tokens)
    (card, memory), kept = parse_card(gpu), parse_bytes("--reserve", reserve)
    described = load_config(config)
    try:
        policy = policy_of(cache)
        precision_of(cache_dtype)
        selection = selection_of(cache_score, cache_sets)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    keep = parse_keep(cache_keep)
    if keep is None and policy.chooses and cache_keep is None:
        keep = DEFAULT_KEEP
    for name, given in (("dtype", cache_dtype), ("keep", keep)):
        if given is not None and not policy.is_kept:
            raise ConfigError(f"--cache-{name} {given} is for what is kept: choose --cache, dual for example")
    model = traced(
        described, parse_dtype(dtype), device, on_trace=_say_tracing, with_state=policy.is_kept,
        precision=cache_dtype, selection=None if keep is None else selection,
    )  # fmt: skip
    room = memory - kept - model.weights
    if model.stateful is not None:
        _fit_with_state(model, config, dtype, card, room, lengths, rows, masked, cache_dtype, keep, output, as_json)
        return
    answers = [answer(model, length, room, masked) for length in lengths]
    most, eager = longest(model, room, masked)
    trained = positions(described)
    plans = [a.plan for a in answers if a.plan is not None]
    if output is not None:
        if not plans:
            raise ConfigError(
                f"none of these lengths fits, so there is no plan to write to {output}: {answers[-1].problem}"
            )
        title = f"{name_of(config)}, {parse_dtype(dtype)}"
        output.write_text(replace(plans[-1], title=title).to_json())
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
    console.print(
        f"{config}, {dtype}: weights {format_bytes(model.weights)}; {format_bytes(max(room, 0))} of {card} are left"
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("tokens", "fits", "peak", "rows per chunk", "eager needs", "fits"):
        table.add_column(column, justify="right")
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
    if trained is not None and trained < max(most, *lengths):
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


@app.command()
def explain(plan: _PLAN) -> None:
    """What a plan says: figures, timeline, chunk loops, the largest buffers, fallbacks."""
    found = read_plan(plan)
    console = Console()
    for line in (*tables.plan_lines(found), tables.fallbacks(found.fallbacks)):
        console.print(line)


@app.command()
def report(
    plan: _PLAN,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help=".html: interactive; .png, .svg, .pdf: a picture; .trace.json: Perfetto; .pickle: PyTorch's",
        ),
    ] = Path("plan.html"),
) -> None:
    """Draw a plan: one HTML file, a picture, or what other tools open."""
    found = read_plan(plan)
    try:
        _write(found, output)
    except ImportError as error:
        raise ConfigError(f"{output.name} needs {error.name}: pip install 'mosaic-compiler[report]'") from None
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error.strerror}") from None
    print(f"wrote {output} ({format_bytes(output.stat().st_size)})")


def _write(plan: MemoryPlan, output: Path) -> None:
    suffix = "".join(output.suffixes[-2:]) if output.suffix == ".json" else output.suffix
    if suffix == ".html":
        from mosaic_compiler.report.page import html

        output.write_text(html(plan))
    elif suffix in (".png", ".svg", ".pdf"):
        from mosaic_compiler.report.picture import picture

        picture(plan, output)
    elif suffix.endswith(".json"):
        from mosaic_compiler.report.traces import chrome_trace

        output.write_text(chrome_trace(plan))
    elif suffix == ".pickle":
        from mosaic_compiler.report.traces import memory_snapshot

        output.write_bytes(pickle.dumps(memory_snapshot(plan)))
    else:
        raise OptionsError(
            f"-o {output}: the suffix says in which format: .html, .png, .svg, .pdf, .trace.json or .pickle"
        )


@app.command()
def diff(
    before: _PLAN,
    after: Annotated[Path, typer.Argument(help="another plan.json", show_default=False)],
    count: Annotated[int, typer.Option(help="lines about what is live at the peak", min=1)] = 12,
) -> None:
    """What changed between two plans, and why the peak moved."""
    from mosaic_compiler.report.diff import diff as compare

    first, second = read_plan(before), read_plan(after)
    console = Console()
    for line in compare(first, second, count):
        console.print(line)


app.command()(generate)
app.command("compile")(cli_cache.compile_ahead)
app.add_typer(cli_cache.app, name="cache")
app.command()(quality)


@app.command()
def doctor() -> None:
    """What this machine has, which kernels will be used, what is missing and how to install it."""
    from mosaic_compiler.report.doctor import examine

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for finding in examine():
        table.add_row(finding.what, finding.found, Text(finding.advice, style="yellow"))
    Console().print(table)
