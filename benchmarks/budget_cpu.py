"""A step inside a memory budget on the CPU: resident memory, time and token ids against eager.

Each system runs in a process of its own.  It compiles on 64 tokens and runs one step at the full length (which plans
and binds it: some 16 MiB of Python objects).  Then all memory is given back, the growth of the process's resident
memory over one step is read from the kernel (VmHWM), and steps are timed.

    python -m benchmarks.budget_cpu            # writes benchmarks/results/budget_cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.common import RESULTS, write

HERE = Path(__file__).parent
CASES = ((16384, "128MiB", ("eager", "mosaic", "unchunked")), (32768, "160MiB", ("mosaic",)))


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def one(system: str, tokens: int, budget: str, repeats: int) -> None:
    """Measure one system in this process; prints one JSON line."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from mosaic_compiler import release_memory
    from mosaic_compiler.backend import observing
    from mosaic_compiler.sampling import DenoisingStep, block_window

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(HERE.parent / "examples" / "tiny-llada", dtype=torch.float32).eval()
    plain = DenoisingStep(model, 3)

    def arguments(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids = torch.randint(4, 8000, (1, length), generator=torch.Generator().manual_seed(0))
        ids[:, ::2] = 3
        return ids, block_window(length, 0, length), torch.tensor([length // 8])

    steps = []
    options = {} if system == "unchunked" else {"memory_budget": budget}
    options |= {"disable": ["chunk-loops"]} if system == "no chunk-loops" else {}
    step = (
        plain
        if system == "eager"
        else torch.compile(plain, backend="mosaic", dynamic=True, fullgraph=True, options=options)
    )
    with torch.no_grad(), observing(steps.append):
        step(*arguments(64))
        given = arguments(tokens)
        step(*given)
        release_memory()
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        ids = step(*given)
        growth = resident("VmHWM") - before
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            step(*given)
            times.append(time.perf_counter() - started)
    plan = steps[0].plan if steps else None
    found = {
        "system": system,
        "tokens": tokens,
        "budget": budget if system != "eager" else None,
        "growth": growth,
        "seconds": times,
        "ids": int((ids * torch.arange(1, tokens + 1)).sum() % (1 << 61)),
        "planned": plan.workspace if plan else None,
        "chunks": sorted({(loop.rows, loop.chunk) for loop in plan.loops}) if plan else None,
    }
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="*")
    given = parser.parse_args()
    if given.one:
        system, tokens, budget, repeats = given.one
        one(system, int(tokens), budget, int(repeats))
        return
    results = []
    for tokens, budget, systems in CASES:
        if given.tokens and tokens not in given.tokens:
            path = RESULTS / "budget_cpu.json"
            earlier = json.loads(path.read_text())["results"] if path.exists() else []
            results += [r for r in earlier if r["tokens"] == tokens]
            continue
        for system in systems:
            command = [
                sys.executable,
                "-m",
                "benchmarks.budget_cpu",
                "--one",
                system,
                str(tokens),
                budget,
                str(given.repeats),
            ]
            run = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
            found = json.loads(run.stdout.splitlines()[-1])
            results.append(found)
            print(
                f"{system:>10} N={tokens} growth {found['growth'] / 2**20:.1f} MiB, planned "
                f"{(found['planned'] or 0) / 2**20:.1f} MiB, seconds {[round(s, 2) for s in found['seconds']]}, "
                f"chunks {found['chunks']}",
                flush=True,
            )
        mine = [r for r in results if r["tokens"] == tokens]
        assert len({r["ids"] for r in mine}) == 1, "token ids differ"
    write("budget_cpu", {"results": results})


if __name__ == "__main__":
    main()
