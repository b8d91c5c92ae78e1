"""Attention on a GPU whose number of queries only the data says: FlashAttention instead of cuDNN.

cuDNN, the fastest on Hopper, makes an execution plan for each shape that it has not seen (43 ms of CPU time on an idle
H100 host, 65 to 130 ms in a step on a busy one), and PyTorch keeps every one.  That pays for the N x N attentions of a
length.  The rows that somebody reads are others in nearly every step; their attention runs without a plan unless it is
so large that FlashAttention would lose more than half a millisecond.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from mosaic_compiler import ir
from mosaic_compiler.planning.lives import Sizes

aten = torch.ops.aten

_CUDNN = aten._scaled_dot_product_cudnn_attention.default
_FLASH = aten._scaled_dot_product_flash_attention.default
_WORTH_A_PLAN = 1 << 39  # floating-point operations


def kernel_of(node: fx.Node, sizes: Sizes, varying: Collection[sympy.Symbol], room: int) -> Callable[..., Any]:
    """What computes a node at these sizes: its own op, or FlashAttention called like it.

    Args:
        varying: symbols whose values only the data says.
        room: bytes that may be allocated while the node runs, in addition to its results.
    """
    assert callable(node.target)
    if not _has_twin(node, varying):
        return node.target
    batch, heads, rows, depth = (sizes(size) for size in _shape(node, 0))
    keys = sizes(_shape(node, 1)[2])
    if 4 * batch * heads * rows * depth * keys >= _WORTH_A_PLAN:
        return node.target
    return _flash_like_cudnn if flash_scratch(batch, heads, rows, depth, keys) <= room else node.target


def _has_twin(node: fx.Node, varying: Collection[sympy.Symbol]) -> bool:
    """An attention of cuDNN's that FlashAttention can compute as well, with a number of queries that varies."""
    if node.target is not _CUDNN or not _shape(node, 0)[2].free_symbols & set(varying):
        return False
    depth, depth_of_values = _shape(node, 0)[3], _shape(node, 2)[3]
    plain = ir.argument(node, "attn_bias") is None and ir.argument(node, "is_causal") is False
    plain = plain and ir.argument(node, "dropout_p") == 0 and all(user.args[1] == 0 for user in node.users)
    return bool(plain and depth == depth_of_values and depth.is_Integer and depth % 8 == 0 and depth <= 256)


def _shape(node: fx.Node, operand: int) -> list[sympy.Expr]:
    source = node.args[operand]
    assert isinstance(source, fx.Node)
    return [ir.expr_of(size) for size in ir.only_tensor(source).shape]


def _flash_like_cudnn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    return _FLASH(query, key, value, dropout_p, is_causal, False, scale=scale)


def flash_scratch(batch: int, heads: int, rows: int, depth: int, keys: int) -> int:
    """Bytes that FlashAttention allocates where there are too few queries to keep the device busy, and it splits keys:
    a float32 result and a sum for each query and part (aten/native/transformers/cuda/flash_attn/flash_api.cpp)."""
    groups = batch * heads * -(-rows // 64)
    blocks = -(-keys // (256 if depth <= 64 else 128 if depth <= 128 else 64))
    count = _multiprocessors()
    parts = max(_splits(groups, count, blocks), _splits(groups, 2 * count, blocks))  # versions differ in what they ask
    return 0 if parts == 1 else 4 * parts * batch * heads * rows * (-(-depth // 32) * 32 + 1)


def _splits(groups: int, processors: int, blocks: int) -> int:
    """``num_splits_heuristic``: the fewest parts at which the last wave of (heads, 64 queries, part) is nearly as full
    as at best; one where a wave is nearly full without."""
    if groups >= 0.8 * processors:
        return 1
    full: dict[int, float] = {}
    for parts in range(1, min(128, processors, blocks) + 1):
        if parts == 1 or -(-blocks // parts) != -(-blocks // (parts - 1)):
            waves = groups * parts / processors
            full[parts] = waves / math.ceil(waves)
    return next(parts for parts, share in full.items() if share >= 0.85 * max(full.values()))


@functools.cache
def _multiprocessors() -> int:
    """Of the largest device; of a large one, where there is none to ask."""
    counts = [torch.cuda.get_device_properties(i).multi_processor_count for i in range(torch.cuda.device_count())]
    return max(counts, default=132)
