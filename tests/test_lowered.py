"""A lowered step is data: it is printed, pickled, planned where there is no torch, and run where there is no graph."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mosaic_compiler.backend import compile_aten
from mosaic_compiler.errors import CaptureError
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes import trace
from mosaic_compiler.planning.lowered import Kind
from mosaic_compiler.runtime.loading import LoadedStep

ROOT = Path(__file__).parent.parent


def step(x, mask, w, head):
    """x [N, 8]; the head's rows are read where the mask holds."""
    q, k, v = ((x @ w)[None, None] * scale for scale in (1.0, 0.5, 2.0))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v)[0, 0]
    y = x + torch.nn.functional.silu(y @ w) * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)
    return torch.where(mask, torch.softmax(y @ head, -1).amax(-1), 0.0), y.float()


def arguments(n):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 8, generator=generator)
    return x, torch.arange(n) % 3 == 0


def weights():
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(8, width, generator=generator) for name, width in (("w_1", 8), ("head_1", 40))}


def compiled(**options):
    module = trace(step, *arguments(12), *weights().values(), dynamic=[(0,), (0,)])
    return compile_aten(module, MosaicOptions(**options), static_inputs=[2, 3])


PLANS = """
import sys
sys.modules["torch"] = None  # an import of it fails
import pickle
kept = pickle.load(open(sys.argv[1], "rb"))
for tokens in (4096, 9000, 20000):
    plan = kept.outline.plan_for(tokens, 0.5).plan
    small = kept.outline.plan_for(tokens, 0.5, plan.workspace * 9 // 10).plan
    print(plan.to_json(indent=None), small.to_json(indent=None), sep="\\n")
print(kept.variants["loops"])
assert not [name for name in sys.modules if name.startswith("torch.")]
"""

RUNS = """
import pickle, sys, torch
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.runtime.loading import LoadedStep
kept = pickle.load(open(sys.argv[1], "rb"))
given = torch.load(sys.argv[2])
torch.set_num_threads(1)  # as in the tests: results are compared bit for bit
step = LoadedStep(kept, given["weights"], MosaicOptions(poison=True, chunk_rows=given["chunks"]))
results = [step(inputs) for inputs in given["inputs"]]
torch.save([results, [failure.reason for c in step.variants.values() for k, _ in c._kernels if (failure := k.failure)]],
           sys.argv[3])
"""


