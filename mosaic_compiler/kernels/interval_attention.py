"""Attention whose queries each see a run of keys: causal, block by block, within a window.

A mask [N, N] would say the same, and take N times the memory.  Two numbers for each query do::

    out[q] = softmax(scale * query[q] @ key[first[q] : last[q]]^T) @ value[first[q] : last[q]]

On a GPU a kernel of our own reads only the keys that a block of queries can see (``few_queries.py``).  Elsewhere
queries are taken some at a time, with a mask of their own where they need one.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor, fx

from mosaic_compiler import ir
from mosaic_compiler.book import scratch
from mosaic_compiler.ir import ops
from mosaic_compiler.kernels import few_queries
from mosaic_compiler.planning.flash import FewBytes

aten = torch.ops.aten

TILE = 256
"""Queries that are taken at a time, where no kernel of our own is."""


def attend_intervals_(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    only: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Attention of runs of keys; queries that see none get 0.

    Args:
        out: [B, H, M, d], with a dense last dim.
        query: [B, H, M, d].
        key, value: [B, H / g, N, d].
        first, last: int64 [1 or B, 1, M, 1]: a query sees keys [first, last); ``None``: from the first on, to the last
            one.
        only: bool [1 or B, 1, 1, N], of those keys the ones that count.
        scale: ``None``: 1 / sqrt(d).
    """
    scale = few_queries.scale_of(scale, query.shape[3])
    if query.is_cuda and has_kernel(query.dtype, query.shape[3]):
        processors = scratch.multiprocessors()
        return few_queries.interval_attention_(out, query, key, value, first, last, only, scale, processors)
    return attend_in_tiles_(out, query, key, value, first, last, only, scale)


def has_kernel(dtype: torch.dtype, depth: Any) -> bool:
    """The kernel of our own takes such queries."""
    return dtype in few_queries.DTYPES and depth in few_queries.DEPTHS and few_queries.has_triton()


def depth_of(tensor: Tensor) -> int:
    """Entries of a row, 0 where they are a symbol: to compare that would make a number of it."""
    depth = ir.expr_of(tensor.shape[3])
    return int(depth) if depth.is_Integer else 0


def why_tiled(node: fx.Node) -> str | None:
    """What keeps the attention ``node`` from the kernel of our own on a GPU."""
    if node.target is not ops.interval_attention:
        return None
    out = ir.only_tensor(node)
    if out.device.type != "cuda" or has_kernel(out.dtype, depth_of(out)):
        return None
    name = str(out.dtype).removeprefix("torch.")
    return (
        f"the kernel takes bfloat16 and float16 and heads of {', '.join(map(str, few_queries.DEPTHS))}, not {name} and "
        f"{out.shape[3]}: {TILE} queries at a time, each with a mask over all keys"
    )


def attend_in_tiles_(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    only: Tensor | None,
    scale: float,
) -> Tensor:
    """The same (see :func:`attend_intervals_`) with PyTorch's kernels."""
    queries, keys = query.shape[2], key.shape[2]
    for start in range(0, queries, TILE):
        rows = slice(start, min(start + TILE, queries))
        begins, ends = (bound if bound is None else bound[:, :, rows] for bound in (first, last))
        run = slice(0, keys)
        is_whole = begins is None and ends is None
        if query.device.type == "cpu":  # elsewhere, to look at numbers is to wait for the device
            run, is_whole = _run_of(begins, ends, keys)
        part = out[:, :, rows]
        if run.start >= run.stop:
            part.zero_()
            continue
        mask = None if is_whole else _mask_of(begins, ends, torch.arange(run.start, run.stop, device=query.device))
        if only is not None:
            mask = only[..., run] if mask is None else mask & only[..., run]
        part.copy_(_attend(query[:, :, rows], key[:, :, run], value[:, :, run], mask, scale))
    return out


def _run_of(begins: Tensor | None, ends: Tensor | None, keys: int) -> tuple[slice, bool]:
    """The keys that some of the queries see, and whether all of them do."""
    low, high = (0, 0) if begins is None else map(int, torch.aminmax(begins))
    least, most = (keys, keys) if ends is None else map(int, torch.aminmax(ends))
    run = slice(max(low, 0), min(most, keys))
    return run, high <= run.start and least >= run.stop


def _mask_of(begins: Tensor | None, ends: Tensor | None, keys: Tensor) -> Tensor:
    """bool [1 or B, 1, M, N]"""
    parts = [keys >= begins] if begins is not None else []
    parts += [keys < ends] if ends is not None else []
    return parts[0] & parts[1] if len(parts) == 2 else parts[0]


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if query.device.type == "cpu":
        bias = None if mask is None else query.new_zeros(mask.shape).masked_fill_(~mask, float("-inf"))
        if bias is not None and bias.shape[2] == 1:
            bias = bias.expand(-1, -1, query.shape[2], -1)
        result: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=bias, scale=scale
        )[0]
        return result
    if mask is not None and mask.shape[2] == 1:
        mask = mask.expand(-1, -1, query.shape[2], -1)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    only: Tensor | None,
    scale: float | None,
) -> Tensor:
    """The same in plain PyTorch, with a mask and all scores."""
    share = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(share, 1) for tensor in (key, value))
    positions = torch.arange(key.shape[2], device=key.device)
    mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
    mask = mask & (positions >= first) if first is not None else mask
    mask = mask & (positions < last) if last is not None else mask
    mask = mask & only if only is not None else mask
    scale = few_queries.scale_of(scale, query.shape[3])
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, -1).nan_to_num(0.0) @ value


def scratch_bytes(node: fx.Node) -> sympy.Expr:
    """What :func:`attend_intervals_` allocates: partial results; or a tile's mask and result, and what attention
    takes."""
    key, (first, last, only) = node.args[1], node.args[3:6]
    out = ir.only_tensor(node)
    batch, heads, rows, depth = (ir.expr_of(size) for size in out.shape)
    groups, keys = (ir.expr_of(size) for size in ir.only_tensor(key).shape[1:3])  # type: ignore[arg-type]
    if out.device.type == "cuda" and has_kernel(out.dtype, depth_of(out)):
        return FewBytes(batch * groups, rows, keys, depth, sympy.Integer(scratch.multiprocessors()), heads / groups)
    tile = sympy.Min(rows, TILE) if not rows.is_Integer else min(rows, sympy.Integer(TILE))
    size = out.dtype.itemsize
    result = batch * heads * tile * (depth * size + 8)
    total = result + 8 * keys
    bounds = [bound for bound in (first, last, only) if isinstance(bound, fx.Node)]
    if bounds:
        entries = [ir.expr_of(ir.only_tensor(bound).shape[0]) for bound in bounds]
        most = batch if any(entry != 1 for entry in entries) else sympy.Integer(1)
        padded = -(-keys // 16) * 16 if keys.is_Integer else keys + 15
        total += most * tile * padded * (3 + size + (0 if out.device.type == "cpu" else size))
    if out.device.type == "cpu":
        total += scratch.cpu_flash_attention(node)
    return total
