"""A full step of a model whose rows see their own block and what is before it, against one whose rows see everything.

SDAR-8B's dims, random weights, bf16, in 16 GiB for activations: half of the attention is not there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import show, write
from benchmarks.gpu.block_causal import BLOCK, LAYERS, build
from benchmarks.gpu.models import MASK, clean
from mosaic_compiler.sampling import DenoisingStep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--tokens", nargs="*", type=int, default=[32_768, 65_536])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    model = build(given.layers)
    device = next(model.parameters()).device
    options = {"memory_budget": "16GiB"}
    steps: dict[str, Any] = {
        name: torch.compile(DenoisingStep(model, MASK, **more), backend="mosaic", dynamic=True, options=options)
        for name, more in (("all", {}), ("block-causal", {"block_causal": BLOCK}))
    }
    rows = []
    with torch.no_grad():
        for tokens in given.tokens:
            ids = torch.randint(0, 50_000, (1, tokens), device=device)
            ids[:, -BLOCK:] = MASK
            window, count = torch.ones_like(ids, dtype=torch.bool), torch.tensor([1], device=device)
            times: dict[str, list[float]] = {name: [] for name in steps}
            for repeat in range(given.repeats + 1):
                for name, step in steps.items():
                    torch.cuda.synchronize()
                    started = time.perf_counter()
                    step(ids, window, count)
                    torch.cuda.synchronize()
                    if repeat:
                        times[name].append(time.perf_counter() - started)
                    print(tokens, name, repeat, round(time.perf_counter() - started, 3), flush=True)
            found = {name: statistics.median(each) for name, each in times.items()}
            rows.append({"tokens": tokens, **found, "share": found["block-causal"] / found["all"]})
            write("visibility", {"layers": given.layers, "rows": rows}, given.out)
    clean()
    columns = ["tokens", "all", "block-causal", "share"]
    show("seconds of a full step", columns, [[row[c] for c in columns] for row in rows])


if __name__ == "__main__":
    main()
