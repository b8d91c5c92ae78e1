"""What FlashAttention allocates on a GPU where it splits the keys, as numbers and as an expression in sizes.

With few queries there are fewer pairs of (head, 64 queries) than a device can work on at once, so it takes the keys in
parts, keeps a float32 result and a sum for each query and part, and adds them up
(aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp).
"""

from __future__ import annotations

import math
from typing import Any

import sympy

from mosaic_compiler.planning.few import LEAST_KEYS, MOST_ROWS, partial_bytes
from mosaic_compiler.planning.room import least_served

_ROWS = 64  # queries that one group of threads works on


def split_bytes(heads: int, rows: int, keys: int, depth: int, processors: int) -> int:
    """Bytes for ``rows`` queries in each of ``heads`` (of all batch entries together), on so many multiprocessors."""
    groups = heads * -(-rows // _ROWS)
    blocks = -(-keys // (256 if depth <= 64 else 128 if depth <= 128 else 64))
    counts = (processors, 2 * processors)  # versions differ in which they ask for
    parts = max(_parts(groups, count, blocks) for count in counts)
    return 0 if parts == 1 else 4 * parts * heads * rows * (-(-depth // 32) * 32 + 1)


def _parts(groups: int, processors: int, blocks: int) -> int:
    """``num_splits_heuristic``: the fewest parts at which the last wave of (group, part) is nearly as full as at best;
    one where a wave is nearly full without."""
    if groups >= 0.8 * processors:
        return 1
    full: dict[int, float] = {}
    for parts in range(1, min(128, processors, blocks) + 1):
        if parts == 1 or -(-blocks // parts) != -(-blocks // (parts - 1)):
            waves = groups * parts / processors
            full[parts] = waves / math.ceil(waves)
    return next(parts for parts, share in full.items() if share >= 0.85 * max(full.values()))


class SplitBytes(sympy.Function):  # type: ignore[misc]
    """``SplitBytes(heads, rows, keys, depth, processors, groups)``: the most of :func:`split_bytes` (and of
    :func:`~mosaic_compiler.planning.few.partial_bytes`) for ``rows`` queries or fewer, down to those that a program for
    ``rows`` still serves (half, and what was rounded up).  ``groups``: heads of keys, of all batch entries."""

    is_integer = True
    is_nonnegative = True

    @classmethod
    def eval(cls, *arguments: Any) -> sympy.Integer | None:
        if not all(argument.is_Integer for argument in arguments):
            return None
        heads, rows, keys, depth, processors, groups = map(int, arguments)
        if rows <= 0 or keys <= 0:
            return sympy.Integer(0)
        least = least_served(rows)
        ends = [min(last * _ROWS, rows) for last in range(-(-least // _ROWS), -(-rows // _ROWS) + 1)]
        busy = 2 * processors * _ROWS  # queries in all heads from which nothing is split
        sizes = [split_bytes(heads, end, keys, depth, processors) for end in ends if heads * (end - _ROWS) < busy]
        if heads > groups:
            sizes.append(_few_bytes(groups, rows, keys, depth, processors, heads // groups))
        return sympy.Integer(max(sizes, default=0))


class FewBytes(sympy.Function):  # type: ignore[misc]
    """``FewBytes(groups, rows, keys, depth, processors, share, bits)``: the most of
    :func:`~mosaic_compiler.planning.few.partial_bytes` for ``rows`` queries (of each of ``share`` heads) or fewer, as
    in :class:`SplitBytes`; for keys and values of so many bits (16 where that is not said)."""

    is_integer = True
    is_nonnegative = True

    @classmethod
    def eval(cls, *arguments: Any) -> sympy.Integer | None:
        if not all(argument.is_Integer for argument in arguments):
            return None
        return sympy.Integer(_few_bytes(*map(int, arguments)))


def _few_bytes(groups: int, rows: int, keys: int, depth: int, processors: int, share: int, bits: int = 16) -> int:
    if rows <= 0 or (keys < LEAST_KEYS and bits == 16):
        return 0
    few = range(least_served(rows), min(rows, MOST_ROWS // share if bits == 16 else rows) + 1)
    return max((partial_bytes(groups, share * count, keys, depth, processors, bits) for count in few), default=0)
