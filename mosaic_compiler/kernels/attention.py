"""Attention on a GPU whose number of queries only the data says: FlashAttention instead of cuDNN.

cuDNN, the fastest on Hopper, makes an execution plan for each shape that it has not seen (43 ms of CPU time on an idle
H100 host, 65 to 130 ms in a step on a busy one), and PyTorch keeps every one.  That pays for the N x N attentions of a
length.  The rows that somebody reads are others in nearly every step; their attention runs without a plan unless it is
so large that FlashAttention would lose more than half a millisecond.  (Steps of 1,024 tokens of Dream-7B's dims, each
with another number of needed rows: 95 ms with a plan, 31 without.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from mosaic_compiler import ir
from mosaic_compiler.book import scratch
from mosaic_compiler.planning.flash import split_bytes
from mosaic_compiler.planning.lives import Sizes

aten = torch.ops.aten

_FLASH = aten._scaled_dot_product_flash_attention.default
_WORTH_A_PLAN = 1 << 39  # floating-point operations


def kernel_of(node: fx.Node, sizes: Sizes, varying: Collection[sympy.Symbol], room: int) -> Callable[..., Any]:
    """What computes a node at these sizes: its own op, or FlashAttention called like it.

    Args:
        varying: symbols whose values only the data says.
        room: bytes that the plan has for the node, besides its results.
    """
    assert callable(node.target)
    if not scratch.has_flash_twin(node, varying):
        return node.target
    query, key = ([sizes(size) for size in scratch.attention_shape(node, operand)] for operand in (0, 1))
    if work(query, key) >= _WORTH_A_PLAN:
        return node.target
    batch, heads, rows, depth = query
    needed = split_bytes(batch * heads, rows, key[2], depth, scratch.multiprocessors())
    return _flash_like_cudnn if needed <= room else node.target


def makes_plan(node: fx.Node, known: Collection[sympy.Symbol]) -> bool:
    """cuDNN makes a plan for a node, whose shapes follow from the symbols in ``known``."""
    others = (*node.args[3:], *node.kwargs.values())
    if node.target is not scratch.CUDNN or any(isinstance(other, fx.Node) for other in others):
        return False
    numbers = [ir.expr_of(n) for tensor in scratch.attention_operands(node) for n in (*tensor.shape, *tensor.stride())]
    return all(number.free_symbols <= set(known) for number in numbers)


def work(query: Sequence[int], key: Sequence[int]) -> int:
    """Floating-point operations of an attention of these shapes."""
    batch, heads, rows, depth = query
    return 4 * batch * heads * rows * depth * key[2]


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
