"""Attention of keys and values that are kept in fewer bits, and of some rows' own as they are.

Codes become numbers where they are read: on a GPU in registers (``coded_attention_kernels.py``), elsewhere a tile of
keys at a time, so that nothing of all keys' size is ever there in full width::

    k[n] = number(code[n]) * scale[n]       but where n is one of the computed rows: their own, exactly
    out = softmax(scale * q @ k^T) @ v
"""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, fx

from mosaic_compiler import ir
from mosaic_compiler.book import scratch
from mosaic_compiler.ir import ops
from mosaic_compiler.kernels import few_queries
from mosaic_compiler.kernels.interval_attention import depth_of
from mosaic_compiler.planning.few import pieces, tile_for
from mosaic_compiler.planning.flash import FewBytes
from mosaic_compiler.planning.precisions import PRECISIONS

TILE = 512
"""Keys that are taken at a time, where the kernel is not."""


def attend_codes_(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    key_scale: Tensor,
    value: Tensor,
    value_scale: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    rows: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    only: Tensor | None,
    scale: float | None,
    precision: str,
) -> Tensor:
    """Attention of codes; queries that see no key get 0.

    Args:
        out: [B, H, M, d], with a dense last dim.
        query: [B, H, M, d].
        key, value: codes [B, H / g, N, d], or half as many where two stand in a byte (a number and the one half a head
            behind it).
        key_scale, value_scale: float32 [B, H / g, N, 1].
        own_key, own_value: [B, H / g, C, d], of ``rows``, int64 [B, 1 or H / g, C] in ascending order; the last one may
            come again.
        first, last: int64 [1 or B, 1, M, 1]: a query sees keys [first, last).
        only: bool [1 or B, 1, 1, N], of those keys the ones that count.
        scale: ``None``: 1 / sqrt(d).
        precision: see ``planning/precisions.py``.
    """
    given = _Operands(query, key, key_scale, value, value_scale, own_key, own_value, rows, first, last, only)
    factor = few_queries.scale_of(scale, query.shape[3])
    depths = {int(query.shape[3]), int(own_value.shape[3])}
    if few_queries.is_interpreted() or (query.is_cuda and has_kernel(query.dtype, depths, precision)):
        return _attend_with_kernel_(out, given, factor, precision)
    return _attend_in_tiles_(out, given, factor, precision)


class _Operands(NamedTuple):
    """As of :func:`attend_codes_`."""

    query: Tensor
    key: Tensor
    key_scale: Tensor
    value: Tensor
    value_scale: Tensor
    own_key: Tensor
    own_value: Tensor
    rows: Tensor
    first: Tensor | None
    last: Tensor | None
    only: Tensor | None


def has_kernel(dtype: torch.dtype, depths: set[int], precision: str) -> bool:
    """The kernel takes such queries: one depth of keys and values; and the device has such numbers."""
    known = dtype in few_queries.DTYPES and len(depths) == 1 and depths <= set(few_queries.DEPTHS)
    fits = known and min(depths) >= 16 * 8 // PRECISIONS[precision].bits  # a product has 16 numbers at least
    return fits and few_queries.has_triton() and (precision != "fp8" or _has_fp8())


