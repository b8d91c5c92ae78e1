"""Attention of few queries against many keys: into how many pieces the keys are cut, and the memory that takes.

The heads of a group are packed as rows; one program works on a block of them against one piece of the keys, and pieces
are merged by their log-sum-exps (``kernels/few_queries.py``).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

MOST_ROWS = 512
"""Rows (heads of a group times queries) up to which queries count as few: as far as was measured."""
LEAST_KEYS = 1024
MOST_PIECES = 128
_LEAST_PIECE = 512  # keys
_OVERHEAD = 256  # what starting and ending a program costs, in keys


@dataclass(frozen=True)
class Tile:
    """Launch parameters of the kernel.

    Attributes:
        rows, keys: of one block.
        warps, stages: of one program.
        programs: that share a multiprocessor.
        takes_words: of codes, 4 bytes at a time, where there are enough of them.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int
    takes_words: bool = False


SMALL, LARGE = Tile(64, 64, 4, 3, 2), Tile(128, 128, 8, 3, 1)
"""Measured on an H100, bf16, 7 heads a group, 32 queries: ``SMALL`` is 4 % faster at 61,440 keys, ``LARGE`` 2 % at
262,144 (what they take: ``benchmarks/results/few_queries.json``)."""

MANY = Tile(128, 64, 8, 3, 1)
"""For many queries, which each see some of the keys."""


CODED = {4: Tile(32, 64, 2, 3, 4, takes_words=True), 8: Tile(32, 32, 2, 3, 4, takes_words=True)}
CODED_MANY = Tile(128, 64, 8, 3, 1)
"""For keys and values in so many bits; for more than 32 rows.  The fastest of what was measured on an H100
(``benchmarks/results/coded_attention.json``)."""


def tile_for(keys: int, rows: int = MOST_ROWS, bits: int = 16) -> Tile:
    """The fastest tile for so many keys."""
    if bits < 16:
        return CODED[bits] if rows <= CODED[bits].rows else CODED_MANY
    return SMALL if keys < 128 * 1024 else LARGE


@functools.lru_cache(maxsize=4096)
def pieces(heads: int, rows: int, keys: int, processors: int, bits: int = 16) -> int:
    """Pieces of the keys: the fewest of those that take the least time.

    Args:
        heads: of keys, in all batch entries together.
        rows: heads of a group times queries.
        processors: multiprocessors of the device.
        bits: of a number of keys and values.
    """
    tile = tile_for(keys, rows, bits)
    blocks = -(-keys // tile.keys)
    programs, places = heads * -(-rows // tile.rows), processors * tile.programs
    best, least = 1, math.inf
    for count in range(1, max(1, min(MOST_PIECES, keys // _LEAST_PIECE, blocks)) + 1):
        time = -(-programs * count // places) * (-(-blocks // count) * tile.keys + _OVERHEAD)
        if time < least:
            best, least = count, time
    return best


def partial_bytes(heads: int, rows: int, keys: int, depth: int, processors: int, bits: int = 16) -> int:
    """Bytes of the partial results and their log-sum-exps, float32."""
    count = pieces(heads, rows, keys, processors, bits)
    return 0 if count == 1 else 4 * heads * count * rows * (depth + 1)
