"""The Triton kernel of ``coded_attention.py``.  Another number of queries, keys, heads or pieces compiles nothing.

Keys and values of a tile are there in parts, of which each has some of the features: the low and the high halves of
bytes, or the bytes of words.  A product is the sum of those of its parts::

    q . k = sum_i q_i . k_i             out_i += w . v_i

Products are of 16-bit floats, so what can be large is taken out: queries are divided by the largest number of their
tile, and a weight has the value's scale in its exponent, so that none is above 1::

    w[n] = 2 ** (score[n] + log2(value_scale[n]) - peak)            sum of weights = sum_n w[n] / value_scale[n]
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from mosaic_compiler.kernels.code_numbers import (
    BYTES_FP8,
    BYTES_INT4,
    BYTES_INT8,
    LOGARITHM_AND_INVERSE,
    WORDS_FP8,
    WORDS_INT4,
    WORDS_INT8,
)


@triton.jit
def _parts(codes, BITS: tl.constexpr, FLOAT: tl.constexpr, WORDS: tl.constexpr, PACKED: tl.constexpr):
    """The numbers of codes, without their scales: a tuple of tiles, see :func:`_feature`."""
    if PACKED and WORDS and BITS == 4:
        found = tl.inline_asm_elementwise(
            WORDS_INT4, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [codes],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True, pack=2,
        )  # fmt: skip
    elif PACKED and WORDS:
        found = tl.inline_asm_elementwise(
            WORDS_FP8 if FLOAT else WORDS_INT8, "=r,=r,=r,=r,r,r", [codes],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    elif PACKED and BITS == 4:
        found = tl.inline_asm_elementwise(
            BYTES_INT4, "=r,=r,=r,=r,r", [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    elif PACKED:
        found = (
            tl.inline_asm_elementwise(
                BYTES_FP8 if FLOAT else BYTES_INT8, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
            ),
        )
    elif BITS == 4:
        found = ((codes & 15).to(tl.float32) - 8, (codes >> 4).to(tl.float32) - 8)
    elif FLOAT:
        found = (codes.to(tl.float8e4nv, bitcast=True).to(tl.float32),)
    else:
        found = (codes.to(tl.int8, bitcast=True).to(tl.float32),)
    return found


@triton.jit
def _feature(part: tl.constexpr, DEPTH: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr):
    """The first feature of a part; others follow in steps of 1 (bytes) or 4 (words)."""
    if WORDS and BITS == 4:
        found = part // 2 + part % 2 * (DEPTH // 2)
    elif WORDS:
        found = part
    else:
        found = part * (DEPTH // 2)
    return found


@triton.jit
def _dot(a, b, total, PACKED: tl.constexpr):
    if PACKED:
        found = tl.dot(a, b, total)
    else:
        found = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return found


@triton.jit
def _times(tiles, factor, PARTS: tl.constexpr):
    found = ()
    for part in tl.static_range(PARTS):
        found = found + (tiles[part] * factor[:, None],)
    return found


@triton.jit
def _weights(scores, hidden, peak):
    """Of some more keys, relative to the new peak: weights, what others are to be rescaled by, the peak."""
    if hidden is not None:
        scores = tl.where(hidden, float("-inf"), scores)
    higher = tl.maximum(peak, tl.max(scores, 1))
    level = higher
    if hidden is not None:
        level = tl.where(higher == float("-inf"), 0.0, higher)
    return tl.exp2(scores - level[:, None]), tl.exp2(peak - level), higher


@triton.jit
def _step(q, key, key_scale, value, value_scale, hidden, total, peak, weight, scale, PARTS: tl.constexpr,
          BITS: tl.constexpr, FLOAT: tl.constexpr, WORDS: tl.constexpr, PACKED: tl.constexpr):  # fmt: skip
    """Online softmax over some more keys; ``hidden`` [BLOCK_M or 1, BLOCK_N] ones do not count."""
    if PACKED:
        log, inverse = tl.inline_asm_elementwise(
            LOGARITHM_AND_INVERSE, "=f,=f,f", [value_scale], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
        )
    else:
        log, inverse = tl.log2(value_scale), 1.0 / value_scale
    k = _parts(key, BITS, FLOAT, WORDS, PACKED)
    scores = _dot(q[0], tl.trans(k[0]), None, PACKED)
    for part in tl.static_range(1, PARTS):
        scores = _dot(q[part], tl.trans(k[part]), scores, PACKED)
    scores = scores * (key_scale * scale)[None, :] + log[None, :]
    weights, rescale, peak = _weights(scores, hidden, peak)
    weight = weight * rescale + tl.sum(weights * inverse[None, :], 1)
    if PACKED:
        weights = weights.to(tl.float16)
    v = _parts(value, BITS, FLOAT, WORDS, PACKED)
    total = _times(total, rescale, PARTS)
    found = ()
    for part in tl.static_range(PARTS):
        found = found + (_dot(weights, v[part], total[part], PACKED),)
    return found, peak, weight


@triton.jit(do_not_specialize=["groups", "queries", "keys", "own_count", "rows", "row_blocks", "heads", "pieces"])
def coded_kernel(
    query,  # [B, H, M, d]
    key, key_scale, value, value_scale,  # codes (bytes, or words of them) [B, groups, N, ..], float32 [B, groups, N]
    own_key, own_value,  # [B, groups, C, d]
    own,  # int64 [B, groups or 1, C], ascending: the keys that those stand for
    target,  # SPLIT: partial results [B * groups, pieces, rows, d], float32; else the result [B, H, M, d]
    sums,  # SPLIT: log-sum-exps, base 2, float32 [B * groups, pieces, rows]
    scale,  # times log2(e)
    q_batch, q_head, q_row, k_batch, k_head, k_row, ks_batch, ks_head, ks_row,
    v_batch, v_head, v_row, vs_batch, vs_head, vs_row,
    ok_batch, ok_head, ok_row, ov_batch, ov_head, ov_row, w_batch, w_head,
    o_batch, o_head, o_row,
    groups, queries, keys, own_count,
    rows,  # heads of a group * queries
    row_blocks,
    heads,  # B * groups
    pieces,
    first_key,  # int64 [B or 1, M]: a query sees keys from here on; None: all
    last_key,  # int64 [B or 1, M]: and before this one
    only,  # bool [B or 1, N]: of those, the ones that count
    f_batch, f_row, l_batch, l_row, c_batch, c_key,
    DEPTH: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, BOUNDS: tl.constexpr,
    WORDS: tl.constexpr,  # codes are words
    PACKED: tl.constexpr,  # not in the interpreter
):  # fmt: skip
    """A block of the rows of one group against one piece of the keys; with the last piece the computed rows' own."""
    program = tl.program_id(0)
    row_block = program % row_blocks
    place = program // row_blocks % heads
    piece = program // row_blocks // heads
    batch, head = (place // groups).to(tl.int64), (place % groups).to(tl.int64)
    PARTS: tl.constexpr = (4 if WORDS else 1) * (8 // BITS)
    WIDE: tl.constexpr = DEPTH // PARTS
    STEP: tl.constexpr = 4 if WORDS else 1

    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < rows
    row_head = head * (rows // queries) + row // queries
    row_query = (row % queries).to(tl.int64)
    column = tl.arange(0, WIDE)
    q_row_pointers = query + (batch * q_batch + row_head * q_head + row_query * q_row)[:, None]
    wide = ()
    most = tl.zeros([BLOCK_M], tl.float32) + 1e-30
    for part in tl.static_range(PARTS):
        pointers = q_row_pointers + (_feature(part, DEPTH, BITS, WORDS) + STEP * column)[None, :]
        tile = tl.load(pointers, mask=is_row[:, None], other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.max(tl.abs(tile), 1))
        wide = wide + (tile,)
    top = tl.max(most, 0)
    q = ()
    for part in tl.static_range(PARTS):
        q = q + ((wide[part] * (1.0 / top)).to(tl.float16 if PACKED else tl.float32),)

    blocks, whole = tl.cdiv(keys, BLOCK_N), keys // BLOCK_N
    first, last = piece * blocks // pieces, (piece + 1) * blocks // pieces
    own += batch * w_batch + head * w_head
    low = tl.zeros([BLOCK_M], tl.int32)
    high = tl.full([BLOCK_M], 0, tl.int32) + keys
    counts = only
    if BOUNDS:
        if first_key is not None:
            low = tl.load(first_key + batch * f_batch + row_query * f_row, mask=is_row, other=0)
            low = tl.minimum(tl.maximum(low, 0), keys).to(tl.int32)
        if last_key is not None:
            high = tl.load(last_key + batch * l_batch + row_query * l_row, mask=is_row, other=0)
            high = tl.minimum(tl.maximum(high, 0), keys).to(tl.int32)
        if only is not None:
            counts = only + batch * c_batch
        begin, end = first, last
    else:  # blocks [begin, end) have keys of the computed rows among them
        least = tl.load(own).to(tl.int32)
        greatest = tl.load(own + own_count - 1).to(tl.int32)
        begin = tl.minimum(tl.maximum(least // BLOCK_N, first), last)
        end = tl.minimum(tl.maximum(greatest // BLOCK_N + 1, begin), last)
    ragged = tl.maximum(end, tl.minimum(last, whole))  # blocks from here on have keys that there are not

    offset = tl.arange(0, BLOCK_N)
    k_source = key + batch * k_batch + head * k_head
    v_source = value + batch * v_batch + head * v_head
    ks_source = key_scale + batch * ks_batch + head * ks_head
    vs_source = value_scale + batch * vs_batch + head * vs_head
    k_offsets = offset[:, None] * k_row + column[None, :]
    v_offsets = offset[:, None] * v_row + column[None, :]

    total = ()
    for _ in tl.static_range(PARTS):
        total = total + (tl.zeros([BLOCK_M, WIDE], tl.float32),)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    for index in tl.range(0, begin - first + ragged - end):
        block = first + index + tl.where(first + index >= begin, end - begin, 0)
        start = block.to(tl.int64) * BLOCK_N
        k = tl.load(k_source + start * k_row + k_offsets)
        v = tl.load(v_source + start * v_row + v_offsets)
        ks = tl.load(ks_source + start * ks_row + offset * ks_row)
        vs = tl.load(vs_source + start * vs_row + offset * vs_row)
        total, peak, weight = _step(
            q, k, ks, v, vs, None, total, peak, weight, scale * top, PARTS, BITS, FLOAT, WORDS, PACKED
        )
    some = tl.arange(0, 32)
    for index in tl.range(0, end - begin + last - ragged, num_stages=1):
        block = begin + index + tl.where(begin + index >= end, ragged - end, 0)
        start = block.to(tl.int64) * BLOCK_N
        position = block * BLOCK_N + offset
        is_key = position < keys
        k = tl.load(k_source + start * k_row + k_offsets, mask=is_key[:, None], other=0)
        v = tl.load(v_source + start * v_row + v_offsets, mask=is_key[:, None], other=0)
        ks = tl.load(ks_source + start * ks_row + offset * ks_row, mask=is_key, other=0.0)
        vs = tl.load(vs_source + start * vs_row + offset * vs_row, mask=is_key, other=1.0)
        gone = (position >= keys).to(tl.int32)
        for begin_own in range(0, own_count, 32):
            number = begin_own + some
            places = tl.load(own + number, mask=number < own_count, other=-1).to(tl.int32)
            gone = tl.maximum(gone, tl.max((position[:, None] == places[None, :]).to(tl.int32), 1))
        hidden = (gone > 0)[None, :]
        if BOUNDS:
            hidden = hidden | (position[None, :] < low[:, None]) | (position[None, :] >= high[:, None])
            if only is not None:
                seen = tl.load(counts + position.to(tl.int64) * c_key, mask=is_key, other=0)
                hidden = hidden | (seen == 0)[None, :]
        total, peak, weight = _step(
            q, k, ks, v, vs, hidden, total, peak, weight, scale * top, PARTS, BITS, FLOAT, WORDS, PACKED
        )
    if piece == pieces - 1:
        feature = tl.arange(0, DEPTH)
        raw = tl.load(q_row_pointers + feature[None, :], mask=is_row[:, None], other=0.0)
        for start in range(0, own_count, 32):
            number = start + some
            is_own = number < own_count
            places = tl.load(own + number, mask=is_own, other=-1).to(tl.int32)
            before = tl.load(own + number - 1, mask=is_own & (number > 0), other=-1).to(tl.int32)
            k_row_pointers = own_key + batch * ok_batch + head * ok_head + number.to(tl.int64)[:, None] * ok_row
            v_row_pointers = own_value + batch * ov_batch + head * ov_head + number.to(tl.int64)[:, None] * ov_row
            own_tile = tl.load(k_row_pointers + feature[None, :], mask=is_own[:, None], other=0.0)
            hidden = ((is_own == 0) | (places == before))[None, :]  # the last one may come again
            if BOUNDS:
                hidden = hidden | (places[None, :] < low[:, None]) | (places[None, :] >= high[:, None])
                if only is not None:
                    seen = tl.load(counts + places.to(tl.int64) * c_key, mask=is_own, other=0)
                    hidden = hidden | (seen == 0)[None, :]
            scores = _dot(raw, tl.trans(own_tile), None, PACKED) * scale
            weights, rescale, peak = _weights(scores, hidden, peak)
            weight = weight * rescale + tl.sum(weights, 1)
            total = _times(total, rescale, PARTS)
            found = ()
            for part in tl.static_range(PARTS):
                features = (_feature(part, DEPTH, BITS, WORDS) + STEP * column)[None, :]
                own_part = tl.load(v_row_pointers + features, mask=is_own[:, None], other=0.0)
                found = found + (_dot(weights.to(own_part.dtype), own_part, total[part], PACKED),)
            total = found

    is_empty = weight == 0.0  # rows that see nothing
    lse = tl.where(is_empty, float("-inf"), peak + tl.log2(weight))
    factor = 1.0 / tl.where(is_empty, 1.0, weight)
    if SPLIT:
        slot = (place.to(tl.int64) * pieces + piece) * rows + row
        tl.store(sums + slot, lse, mask=is_row)
        base = target + slot * DEPTH
    else:
        base = target + batch * o_batch + row_head * o_head + row_query * o_row
    for part in tl.static_range(PARTS):
        pointers = base[:, None] + (_feature(part, DEPTH, BITS, WORDS) + STEP * column)[None, :]
        tl.store(pointers, (total[part] * factor[:, None]).to(target.dtype.element_ty), mask=is_row[:, None])