@functools.cache
def _has_fp8() -> bool:
    """It converts 8-bit floats (a device that is not there yet is taken for one of today)."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 9)


def _are_words(*codes: Tensor) -> bool:
    """Rows of codes begin at multiples of 4 bytes."""
    return all(not (part.data_ptr() | functools.reduce(operator.or_, part.stride()[:3])) % 4 for part in codes)


def _attend_with_kernel_(out: Tensor, given: _Operands, scale: float, precision: str) -> Tensor:
    from mosaic_compiler.kernels import coded_attention_kernels as kernels

    query, key, key_scale, value, value_scale, own_key, own_value, rows, first, last, only = given
    steps, bound_steps = few_queries.steps_of, few_queries.bound_steps
    batch, heads, queries, depth = query.shape
    groups, keys = key.shape[1:3]
    count = heads // groups * queries
    interpreted = few_queries.is_interpreted()
    bits = PRECISIONS[precision].bits
    tile = tile_for(keys, count, bits)
    parts = pieces(batch * groups, count, keys, scratch.multiprocessors(), bits)
    target, sums = few_queries.partial_results(out, batch * groups * parts * count) if parts > 1 else (out, out)
    blocks = -(-count // tile.rows)
    has_words = tile.takes_words and depth >= 16 * 32 // bits and not interpreted and _are_words(key, value)
    key, value = (codes.view(torch.int32 if has_words else torch.uint8) for codes in (key, value))
    kernels.coded_kernel[(blocks * batch * groups * parts,)](
        query, key, key_scale, value, value_scale, own_key, own_value, rows,
        target, sums, scale * few_queries.LOG2E,
        *steps(query), *steps(key), *steps(key_scale), *steps(value), *steps(value_scale),
        *steps(own_key), *steps(own_value), *steps(rows)[:2], *steps(out),
        groups, queries, keys, own_key.shape[2], count, blocks, batch * groups, parts,
        first, last, only, *bound_steps(first, 2), *bound_steps(last, 2), *bound_steps(only, 3),
        DEPTH=depth, BITS=bits, FLOAT=precision == "fp8", BLOCK_M=tile.rows, BLOCK_N=tile.keys, SPLIT=parts > 1,
        BOUNDS=not (first is None and last is None and only is None), WORDS=has_words, PACKED=not interpreted,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return few_queries.merge_(out, target, sums, groups, parts) if parts > 1 else out


def _attend_in_tiles_(out: Tensor, given: _Operands, scale: float, precision: str) -> Tensor:
    """The same (see :func:`attend_codes_`) with PyTorch's kernels."""
    query, key, key_scale, value, value_scale, own_key, own_value, rows, first, last, only = given
    batch, heads, queries, depth = query.shape
    groups, keys = key.shape[1:3]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    packed = (query.to(wide) * scale).reshape(batch, groups, heads // groups * queries, depth)
    is_own = torch.zeros(rows.shape[0], rows.shape[1], keys, dtype=torch.bool, device=query.device)
    is_own.scatter_(2, rows, True)
    found = _Softmax(packed, own_value.shape[3], precision)
    for begin in range(0, keys, TILE):
        tile = slice(begin, min(begin + TILE, keys))
        places = torch.arange(tile.start, tile.stop, device=query.device)
        hidden = is_own[:, :, None, None, tile]
        seen = None if only is None else only[..., tile]
        k, ks, v, vs = (part[:, :, tile] for part in (key, key_scale, value, value_scale))
        found.add_codes(k, ks, v, vs, _hidden(hidden, places, seen, first, last))
    again = torch.zeros_like(rows, dtype=torch.bool)
    again[..., 1:] = rows[..., 1:] == rows[..., :-1]
    seen = None if only is None else only.expand(rows.shape[0], rows.shape[1], 1, -1).gather(3, rows.unsqueeze(2))
    places = rows.unsqueeze(2) if first is not None or last is not None else rows
    found.add(own_key.to(wide), own_value.to(wide), _hidden(again[:, :, None, None], places, seen, first, last))
    return out.copy_(found.result().view(batch, heads, queries, -1))


def _hidden(hidden: Tensor, places: Tensor, seen: Tensor | None, first: Tensor | None, last: Tensor | None) -> Tensor:
    """Which keys do not count: bool [B, 1 or G, 1, 1 or M, keys]."""
    for is_out in (
        None if seen is None else ~seen,
        None if first is None else places < first,
        None if last is None else places >= last,
    ):
        if is_out is not None:
            hidden = hidden | is_out.unsqueeze(2)
    return hidden


class _Softmax:
    """Softmax over keys that come a tile at a time, and the weighted sum of their values."""

    def __init__(self, query: Tensor, depth: int, precision: str) -> None:
        self._query, self._precision = query, precision
        self._halves = [half.contiguous() for half in query.chunk(2, -1)] if precision == "int4" else [query]
        self._less = 8 * query.sum(-1, keepdim=True)
        self._peak = query.new_full((*query.shape[:3], 1), float("-inf"))
        self._weight = torch.zeros_like(self._peak)
        self._total = query.new_zeros(*query.shape[:3], depth)

    def add_codes(self, key: Tensor, key_scale: Tensor, value: Tensor, value_scale: Tensor, hidden: Tensor) -> None:
        """Codes [B, G, T, d] (or half as many) and scales [B, G, T, 1]; ``hidden`` as of :meth:`add`.  Products are of
        codes, scales come behind them."""
        dtype = self._query.dtype
        first, *others = (q @ k.transpose(-1, -2) for q, k in zip(self._halves, self._numbers(key), strict=True))
        for more in others:
            first.add_(more)
        if self._precision == "int4":
            first.sub_(self._less)
        weights = self._weigh(first.mul_(key_scale.to(dtype).transpose(-1, -2)), hidden)
        weights.mul_(value_scale.to(dtype).transpose(-1, -2))
        found = torch.cat([weights @ v for v in self._numbers(value)], -1)
        if self._precision == "int4":
            found.sub_(8 * weights.sum(-1, keepdim=True))
        self._total.add_(found)

    def _numbers(self, codes: Tensor) -> list[Tensor]:
        """Codes as numbers, without their scales; of 4 bits both halves, 8 too high."""
        dtype = self._query.dtype
        if self._precision == "int4":
            return [(codes & 15).to(dtype), (codes >> 4).to(dtype)]
        return [numbers_of(codes, self._precision).to(dtype)]

    def add(self, key: Tensor, value: Tensor, hidden: Tensor) -> None:
        """Keys and values [B, G, T, d]; ``hidden`` [B, 1 or G, 1, 1 or M, T] ones do not count."""
        self._total.add_(self._weigh(self._query @ key.transpose(-1, -2), hidden) @ value)

    def _weigh(self, scores: Tensor, hidden: Tensor) -> Tensor:
        """Weights of these keys; what was added before is rescaled."""
        queries = hidden.shape[3] if hidden.shape[3] > 1 else scores.shape[2]
        scores.view(*scores.shape[:2], -1, queries, scores.shape[3]).masked_fill_(hidden, float("-inf"))
        higher = torch.maximum(self._peak, scores.amax(-1, keepdim=True))
        level = higher.masked_fill(higher == float("-inf"), 0.0)
        weights = scores.sub_(level).exp_()
        rescale = self._peak.sub_(level).exp_()
        self._weight.mul_(rescale).add_(weights.sum(-1, keepdim=True))
        self._total.mul_(rescale)
        self._peak = higher
        return weights

    def result(self) -> Tensor:
        """[B, G, g * M, d]"""
        return self._total.div_(self._weight.masked_fill_(self._weight == 0.0, 1.0))


def numbers_of(codes: Tensor, precision: str) -> Tensor:
    """Codes as numbers, float32 [..., d], without their scales."""
    if precision == "fp8":  # by their bits: a float16's exponent is 8 higher
        sign = codes.view(torch.uint8).to(torch.int16)
        bits = (sign & 127).bitwise_left_shift_(7)
        bits |= sign.bitwise_and_(128).bitwise_left_shift_(8)
        return bits.view(torch.float16).float().mul_(256.0)
    if precision == "int8":
        return codes.view(torch.int8).float()
    return torch.cat([codes & 15, codes >> 4], -1).float().sub_(8)


def why_tiled(node: fx.Node) -> str | None:
    """What keeps the attention ``node`` from the kernel on a GPU."""
    if node.target is not ops.coded_attention:
        return None
    out = ir.only_tensor(node)
    precision: Any = node.args[12]
    if out.device.type != "cuda" or has_kernel(out.dtype, _depths(node), precision):
        return None
    name, depths = str(out.dtype).removeprefix("torch."), " and ".join(map(str, sorted(_depths(node))))
    why = (
        "the device has no 8-bit floats (take int8)"
        if precision == "fp8" and has_kernel(out.dtype, _depths(node), "int8")
        else "the kernel takes bfloat16 and float16 and heads of "
        f"{', '.join(map(str, few_queries.DEPTHS))} (int4 from 32 on), not {name} and {depths}"
    )
    return f"{why}: {TILE} keys at a time, in float32"


def _depths(node: fx.Node) -> set[int]:
    """Of keys and values; 0 where one is a symbol."""
    return {depth_of(ir.only_tensor(node.args[at])) for at in (0, 6)}  # type: ignore[arg-type]


def scratch_bytes(node: fx.Node) -> sympy.Expr:
    """What :func:`attend_codes_` allocates: partial results; or a tile of keys, values and scores, and sums."""
    out, key, own = (ir.only_tensor(given) for given in (node, node.args[1], node.args[5]))  # type: ignore[arg-type]
    precision: Any = node.args[12]
    batch, heads, rows, value_depth = (ir.expr_of(size) for size in out.shape)
    groups, keys = (ir.expr_of(size) for size in key.shape[1:3])
    if out.device.type == "cuda" and has_kernel(out.dtype, _depths(node), precision):
        processors = sympy.Integer(scratch.multiprocessors())
        bits = sympy.Integer(PRECISIONS[precision].bits)
        return FewBytes(batch * groups, rows, keys, value_depth, processors, heads / groups, bits)
    size = 8 if out.dtype == torch.float64 else 4
    depth, count = ir.expr_of(own.shape[3]), ir.expr_of(own.shape[2])
    tile = sympy.Min(keys, TILE) if not keys.is_Integer else min(keys, sympy.Integer(TILE))
    both, deeper = depth + value_depth, sympy.Max(depth, value_depth)
    # keys or values of a tile, as numbers and as they are on the way there, once more where entries are copied together
    tiles = batch * groups * (tile * (deeper * (2 * size + 4) + 2 * size) + 2 * count * both * size)
    halves = 2 if precision == "int4" else 1
    scores = batch * heads * rows * (tile + count) * (halves * size + 4) + 16 * (tile + keys * batch * groups)
    return (
        tiles + scores + batch * heads * rows * size * (2 * depth + 3 * value_depth + 16) + 64 * batch * groups * count
    )
