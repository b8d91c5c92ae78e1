"""One denoising step of tiny-llada on the CPU: eager against mosaic, time and peak, planned and measured.

make bench
"""

from __future__ import annotations

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import functools
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import interleaved, write
from mosaic_compiler.backend import observing
from mosaic_compiler.book import Call
from mosaic_compiler.planning import make_plan
from mosaic_compiler.planning.budget import format_bytes
from mosaic_compiler.report.measure import measure
from mosaic_compiler.runtime.instructions import bound_call
from mosaic_compiler.runtime.program import Program
from mosaic_compiler.sampling import DenoisingStep, block_window

MODEL = Path(__file__).parent.parent / "examples" / "tiny-llada"
LENGTHS = (512, 2048, 8192)


def arguments(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(4, 8000, (1, length), generator=generator)
    ids[torch.rand(1, length, generator=generator) < 0.5] = 3
    return ids, block_window(length, 0, length), torch.tensor([length // 4])


def python_cost(program: Program) -> float:
    """Seconds of Python per bound instruction: the same flat list, with operators that do nothing."""
    nothing = functools.partial(bound_call, slots=[None])
    full, program.instructions = program.instructions, [nothing(Call(_no_operator, (1, 2), (("out", 3),)))] * 1000
    outputs, program.outputs = program.outputs, []
    given = [None] * program._inputs
    started = time.perf_counter()
    for _ in range(100):
        program.run(given)
    seconds = (time.perf_counter() - started) / 100_000
    program.instructions, program.outputs = full, outputs
    return seconds


def _no_operator(*args: object, **kwargs: object) -> None:
    return None


def main() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    step, steps = DenoisingStep(model, 3), []
    with torch.no_grad(), observing(steps.append):
        compiled = torch.compile(step, backend="mosaic", dynamic=True)
        started = time.perf_counter()
        compiled(*arguments(64))
        compile_seconds = time.perf_counter() - started
        rows = []
        for length in LENGTHS:
            given = arguments(length)
            equal = torch.equal(step(*given), compiled(*given))
            calls = {"eager": functools.partial(step, *given), "mosaic": functools.partial(compiled, *given)}
            seconds = interleaved(calls, 9 if length <= 2048 else 3)
            peaks = {name: measure(call, repeats=1).peak for name, call in calls.items()}
            plan = steps[0].plan
            rows.append(
                {
                    "tokens": length,
                    "equal": equal,
                    "seconds": seconds,
                    "ratio": seconds["mosaic"] / seconds["eager"],
                    "measured_peak": peaks,
                    "planned_peak": plan.peak,
                    "height": plan.height,
                    "lower_bound": plan.lower_bound,
                    "naive": plan.naive,
                }
            )
        sizes = steps[0].sizes([4096] * len(steps[0]._readers), [2048])
        started = time.perf_counter()
        make_plan(steps[0].lives.at(sizes), steps[0].lives.schedule)
        planning = time.perf_counter() - started
        program = next(iter(steps[0]._programs.values())).program
        body = {
            "model": "tiny-llada float32",
            "compile_seconds": compile_seconds,
            "graphs": len(steps),
            "planning_seconds": planning,
            "python_seconds_per_instruction": python_cost(program),
            "rows": rows,
        }
    table = Table(
        "tokens", "equal", "eager", "mosaic", "ratio", "peak eager", "peak mosaic", "planned", "height / bound"
    )
    for row in rows:
        table.add_row(
            f"{row['tokens']}",
            "yes" if row["equal"] else "NO",
            *(f"{row['seconds'][name] * 1e3:.0f} ms" for name in ("eager", "mosaic")),
            f"{row['ratio']:.2f}",
            *(format_bytes(row["measured_peak"][name]) for name in ("eager", "mosaic")),
            format_bytes(row["planned_peak"]),
            f"{row['height'] / row['lower_bound']:.4f}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"compiled {len(steps)} graph in {compile_seconds:.1f} s; a plan takes {planning * 1e3:.1f} ms; "
        f"{body['python_seconds_per_instruction'] * 1e6:.2f} us of Python per instruction"
    )
    console.print(f"wrote {write('step_cpu', body)}")


if __name__ == "__main__":
    main()
