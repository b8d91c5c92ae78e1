"""What ops allocate inside, against PyTorch's own allocation events."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mosaic_compiler.backend import compile_aten
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes import trace
from mosaic_compiler.report.measure import _cpu_peak

QKV = [(2, 4, 900, 32)] * 3
SQUARE = (600, 500)


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def attend_masked(q, k, v):
    mask = (q[..., 0] > 0).unsqueeze(-1).expand(2, 4, 900, 900)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def multiply(x, y):
    return x @ y.t() @ y, torch.baddbmm(x[None], x[None], x[None].mT @ x[None])


CASES = {
    "attention": (attend, QKV, torch.float32),
    "attention-bf16": (attend, QKV, torch.bfloat16),
    "attention-bf16-odd": (attend, [(2, 4, 901, 33)] * 3, torch.bfloat16),
    "attention-masked": (attend_masked, QKV, torch.float32),
    "mixed-dtypes": (lambda x, y: x.double() * y.double() + x, [SQUARE] * 2, torch.float32),
    "mixed-where": (lambda x, y: torch.where(x > y, x.double(), y), [SQUARE] * 2, torch.float32),
    "softmax": (lambda x: torch.softmax(x, -1), [(300, 4000)], torch.float32),
    "sort": (lambda x: torch.sort(x, dim=-1, stable=True), [(3, 100_000)], torch.float32),
    "sort-columns": (lambda x: torch.sort(x, dim=0), [(50_000, 3)], torch.float32),
    "reductions": (lambda x: (x.sum(0), x.mean(-1), x.amax(0), x.argmax(-1), x.cumsum(0)), [SQUARE], torch.float32),
    "norms": (lambda x: F.layer_norm(x, (500,)), [SQUARE], torch.float32),
    "matmuls": (multiply, [SQUARE] * 2, torch.float32),
    "gathers": (lambda x: (x.gather(0, x.argsort(0)), x[x.argmax(0)]), [SQUARE], torch.float32),
    "scatters": (lambda x: x.scatter(0, x.argsort(0), x), [SQUARE], torch.float32),
    "random": (lambda x: torch.rand_like(x) + torch.randn_like(x), [SQUARE], torch.float32),
    "writes": (lambda x: torch.slice_scatter(x.masked_fill(x > 0, 0), x[:9] * 2, 0, 0, 9), [SQUARE], torch.float32),
    "cats": (lambda x: torch.cat((x, -x, x * 2), -1).relu(), [SQUARE], torch.float32),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_allocated_beyond_the_plan(name):
    f, shapes, dtype = CASES[name]
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    step = compile_aten(trace(f, *inputs), MosaicOptions(disable=("fuse",)))
    step(inputs)
    _, peak = _cpu_peak(lambda: step(inputs))
    assert peak <= max(step.plan.outside) + 4096  # a few wrapped numbers
