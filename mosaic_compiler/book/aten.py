"""The entries of PyTorch's operators, one for each: what is not said here (or in ``trusted.py``) is not known."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch._ops import OpOverload

from mosaic_compiler.book import fusing, rows, scratch, writes
from mosaic_compiler.book.entry import Op
from mosaic_compiler.book.families import (
    attention,
    comparison,
    copy,
    empty,
    fill,
    fused_reduction,
    lookup,
    matmul,
    norm,
    pointwise,
    reduction,
    scan,
    view,
)

aten = torch.ops.aten

ENTRIES: Mapping[OpOverload, Op] = {
    # ------------------------------------------------------------------------------------------ pointwise
    aten.exp.default: pointwise(is_kept_on_cpu=True),
    aten.sigmoid.default: pointwise(is_kept_on_cpu=True),
    aten.ge.Scalar: comparison(operator.ge),
    aten.gt.Scalar: comparison(operator.gt),
    aten.le.Scalar: comparison(operator.le),
    aten.lt.Scalar: comparison(operator.lt),
    aten.eq.Scalar: comparison(operator.eq),
    aten.ne.Scalar: comparison(operator.ne),
    aten.bitwise_and.Tensor: pointwise(logic="and"),
    aten.logical_and.default: pointwise(logic="and"),
    aten.bitwise_or.Tensor: pointwise(logic="or"),
    aten.logical_or.default: pointwise(logic="or"),
    aten.bitwise_not.default: pointwise(logic="not"),
    aten.logical_not.default: pointwise(logic="not"),
    aten.where.self: pointwise(choice=(0, ((1, True), (2, False)))),
    aten.masked_fill.Scalar: pointwise(choice=(1, ((0, False),)), trusted_twin=True),
    aten.masked_fill.Tensor: pointwise(choice=(1, ((0, False),)), trusted_twin=True),
    # these have a layout or a rounding of their own, or memory inside that no plan has
    aten.log_sigmoid_forward.default: pointwise(trusted=False),
    aten.pow.Scalar: pointwise(trusted=False),
    aten.ldexp.Tensor: pointwise(trusted=False),
    aten.mvlgamma.default: pointwise(trusted=False),
    # ----------------------------------------------------------------------------------------- reductions
    aten.sum.dim_IntList: fused_reduction(fused=fusing.summed),
    aten.mean.dim: fused_reduction(),
    aten.amax.default: fused_reduction(takes_elements=True),
    aten.amin.default: fused_reduction(takes_elements=True),
    aten.argmax.default: fused_reduction(positions=0),
    aten.argmin.default: fused_reduction(positions=0),
    aten.any.dim: fused_reduction(fused_scratch=1),
    aten.all.dim: fused_reduction(fused_scratch=1),
    aten.max.dim: reduction(trusted=True, takes_elements=True, positions=1),
    aten.min.dim: reduction(trusted=True, takes_elements=True, positions=1),
    aten.prod.dim_int: reduction(trusted=True),
    aten.logsumexp.default: reduction(),
    aten.var.correction: reduction(),
    aten.std.correction: reduction(),
    aten.native_layer_norm.default: Op("norms", rows=rows.layer_norm_rows, is_accounted=True),
    # ---------------------------------------------------------------------------------- along one dim
    aten._softmax.default: norm(),
    aten._log_softmax.default: norm(),
    aten.cumsum.default: scan(trusted=True, is_dear=True),
    aten.logcumsumexp.default: scan(trusted=True),
    aten.sort.default: scan(trusted=True, is_dear=True, takes_elements=True, positions=1, scratch=scratch.cpu_sort),
    aten.sort.stable: scan(trusted=True, is_dear=True, takes_elements=True, positions=1, scratch=scratch.cpu_sort),
    aten.topk.default: scan(trusted=True, is_dear=True, takes_elements=True, positions=1),
    aten.argsort.default: Op("scan", positions=0),
    aten.argsort.stable: Op("scan", positions=0),
    aten.scatter.src: scan(trusted=True),
    aten.scatter.value: scan(trusted=True),
    # -------------------------------------------------------------------------------------------- views
    aten.view.default: view(rows.view_rows, shape_at=1),
    aten.permute.default: view(rows.permute_rows),
    aten.transpose.int: view(rows.permute_rows),
    aten.t.default: view(rows.permute_rows),
    aten.unsqueeze.default: view(rows.unsqueeze_rows),
    aten.squeeze.default: view(rows.squeeze_rows, is_looked_through=False),
    aten.squeeze.dim: view(rows.squeeze_rows),
    aten.squeeze.dims: view(rows.squeeze_rows),
    aten.expand.default: view(rows.expand_rows, shape_at=1),
    aten.slice.Tensor: view(rows.slice_rows, moves_rows=True),
    aten.select.int: view(rows.select_rows, moves_rows=True),
    aten.view_as_complex.default: view(rows.complex_rows, is_looked_through=False),
    aten.view_as_real.default: view(rows.complex_rows, is_looked_through=False),
    aten.alias.default: view(rows.same_rows, is_looked_through=False),
    aten.detach.default: view(rows.same_rows, is_looked_through=False),
    # ------------------------------------------------------------------------------- copies and parts
    aten.clone.default: copy(takes_elements=True),
    aten._to_copy.default: copy(),
    aten.lift_fresh_copy.default: Op("copy", write=writes.copied, takes_elements=True),
    torch.ops.prims.convert_element_type.default: Op("copy", write=writes.copied),
    aten.flip.default: Op("rearrangement", takes_elements=True),
    aten.cat.default: Op("join", rows=rows.cat_rows, trusted=True, fused=fusing.joined),
    aten.stack.default: Op("join", rows=rows.stack_rows, trusted=True),
    aten.constant_pad_nd.default: Op("join", rows=rows.pad_rows, write=writes.padded, can_write=writes.adds_only),
    aten.slice_scatter.default: Op("write", write=writes.slice_replaced),
    aten.select_scatter.default: Op("write", write=writes.part_replaced),
    # ------------------------------------------------------------------------------------------ lookups
    aten.index_select.default: lookup(rows.index_select_rows, fused=fusing.rows_gathered),
    aten.index.Tensor: lookup(rows.index_rows, fused=fusing.rows_gathered),
    aten.gather.default: lookup(rows.along_rows, fused=fusing.element_gathered),
    # ----------------------------------------------------------------------------------------- creation
    aten.full.default: fill("arg1", rows.source_rows, shape_at=0),
    aten.full_like.default: fill("arg1", rows.source_rows),
    aten.new_full.default: fill("arg2"),
    aten.fill.Scalar: fill("arg1"),
    aten.scalar_tensor.default: fill("arg0"),
    aten.zeros.default: fill(0),
    aten.zeros_like.default: fill(0, rows.source_rows),
    aten.new_zeros.default: fill(0),
    aten.ones.default: fill(1),
    aten.ones_like.default: fill(1, rows.source_rows),
    aten.new_ones.default: fill(1),
    aten.empty.memory_format: empty(),
    aten.empty_like.default: empty(),
    aten.empty_strided.default: empty(),
    aten.new_empty.default: empty(),
    aten.arange.default: Op("numbers", write=writes.numbered),
    aten.arange.start: Op("numbers", write=writes.numbered),
    aten.arange.start_step: Op("numbers", write=writes.numbered),
    # ------------------------------------------------------------------------------------------ products
    aten.mm.default: matmul(rows.mm_rows),
    aten.addmm.default: matmul(rows.addmm_rows),
    aten.bmm.default: matmul(rows.bmm_rows),
    aten.baddbmm.default: matmul(None),
    aten._grouped_mm.default: Op("products", is_accounted=True, scratch=scratch.cuda_grouped_mm),
    # ----------------------------------------------------------------------------------------- attention
    aten._scaled_dot_product_flash_attention_for_cpu.default: attention(
        mask="attn_mask", groups_heads=True, scratch=scratch.cpu_flash_attention
    ),
    aten._scaled_dot_product_flash_attention.default: attention(groups_heads=True),
    aten._scaled_dot_product_efficient_attention.default: attention(mask="attn_bias"),
    aten._scaled_dot_product_cudnn_attention.default: attention(
        mask="attn_bias", groups_heads=True, scratch=scratch.flash_scratch
    ),
}
