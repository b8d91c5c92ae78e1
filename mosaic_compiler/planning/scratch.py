"""Bytes that an op allocates while it runs and frees before it returns.

Planned as buffers of kind ``scratch`` that live for one schedule position.  Each formula names the
code it mirrors; ops that are not listed allocate nothing (checked in ``tests/test_scratch.py``).
"""

from __future__ import annotations

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from mosaic_compiler import ir
from mosaic_compiler.clusters import cluster_of
from mosaic_compiler.kernels import attention, cluster_form, ops

aten = torch.ops.aten


def scratch_bytes(node: fx.Node) -> sympy.Expr:
    """Scratch of one node in bytes, as an expression in the graph's symbols."""
    if (cluster := cluster_of(node)) is not None:
        return cluster_form.scratch_bytes(cluster)
    if node.target is aten._scaled_dot_product_flash_attention_for_cpu.default:
        return _cpu_flash_attention(node)
    if node.target is aten._scaled_dot_product_cudnn_attention.default:
        return attention.flash_scratch(node)
    if node.target is ops.head_statistics:
        return _head_statistics(node)
    if node.target is aten._grouped_mm.default:
        return _cuda_grouped_mm(node)
    if node.target in (aten.sort.default, aten.sort.stable):
        return _cpu_sort(node)
    if ir.is_pointwise(node):
        return _cpu_casts(node)
    return sympy.Integer(0)


def _cpu_flash_attention(node: fx.Node) -> sympy.Expr:
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
        if torch.cpu._is_amx_tile_supported():
            batch, heads, length, _ = (ir.expr_of(size) for size in k.shape)
            packed = batch * heads * ((head_dim + 1) * length + head_dim * (length + 1))
            scratch += 2 * packed + 2 * (512 * head_dim + 256 * (head_dim + 1)) * torch.get_num_threads()
    return scratch


def _head_statistics(node: fx.Node) -> sympy.Expr:
    """kernels/head_statistics.py: a tile of the product, of each step behind it, of the exponentials and of
    one temporary, and vectors."""
    hidden, total = node.args[0], ir.tensors_of(node)[2]
    assert isinstance(hidden, fx.Node)
    assert total is not None
    tensor, tile, top = ir.tensor_of(hidden), node.args[4], node.args[5]
    assert tensor is not None
    assert isinstance(tile, int)
    assert isinstance(top, int)
    steps = node.args[3]
    assert isinstance(steps, str)
    wide = 8 if "to:float64" in steps else total.dtype.itemsize
    tiles = tensor.dtype.itemsize + (2 + len(steps.split(","))) * wide
    return ir.expr_of(tensor.shape[0]) * (tiles * tile + 16 * wide + 80 * (top + 1))


def _cuda_grouped_mm(node: fx.Node) -> sympy.Expr:
    """ATen/native/cuda/GroupMM.cu: one record per group, and CUTLASS's workspace (some bytes per multiprocessor; both
    together 66 KiB for 64 groups on an H100)."""
    out, groups = ir.only_tensor(node), ir.only_tensor(node.args[1])  # type: ignore[arg-type]
    if out.device.type != "cuda":
        return sympy.Integer(0)
    return sympy.Integer(128 << 10) + 1024 * ir.expr_of(groups.shape[0])


def _cpu_sort(node: fx.Node) -> sympy.Expr:
    """ATen/native/cpu/SortingKernel.cpp: int64 positions of one row."""
    values = ir.tensors_of(node)[0]
    assert values is not None
    default = node.args[1] if node.target is aten.sort.default and len(node.args) > 1 else -1
    dim = node.kwargs.get("dim", default)
    assert isinstance(dim, int)
    return 8 * ir.expr_of(values.shape[dim]) if values.dim() else sympy.Integer(8)


def _cpu_casts(node: fx.Node) -> sympy.Expr:
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
