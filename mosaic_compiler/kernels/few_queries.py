"""Attention of few queries against many keys, on a GPU: heads of a group packed as rows, keys in pieces.

FlashAttention gives each head of a group a program of its own, which reads the group's keys again: with 7 heads a group
it takes three to five times as long as reading keys and values once does.  Here they are read once.  Pieces of the keys
are merged exactly::

    o = sum_i 2^(l_i - l) o_i,   l = log2 sum_i 2^l_i        for partial results o_i with log-sum-exps l_i (base 2)

The kernels are in ``few_queries_kernels.py``, which needs Triton; the reference beside them does not.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from typing import Any

import torch
from torch import Tensor

from mosaic_compiler.planning.few import LEAST_KEYS, MANY, MOST_PIECES, MOST_ROWS, partial_bytes, pieces, tile_for

DTYPES = (torch.bfloat16, torch.float16)
DEPTHS = (16, 32, 64, 128)
LOG2E = 1.4426950408889634


def few_query_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, processors: int) -> Tensor:
    """softmax(scale * query @ key^T) @ value, head by head.

    Args:
        query: [B, H, M, d], bf16 or fp16 (float32 only in Triton's interpreter), d a power of two from 16 to 128.
        key, value: [B, H / g, N, d]; the last dim of all three is dense.
        processors: multiprocessors, see :func:`~mosaic_compiler.planning.few.pieces`.

    Returns:
        [B, H, M, d], with the query's strides where that is dense.
    """
    out = torch.empty_like(query)  # also in memory, as the kernels that this stands for do
    return interval_attention_(out, query, key, value, None, None, None, scale, processors)


def interval_attention_(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    only: Tensor | None,
    scale: float,
    processors: int,
    done: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """The same for queries, few or many, that each see a run of the keys.

    Args:
        out: as the query, with a dense last dim.
        first, last: int64 [1 or B, 1, M, 1]: a query sees keys [first, last); ``None``: from the first on, to the last
            one.
        only: bool [1 or B, 1, 1, N], of those keys the ones that count.
        done, sums: [B, H, M, d] and float32 [B, H, M]: the results for keys [0, n] of query n, and the logs of their
            sums of exponentials; the keys behind are added to them.
    """
    from mosaic_compiler.kernels import few_queries_kernels as kernels

    batch, heads, queries, depth = query.shape
    groups, keys = key.shape[1], key.shape[2]
    rows = heads // groups * queries
    has_bounds = first is not None or last is not None or only is not None
    tile = tile_for(keys) if rows <= MOST_ROWS else MANY
    is_few = rows <= MOST_ROWS and keys >= LEAST_KEYS and done is None
    count = pieces(batch * groups, rows, keys, processors) if is_few else 1
    target, parts = partial_results(out, batch * groups * count * rows) if count > 1 else (out, out)
    sources: Any = [_descriptor(tensor, tile.keys) for tensor in (key, value)]
    has_descriptors = _has_descriptors(query.device) and None not in sources
    blocks = -(-rows // tile.rows)
    kernels.attention_kernel[(blocks * batch * groups * count,)](
        query, *(sources if has_descriptors else (key, value)), target, parts, scale * LOG2E,
        *steps_of(query), *steps_of(key), *steps_of(value), *steps_of(out),
        groups, queries, keys, rows, blocks, batch * groups, count,
        first, last, only, done, sums, *(steps_of(done) if done is not None else (0, 0, 0)),
        *(sums.stride()[:3] if sums is not None else (0, 0, 0)),
        *bound_steps(first, 2), *bound_steps(last, 2), *bound_steps(only, 3),
        DEPTH=depth, BLOCK_M=tile.rows, BLOCK_N=tile.keys, SPLIT=count > 1, DESCRIPTORS=has_descriptors,
        BOUNDS=has_bounds, UPCAST=is_interpreted(), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return merge_(out, target, parts, groups, count) if count > 1 else out


def partial_results(out: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Memory for so many rows of partial results, as long as those of ``out``, and for their log-sum-exps."""
    depth = out.shape[3]
    both = out.new_empty(count * (depth + 1), dtype=torch.float32)
    target, sums = torch.split(both, [count * depth, count])
    return target, sums


def merge_(out: Tensor, partial: Tensor, sums: Tensor, groups: int, pieces: int) -> Tensor:
    """The results [B, H, M, d] of pieces [B * groups, pieces, H / groups * M, d] of the keys, by their log-sum-exps."""
    from mosaic_compiler.kernels import few_queries_kernels as kernels

    batch, heads, queries, depth = out.shape
    rows = heads // groups * queries
    kernels.merge_kernel[(rows, batch * groups)](
        partial, sums, out, *steps_of(out), groups, queries, rows, pieces,
        DEPTH=depth, MOST=MOST_PIECES, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def few_query_reference(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The same in plain PyTorch, in float32."""
    batch, heads, queries, depth = query.shape
    packed = query.float().reshape(batch, key.shape[1], -1, depth)
    weights = torch.softmax(packed @ key.float().transpose(-1, -2) * scale, -1)
    return (weights @ value.float()).reshape(batch, heads, queries, depth).to(query.dtype)


def serves(query: list[int], key: list[int], dtype: str) -> bool:
    """The kernel takes these shapes (as :func:`few_query_attention`), and is faster than FlashAttention there: groups
    of heads, few rows, many keys."""
    heads, queries, depth = query[1:]
    groups, keys = key[1:3]
    shape = depth in DEPTHS and groups and heads % groups == 0
    rows = heads // groups * queries if shape else 0
    fits = bool(shape) and heads > groups and 0 < rows <= MOST_ROWS and keys >= LEAST_KEYS
    return fits and dtype in map(str, DTYPES) and has_triton()


def scratch_for(query: list[int], key: list[int], processors: int) -> int:
    """Bytes that it allocates besides its result."""
    batch, heads, queries, depth = query
    return partial_bytes(batch * key[1], heads // key[1] * queries, key[2], depth, processors)


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def is_interpreted() -> bool:
    """Kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _has_descriptors(device: torch.device) -> bool:
    """Blocks of a tensor can be copied by the device's copy engine."""
    return is_interpreted() or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0))


def steps_of(tensor: Tensor) -> tuple[int, ...]:
    """The first three strides; one along a dim of size 1 means nothing."""
    return tuple(0 if size == 1 else step for size, step in zip(tensor.shape[:3], tensor.stride()[:3], strict=True))


def bound_steps(bound: Tensor | None, dim: int) -> tuple[int, int]:
    """Strides along batch entries and along queries (or keys)."""
    return (0, 0) if bound is None else tuple(0 if bound.shape[d] == 1 else bound.stride(d) for d in (0, dim))  # type: ignore[return-value]


def _descriptor(tensor: Tensor, keys: int) -> Any:
    """What the copy engine needs to know of keys or values; ``None`` where they do not lie as it needs them."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    size, depth = tensor.dtype.itemsize, tensor.shape[3]
    strides = [depth if n == 1 else step for n, step in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)]
    if tensor.data_ptr() % 16 or any(step <= 0 or step * size % 16 or step * size >= 1 << 40 for step in strides):
        return None
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, keys, depth])


def scale_of(given: float | None, depth: int) -> float:
    """The scale of an attention, as PyTorch takes it."""
    return 1 / math.sqrt(depth) if given is None else given
