"""Attention of 32 queries against many keys, one layer: the kernel for few queries, FlashAttention, and the floor.

Several buffers are used in turns, so that the second-level cache does not hold them; calls are replayed as a graph.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import show, write
from mosaic_compiler.kernels.few_queries import few_query_attention, few_query_reference

BANDWIDTH, CALLS, QUERIES, DEPTH = 3.0e12, 24, 32, 128
CASES = {"Dream-7B": (28, 4, (16_384, 61_440, 262_144)), "LLaDA-8B": (32, 32, (4_096, 16_384, 61_440))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    rows = [_row(name, heads, groups, keys) for name, (heads, groups, lengths) in CASES.items() for keys in lengths]
    columns = ["model", "keys", "few queries", "flash", "floor", "largest error"]
    show("milliseconds", columns, [[row[column] for column in columns] for row in rows])
    write("few_queries", {"queries": QUERIES, "rows": rows}, given.out)


def _row(name: str, heads: int, groups: int, keys: int) -> dict[str, Any]:
    nbytes = 4 * groups * keys * DEPTH
    buffers = max(2, min(16, (200 << 20) // nbytes + 1))
    made = [_operands(heads, groups, keys) for _ in range(buffers)]
    scale, processors = DEPTH**-0.5, torch.cuda.get_device_properties(0).multi_processor_count
    few = functools.partial(few_query_attention, scale=scale, processors=processors)
    flash = functools.partial(torch.ops.aten._scaled_dot_product_flash_attention, scale=scale)
    error = (few(*made[0]).float() - few_query_reference(*made[0], scale).float()).abs().max()
    row = {
        "model": name, "keys": keys, "few queries": milliseconds(few, made), "flash": milliseconds(flash, made),
        "floor": 1e3 * nbytes / BANDWIDTH, "largest error": float(error),
    }  # fmt: skip
    print(row, flush=True)
    return row


def _operands(heads: int, groups: int, keys: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values as a step has them: rows outermost in memory."""
    shapes = ((1, QUERIES, heads, DEPTH), (1, keys, groups, DEPTH), (1, keys, groups, DEPTH))
    return tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for shape in shapes)


def milliseconds(call: Callable[..., Any], operands: list[tuple[torch.Tensor, ...]]) -> float:
    """Of one call, best of several replays of many."""
    for given in operands:
        call(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(CALLS):
            call(*operands[number % len(operands)])
    best = float("inf")
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) / CALLS)
    return best


if __name__ == "__main__":
    main()
