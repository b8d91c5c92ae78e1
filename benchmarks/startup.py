"""How long a new process takes to its first result: with an empty cache folder, and with a full one.

Each process builds a model of random weights (or loads the shipped one), calls ``generate()``, and says how long it
took to the first step's ids: LLaDA-8B's dims on a GPU, or ``--model tiny-llada``, the shipped one, and with it what
commands take.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VARIATIONS: dict[str, dict[str, Any]] = {
    "first": {},
    "again": {},
    "temperature": {"temperature": 0.7},
    "budget": {"memory_budget": "3GiB"},
    "length": {"gen_length": 96},
    "dual": {"cache": "dual"},
}


FOLDERS = ("MOSAIC_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def child(name: str, variations: Mapping[str, dict[str, Any]]) -> None:
    """One process: seconds to the first ids of each kind of call, as JSON."""
    started = time.perf_counter()
    import torch

    imported = time.perf_counter()
    if name == "tiny-llada":
        from transformers import AutoModelForCausalLM

        place = torch.device("cpu")
        model: Any = AutoModelForCausalLM.from_pretrained("examples/tiny-llada", dtype=torch.float32)
        model = model.eval().requires_grad_(False)
    else:
        from benchmarks.gpu.models import build, device

        place = device()
        model = build(name).model
        torch.cuda.synchronize()
    found: dict[str, Any] = {"import": imported - started, "model": time.perf_counter() - imported}
    import mosaic_compiler

    for variation, given in variations.items():
        torch.manual_seed(0)
        ids = torch.randint(200, 1000, (1, 500), device=place)
        first: list[float] = []
        began = time.perf_counter()

        def on_step(step: int, ids: torch.Tensor, first: list[float] = first) -> None:
            if not first:
                ids.tolist()
                first.append(time.perf_counter())

        mosaic_compiler.generate(
            model,
            ids,
            bidirectional=True,
            block_length=32,
            mask_token_id=3,
            on_step=on_step,
            **{"gen_length": 64, "steps": 12, **given},
        )
        found[variation] = first[0] - began
        found[f"{variation}, all"] = time.perf_counter() - began
        print(variation, found[variation], file=sys.stderr, flush=True)
    print(json.dumps(found))


def process(model: str, environment: Mapping[str, str], *more: str) -> dict[str, Any]:
    """What a process of its own tells."""
    command = [sys.executable, "-m", "benchmarks.startup", "--child", "--model", model, *more]
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode:
        raise SystemExit(ran.stdout[-2000:])
    told: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return told


LOAD = """
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained("examples/tiny-llada", dtype=torch.float32).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained("examples/tiny-llada")
"""


def commands(rounds: int) -> dict[str, Any]:
    """Seconds of what people type, first and again, medians; each round with folders of its own."""
    found: dict[str, list[float]] = {}
    mosaic = [sys.executable, "-c", "from mosaic_compiler.cli import main; main()"]
    for _ in range(rounds):
        folder = Path(tempfile.mkdtemp(prefix="startup_"))
        environment = {**os.environ, **{name: str(folder / name) for name in FOLDERS}}

        def run(name: str, command: list[str], told: str = "", environment: Any = environment) -> None:
            began = time.perf_counter()
            ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            seconds = time.perf_counter() - began
            if told:
                match = re.search(told, ran.stdout)
                assert match is not None, ran.stdout
                seconds = float(match[1])
            found.setdefault(name, []).append(seconds)
            print(name, f"{seconds:.2f}", flush=True)

        generate = [*mosaic, "generate", "--prompt", "hi", "--gen-length", "16"]
        demo = [sys.executable, "examples/demo.py", "--out", str(folder / "demo")]
        fit = [*mosaic, "fit", "--config", "LLaDA-8B", "--tokens", "4k", "--gpu", "24GiB"]
        run("load the model only", [sys.executable, "-c", LOAD])
        run("mosaic generate, first process ever", generate)
        run("mosaic generate, second process", generate)
        shutil.rmtree(folder)
        run("demo's compilation, cold", demo, r"compiled and planned in ([\d.]+) s")
        run("demo's compilation, warm", demo, r"compiled and planned in ([\d.]+) s")
        run("mosaic fit of 32 layers, first", fit)
        run("mosaic fit of 32 layers, second", fit)
        run("mosaic --help", [*mosaic, "--help"])
        shutil.rmtree(folder, ignore_errors=True)
    return {name: {"median": statistics.median(seconds), "all": seconds} for name, seconds in found.items()}


def main() -> None:
    """First and second process, with a cache folder of their own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="LLaDA-8B")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--child", action="store_true")
    parser.add_argument("--processes", type=int, default=3, help="one after the other, with the folders of the first")
    parser.add_argument(
        "--first", type=int, default=0, help="more processes that find nothing, of which one call counts"
    )
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.child:
        child(given.model, {"first": VARIATIONS["first"]} if given.first else VARIATIONS)
        return
    folder = Path(tempfile.mkdtemp(prefix="startup_"))
    environment = {**os.environ, **{name: str(folder / name) for name in FOLDERS}}
    rows = []
    for number in range(given.processes):
        if number:  # only what is ours helps
            shutil.rmtree(folder / "TORCHINDUCTOR_CACHE_DIR", ignore_errors=True)
            shutil.rmtree(folder / "TRITON_CACHE_DIR", ignore_errors=True)
        began = time.perf_counter()
        told = process(given.model, environment)
        rows.append({**told, "process": time.perf_counter() - began})
        print(number, json.dumps(rows[-1]), flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    first = []
    for _ in range(given.first):
        first.append(process(given.model, environment, "--first", "1")["first"])
        print("first", first[-1], flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    import torch

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "2 CPU cores"
    result = {"device": where, "torch": torch.__version__, "model": given.model, "processes": rows, "first": first}
    if given.model == "tiny-llada":
        result["commands"] = commands(given.rounds)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / f"startup_{given.model}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
