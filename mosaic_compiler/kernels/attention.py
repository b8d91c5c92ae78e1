"""Attention on a GPU whose number of queries only the data says: FlashAttention instead of cuDNN.

cuDNN, the fastest on Hopper, makes an execution plan for each shape that it has not seen (43 ms of CPU time on an idle
H100 host, 65 to 130 ms in a step on a busy one), and PyTorch keeps every one.  That pays for the N x N attentions of a
length.  The rows that somebody reads are others in nearly every step; their attention runs without a plan unless it is
so large that FlashAttention would lose more than half a millisecond.  (Steps of 1,024 tokens of Dream-7B's dims, each
with another number of needed rows: 95 ms with a plan, 31 without.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from mosaic_compiler import ir
from mosaic_compiler.planning.flash import SplitBytes, split_bytes
from mosaic_compiler.planning.lives import Sizes

aten = torch.ops.aten

_CUDNN = aten._scaled_dot_product_cudnn_attention.default
_FLASH = aten._scaled_dot_product_flash_attention.default
_WORTH_A_PLAN = 1 << 39  # floating-point operations


def kernel_of(node: fx.Node, sizes: Sizes, varying: Collection[sympy.Symbol], scratch: int) -> Callable[..., Any]:
    """What computes a node at these sizes: its own op, or FlashAttention called like it.

    Args:
        varying: symbols whose values only the data says.
        scratch: bytes that the plan has for the node, besides its results.
    """
    assert callable(node.target)
    if not _has_twin(node, varying):
        return node.target
    batch, heads, rows, depth = (sizes(size) for size in _shape(node, 0))
    keys = sizes(_shape(node, 1)[2])
    if 4 * batch * heads * rows * depth * keys >= _WORTH_A_PLAN:
        return node.target
    needed = split_bytes(batch * heads, rows, keys, depth, _multiprocessors())
    return _flash_like_cudnn if needed <= scratch else node.target


def flash_scratch(node: fx.Node) -> sympy.Expr:
    """Bytes that FlashAttention may allocate while it computes a node, if :func:`kernel_of` may choose it."""
    varying = {other.meta[ir.BINDS] for other in node.graph.nodes if ir.BINDS in other.meta}
    if not _has_twin(node, varying):
        return sympy.Integer(0)
    batch, heads, rows, depth = _shape(node, 0)
    return SplitBytes(batch * heads, rows, _shape(node, 1)[2], depth, sympy.Integer(_multiprocessors()))


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


@functools.cache
def _multiprocessors() -> int:
    """Of the largest device; of a large one, where there is none to ask."""
    counts = [torch.cuda.get_device_properties(i).multi_processor_count for i in range(torch.cuda.device_count())]
    return max(counts, default=132)