def elsewhere(script, *paths):
    command = [sys.executable, "-c", script, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert not done.returncode, done.stderr
    return done.stdout


def keep(run, folder):
    path = folder / "step.pickle"
    path.write_bytes(pickle.dumps(run.kept.data()))
    return path


def test_it_plans_in_a_process_without_torch(tmp_path):
    run = compiled(disable=("fuse",))
    *lines, text = elsewhere(PLANS, keep(run, tmp_path)).split("\n", 6)
    expected = []
    for tokens in (4096, 9000, 20000):
        plan = run.outline.plan_for(tokens, 0.5).plan
        expected += [plan, run.outline.plan_for(tokens, 0.5, plan.workspace * 9 // 10).plan]
    assert [json.loads(line)["buffers"] for line in lines] == [json.loads(p.to_json())["buffers"] for p in expected]
    assert "chunk_loop_0" in text
    assert "aten._scaled_dot_product_flash_attention_for_cpu.default" in text


@pytest.mark.parametrize(
    "fuse", [pytest.param(False, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.fuse)]
)
@pytest.mark.parametrize("chunks", [pytest.param(None, marks=pytest.mark.slow), 7])
def test_it_runs_in_another_process_with_weights_by_name(tmp_path, fuse, chunks):
    run = compiled(chunk_rows=chunks, **({} if fuse else {"disable": ("fuse",)}))
    assert bool(run.kept.variants["flat"].graph.clusters) == fuse
    given, results = tmp_path / "given.pt", tmp_path / "results.pt"
    inputs = [arguments(n) for n in (12, 30, 3, 2)]
    torch.save({"weights": weights(), "inputs": inputs, "chunks": chunks}, given)
    elsewhere(RUNS, keep(run, tmp_path), given, results)
    found, failures = torch.load(results)
    assert not failures
    for result, own in zip(found, inputs, strict=True):
        for got, expected in zip(result, step(*own, *weights().values()), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        if not fuse:
            for got, here in zip(result, run([*own, *weights().values()]), strict=True):
                assert torch.equal(got, here)


def test_what_is_missing_is_said():
    kept = compiled(disable=("fuse",)).kept
    with pytest.raises(CaptureError, match="needs 1 more weights: head_1"):
        LoadedStep(kept, {"w_1": torch.randn(8, 8)})
    with pytest.raises(CaptureError, match=r"takes 2 inputs besides weights \(x_1, mask_1\), got 1"):
        LoadedStep(kept, weights())([torch.randn(3, 8)])


def test_every_op_says_how_it_gets_its_result():
    lowered = compiled(disable=("fuse",)).kept.variants["loops"]
    ops = [*lowered.graph.ops, *(op for loop in lowered.loops.values() for op in loop.body.ops)]
    assert all(op.way for op in ops if op.kind is Kind.DESTINATION)
    assert {op.kind for op in ops} >= {Kind.DESTINATION, Kind.VIEW, Kind.LOOP, Kind.NUMBER}
    assert lowered.symbols
    text = str(lowered)
    assert text.startswith("early: ")
    assert text.splitlines()[-1].startswith("return %")


def test_options_of_running_are_those_of_the_loaded_step():
    """A step that was compiled without poison mode runs in it, in chunks, within another budget."""
    run = compiled(disable=("fuse",))
    for options in ({"poison": True}, {"poison": True, "chunk_rows": 5}, {"chunk_rows": 3}, {"memory_budget": "8MiB"}):
        loaded = LoadedStep(pickle.loads(pickle.dumps(run.kept.data())), weights(), MosaicOptions(**options))
        for n in (12, 33, 2):
            for got, expected in zip(loaded(arguments(n)), step(*arguments(n), *weights().values()), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------ what ops are called with
library = torch.library.Library("math", "FRAGMENT")  # a namespace that is called like a module of Python's
library.define("half(Tensor x) -> Tensor")
library.impl("half", lambda x: x / 2, "CompositeExplicitAutograd")
torch.library.register_fake("math::half", torch.empty_like, lib=library)


@torch.library.custom_op("lowered::add_one", mutates_args={"x"})
def add_one(x: torch.Tensor) -> None:
    x.add_(1)


def writes(x):
    y = x * 1
    add_one(y)
    return y * 2


def compares(x):
    return x + 1, x.shape[0] > 5, torch.sym_not(x.shape[0] > 5), torch.add(x > 0, x.shape[0] > 5)


def literals(x):
    ids = torch.arange(x.shape[0]) % 4
    y = torch.nn.functional.silu(x @ x.t())
    masks = ids == torch.tensor(0), torch.isin(ids, torch.tensor([0, 3])), torch.tensor([True, False, False, True])[ids]
    return tuple(torch.where(mask, (y @ x).softmax(-1).amax(-1), 0.0) for mask in masks)


def one_row(x):
    logits = (x @ x.t()) @ x
    return logits[0], logits[-1], logits[x.shape[0] // 2]


CALLS = [writes, compares, literals, one_row, lambda x: torch.ops.math.half(x) + 1]


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("options", [{}, {"poison": True, "chunk_rows": 2}])
def test_what_ops_are_called_with(function, options):
    fast = torch.compile(function, backend="mosaic", dynamic=True, options=options)
    for n in (4, 9):
        x = torch.randn(n, 6)
        with torch.no_grad():
            got, expected = fast(x.clone()), function(x.clone())
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        for one, other in zip(got, expected, strict=True) if isinstance(got, tuple) else ():
            assert type(one) is type(other)
