"""What fewer bits and fewer keys cost, on both shipped models; writes benchmarks/results/ and docs/quality.md.

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


RUNS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (64, ("--cache-dtype", "fp8,int8,int4", "--generated", "4")),
    (64, ("--cache-dtype", "as-computed,int4", "--cache-keep", "0.05")),
    (24, ("--cache-dtype", "as-computed", "--cache-keep", "0.5,0.05", "--cache-score", "sparse-dllm")),
    (24, ("--cache-dtype", "as-computed", "--cache-keep", "0.05", "--cache-score", "mage")),
)
"""Sequences of each kind, and what is kept."""


def measured(tokens: int, sequences: int, options: tuple[str, ...]) -> dict[str, Any]:
    """``mosaic quality`` in a process of its own."""
    command = [sys.executable, "-c", "from mosaic_compiler.cli import main; main()", "quality", "--json"]
    command += ["--tokens", str(tokens), "--sequences", str(sequences), *options]
    started = time.perf_counter()
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {**json.loads(ran.stdout), "seconds": round(time.perf_counter() - started)}


def table(results: list[dict[str, Any]]) -> str:
    """The figures as Markdown, a table for each model, length and number of sequences."""
    lines = []
    for (folder, tokens, sequences), rows in gathered(results).items():
        kinds = list(rows[0]["right"])
        head = ["kept", "bytes a token", *(f"{kind} right" for kind in kinds), "same token", "KL, nats"]
        head += ["steps to finish"]
        lines += [f"\n`{Path(folder).name}`, {tokens:,} tokens, {sequences} sequences of each kind:\n"]
        lines += ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
        for row in rows:
            nbytes = format_bytes(round(row["bytes_per_token"])) if row["bytes_per_token"] else "none"
            cells = [row["method"], nbytes, *(f"{row['right'][kind]:.3f}" for kind in kinds)]
            cells += [f"{row['agreement']:.3f}", f"{row['divergence']:.2g}"]
            cells += ["" if row["steps"] is None else f"{row['steps']:.1f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def gathered(results: list[dict[str, Any]]) -> dict[tuple[str, int, int], list[dict[str, Any]]]:
    """Rows of runs with the same sequences, ``no cache`` once."""
    found: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for result in results:
        for folder, rows in result["models"].items():
            known = found.setdefault((folder, result["tokens"], result["sequences"]), [])
            known += [row for row in rows if row["method"] not in [other["method"] for other in known]]
    return found


def draw(results: list[dict[str, Any]]) -> None:
    """Right answers with each method, of the longest sequences."""
    from matplotlib.figure import Figure

    longest = max((tokens, count) for _, tokens, count in gathered(results))
    models = {Path(key[0]).name: rows for key, rows in gathered(results).items() if key[1:] == longest}
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
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--page", action="store_true", help="from the figures that are there")
    given = parser.parse_args()
    if not given.page:
        results = []
        for tokens in given.tokens:
            for sequences, options in RUNS:
                results.append(measured(tokens, sequences, options))
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                print(table(results[-1:]), flush=True)
    results = json.loads(RESULTS.read_text())
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{rest.partition(END)[2]}")
    draw(results)


if __name__ == "__main__":
    main()
