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
    """Right answers over bytes a token, of the longest sequences."""
    from matplotlib.figure import Figure

    result = results[-1]
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    for axis, kind, name in zip(axes, ("facts", "words"), ("recall of facts", "accuracy on a text"), strict=True):
        for (folder, rows), colour in zip(result["models"].items(), ("#2b6cb0", "#c05621"), strict=True):
            kept = rows[1:]
            axis.axhline(rows[0]["right"][kind], color=colour, linewidth=0.8, linestyle=":")
            axis.plot(
                [row["bytes_per_token"] for row in kept], [row["right"][kind] for row in kept], "o-", color=colour,
                label=Path(folder).name, markersize=4, linewidth=1,
            )  # fmt: skip
            for row in kept:
                if colour == "#2b6cb0" and kind == "facts":
                    axis.annotate(row["method"], (row["bytes_per_token"], row["right"][kind]), xytext=(0, 8),
                                  textcoords="offset points", ha="center", fontsize=7)  # fmt: skip
        axis.set(xscale="log", ylim=(0, 1), title=name, xlabel="bytes kept a token (dotted: no cache)")
        axis.grid(visible=True, alpha=0.3)
    axes[0].legend(fontsize=8, loc="lower right")
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
