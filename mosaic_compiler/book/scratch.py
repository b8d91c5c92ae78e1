"""Bytes that an op allocates while it runs and frees before it returns.

Planned as buffers of their own that live for one schedule position.  Each formula names the code it mirrors; ops whose
entries have none allocate nothing (checked in ``tests/test_scratch.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Collection

import sympy
import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from mosaic_compiler import ir
from mosaic_compiler.compat.tensors import has_tiles
from mosaic_compiler.planning.flash import SplitBytes

aten = torch.ops.aten

CUDNN = aten._scaled_dot_product_cudnn_attention.default
FLASH = aten._scaled_dot_product_flash_attention.default


def cpu_flash_attention(node: fx.Node) -> sympy.Expr:
    """ATen/native/cpu/FlashAttentionKernel.cpp: one [threads, elements] float (or double) buffer.

    Per thread: a score tile (query block x key block), running max and sum, and an accumulator
    (query block x head dim); reduced types keep a reduced copy of the tile beside it.  The query
    block is at most 256 and the key block at most 512, whatever the length.  Where the CPU multiplies a
    reduced type in tiles (AMX), keys and values are packed, with an even head dim and an even length; per
    thread, a key block is transposed for that, and an odd head dim needs a padded query block.
    """
    query, key = node.args[0], node.args[1]
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    q, k = ir.tensor_of(query), ir.tensor_of(key)
    assert q is not None
    assert k is not None
    head_dim = ir.expr_of(q.shape[-1])
    tile = 256 * 512 + 2 * 256 + 256 * head_dim
    scratch = max(4, q.dtype.itemsize) * tile * torch.get_num_threads()
    if q.dtype.itemsize < 4:
        scratch += 2 * 256 * 512 * torch.get_num_threads()
        if has_tiles():
            batch, heads, length, _ = (ir.expr_of(size) for size in k.shape)
            packed = batch * heads * ((head_dim + 1) * length + head_dim * (length + 1))
            scratch += 2 * packed + 2 * (512 * head_dim + 256 * (head_dim + 1)) * torch.get_num_threads()
    return scratch


def cuda_grouped_mm(node: fx.Node) -> sympy.Expr:
    """ATen/native/cuda/GroupMM.cu: one record per group, and CUTLASS's workspace (some bytes per multiprocessor; both
    together 66 KiB for 64 groups on an H100)."""
    out, groups = ir.only_tensor(node), ir.only_tensor(node.args[1])  # type: ignore[arg-type]
    if out.device.type != "cuda":
        return sympy.Integer(0)
    return sympy.Integer(128 << 10) + 1024 * ir.expr_of(groups.shape[0])


def cpu_sort(node: fx.Node) -> sympy.Expr:
    """ATen/native/cpu/SortingKernel.cpp: int64 positions of one row."""
    values = ir.tensors_of(node)[0]
    assert values is not None
    dim = ir.argument(node, "dim")
    assert isinstance(dim, int)
    return 8 * ir.expr_of(values.shape[dim]) if values.dim() else sympy.Integer(8)


def cpu_casts(node: fx.Node) -> sympy.Expr:
    """ATen/TensorIterator.cpp: on the CPU, operands of another dtype are cast into temporaries."""
    out = ir.tensor_of(node)
    if out is None or out.device.type != "cpu":
        return sympy.Integer(0)
    operands = [t for n in node.all_input_nodes if (t := ir.tensor_of(n)) is not None]
    if len(operands) < 2:
        return sympy.Integer(0)
    assert isinstance(node.target, OpOverload)
    values = operands[1:] if node.target._schema.name == "aten::where" else operands
    common = values[0].dtype
    for operand in values[1:]:
        common = torch.promote_types(common, operand.dtype) if operand.dim() or common.is_floating_point else common
    total = sympy.Integer(0)
    for operand in values:
        if operand.dtype != common and operand.dim() > 0:
            elements = sympy.prod([ir.expr_of(size) for size in operand.shape])
            total += elements * common.itemsize
    return total


def flash_scratch(node: fx.Node) -> sympy.Expr:
    """Bytes that FlashAttention, or the kernel for few queries, may allocate while it computes a node, if
    ``kernels/attention.py`` may choose it."""
    if not has_flash_twin(node, ir.numbers_of_rows(node.graph)):
        return sympy.Integer(0)
    batch, heads, rows, depth = attention_shape(node, 0)
    groups, keys = attention_shape(node, 1)[1:3]
    return SplitBytes(batch * heads, rows, keys, depth, sympy.Integer(multiprocessors()), batch * groups)


def has_flash_twin(node: fx.Node, varying: Collection[sympy.Symbol]) -> bool:
    """An attention of cuDNN's (or its own) that FlashAttention can compute as well, with a number of queries that
    varies."""
    if node.target not in (CUDNN, FLASH) or not attention_shape(node, 0)[2].free_symbols & set(varying):
        return False
    depth, depth_of_values = attention_shape(node, 0)[3], attention_shape(node, 2)[3]
    plain = (node.target is FLASH or ir.argument(node, "attn_bias") is None) and ir.argument(node, "is_causal") is False
    plain = plain and ir.argument(node, "dropout_p") == 0 and all(user.args[1] == 0 for user in node.users)
    return bool(plain and depth == depth_of_values and depth.is_Integer and depth % 8 == 0 and depth <= 256)


def attention_shape(node: fx.Node, operand: int) -> list[sympy.Expr]:
    """Sizes of its queries, keys or values."""
    return [ir.expr_of(size) for size in attention_operands(node)[operand].shape]


def attention_operands(node: fx.Node) -> list[Tensor]:
    """Queries, keys and values, each [B, heads, rows, depth]."""
    return [ir.only_tensor(source) for source in node.args[:3] if isinstance(source, fx.Node)]


@functools.cache
def multiprocessors() -> int:
    """Of the largest device; of a large one, where there is none to ask."""
    counts = [torch.cuda.get_device_properties(i).multi_processor_count for i in range(torch.cuda.device_count())]
    return max(counts, default=132)
