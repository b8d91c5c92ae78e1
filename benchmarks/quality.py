"""What fewer bits cost: both shipped models, 64 sequences of each kind; writes benchmarks/results/ and docs/quality.md.

make bench-quality
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mosaic_compiler.planning.budget import format_bytes

RESULTS = Path("benchmarks/results/quality.json")
PAGE, PICTURE = Path("docs/quality.md"), Path("docs/quality.png")
COLOURS = ("#2b6cb0", "#dd8b4a")
BEGIN, END = "<!-- figures: written by benchmarks/quality.py -->", "<!-- end of figures -->"


def measured(tokens: int, sequences: int, generated: int, precisions: str) -> dict[str, Any]:
    """``mosaic quality`` in a process of its own."""
    command = [sys.executable, "-c", "from mosaic_compiler.cli import main; main()", "quality", "--json"]
    command += ["--tokens", str(tokens), "--sequences", str(sequences), "--generated", str(generated)]
    command += ["--cache-dtype", precisions]
    started = time.perf_counter()
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {**json.loads(ran.stdout), "seconds": round(time.perf_counter() - started)}


def table(results: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = []
    for result in results:
        for folder, rows in result["models"].items():
            kinds = list(rows[0]["right"])
            has_steps = rows[0]["steps"] is not None
            head = ["kept", "bytes a token", *(f"{kind} right" for kind in kinds), "same token", "KL, nats"]
            head += ["steps to finish"] if has_steps else []
            lines += [
                f"\n`{Path(folder).name}`, {result['tokens']:,} tokens, {result['sequences']} sequences of each kind:\n"
            ]
            lines += ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
            for row in rows:
                nbytes = format_bytes(round(row["bytes_per_token"])) if row["bytes_per_token"] else "none"
                cells = [row["method"], nbytes, *(f"{row['right'][kind]:.3f}" for kind in kinds)]
                cells += [f"{row['agreement']:.3f}", f"{row['divergence']:.2g}"]
                cells += [f"{row['steps']:.1f}"] if has_steps else []
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]]) -> None:
    """Right answers with each method, of the longest sequences."""
    from matplotlib.figure import Figure

    models = {Path(folder).name: rows for folder, rows in results[-1]["models"].items()}
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, kind, name in zip(axes, ("facts", "words"), ("recall of facts", "accuracy on a text"), strict=True):
        for number, (model, rows) in enumerate(models.items()):
            at = [position + 0.38 * (number - 0.5) for position in range(len(rows))]
            bars = axis.bar(at, [row["right"][kind] for row in rows], 0.36, label=model, color=COLOURS[number])
            axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
        kept = [row["bytes_per_token"] for row in next(iter(models.values()))]
        names = [row["method"] for row in next(iter(models.values()))]
        told = [f"\n{nbytes / 1024:.1f} KiB" if nbytes else "\n" for nbytes in kept]
        axis.set_xticks(range(len(names)), [a + b for a, b in zip(names, told, strict=True)], fontsize=8)
        axis.set(title=name)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.15)
    axes[0].legend(fontsize=8, loc="lower right", framealpha=1)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    """Measure, or only write the page again (``--page``)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--generated", type=int, default=4)
    parser.add_argument("--cache-dtype", default="as-computed,fp8,int8,int4")
    parser.add_argument("--page", action="store_true", help="from the figures that are there")
    given = parser.parse_args()
    if not given.page:
        results = []
        for tokens in given.tokens:
            results.append(measured(tokens, given.sequences, given.generated, given.cache_dtype))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(table(results[-1:]), flush=True)
    results = json.loads(RESULTS.read_text())
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{rest.partition(END)[2]}")
    draw(results)


if __name__ == "__main__":
    main()
