"""Fill in a masked passage of real text with a real diffusion LM, in eager PyTorch and with mosaic.

python examples/demo.py [--tokens 4096] [--steps 8] [--out demo-output]
"""

from __future__ import annotations

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the allocation profiler's own log lines

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import mosaic_compiler
from mosaic_compiler.report.measure import measure
from mosaic_compiler.report.tables import format_bytes
from mosaic_compiler.sampling import DenoisingStep, block_window, denoise

HERE = Path(__file__).resolve().parent
console = Console()


def mask_spans(ids: torch.Tensor, mask_id: int, share: float, seed: int) -> torch.Tensor:
    """Mask spans of 1 to 12 tokens until about ``share`` of them are hidden."""
    generator = torch.Generator().manual_seed(seed)
    masked = ids.clone()
    length = ids.shape[1]
    while (masked == mask_id).float().mean() < share:
        start = int(torch.randint(1, length - 1, (1,), generator=generator))
        span = int(torch.randint(1, 13, (1,), generator=generator))
        masked[:, start : start + span] = mask_id
    return masked


def fill(
    step: torch.nn.Module, masked: torch.Tensor, mask_id: int, steps: int, label: str
) -> tuple[torch.Tensor, float]:
    columns = (
        TextColumn(f"{label:<8}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} tokens"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        total = int((masked == mask_id).sum())
        task = progress.add_task(label, total=total)

        def on_step(ids: torch.Tensor) -> None:
            progress.update(task, completed=total - int((ids == mask_id).sum()))

        started = time.perf_counter()
        filled = denoise(step, masked, mask_token_id=mask_id, steps=steps, on_step=on_step)
        return filled, time.perf_counter() - started


def main(
    tokens: Annotated[int, typer.Option(help="how much of the passage to use")] = 4096,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 8,
    share: Annotated[float, typer.Option(help="share of the tokens to mask")] = 0.3,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="folder for plan.json")] = Path("demo-output"),
) -> None:
    """Fill in a masked passage with eager PyTorch and with mosaic, and compare."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny-llada")
    model = AutoModelForCausalLM.from_pretrained(HERE / "tiny-llada", dtype=torch.float32).eval()
    mask_id = model.config.mask_token_id

    text = (HERE / "genesis.txt").read_text()
    ids = torch.tensor([tokenizer(text).input_ids[:tokens]])
    masked = mask_spans(ids, mask_id, share, seed)
    hidden = masked == mask_id
    console.print(
        f"{ids.shape[1]} tokens of Genesis, {int(hidden.sum())} of them masked, {steps} steps, float32 on the CPU\n"
    )

    step = DenoisingStep(model, mask_id)
    compiled = mosaic_compiler.compile(step)
    window = block_window(ids.shape[1], 0, ids.shape[1])
    arguments = (masked, window, torch.tensor([int(hidden.sum()) // steps]))
    with torch.no_grad():
        console.print("compiling once, for all lengths ...")
        started = time.perf_counter()
        compiled(*arguments)
        console.print(f"compiled and planned in {time.perf_counter() - started:.1f} s\n")

    by_eager, eager_seconds = fill(step, masked, mask_id, steps, "eager")
    by_mosaic, mosaic_seconds = fill(compiled, masked, mask_id, steps, "mosaic")

    console.rule("the passage, with what the model filled in")
    console.print(marked_text(tokenizer, by_mosaic[0, :220], hidden[0, :220]))
    console.rule()

    with torch.no_grad():
        eager_step = measure(lambda: step(*arguments))
        mosaic_step = measure(lambda: compiled(*arguments))
    report = mosaic_compiler.explain(step, *arguments)
    table = Table(title="one denoising step", title_justify="left")
    for column in ("", "eager", "mosaic", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    peaks = eager_step.peak, mosaic_step.peak
    times = eager_step.seconds, mosaic_step.seconds
    table.add_row("peak activations, measured", *map(format_bytes, peaks), f"{peaks[0] / peaks[1]:.2f} x")
    table.add_row("peak activations, planned", "", format_bytes(report.plan.peak), "")
    table.add_row("time per step", *(f"{t * 1e3:.0f} ms" for t in times), f"{times[0] / times[1]:.2f} x")
    table.add_row(
        "time of the whole fill",
        f"{eager_seconds:.1f} s",
        f"{mosaic_seconds:.1f} s",
        f"{eager_seconds / mosaic_seconds:.2f} x",
    )
    console.print(table)

    equal = torch.equal(by_eager, by_mosaic)
    right = (by_mosaic == ids)[hidden].float().mean()
    console.print(f"every token equal to eager's: [bold]{'yes' if equal else 'NO'}[/]")
    console.print(f"masked tokens restored as in the original: {right:.0%}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "plan.json").write_text(report.plan.to_json())
    console.print(f"wrote {out / 'plan.json'}")
    if not equal:
        raise typer.Exit(1)


def marked_text(tokenizer, ids: torch.Tensor, hidden: torch.Tensor) -> Text:
    """The decoded text with filled-in tokens highlighted."""
    text = Text()
    for token, was_hidden in zip(ids.tolist(), hidden.tolist(), strict=True):
        text.append(tokenizer.decode([token]), style="bold green" if was_hidden else "")
    return text


if __name__ == "__main__":
    typer.run(main)
