"""Attention whose queries each see a run of keys, one layer: our kernel, FlashAttention (causal), a mask, the floor."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.common import show, write
from benchmarks.gpu.few_queries import _milliseconds
from mosaic_compiler.kernels import few_queries
from mosaic_compiler.kernels.interval_attention import reference
from mosaic_compiler.planning.few import Tile

RATE, DEPTH = 660e12, 128
CASES = {"SDAR-8B": (32, 8), "LLaDA-8B": (32, 32)}
SIZES = ((4_096, 4_096), (16_384, 16_384), (40_960, 40_960), (4_096, 40_960), (32, 40_128))
VISIBLE = {
    "causal": lambda at: (None, at + 1),
    "blocks of 32": lambda at: (None, at // 32 * 32 + 32),
    "window of 1,024": lambda at: (at - 1023, at + 1),
}
TILES = {
    "128x64, 8 warps": Tile(128, 64, 8, 3, 1),
    "128x128, 8 warps": Tile(128, 128, 8, 3, 1),
    "128x64, 4 warps": Tile(128, 64, 4, 3, 1),
    "128x128, 8 warps, 2 stages": Tile(128, 128, 8, 2, 1),
    "64x64, 4 warps": Tile(64, 64, 4, 3, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--tiles", action="store_true", help="every tile, not only the chosen one")
    given = parser.parse_args()
    tiles = TILES if given.tiles else {}
    rows = [
        _row(name, heads, groups, queries, keys, seen, tiles)
        for name, (heads, groups) in CASES.items()
        for queries, keys in SIZES
        for seen in VISIBLE
    ]
    columns = ["model", "queries", "keys", "visible", "ours", "flash", "masked", "floor", "error"]
    show("milliseconds", columns, [[row[column] for column in columns] for row in rows])
    write("interval_attention", {"rows": rows}, given.out)


def _row(
    name: str, heads: int, groups: int, queries: int, keys: int, seen: str, tiles: dict[str, Tile]
) -> dict[str, Any]:
    """The queries are the last ones of the sequence."""
    q, k, v = (
        torch.randn(1, n, h, DEPTH, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for n, h in ((queries, heads), (keys, groups), (keys, groups))
    )
    at = torch.arange(keys - queries, keys, device="cuda").view(1, 1, -1, 1)
    first, last = VISIBLE[seen](at)
    scale, processors = DEPTH**-0.5, torch.cuda.get_device_properties(0).multi_processor_count
    low = torch.zeros_like(at) if first is None else first.clamp(0, keys)
    pairs = int((last.clamp(0, keys) - low).sum())
    ours = functools.partial(_ours, first=first, last=last, scale=scale, processors=processors)
    row: dict[str, Any] = {
        "model": name, "queries": queries, "keys": keys, "visible": seen, "ours": _milliseconds(ours, [(q, k, v)]),
        "floor": max(4e3 * pairs * heads * DEPTH / RATE, 4e3 * groups * min(keys, pairs) * DEPTH / 3e12),
        "flash": None, "masked": None,
    }  # fmt: skip
    if queries == keys and seen == "causal":
        flash: Callable[..., Any] = functools.partial(
            torch.ops.aten._scaled_dot_product_flash_attention, is_causal=True
        )
        row["flash"] = _milliseconds(flash, [(q, k, v)])
    if queries * keys <= 16_384 * 16_384:
        positions = torch.arange(keys, device="cuda")
        mask = (positions >= low) & (positions < last)
        wide = [(q, k.repeat_interleave(heads // groups, 1), v.repeat_interleave(heads // groups, 1))]
        row["masked"] = _milliseconds(functools.partial(scaled_dot_product_attention, attn_mask=mask), wide)
    part = slice(max(0, queries - 300), queries)  # the last queries, in float32
    exact = reference(
        q[:, :, part].float(), k.float(), v.float(), None if first is None else first[:, :, part], last[:, :, part],
        None, scale,
    )  # fmt: skip
    row["error"] = float((ours(q, k, v)[:, :, part].float() - exact).norm() / exact.norm())
    chosen = few_queries.MANY
    for words, tile in tiles.items() if queries > 512 else ():
        few_queries.MANY = tile
        try:
            row[words] = _milliseconds(ours, [(q, k, v)])
        except Exception as error:  # too much shared memory
            row[words] = str(error)[:80]
    few_queries.MANY = chosen
    print(row, flush=True)
    return row


def _ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: Any) -> torch.Tensor:
    out = torch.empty_like(q)
    return few_queries.interval_attention_(
        out, q, k, v, how["first"], how["last"], None, how["scale"], how["processors"]
    )


if __name__ == "__main__":
    main()
