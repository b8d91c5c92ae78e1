"""The Triton kernel against its plain-PyTorch reference, in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mosaic_compiler.kernels.gather_logits import choose, gather_logits_reference

SCRIPT = """
import torch
from mosaic_compiler.kernels.gather_logits import Tile, gather_logits_reference, gather_logits_triton

torch.manual_seed(0)
cases = [(33, 48, 77, 5), (10, 16, 130, 17), (9, 20, 31, 1), (9, 20, 31, 0), (300, 70, 65, 129)]
for dtype, limit in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)):
    for n, d, v, m in cases:
        hidden, weight = torch.randn(n, d).to(dtype), torch.randn(v, d).to(dtype)
        index = torch.randint(0, n, (m,))
        out = torch.full((m, v), float("nan"), dtype=dtype)
        gather_logits_triton(hidden, index, weight, out)
        exact = gather_logits_reference(hidden.double(), index, weight.double())
        assert not out.isnan().any()
        assert (out.double() - exact).norm() <= limit * exact.norm(), (dtype, n, d, v, m)

# any strides: a transposed weight, a sliced hidden state, a column-major result; another tile
hidden, weight = torch.randn(40, 64)[::2, ::2], torch.randn(32, 50).t()
index, out = torch.tensor([3, 3, 19, 0]), torch.empty(50, 4).t()
gather_logits_triton(hidden, index, weight, out, Tile(32, 64, 16, 4, 1, 2))
torch.testing.assert_close(out, hidden[index] @ weight.t())

bad = ({"index": index.int()}, {"weight": weight[:, 1:]}, {"out": torch.empty(3, 50)}, {"hidden": hidden.double()})
for change in bad:
    arguments = {"hidden": hidden, "index": index, "weight": weight, "out": out} | change
    try:
        gather_logits_triton(**arguments)
    except ValueError:
        continue
    raise AssertionError(change)

# the pass, on a toy head: the kernel runs inside of the planned step
from mosaic_compiler.backend import compile_aten
from mosaic_compiler.ir import ops
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes import CanonicalizePass, RowDemandPass, trace
from mosaic_compiler.passes.gather_logits import GatherLogitsPass


def head(hidden, weight, ids):
    return torch.where(ids == 3, (hidden @ weight.t()).argmax(-1), ids)


def inputs(n):
    return torch.randn(n, 16), torch.randn(37, 16), torch.randint(2, 5, (n,))


module = GatherLogitsPass(force=True)(RowDemandPass()(CanonicalizePass()(trace(head, *inputs(6)))))
assert any(node.target is ops.gather_logits for node in module.graph.nodes)
step = compile_aten(module, MosaicOptions(poison=True, disable=("fuse",)))
assert not step.fallbacks
for n in (4, 11):
    arguments = inputs(n)
    assert torch.equal(step(list(arguments))[0], head(*arguments))
    assert torch.equal(module(*arguments), head(*arguments))
print("ok")
"""


def test_kernel_in_the_interpreter():
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=200, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout == "ok\n"


def test_reference():
    hidden, weight, index = torch.randn(6, 4), torch.randn(5, 4), torch.tensor([5, 0, 5])
    torch.testing.assert_close(gather_logits_reference(hidden, index, weight), hidden[index] @ weight.t())


def test_the_cpu_uses_gather_and_matmul_and_says_why():
    choice = choose(torch.device("cpu"), torch.float32, 16, 100)
    assert choice.kernel == "index_select + mm"
    assert "cpu" in choice.reason


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 31, 1000])
def test_kernel_on_the_device(dtype, rows):
    from mosaic_compiler.kernels.gather_logits import gather_logits_triton

    hidden = torch.randn(2000, 512, device="cuda", dtype=dtype)
    weight = torch.randn(1237, 512, device="cuda", dtype=dtype)
    index = torch.randint(0, 2000, (rows,), device="cuda")
    out = torch.full((rows, 1237), float("nan"), device="cuda", dtype=dtype)
    gather_logits_triton(hidden, index, weight, out)
    exact = gather_logits_reference(hidden.double(), index, weight.double())
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert not out.isnan().any()
    assert (out.double() - exact).norm() <= limit * exact.norm().clamp_min(1e-9)
