"""Operators of which only this is known: their hand-written ``out=`` overload, or their in-place twin, is the
functional op, written somewhere else (see ``overloads.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch._ops import OpOverload

from mosaic_compiler import ir
from mosaic_compiler.book.entry import NOTHING, Op
from mosaic_compiler.book.families import POINTWISE

_ROW_WISE_AND_SUMS = """
    all.default all.dims aminmax any.default any.dims cummax cummin cumprod glu histc kthvalue max.default
    mean.default median.dim min.default mode nanmedian.dim nansum norm.ScalarOpt_dim norm.ScalarOpt_dim_dtype renorm
"""

_PRODUCTS = """
    _addmm_activation _int_mm _scaled_mm addbmm addmv addr dot mv outer vdot
"""

_MOVES = """
    _chunk_cat bucketize.Tensor col2im complex diag floor_divide hardswish im2col index_add index_copy index_reduce
    isin.Scalar_Tensor isin.Tensor_Scalar isin.Tensor_Tensor log_sigmoid multinomial narrow_copy nll_loss2d_forward
    nll_loss_forward polar scatter.reduce scatter.value_reduce scatter_add scatter_reduce.two searchsorted.Scalar
    searchsorted.Tensor take tril triu
"""

_IMAGES = """
    avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices reflection_pad1d replication_pad1d
    upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_trilinear3d
"""

_TWINS = """
    add.Scalar celu copy div.Scalar div.Scalar_mode index_fill.int_Scalar index_fill.int_Tensor index_put
    masked_scatter put relu sub.Scalar
"""


def _named(names: str) -> list[OpOverload]:
    found = []
    for name in names.split():
        packet, _, overload = name.partition(".")
        found.append(getattr(getattr(torch.ops.aten, packet), overload or "default"))
    return found


def _base(op: OpOverload) -> Op:
    return POINTWISE if ir.is_pointwise(op) else NOTHING


TRUSTED: Mapping[OpOverload, Op] = {
    **{op: replace(_base(op), trusted=True) for op in _named(_ROW_WISE_AND_SUMS + _PRODUCTS + _MOVES + _IMAGES)},
    **{op: replace(_base(op), trusted_twin=True) for op in _named(_TWINS)},
}
