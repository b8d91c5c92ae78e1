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
from mosaic_compiler.kernels import few_queries
from mosaic_compiler.planning.flash import split_bytes
from mosaic_compiler.planning.lives import Sizes
from mosaic_compiler.planning.lowered import Attention

aten = torch.ops.aten

_WORTH_A_PLAN = 1 << 39  # floating-point operations


def facts_of(node: fx.Node, varying: Collection[sympy.Symbol]) -> Attention | None:
    """What the choice between kernels depends on; ``None`` for all but cuDNN's and FlashAttention of plain queries.

    Args:
        varying: symbols whose values only the data says.
    """
    others = (*node.args[3:], *node.kwargs.values())
    if node.target not in (scratch.CUDNN, scratch.FLASH) or any(isinstance(other, fx.Node) for other in others):
        return None
    tensors = scratch.attention_operands(node)
    shapes, strides = (tuple(tuple(map(ir.expr_of, part)) for part in parts) for parts in _layouts(tensors))
    is_cudnn, scale = node.target is scratch.CUDNN, ir.argument(node, "scale")
    return Attention(shapes, strides, str(tensors[0].dtype), scratch.has_flash_twin(node, varying), is_cudnn, scale)


def _layouts(tensors: Sequence[Tensor]) -> tuple[list[Any], list[Any]]:
    return [tensor.shape for tensor in tensors], [tensor.stride() for tensor in tensors]


def kernel_of(facts: Attention | None, own: Callable[..., Any], sizes: Sizes, room: int) -> Callable[..., Any]:
    """What computes an attention at these sizes: its own op, or another kernel called like it.

    Args:
        room: bytes that the plan has for it, besides its results.
    """
    if facts is None or not facts.varies:
        return own
    query, key = ([sizes(size) for size in facts.shapes[operand]] for operand in (0, 1))
    processors = scratch.multiprocessors()
    if few_queries.serves(query, key, facts.dtype) and few_queries.scratch_for(query, key, processors) <= room:
        return _few(few_queries.scale_of(facts.scale, query[3]), processors)
    if not facts.is_cudnn or work(query, key) >= _WORTH_A_PLAN:
        return own
    batch, heads, rows, depth = query
    needed = split_bytes(batch * heads, rows, key[2], depth, processors)
    return _flash_like_cudnn if needed <= room else own


def makes_plan(facts: Attention | None, known: Collection[sympy.Symbol]) -> bool:
    """cuDNN makes a plan for it, and its shapes follow from the symbols in ``known``."""
    if facts is None or not facts.is_cudnn or facts.varies:
        return False
    numbers = [number for parts in (facts.shapes, facts.strides) for part in parts for number in part]
    return all(number.free_symbols <= set(known) for number in numbers)


def work(query: Sequence[int], key: Sequence[int]) -> int:
    """Floating-point operations of an attention of these shapes."""
    batch, heads, rows, depth = query
    return 4 * batch * heads * rows * depth * key[2]


def _few(scale: float, processors: int) -> Callable[..., Any]:
    """The kernel for few queries, called like the op that it stands for; nobody reads the other results."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return (few_queries.few_query_attention(query, key, value, scale, processors), *[None] * 8)

    return attend


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
    return scratch.FLASH(query, key, value, dropout_p, is_causal, False, scale=scale)
