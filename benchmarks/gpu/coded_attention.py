"""Attention of 32 queries against keys and values in fewer bits, one layer, and choosing keys for them.

Several buffers are used in turns, so that the second-level cache does not hold them; calls are replayed as a graph.
``floor`` is the time that reading codes and scales once takes; of Dream's shape (7 heads a group) products alone take
longer: ``arithmetic``.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import show, write
from benchmarks.gpu.few_queries import BANDWIDTH, DEPTH, QUERIES, milliseconds
from mosaic_compiler.kernels.coded_attention import attend_codes_, numbers_of
from mosaic_compiler.kernels.interval_attention import reference
from mosaic_compiler.kernels.key_selection import select_keys_
from mosaic_compiler.planning import few
from mosaic_compiler.planning.precisions import PRECISIONS

RATE = 989e12
KEYS = 61_440
SHAPES = {"LLaDA-8B": (32, 32), "Dream-7B": (28, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--tiles", action="store_true", help="other tiles of the kernel as well")
    parser.add_argument("--compile", type=int, nargs=2, default=None, help="compile one part of so many, and end")
    given = parser.parse_args()
    rows = []
    cases = [
        (name, precision, tile)
        for name in SHAPES
        for precision in ("int4", "int8", "fp8")
        for tile in _tiles(name, PRECISIONS[precision].bits, given.tiles)
    ]
    for number, case in enumerate(cases):
        if given.compile is None or number % given.compile[1] == given.compile[0]:
            rows.append(_row(*case, given.compile is not None))
    if given.compile is not None:
        return
    columns = ["model", "precision", "tile", "ms", "floor", "share", "arithmetic", "error"]
    show("milliseconds", columns, [[row[column] for column in columns] for row in rows])
    chosen = [_choosing(name, keys) for name in SHAPES for keys in (4096, 16_384, KEYS)]
    write("coded_attention", {"queries": QUERIES, "keys": KEYS, "rows": rows, "choosing": chosen}, given.out)


def _tiles(name: str, bits: int, more: bool) -> list[few.Tile]:
    known = [few.CODED[bits] if name == "LLaDA-8B" else few.CODED_MANY]
    if not more or name != "LLaDA-8B":
        return known
    others = [(32, 32, 1, 3, 8), (32, 32, 1, 3, 4), (32, 64, 2, 3, 4), (32, 64, 2, 3, 2), (32, 32, 2, 3, 4)]
    return known + [tile for other in others if (tile := few.Tile(*other, takes_words=True)) not in known]


def _row(name: str, precision: str, tile: few.Tile, is_short: bool) -> dict[str, Any]:
    heads, groups = SHAPES[name]
    bits = PRECISIONS[precision].bits
    if name == "LLaDA-8B":
        few.CODED[bits] = replace(tile)
        few.pieces.cache_clear()
    keys = 4096 if is_short else KEYS
    nbytes = 2 * groups * keys * (DEPTH * bits // 8 + 4)
    made = [_operands(heads, groups, keys, precision) for _ in range(1 if is_short else 2 + (200 << 20) // nbytes // 4)]
    call = functools.partial(_call, precision=precision)
    error = _error(_operands(heads, groups, 4096, precision), precision)
    if is_short:
        return {}
    row = {
        "model": name, "precision": precision, "tile": str((tile.rows, tile.keys, tile.warps, tile.programs)),
        "ms": milliseconds(call, made), "floor": 1e3 * nbytes / BANDWIDTH, "error": error,
        "arithmetic": 1e3 * 4 * heads * QUERIES * keys * DEPTH / RATE,
    }  # fmt: skip
    row["share"] = row["floor"] / row["ms"]
    print(row, flush=True)
    return row


def _call(*operands: Any, precision: str) -> torch.Tensor:
    return attend_codes_(torch.empty_like(operands[0]), *operands, None, None, None, None, precision)


def _error(operands: tuple[torch.Tensor, ...], precision: str) -> float:
    """Norm of the difference to float64, relative to that of the result."""
    query, key, key_scale, value, value_scale, own_key, own_value, rows = operands
    exact = [
        (numbers_of(codes, precision) * scale).double().index_copy(2, rows[0, 0], own.double())
        for codes, scale, own in ((key, key_scale, own_key), (value, value_scale, own_value))
    ]
    expected = reference(query.double(), *exact, None, None, None, None)
    got = _call(*operands, precision=precision)
    return float((got.double() - expected).norm() / expected.norm())


def _operands(heads: int, groups: int, keys: int, precision: str) -> tuple[torch.Tensor, ...]:
    """Queries, codes and scales as a step has them: rows outermost in memory."""
    wide = DEPTH * PRECISIONS[precision].bits // 8

    def by_row(value: torch.Tensor) -> torch.Tensor:
        return value.transpose(1, 2)

    query, *own = (
        by_row(torch.randn(1, QUERIES, count, DEPTH, device="cuda", dtype=torch.bfloat16))
        for count in (heads, groups, groups)
    )
    parts = []
    for _ in range(2):
        codes = torch.randint(0, 256, (1, keys, groups, wide), device="cuda", dtype=torch.uint8)
        codes.masked_fill_((codes & 127) == 127, 3)  # no NaN of fp8
        codes = codes.view(torch.int8) if precision == "int8" else codes
        parts += [
            by_row(codes),
            by_row(0.1 * torch.rand(1, keys, groups, 1, device="cuda") / PRECISIONS[precision].bits),
        ]
    rows = torch.arange(keys - 3 * QUERIES, keys - 2 * QUERIES, device="cuda").view(1, 1, -1)
    return query, *parts, *own, rows


def _choosing(name: str, keys: int) -> dict[str, Any]:
    """Milliseconds of choosing 5 % of the keys, one set per head."""
    heads, groups = SHAPES[name]
    query, key = (
        torch.randn(1, count, many, DEPTH, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for count, many in ((QUERIES, heads), (keys, groups))
    )
    rows = torch.arange(keys - QUERIES, keys, device="cuda").view(1, -1)
    out = torch.empty(1, groups, keys // 20, device="cuda", dtype=torch.int64)
    call = functools.partial(select_keys_, rows=rows, first=None, last=None, only=None, scale=None, score="probability")
    row = {"model": name, "keys": keys, "ms": milliseconds(lambda *given: call(out, *given), [(query, key)])}
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
