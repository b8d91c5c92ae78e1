"""Attention on a GPU whose number of queries only the data says: FlashAttention instead of cuDNN.

cuDNN, the fastest on Hopper, makes an execution plan for each shape that it has not seen (43 ms of CPU time on an idle
H100 host, 65 to 130 ms in a step on a busy one), and PyTorch keeps every one.  That pays for the N x N attentions of a
length.  The rows that somebody reads are others in nearly every step; their attention runs without a plan unless it is
so large that FlashAttention would lose more than half a millisecond.  (Steps of 1,024 tokens of Dream-7B's dims, each
with another number of needed rows: 95 ms with a plan, 31 without.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
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
    query, key = ([sizes(size) for size in _shape(node, operand)] for operand in (0, 1))
    if work(query, key) >= _WORTH_A_PLAN:
        return node.target
    batch, heads, rows, depth = query
    needed = split_bytes(batch * heads, rows, key[2], depth, _multiprocessors())
    return _flash_like_cudnn if needed <= scratch else node.target


def flash_scratch(node: fx.Node) -> sympy.Expr:
    """Bytes that FlashAttention may allocate while it computes a node, if :func:`kernel_of` may choose it."""
    varying = {other.meta[ir.BINDS] for other in node.graph.nodes if ir.BINDS in other.meta}
    if not _has_twin(node, varying):
        return sympy.Integer(0)
    batch, heads, rows, depth = _shape(node, 0)
    return SplitBytes(batch * heads, rows, _shape(node, 1)[2], depth, sympy.Integer(_multiprocessors()))


def makes_plan(node: fx.Node, known: Collection[sympy.Symbol]) -> bool:
    """cuDNN makes a plan for a node, whose shapes follow from the symbols in ``known``."""
    others = (*node.args[3:], *node.kwargs.values())
    if node.target is not _CUDNN or any(isinstance(other, fx.Node) for other in others):
        return False
    numbers = [ir.expr_of(n) for tensor in operands(node) for n in (*tensor.shape, *tensor.stride())]
    return all(number.free_symbols <= set(known) for number in numbers)


def operands(node: fx.Node) -> list[Tensor]:
    """Queries, keys and values, each [B, heads, rows, depth]."""
    return [ir.only_tensor(source) for source in node.args[:3] if isinstance(source, fx.Node)]


def work(query: Sequence[int], key: Sequence[int]) -> int:
    """Floating-point operations of an attention of these shapes."""
    batch, heads, rows, depth = query
    return 4 * batch * heads * rows * depth * key[2]


def _has_twin(node: fx.Node, varying: Collection[sympy.Symbol]) -> bool:
    """An attention of cuDNN's that FlashAttention can compute as well, with a number of queries that varies."""
    if node.target is not _CUDNN or not _shape(node, 0)[2].free_symbols & set(varying):
        return False
    depth, depth_of_values = _shape(node, 0)[3], _shape(node, 2)[3]
    plain = ir.argument(node, "attn_bias") is None and ir.argument(node, "is_causal") is False
    plain = plain and ir.argument(node, "dropout_p") == 0 and all(user.args[1] == 0 for user in node.users)
    return bool(plain and depth == depth_of_values and depth.is_Integer and depth % 8 == 0 and depth <= 256)


def _shape(node: fx.Node, operand: int) -> list[sympy.Expr]:
    return [ir.expr_of(size) for size in operands(node)[operand].shape]


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
