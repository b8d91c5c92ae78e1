"""Single ops between two products: the same results as eager's, whole and in chunks of rows, in poisoned memory.

What has a row rule is computed in chunks, what has none whole; either way nobody should notice.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

OPS = {
    "sum()": lambda h: h.sum(dim=()),
    "mean()": lambda h: h.mean(dim=()),
    "amax()": lambda h: h.amax(()),
    "any": lambda h: (h > 0).any(),
    "all": lambda h: (h > -9).all(),
    "any-1": lambda h: (h > 0).any(-1),
    "std": lambda h: torch.std(h),
    "var-1": lambda h: h.var(-1),
    "argmax": lambda h: h.argmax(),
    "argmax0": lambda h: h.argmax(0),
    "lse-1": lambda h: torch.logsumexp(h, -1),
    "norm": lambda h: h.norm(),
    "vector_norm": lambda h: torch.linalg.vector_norm(h, dim=-1),
    "vector_norm_0": lambda h: torch.linalg.vector_norm(h, dim=0),
    "prod-1": lambda h: h.prod(-1),
    "prod": lambda h: h.prod(),
    "cumsum-1": lambda h: h.cumsum(-1),
    "sum": lambda h: h.sum(),
    "mean": lambda h: h.mean(),
    "max": lambda h: h.max(),
    "min-1": lambda h: h.min(-1).values,
    "max0": lambda h: h.max(0).indices,
    "median-1": lambda h: h.median(-1).values,
    "sum0k": lambda h: h.sum(0, keepdim=True),
    "sum(0,1)": lambda h: h.sum((0, 1)),
    "mean(-1,k)": lambda h: h.mean(-1, keepdim=True),
    "amin0": lambda h: h.amin(0),
    "softmax0": lambda h: torch.softmax(h, 0),
    "std-1": lambda h: h.std(-1, keepdim=True),
    "var_mean": lambda h: torch.var_mean(h, -1)[0],
    "kthvalue": lambda h: h.kthvalue(2, -1).values,
    "mode": lambda h: h.round().mode(-1).values,
    "cummax": lambda h: h.cummax(-1).values,
    "flip": lambda h: h.flip(0),
    "roll": lambda h: h.roll(1, 0),
    "roll1": lambda h: h.roll(1, -1),
    "tril": lambda h: h.tril(),
    "diag": lambda h: torch.diagonal(h),
    "repeat": lambda h: h.repeat(2, 1),
    "repeat_i": lambda h: h.repeat_interleave(2, 0),
    "repeat_i1": lambda h: h.repeat_interleave(2, 1),
    "pad_last": lambda h: F.pad(h, (1, 2)),
    "pad_rows": lambda h: F.pad(h, (0, 0, 1, 2)),
    "tile": lambda h: h.tile(1, 3),
    "stack": lambda h: torch.stack([h, h * 2], 1),
    "nan_to_num": lambda h: h.nan_to_num(),
    "clamp": lambda h: h.clamp(-1, 1),
    "where": lambda h: torch.where(h > 0, h, -h),
    "bucketize": lambda h: torch.bucketize(h, torch.linspace(-1, 1, 5)),
    "one_hot": lambda h: F.one_hot(h.argmax(-1), 8),
    "group_norm": lambda h: F.group_norm(h, 2),
    "layer_norm": lambda h: F.layer_norm(h, (8,)),
    "glu": lambda h: F.glu(h),
    "gelu": lambda h: F.gelu(h, approximate="tanh"),
    "einsum_rows": lambda h: torch.einsum("nd,nd->n", h, h),
    "einsum_outer": lambda h: torch.einsum("nd,md->nm", h, h),
    "cdist": lambda h: torch.cdist(h, h),
    "unfold": lambda h: h.unfold(0, 3, 1),
    "histc": lambda h: torch.histc(h, 4),
    "topk": lambda h: h.topk(3, -1).values,
    "sort0": lambda h: h.sort(0).values,
    "masked_scatter": lambda h: h.masked_scatter(h > 0, h.flip(0)),
    "index_add": lambda h: h.index_add(0, torch.tensor([0, 1]), h[:2]),
    "scatter_add": lambda h: h.scatter_add(0, torch.zeros(1, 8, dtype=torch.long), h[:1]),
    "scatter_reduce": lambda h: h.scatter_reduce(0, torch.zeros(2, 8, dtype=torch.long), h[:2], "amax"),
    "take_along": lambda h: torch.take_along_dim(h, h.argsort(0), 0),
    "logcumsumexp": lambda h: h.logcumsumexp(0),
    "searchsorted": lambda h: torch.searchsorted(h.sort(-1).values.contiguous(), h),
    "conv1d": lambda h: F.conv1d(h.t()[None], torch.ones(4, 8, 3), padding=1),
    "avg_pool": lambda h: F.avg_pool1d(h[None], 2),
    "bmm": lambda h: torch.bmm(h[None], h.t()[None]),
    "addmm": lambda h: torch.addmm(h[0, 0], h, h.t()),
    "baddbmm": lambda h: torch.baddbmm(torch.zeros(1), h[None], h.t()[None], beta=0.5),
    "isin": lambda h: torch.isin(h.round(), torch.tensor([0.0, 1.0])),
    "atan2": lambda h: torch.atan2(h, h + 1),
    "polar": lambda h: torch.view_as_real(torch.polar(h, h)),
    "complex": lambda h: torch.view_as_real(
        torch.view_as_complex(h.view(-1, 4, 2)) * torch.view_as_complex(h.view(-1, 4, 2))
    ),
    "fft": lambda h: torch.fft.fft(h).real,
    "bitwise": lambda h: (h * 10).int() & 3,
    "remainder": lambda h: h.remainder(0.7),
    "fmod": lambda h: torch.fmod(h, 0.7),
    "floor_divide": lambda h: h // 0.3,
    "logaddexp": lambda h: torch.logaddexp(h, h),
    "lerp": lambda h: torch.lerp(h, h + 1, 0.3),
    "addcmul": lambda h: torch.addcmul(h, h, h),
    "rms_norm": lambda h: F.rms_norm(h, (8,)),
    "dropout": lambda h: F.dropout(h, 0.0),
    "embedding": lambda h: F.embedding((h.abs() * 3).long().clamp(0, 3), torch.eye(4)),
    "chunk": lambda h: h.chunk(2, -1)[1],
    "tensor_split": lambda h: h.tensor_split(3, 0)[1],
    "unflatten": lambda h: h.unflatten(-1, (2, 4)).transpose(-1, -2),
    "movedim": lambda h: h.view(-1, 2, 4).movedim(1, 0),
    "expand": lambda h: h[:, None].expand(-1, 3, -1),
    "t_contiguous": lambda h: h.t().contiguous(),
    "view_dtype": lambda h: h.view(torch.int32),
    "half": lambda h: h.half().float(),
    "bfloat16_mm": lambda h: h.to(torch.bfloat16) @ h.to(torch.bfloat16).t(),
}


# Numbers that are computed from sizes, and are no whole ones.
SIZED = {
    "clamp": lambda h: h.clamp(max=1 / h.shape[0]) * 2,
    "full": lambda h: h + torch.full((h.shape[0], 8), 0.3 * h.shape[0]),
    "addmm": lambda h: torch.addmm(h, h, h.mT @ h, alpha=1 / h.shape[0], beta=0.3 * h.shape[0]),
    "power": lambda h: h * h.shape[0] ** -0.5,
    "log": lambda h: F.scaled_dot_product_attention(h, h, h, scale=math.log(h.shape[0])),
    "threshold": lambda h: F.threshold(h, 1 / h.shape[0], 0.1 * h.shape[0]),
    "masked_fill": lambda h: h.masked_fill(h > 0.1, 0.5 * h.shape[0]),
    "picked": lambda h: h[h[:, 0] > 0].clamp(max=1 / h.shape[0]) + 1,
    "eps": lambda h: F.layer_norm(h, (8,), eps=1 / h.shape[0]),
}


def check(op, lengths, **options):
    def f(x, w):
        h = torch.relu(x @ w) - 0.2
        return op(h), (h * 2) @ w

    step = torch.compile(f, backend="mosaic", dynamic=True, options={"poison": True, **options})
    for n, width in lengths:
        x, w = torch.randn(n, width), torch.randn(width, width)
        for got, expected in zip(step(x, w), f(x, w), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("name", OPS)
def test_an_op_between_two_products(name, chunk):
    check(OPS[name], [(17, 8), (40, 8)], chunk_rows=chunk)


@pytest.mark.parametrize("name", ["einsum_rows", "einsum_outer", "repeat", "pad_rows", "vector_norm", "flip"])
def test_an_op_between_two_products_in_chunks(name):
    check(OPS[name], [(17, 8), (40, 8)], chunk_rows=5)


def test_the_last_part_of_a_split_is_what_is_left():
    """Two parts of an odd width, from a graph that was captured for an even one."""
    check(lambda h: h.chunk(2, -1)[1], [(17, 8), (12, 7), (9, 5)])


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("name", SIZED)
def test_numbers_computed_from_sizes(name, chunk):
    check(SIZED[name], [(17, 8), (40, 8), (5, 8)], chunk_rows=chunk)


@pytest.mark.parametrize("chunk", [None, 5])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True)
def test_numbers_computed_from_numbers_that_only_the_data_knows(chunk):
    """Rows picked in the middle of a step have no number when it is planned: neither chunks nor offsets."""

    def op(h):
        picked = h[(h[:, 0] > 0).nonzero()[:, 0]]
        some = torch.relu(picked) @ torch.ones(8, 3) + torch.full((picked.shape[0], 3), 0.1 * picked.shape[0])
        return some, h.clamp(max=0.1 * (h > 0).sum().item())

    def f(x, w):
        return (*op(torch.relu(x @ w) - 0.2), x @ w)

    step = torch.compile(f, backend="mosaic", dynamic=True, options={"poison": True, "chunk_rows": chunk})
    for n in (17, 40, 9):
        x, w = torch.randn(n, 8), torch.randn(8, 8)
        for got, expected in zip(step(x, w), f(x, w), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.fuse
def test_what_only_the_data_knows_the_size_of_is_not_fused():
    def f(x):
        picked = x[(x[:, 0] > 0).nonzero()[:, 0]]
        return (torch.relu(picked) @ torch.ones(8, 3) + torch.full((picked.shape[0], 3), 0.5)), torch.relu(x) * 2 + 1

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        step = torch.compile(f, backend="mosaic", dynamic=True)
        for n in (17, 40, 9):
            x = torch.randn(n, 8)
            for got, expected in zip(step(x), f(x), strict=True):
                torch.testing.assert_close(got, expected)


@pytest.mark.fuse
@pytest.mark.parametrize("name", ["clamp", "picked", "threshold"])
def test_numbers_computed_from_sizes_beside_fused_kernels(name):
    check(SIZED[name], [(17, 8), (40, 8), (5, 8)])
