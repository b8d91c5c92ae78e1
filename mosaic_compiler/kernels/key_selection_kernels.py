"""The Triton kernels of ``key_selection.py``.  Another number of queries, keys, heads or pieces compiles nothing."""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _scores(q, key, start, offset, step, keys, low, high, only, only_key, scale,
            DEPTH: tl.constexpr, BOUNDS: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Of some rows and keys, times ``scale``: [BLOCK_M, BLOCK_N], -inf where a row does not see a key."""
    place = start + offset
    column = tl.arange(0, DEPTH)
    pointers = key + start * step + offset[:, None] * step + column[None, :]
    k = tl.load(pointers, mask=(place < keys)[:, None], other=0.0)
    if UPCAST:
        scores = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
    else:
        scores = tl.dot(q, tl.trans(k))
    hidden = (place >= keys)[None, :]
    if BOUNDS:
        hidden = hidden | (place[None, :] < low[:, None]) | (place[None, :] >= high[:, None])
        if only is not None:
            counts = tl.load(only + place.to(tl.int64) * only_key, mask=place < keys, other=0)
            hidden = hidden | (counts == 0)[None, :]
    return tl.where(hidden, float("-inf"), scores * scale)


@triton.jit
def _rows(query, first_key, last_key, row, rows, queries, batch, head, keys,
          q_batch, q_head, q_row, f_batch, f_row, l_batch, l_row, DEPTH: tl.constexpr):  # fmt: skip
    """Queries of some rows, and the runs of keys that they see."""
    is_row = row < rows
    row_head = head * (rows // queries) + row // queries
    row_query = (row % queries).to(tl.int64)
    offset = batch * q_batch + row_head * q_head + row_query * q_row
    q = tl.load(query + offset[:, None] + tl.arange(0, DEPTH)[None, :], mask=is_row[:, None], other=0.0)
    low = tl.where(is_row, 0, keys)  # rows that there are not see nothing
    high = tl.where(is_row, keys, 0)
    if first_key is not None:
        first = tl.load(first_key + batch * f_batch + row_query * f_row, mask=is_row, other=0)
        low = tl.maximum(low, tl.minimum(tl.maximum(first, 0), keys).to(tl.int32))
    if last_key is not None:
        last = tl.load(last_key + batch * l_batch + row_query * l_row, mask=is_row, other=0)
        high = tl.minimum(high, tl.minimum(tl.maximum(last, 0), keys).to(tl.int32))
    return q, low, high


@triton.jit(do_not_specialize=["groups", "queries", "keys", "rows", "row_blocks", "heads", "pieces"])
def sums_kernel(
    query,  # [B, H, R, d]
    key,  # [B, groups, N, d]
    sums,  # float32 [B * groups, pieces, rows]: logs, base 2, of sums of exponentials over a piece of the keys
    first_key, last_key, only, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, f_batch, f_row, l_batch, l_row, c_batch, c_key,
    groups, queries, keys, rows, row_blocks, heads, pieces,
    DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A block of the rows of one group against one piece of the keys."""
    program = tl.program_id(0)
    row = program % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    place, piece = program // row_blocks % heads, program // row_blocks // heads
    batch, head = (place // groups).to(tl.int64), (place % groups).to(tl.int64)
    q, low, high = _rows(query, first_key, last_key, row, rows, queries, batch, head, keys,
                         q_batch, q_head, q_row, f_batch, f_row, l_batch, l_row, DEPTH)  # fmt: skip
    blocks = tl.cdiv(keys, BLOCK_N)
    offset = tl.arange(0, BLOCK_N)
    source = key + batch * k_batch + head * k_head
    counts = only
    if only is not None:
        counts = only + batch * c_batch
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    begin, end = piece * blocks // pieces, (piece + 1) * blocks // pieces
    for index in tl.range(0, end - begin):
        block = (begin + index).to(tl.int64)
        scores = _scores(q, source, block * BLOCK_N, offset, k_row, keys, low, high, counts, c_key, scale,
                         DEPTH, BOUNDS, UPCAST)  # fmt: skip
        higher = tl.maximum(peak, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weight = weight * tl.exp2(peak - level) + tl.sum(tl.exp2(scores - level[:, None]), 1)
        peak = higher
    found = tl.where(weight == 0.0, float("-inf"), peak + tl.log2(weight))
    tl.store(sums + (place.to(tl.int64) * pieces + piece) * rows + row, found, mask=row < rows)


@triton.jit(do_not_specialize=["groups", "queries", "keys", "rows", "row_blocks", "heads", "pieces"])
def best_kernel(
    query, key,
    sums,  # as sums_kernel leaves them
    best,  # float32 [B, groups, N]: the log, base 2, of the largest probability that a row gives a key
    first_key, last_key, only, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, f_batch, f_row, l_batch, l_row, c_batch, c_key,
    groups, queries, keys, rows, row_blocks, heads, pieces,
    DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDS: tl.constexpr, UPCAST: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """All rows of one group against a block of its keys."""
    program = tl.program_id(0)
    place, block = program % heads, program // heads
    batch, head = (place // groups).to(tl.int64), (place % groups).to(tl.int64)
    source = key + batch * k_batch + head * k_head
    counts = only
    if only is not None:
        counts = only + batch * c_batch
    offset = tl.arange(0, BLOCK_N)
    every = tl.arange(0, MOST)
    found = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for row_block in range(row_blocks):
        row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        q, low, high = _rows(query, first_key, last_key, row, rows, queries, batch, head, keys,
                             q_batch, q_head, q_row, f_batch, f_row, l_batch, l_row, DEPTH)  # fmt: skip
        slots = (place.to(tl.int64) * pieces + every[None, :]) * rows + row[:, None]
        parts = tl.load(sums + slots, mask=(row < rows)[:, None] & (every < pieces)[None, :], other=float("-inf"))
        peak = tl.max(parts, 1)
        level = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.sum(tl.exp2(parts - level[:, None]), 1)
        log = tl.where(total == 0.0, 0.0, level + tl.log2(total))  # of rows that see nothing, all scores are -inf
        scores = _scores(q, source, block.to(tl.int64) * BLOCK_N, offset, k_row, keys, low, high, counts, c_key, scale,
                         DEPTH, BOUNDS, UPCAST)  # fmt: skip
        scores = tl.where((row < rows)[:, None], scores - log[:, None], float("-inf"))
        found = tl.maximum(found, tl.max(scores, 0))
    position = block * BLOCK_N + offset
    tl.store(best + place.to(tl.int64) * keys + position, found, mask=position < keys)
