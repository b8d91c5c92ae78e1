"""The Triton kernels of ``few_queries.py``.  Another number of queries, keys, heads or pieces compiles nothing."""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _load(source, batch, head, start, step, offsets, keys, MASKED: tl.constexpr, DEPTH: tl.constexpr,
          BLOCK_N: tl.constexpr, DESCRIPTORS: tl.constexpr):  # fmt: skip
    """Keys (or values) ``start : start + BLOCK_N`` of a head: [BLOCK_N, DEPTH]; absent ones are 0.

    ``source`` is a descriptor of the whole tensor, or a pointer to the head's first key.
    """
    if DESCRIPTORS:
        tile = tl.reshape(source.load([batch, head, start, 0]), (BLOCK_N, DEPTH))
    else:
        pointers = source + start.to(tl.int64) * step + offsets
        if MASKED:
            tile = tl.load(pointers, mask=(start + tl.arange(0, BLOCK_N) < keys)[:, None], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def _step(q, k, v, hidden, total, peak, weight, scale, UPCAST: tl.constexpr):
    """Online softmax over some more keys; ``hidden`` [BLOCK_M or 1, BLOCK_N] keys do not count."""
    if UPCAST:  # the interpreter multiplies the bits of bfloat16 numbers
        scores = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
    else:
        scores = tl.dot(q, tl.trans(k))
    if hidden is not None:
        scores = tl.where(hidden, float("-inf"), scores)
    higher = tl.maximum(peak, tl.max(scores, 1) * scale)
    level = higher
    if hidden is not None:
        level = tl.where(higher == float("-inf"), 0.0, higher)  # nothing was seen yet
    weights = tl.exp2(scores * scale - level[:, None])
    rescale = tl.exp2(peak - level)
    weight = weight * rescale + tl.sum(weights, 1)
    total = total * rescale[:, None]
    if UPCAST:
        total = tl.dot(weights, v.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(weights.to(v.dtype), v, total)
    return total, higher, weight


@triton.jit
def _hidden(start, offset, keys, low, high, only, only_key, ONLY: tl.constexpr):
    """Which keys of a block which rows do not see: [BLOCK_M, BLOCK_N]."""
    place = start + offset
    hidden = (place[None, :] < low[:, None]) | (place[None, :] >= high[:, None])
    if ONLY:
        counts = tl.load(only + place.to(tl.int64) * only_key, mask=place < keys, other=0)
        hidden = hidden | (counts == 0)[None, :]
    return hidden


@triton.jit(do_not_specialize=["groups", "queries", "keys", "rows", "row_blocks", "heads", "pieces"])
def attention_kernel(
    query,  # [B, H, M, d]
    key,  # [B, groups, N, d], or a descriptor with blocks [1, 1, BLOCK_N, d]
    value,  # as key
    target,  # SPLIT: partial results [B * groups, pieces, rows, d], float32; else the result [B, H, M, d]
    sums,  # SPLIT: log-sum-exps, base 2, float32 [B * groups, pieces, rows]
    scale,  # times log2(e)
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    groups, queries, keys,
    rows,  # heads of a group * queries
    row_blocks,
    heads,  # B * groups
    pieces,
    first_key,  # int64 [B or 1, M]: a query sees keys from here on; None: all
    last_key,  # int64 [B or 1, M]: and before this one
    only,  # bool [B or 1, N]: of those, the ones that count
    done,  # [B, H, M, d], the result for the keys up to a query's own; None: begin with the first
    done_sums,  # float32 [B, H, M], its log-sum-exps
    d_batch, d_head, d_row, s_batch, s_head, s_row,
    f_batch, f_row, l_batch, l_row, c_batch, c_key,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    BOUNDS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """A block of the rows of one group against one piece of the keys.  Programs that read the same keys are neighbours,
    so that L2 serves all but the first."""
    program = tl.program_id(0)
    row_block = row_blocks - 1 - program % row_blocks  # later rows often see more: they begin first
    place = program // row_blocks % heads
    piece = program // row_blocks // heads
    batch, head = place // groups, place % groups
    wide_batch, wide_head = batch.to(tl.int64), head.to(tl.int64)

    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < rows
    row_head = wide_head * (rows // queries) + row // queries
    row_query = (row % queries).to(tl.int64)
    column = tl.arange(0, DEPTH)
    q_offset = wide_batch * q_batch + row_head * q_head + row_query * q_row
    q = tl.load(query + q_offset[:, None] + column[None, :], mask=is_row[:, None], other=0.0)

    blocks, whole = tl.cdiv(keys, BLOCK_N), keys // BLOCK_N
    if BOUNDS:
        low = tl.zeros([BLOCK_M], tl.int32)
        high = tl.full([BLOCK_M], 0, tl.int32) + keys
        if done is not None:
            low += row_query.to(tl.int32) + 1
        if first_key is not None:
            low = tl.load(first_key + wide_batch * f_batch + row_query * f_row, mask=is_row, other=0)
            low = tl.minimum(tl.maximum(low, 0), keys).to(tl.int32)
        if last_key is not None:
            high = tl.load(last_key + wide_batch * l_batch + row_query * l_row, mask=is_row, other=0)
            high = tl.minimum(tl.maximum(high, 0), keys).to(tl.int32)
        counts = only
        if only is not None:
            counts = only + wide_batch * c_batch
        # blocks [begin, end) are seen by some row, [inner, outer) by all of them
        begin = tl.min(tl.where(is_row, low, keys), 0) // BLOCK_N
        end = tl.cdiv(tl.max(tl.where(is_row, high, 0), 0), BLOCK_N)
        end = tl.maximum(end, begin)
        inner = tl.cdiv(tl.max(tl.where(is_row, low, 0), 0), BLOCK_N)
        outer = tl.min(tl.where(is_row, high, keys), 0) // BLOCK_N
        if only is not None:
            outer = begin  # each block has keys that may not count
        many = end - begin
        first, last = begin + piece * many // pieces, begin + (piece + 1) * many // pieces
        inner = tl.minimum(tl.maximum(inner, first), last)
        outer = tl.minimum(tl.maximum(outer, inner), last)
    else:
        first, last = piece * blocks // pieces, (piece + 1) * blocks // pieces
        inner, outer = first, tl.minimum(last, whole)
    offset = tl.arange(0, BLOCK_N)
    if DESCRIPTORS:
        k_source, v_source = key, value
        k_offsets = offset
        v_offsets = offset
    else:
        k_source = key + wide_batch * k_batch + wide_head * k_head
        v_source = value + wide_batch * v_batch + wide_head * v_head
        k_offsets = offset.to(tl.int64)[:, None] * k_row + column[None, :]
        v_offsets = offset.to(tl.int64)[:, None] * v_row + column[None, :]

    total = tl.zeros([BLOCK_M, DEPTH], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    if done is not None:
        d_offset = wide_batch * d_batch + row_head * d_head + row_query * d_row
        total += tl.load(done + d_offset[:, None] + column[None, :], mask=is_row[:, None], other=0.0).to(tl.float32)
        s_offset = wide_batch * s_batch + row_head * s_head + row_query * s_row
        peak = tl.load(done_sums + s_offset, mask=is_row, other=0.0) * 1.4426950408889634
        weight += 1.0
    if BOUNDS:
        for block in tl.range(first, inner):
            start = block * BLOCK_N
            k = _load(k_source, batch, head, start, k_row, k_offsets, keys, True, DEPTH, BLOCK_N, DESCRIPTORS)
            v = _load(v_source, batch, head, start, v_row, v_offsets, keys, True, DEPTH, BLOCK_N, DESCRIPTORS)
            hidden = _hidden(start, offset, keys, low, high, counts, c_key, only is not None)
            total, peak, weight = _step(q, k, v, hidden, total, peak, weight, scale, UPCAST)
    for block in tl.range(inner, outer):
        start = block * BLOCK_N
        k = _load(k_source, batch, head, start, k_row, k_offsets, keys, False, DEPTH, BLOCK_N, DESCRIPTORS)
        v = _load(v_source, batch, head, start, v_row, v_offsets, keys, False, DEPTH, BLOCK_N, DESCRIPTORS)
        total, peak, weight = _step(q, k, v, None, total, peak, weight, scale, UPCAST)
    if BOUNDS:
        for block in tl.range(outer, last):
            start = block * BLOCK_N
            k = _load(k_source, batch, head, start, k_row, k_offsets, keys, True, DEPTH, BLOCK_N, DESCRIPTORS)
            v = _load(v_source, batch, head, start, v_row, v_offsets, keys, True, DEPTH, BLOCK_N, DESCRIPTORS)
            hidden = _hidden(start, offset, keys, low, high, counts, c_key, only is not None)
            total, peak, weight = _step(q, k, v, hidden, total, peak, weight, scale, UPCAST)
    else:
        if last > whole:  # the last block has keys that there are not
            start = whole * BLOCK_N
            k = _load(k_source, batch, head, start, k_row, k_offsets, keys, True, DEPTH, BLOCK_N, DESCRIPTORS)
            v = _load(v_source, batch, head, start, v_row, v_offsets, keys, True, DEPTH, BLOCK_N, DESCRIPTORS)
            hidden = (start + offset >= keys)[None, :]
            total, peak, weight = _step(q, k, v, hidden, total, peak, weight, scale, UPCAST)

    lse = peak + tl.log2(weight)
    if BOUNDS:  # rows that see nothing
        is_empty = weight == 0.0
        lse = tl.where(is_empty, float("-inf"), lse)
        weight = tl.where(is_empty, 1.0, weight)
    total = total / weight[:, None]
    if SPLIT:
        slot = (place.to(tl.int64) * pieces + piece) * rows + row
        tl.store(sums + slot, lse, mask=is_row)
        pointers = target + slot[:, None] * DEPTH + column[None, :]
    else:
        o_offset = wide_batch * o_batch + row_head * o_head + row_query * o_row
        pointers = target + o_offset[:, None] + column[None, :]
    tl.store(pointers, total.to(target.dtype.element_ty), mask=is_row[:, None])


@triton.jit(do_not_specialize=["groups", "queries", "rows", "pieces"])
def merge_kernel(
    partial,  # [B * groups, pieces, rows, d]
    sums,  # [B * groups, pieces, rows]
    out,  # [B, H, M, d]
    o_batch, o_head, o_row, groups, queries, rows, pieces,
    DEPTH: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """One row of one group: the mean of its partial results, weighted by 2 ** log-sum-exp."""
    row, place = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, DEPTH)
    base = place.to(tl.int64) * pieces * rows + row
    every = tl.arange(0, MOST)
    logs = tl.load(sums + base + every.to(tl.int64) * rows, mask=every < pieces, other=float("-inf"))
    peak = tl.maximum(tl.max(logs, 0), -1e30)  # where no piece has a key that is seen
    weights = tl.maximum(tl.sum(tl.exp2(logs - peak), 0), 1e-30)
    total = tl.zeros([DEPTH], tl.float32)
    for start in range(0, pieces, 32):
        piece = start + tl.arange(0, 32)
        slot = base + piece.to(tl.int64) * rows
        is_piece = piece < pieces
        weight = tl.exp2(tl.load(sums + slot, mask=is_piece, other=float("-inf")) - peak)
        tile = tl.load(partial + slot[:, None] * DEPTH + column[None, :], mask=is_piece[:, None], other=0.0)
        total += tl.sum(tile * weight[:, None], 0)
    head = place % groups * (rows // queries) + row // queries
    offset = (
        (place // groups).to(tl.int64) * o_batch + head.to(tl.int64) * o_head + (row % queries).to(tl.int64) * o_row
    )
    tl.store(out + offset + column, (total / weights).to(out.dtype.element_ty))
