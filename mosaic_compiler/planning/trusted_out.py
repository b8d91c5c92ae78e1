"""Which hand-written ``out=`` overloads and in-place twins are the functional op, written somewhere else.

Not all are: some use their destination as scratch (``binary_cross_entropy``, with a mean), some lay it out anew
(``max_unpool2d``), some read operands as if they were contiguous (``native_batch_norm``), and ``mul_.Scalar`` rounds
its number to bfloat16 first.  So an op's own overload is used if the op is pointwise, or stands here; all others
allocate their results.  ``tests/test_out_overloads.py`` holds this against every sample that PyTorch has of them.
"""

from __future__ import annotations

import torch
from torch._ops import OpOverload

_ROW_WISE_AND_SUMS = """
    _log_softmax _softmax all.default all.dim all.dims amax amin aminmax any.default any.dim any.dims argmax argmin
    cummax cummin cumprod cumsum glu histc kthvalue logcumsumexp max.default max.dim mean.default mean.dim median.dim
    min.default min.dim mode nanmedian.dim nansum norm.ScalarOpt_dim norm.ScalarOpt_dim_dtype prod.dim_int renorm
    sort.default sort.stable sum.dim_IntList topk
"""

_PRODUCTS = """
    _addmm_activation _int_mm _scaled_mm addbmm addmm addmv addr baddbmm bmm dot mm mv outer vdot
"""

_MOVES = """
    _chunk_cat bucketize.Tensor cat col2im complex diag floor_divide gather hardswish im2col index.Tensor index_add
    index_copy index_reduce index_select isin.Scalar_Tensor isin.Tensor_Scalar isin.Tensor_Tensor log_sigmoid
    multinomial narrow_copy nll_loss2d_forward nll_loss_forward polar scatter.reduce scatter.src scatter.value
    scatter.value_reduce scatter_add scatter_reduce.two searchsorted.Scalar searchsorted.Tensor stack take tril triu
"""

_IMAGES = """
    avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices reflection_pad1d replication_pad1d
    upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_trilinear3d
"""

_TWINS = """
    add.Scalar celu copy div.Scalar div.Scalar_mode index_fill.int_Scalar index_fill.int_Tensor index_put
    masked_fill.Scalar masked_fill.Tensor masked_scatter put relu sub.Scalar
"""

# pointwise, but with a layout or a rounding of its own, or memory inside that no plan has
_NOT_TRUSTED = frozenset({"log_sigmoid_forward.default", "pow.Scalar", "ldexp.Tensor", "mvlgamma.default"})


def _named(names: str) -> frozenset[str]:
    return frozenset(name if "." in name else f"{name}.default" for name in names.split())


_OUT = _named(_ROW_WISE_AND_SUMS + _PRODUCTS + _MOVES + _IMAGES)
_IN_PLACE = _named(_TWINS)


def has_trusted_out(op: OpOverload, is_pointwise: bool) -> bool:
    """The op's hand-written ``out=`` overload writes just what the op returns, whatever was there before."""
    if op.namespace != "aten" or (name := _name(op)) in _NOT_TRUSTED:
        return False
    return is_pointwise or name in _OUT


def has_trusted_twin(op: OpOverload) -> bool:
    """The op's in-place twin, called on a copy of the first operand, makes of it what the op returns."""
    return op.namespace == "aten" and _name(op) in _IN_PLACE


def _name(op: OpOverload) -> str:
    return f"{op._schema.name.partition('::')[2]}.{op._overloadname}"


def listed() -> dict[OpOverload, str]:
    """All ops that stand here, with ``out`` or ``in place``."""
    found: dict[OpOverload, str] = {}
    for names, way in ((_OUT, "out"), (_IN_PLACE, "in place")):
        for name in sorted(names):
            packet, _, overload = name.partition(".")
            found[getattr(getattr(torch.ops.aten, packet), overload)] = way
    return found
