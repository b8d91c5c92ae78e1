"""Where the time of a step goes: kernels by what they do, the floor of matmul and attention, gaps between kernels.

The floor is the model's arithmetic at the rates in :data:`MATMUL_RATE` and :data:`ATTENTION_RATE`, which an H100
reaches on large shapes.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from benchmarks.gpu.benchmark import Benchmark
from benchmarks.gpu.models import MODELS, Session, arguments, clean, synchronize

MATMUL_RATE, ATTENTION_RATE = 780e12, 650e12

_KINDS = {
    "attention": r"flash|fmha|cudnn.*sdpa|attention|sm90.*bwd|cudnn_generated_fort_native_sdpa",
    "matmul": r"gemm|cutlass|nvjet|cublas|splitk|xmma",
    "fused": r"^triton_",
    "sort": r"sort|Sort|radix|Radix|cub::",
}


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name; ``other`` for the ops that run alone."""
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, kernel)), "other")


def floor_ms(name: str, layers: int, tokens: int, rows: int) -> dict[str, float]:
    """Milliseconds of matmuls and attention for ``rows`` masked rows (the last layer runs on them only)."""
    dims = MODELS[name]
    head = dims.width // dims.heads
    kv, feed = 2 * dims.kv_heads * head, 3 * dims.feed_forward * (8 if dims.experts else 1)
    per_row = dims.width * (2 * dims.width + feed)
    matmuls = 2 * (tokens * layers * dims.width * kv + (tokens * (layers - 1) + rows) * per_row)
    matmuls += 2 * rows * dims.width * dims.vocabulary
    attention = 4 * dims.width * tokens * (tokens * (layers - 1) + rows)
    return {"matmul": matmuls / MATMUL_RATE * 1e3, "attention": attention / ATTENTION_RATE * 1e3}


def measure(session: Session, lengths: list[int], systems: tuple[str, ...] = ("inductor", "mosaic")) -> list[Any]:
    """One row per length and system, with milliseconds by kind."""
    rows = []
    with torch.no_grad():
        session.warm_up()
        for tokens in lengths:
            given = arguments(session.name, tokens)
            floor = floor_ms(session.name, session.layers or MODELS[session.name].layers, tokens, tokens // 2)
            for system in systems:
                kinds, top, span = profiled(session.function(system), given)
                rows.append(
                    {
                        "model": session.name, "tokens": tokens, "system": system, "span_ms": span, "ms": kinds,
                        "gaps_ms": span - sum(kinds.values()), "floor_ms": floor, "top": top,
                    }
                )  # fmt: skip
                print({k: v for k, v in rows[-1].items() if k != "top"}, flush=True)
                clean()
    return rows


def profiled(function: Any, given: tuple[Any, ...]) -> tuple[dict[str, float], list[tuple[str, int, float]], float]:
    """Milliseconds by kind, the kernels that take longest (name, calls, ms), and from first start to last end."""
    for _ in range(2):
        function(*given)
    synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function(*given)
        synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA and e.time_range.end]
    kinds: dict[str, float] = {}
    by_name: dict[str, list[float]] = {}
    for event in events:
        took = (event.time_range.end - event.time_range.start) / 1e3
        kinds[kind_of(event.name)] = kinds.get(kind_of(event.name), 0.0) + took
        by_name.setdefault(event.name, []).append(took)
    top = sorted(((name[:90], len(took), sum(took)) for name, took in by_name.items()), key=lambda entry: -entry[2])
    span = (max(e.time_range.end for e in events) - min(e.time_range.start for e in events)) / 1e3
    return kinds, top[:24], span


_COLUMNS = ("matmul", "attention", "fused", "sort", "other")

BENCHMARK = Benchmark(
    "breakdown",
    lambda session, given: measure(session, sorted({min(given.lengths), max(given.lengths)})),
    "milliseconds of a step",
    ["model", "tokens", "system", "step", "floor", *_COLUMNS, "gaps"],
    lambda r: [
        r["model"], r["tokens"], r["system"], r["span_ms"], sum(r["floor_ms"].values()),
        *(r["ms"].get(kind) for kind in _COLUMNS), r["gaps_ms"],
    ],
)  # fmt: skip


if __name__ == "__main__":
    BENCHMARK.alone(__doc__)
