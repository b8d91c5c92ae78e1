"""Attention that goes on behind a query's own key: what causal attention has found is where it begins.

    done, sums = causal attention of query n with keys [0, n], and the log of its sum of exponentials
    out[n] = attention of query n with keys [0, last[n])

On a GPU the kernel of ``few_queries.py`` begins with ``done``; elsewhere (in tests) parts are weighed by their sums.
"""

from __future__ import annotations

import sympy
import torch
from torch import Tensor, fx

from mosaic_compiler import ir
from mosaic_compiler.book import scratch
from mosaic_compiler.kernels import few_queries
from mosaic_compiler.kernels.interval_attention import has_kernel

TILE = 256
"""Queries that are taken at a time, where the kernel is not."""


def attend_behind_(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    done: Tensor,
    sums: Tensor,
    last: Tensor,
    scale: float | None,
) -> Tensor:
    """Go on behind each query's own key.

    Args:
        out: [B, H, M, d], with a dense last dim.
        query: [B, H, M, d]; query n stands at key n.
        key, value: [B, H / g, M, d].
        done, sums: [B, H, M, d] and float32 [B, H, M] (or [B, H, M, 1]), as above.
        last: int64 [1, 1, M, 1], n < last[n].
        scale: ``None``: 1 / sqrt(d).
    """
    scale = few_queries.scale_of(scale, query.shape[3])
    sums = sums.view(sums.shape[:3])
    if few_queries.is_interpreted() or (query.is_cuda and has_kernel(query.dtype, query.shape[3])):
        processors = scratch.multiprocessors()
        return few_queries.interval_attention_(
            out, query, key, value, None, last, None, scale, processors, done=done, sums=sums
        )
    share = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(share, 1) for tensor in (key, value))
    place = torch.arange(key.shape[2], device=key.device)
    for begin in range(0, query.shape[2], TILE):
        rows = slice(begin, min(begin + TILE, query.shape[2]))
        seen = (place > place[rows, None]) & (place < last[0, 0, rows])
        scores = (query[:, :, rows] @ key.transpose(-1, -2) * scale).to(sums.dtype).masked_fill(~seen, float("-inf"))
        behind = torch.logsumexp(scores, -1)
        both = torch.logaddexp(behind, sums[:, :, rows])
        more = torch.exp(scores - both.unsqueeze(-1)).to(value.dtype) @ value
        out[:, :, rows] = done[:, :, rows] * torch.exp(sums[:, :, rows] - both).unsqueeze(-1).to(done.dtype) + more
    return out


def scratch_bytes(node: fx.Node) -> sympy.Expr:
    """What :func:`attend_behind_` allocates: nothing on a GPU; scores of a tile, four times, and repeated heads."""
    out = ir.only_tensor(node)
    if out.device.type == "cuda":
        return sympy.Integer(0)
    batch, heads, rows, depth = (ir.expr_of(size) for size in out.shape)
    tile = sympy.Min(rows, TILE) if not rows.is_Integer else min(rows, sympy.Integer(TILE))
    return batch * heads * (tile * (rows + depth) * 32 + rows * depth * out.dtype.itemsize * 2) + 16 * rows
