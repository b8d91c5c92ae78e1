"""``mosaic``: plans on the command line.

Errors are one line on stderr and exit code 2.  Nothing here imports torch before it has to.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mosaic_compiler import cli_cache
from mosaic_compiler.cli_fit import fit
from mosaic_compiler.cli_generate import generate
from mosaic_compiler.cli_quality import quality
from mosaic_compiler.errors import ConfigError, MosaicError, OptionsError, PlanError
from mosaic_compiler.planning.budget import format_bytes
from mosaic_compiler.planning.plan import MemoryPlan
from mosaic_compiler.report import tables

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


app.command()(fit)
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
