"""``fuse``: what becomes one kernel, and that compiled kernels compute what the ops do, in planned memory only."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn.functional as F
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

import mosaic_compiler
from mosaic_compiler.backend import compile_aten, observing
from mosaic_compiler.errors import ArenaError, FallbackError
from mosaic_compiler.ir.clusters import clusters_in
from mosaic_compiler.kernels import fused
from mosaic_compiler.kernels.coordinates import Coordinates
from mosaic_compiler.options import MosaicOptions
from mosaic_compiler.passes import run_passes, trace
from mosaic_compiler.planning.facts import Source
from mosaic_compiler.sampling import DenoisingStep, block_window

pytestmark = pytest.mark.fuse

D = 64


def norm(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotary(x, angles):
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * angles.cos() + turned * angles.sin()


def block(x, o, w, angles, gate, up):
    y = x + o
    n = norm(y, w)
    heads = rotary(n.view(x.shape[0], 4, D // 4).transpose(0, 1), angles)  # [H, N, d]
    return y, heads, F.silu(gate) * up


def block_inputs(n):
    return (
        torch.randn(n, D), torch.randn(n, D), torch.randn(D), torch.randn(n, D // 4), torch.randn(n, 3 * D),
        torch.randn(n, 3 * D),
    )  # fmt: skip


def found(f, *args, dynamic=None):
    """The ops of each cluster, by name."""
    module, _ = run_passes(trace(f, *args, dynamic=dynamic), disable=("chunk-loops",))
    return [
        sorted(str(n.target).split(".")[1] for n in cluster.body.graph.nodes if n.op == "call_function")
        for _, cluster in clusters_in(module)
    ]


def test_norm_rotary_and_gate_are_clusters():
    clusters = found(block, *block_inputs(9))
    assert len(clusters) == 2
    residual = next(cluster for cluster in clusters if "add" in cluster)
    assert {"mean", "pow", "rsqrt", "mul", "cat", "neg"} <= set(residual)  # the norm and the rotation behind it
    assert not {"cos", "sin"} & set(residual)  # tables: not computed again for every head
    assert ["mul", "silu"] in clusters


def test_a_value_is_not_broadcast_inside_of_a_cluster():
    def f(x, y):
        return torch.exp(x).unsqueeze(1) * y + 1

    assert found(f, torch.randn(5, 8), torch.randn(5, 3, 8)) == [["add", "mul"]]


def experts(rows, weights, at, x, w, mask):
    """Gated activation of masked rows, put back in order, weighted and added up for each token."""
    for other in (rows, weights, at, mask):
        torch._check(other.shape[0] == x.shape[0])
    gate, up = rows.view(-1, 2 * D).masked_fill(mask.view(-1, 1), 0.0).chunk(2, -1)
    out = F.silu(gate) * up
    added = (out * weights.view(-1, 1))[at.view(-1)].view(-1, 4, D).sum(1)
    y = x + added
    return y, norm(y, w)


def expert_inputs(n):
    return (
        torch.randn(n, 4, 2 * D), torch.rand(n, 4), torch.randperm(4 * n).view(n, 4), torch.randn(n, D), torch.randn(D),
        torch.rand(n, 4) < 0.2,
    )  # fmt: skip


def test_gathered_rows_slices_and_small_sums_are_parts_of_one_kernel():
    rows = [(0,), (0,), (0,), (0,), (), (0,)]
    (cluster,) = found(experts, *expert_inputs(9), dynamic=rows)
    assert {"masked_fill", "silu", "index", "sum", "mean", "rsqrt"} <= set(cluster)
    step = compile_aten(trace(experts, *expert_inputs(9), dynamic=rows), MosaicOptions(disable=("chunk-loops",)))
    for n in (1, 8, 57):
        inputs = expert_inputs(n)
        for got, expected in zip(step(list(inputs)), experts(*inputs), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert step.fallbacks == ()
    assert len(step.plan.of_kind("arena")) == 0, "nothing between operands and results is stored"


def test_a_gather_of_what_is_in_memory_stays_a_call():
    assert found(lambda x, at: x[at] * 2 + 1, torch.randn(9, 8), torch.arange(5)) == [["add", "mul"]]


def test_clusters_do_not_depend_on_each_other_in_a_circle():
    def f(x, w):
        a = torch.relu(x * 2)
        b = torch.tanh((a @ w) + 1)
        return torch.exp(a * 3) + b

    x, w = torch.randn(5, 8), torch.randn(8, 8)
    module, _ = run_passes(trace(f, x, w), disable=("chunk-loops",))
    assert torch.equal(module(x, w), f(x, w))
    assert len(clusters_in(module)) == 2


def test_random_draws_writes_and_other_widths_stay_outside():
    def f(x, y):
        noise = torch.rand_like(x)
        total = (x * 2).sum(-1, keepdim=True) + (y * 2).sum(-1, keepdim=True)
        return noise * total

    clusters = found(f, torch.randn(5, 8), torch.randn(5, 16))
    assert not any("rand_like" in cluster for cluster in clusters)
    assert all(cluster.count("sum") <= 1 for cluster in clusters)


@settings(max_examples=examples(4, 24))
@given(st.sampled_from([1, 2, 3, 64, 129]), st.booleans(), st.sampled_from([None, 1, 7, 64]))
def test_kernels_equal_ops_for_any_length(n, poison, chunk):
    step = compiled_block(poison, chunk)
    inputs = block_inputs(n)
    for got, expected in zip(step(list(inputs)), block(*inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert step.fallbacks == ()


_blocks = {}


def compiled_block(poison, chunk):
    key = poison, chunk
    if key not in _blocks:
        rows = [(0,), (0,), (), (0,), (0,), (0,)]
        _blocks[key] = compile_aten(
            trace(block, *block_inputs(9), dynamic=rows), MosaicOptions(poison=poison, chunk_rows=chunk)
        )
    return _blocks[key]


@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.slow), torch.bfloat16])
def test_other_dtypes(dtype):
    def f(x, w):
        return norm(x.float() if dtype == torch.bfloat16 else x, w).to(dtype) * 2

    step = compile_aten(trace(f, torch.randn(9, D, dtype=dtype), torch.randn(D)), MosaicOptions())
    x, w = torch.randn(21, D, dtype=dtype), torch.randn(D)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(step([x, w])[0], f(x, w), rtol=tolerance, atol=tolerance)


def test_one_kernel_serves_every_layer_length_and_graph():
    def layers(x, w):
        for _ in range(5):
            x = x + norm(x, w)
        return x

    before = len(fused._kernels)
    for f in (layers, lambda x, w: layers(x, w) @ w):
        step = compile_aten(trace(f, torch.randn(9, D), torch.randn(D), dynamic=[(0,)]), MosaicOptions())
        for n in (4, 50):
            step([torch.randn(n, D), torch.randn(D)])
    assert len(fused._kernels) - before == 1


@settings(deadline=None, max_examples=200)
@given(st.data())
@pytest.mark.slow
def test_sizes_in_terms_of_those_that_can_be_read(data):
    """Whatever is read gives back every size that is a polynomial in it; nothing is computed from what is not known."""
    symbols = sympy.symbols("s0 s1 s2 s3", integer=True, positive=True)
    term = st.builds(
        lambda factor, chosen: factor * sympy.prod(chosen),
        st.integers(1, 128), st.lists(st.sampled_from(symbols), min_size=1, max_size=2),
    )  # fmt: skip
    size = st.lists(term, min_size=1, max_size=2).map(lambda terms: sympy.Add(*terms))
    read = data.draw(st.lists(size, min_size=1, max_size=4), "read")
    values = dict(zip(symbols, data.draw(st.lists(st.integers(1, 99), min_size=4, max_size=4)), strict=True))
    factors = data.draw(st.lists(st.integers(0, 128), min_size=len(read), max_size=len(read)), "factors")
    products = [a * b for a in read for b in read]
    wanted = [sum((f * r for f, r in zip(factors, read, strict=True)), sympy.Integer(7)), *products, *symbols]
    found = Coordinates({expr: Source("number", at) for at, expr in enumerate(read)}, wanted)
    arguments = [int(expr.xreplace(values)) for expr in read]
    numbers = {symbol: sympy.Integer(reader(arguments)) for symbol, reader in found.readers.items()}
    assert len(numbers) <= len(read)
    assert all(found.of(size).free_symbols <= numbers.keys() for size in read), "what is read is known"
    for size in wanted:
        own = found.of(size)
        if own.free_symbols <= numbers.keys():
            assert own.xreplace(numbers) == size.xreplace(values)
        else:
            assert found.missing


@pytest.mark.parametrize("rows", [(4, 5), (20, 11)])
def test_rows_that_are_a_sum_or_a_product_of_sizes_are_fused(rows):
    """Prompt and answer joined inside of the step: no operand of a kernel says how long each of them is."""

    def f(prompt, answer, w):
        joined = torch.cat([prompt, answer], 1).flatten(0, 1)
        return norm(joined @ w, w[0]) * 2

    def given_(p, n):
        return torch.randn(2, p, D), torch.randn(2, n, D), torch.randn(D, D)

    step = compile_aten(trace(f, *given_(7, 9), dynamic=[(0, 1), (0, 1)]), MosaicOptions())
    given = given_(*rows)
    torch.testing.assert_close(step(list(given))[0], f(*given), rtol=1e-5, atol=1e-5)
    assert step.fallbacks == ()
    assert any(buffer.op.startswith("fused") for buffer in step.plan.buffers)


def test_a_kernel_refuses_operands_of_another_layout():
    module, _ = run_passes(trace(lambda x, y: torch.relu(x * 2) + y, torch.randn(9, 6), torch.randn(9, 6)))
    ((_, cluster),) = clusters_in(module)
    kernel = fused.kernel_for(cluster)
    x, y, out = torch.randn(9, 6), torch.randn(9, 6), torch.empty(9, 6)
    kernel(x, y, out)
    torch.testing.assert_close(out, torch.relu(x * 2) + y)
    for bad in (torch.empty(6, 9).t(), torch.empty(9, 6, dtype=torch.float64), torch.empty(8, 6)):
        with pytest.raises(ArenaError, match="fused kernel"):
            kernel(x, y, bad)


def test_a_kernel_that_does_not_compile_is_named_and_its_ops_run(monkeypatch):
    def broken(self, wide):
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(fused.FusedKernel, "_generated", broken)
    monkeypatch.setattr(fused, "_kernels", {})
    fused.kernel_for.cache_clear()

    def f(x):
        return torch.tanh(x * 3) + 1

    step = compile_aten(trace(f, torch.randn(4, 8)), MosaicOptions())
    x = torch.randn(6, 8)
    assert torch.equal(step([x])[0], f(x))
    (fallback,) = step.fallbacks
    assert fallback.name == "unfused-cluster"
    assert "no compiler found" in fallback.reason
    with pytest.raises(FallbackError, match="unfused-cluster"):
        compile_aten(trace(f, torch.randn(4, 8)), MosaicOptions(strict=True))([x])
    fused.kernel_for.cache_clear()


def test_a_kernel_that_would_allocate_is_named(monkeypatch):
    def check(form, source):
        raise fused._TooMuchMemory("its kernel would allocate 1 byte")

    monkeypatch.setattr(fused.FusedKernel, "_check_allocations", check)
    monkeypatch.setattr(fused, "_kernels", {})
    fused.kernel_for.cache_clear()

    def f(x, w):
        return norm(x, w) * 0.5

    step = compile_aten(trace(f, torch.randn(9, D), torch.randn(D), dynamic=[(0,)]), MosaicOptions())
    x, w = torch.randn(6, D), torch.randn(D)
    torch.testing.assert_close(step([x, w])[0], f(x, w))
    assert [fallback.name for fallback in step.fallbacks] == ["fused-scratch"]
    fused.kernel_for.cache_clear()


def test_tiny_llada_in_kernels_and_in_chunks_of_them(tiny_llada):
    """Token ids equal to eager's, no fallback, planned memory not exceeded (poison mode), one compilation."""
    step = DenoisingStep(tiny_llada, 3)
    for options in ({"chunk_rows": 100, "poison": True}, {})[: examples(1, 2)]:
        steps = []
        fast = torch.compile(DenoisingStep(tiny_llada, 3), backend="mosaic", dynamic=True, options=options)
        with torch.no_grad(), observing(steps.append):
            for n in (300, 64, 7):
                ids = torch.randint(4, 2000, (1, n), generator=torch.Generator().manual_seed(n))
                ids[:, ::2] = 3
                given = ids, block_window(n, 0, n), torch.tensor([n // 4])
                assert torch.equal(fast(*given), step(*given))
        assert len(steps) == 1
        assert steps[0].fallbacks == ()
        assert any(b.op.startswith("fused") for b in steps[0].plan.buffers)


@pytest.mark.slow
def test_the_plan_covers_what_kernels_allocate(tiny_llada):
    from mosaic_compiler.report.measure import measure

    fast = torch.compile(DenoisingStep(tiny_llada, 3), backend="mosaic", dynamic=True)
    ids = torch.full((1, 2048), 5)
    ids[:, ::2] = 3
    given = ids, block_window(2048, 0, 2048), torch.tensor([64])
    steps = []
    with torch.no_grad(), observing(steps.append):
        measured = measure(lambda: fast(*given), repeats=1)
    assert steps[0].plan.peak >= measured.peak >= 0.95 * steps[0].plan.peak


def test_explain_with_kernels():
    report = mosaic_compiler.explain(block, *block_inputs(9))
    assert report.fallbacks == ()
    assert "fuse" in [record.name for record in report.passes]


def test_wide_kernels_index_with_64_bits(monkeypatch):
    """Kernels for more than 2^31 elements, tried on few."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def f(x, y):
        return torch.relu(x * 2 + y) * y

    x, y = torch.randn(300, 64, device=device), torch.randn(300, 64, device=device)
    monkeypatch.setattr(fused, "_WIDE", 1000)
    assert torch.equal(torch.compile(f, backend="mosaic", dynamic=True)(x, y), f(x, y))
    kernels = [kernel for kernel in fused._kernels.values() if True in kernel._artifacts]
    assert kernels
    assert all(kernel.failure is None for kernel in kernels)


@pytest.mark.parametrize("width", [(1 << 31) - 1, 1000])
@pytest.mark.parametrize("chunk", [None, 16])
def test_kernels_are_compiled_before_a_step_takes_its_memory(monkeypatch, width, chunk):
    """Those with 64-bit indices as well, for the first length that needs them."""
    from mosaic_compiler.runtime.arena import HostArena

    happened = []
    compiled, ensure = fused.FusedKernel._generated, HostArena.ensure
    monkeypatch.setattr(fused.FusedKernel, "_generated", lambda *a: happened.append("compiled") or compiled(*a))
    monkeypatch.setattr(HostArena, "ensure", lambda *a: happened.append("mapped") or ensure(*a))
    monkeypatch.setattr(fused, "_WIDE", width)
    monkeypatch.setattr(fused, "_kernels", {})
    fused.kernel_for.cache_clear()
    dynamic = [(0,), (0,), (), (0,), (0,), (0,)]
    step = compile_aten(trace(block, *block_inputs(9), dynamic=dynamic), MosaicOptions(chunk_rows=chunk))
    for n in (7, 12, 40, 40, 7):
        happened.append(n)
        inputs = block_inputs(n)
        for got, expected in zip(step(list(inputs)), block(*inputs), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    steps = "".join("." if entry == "mapped" else "c" if entry == "compiled" else " " for entry in happened).split()
    assert steps[0].startswith("c"), "a step of 7 rows needs kernels"
    assert ("c" in "".join(steps[1:])) == (width == 1000), "wide ones come with longer steps"
    assert all("c" not in step.partition(".")[2] for step in steps), steps
    fused.kernel_for.cache_clear()


@pytest.mark.parametrize("broken", [False, True])
def test_code_is_generated_while_kernels_are_compiled(monkeypatch, broken):
    """All of a step's kernels are on their way before the first is waited for; what fails there is named, too."""
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.utils import fresh_cache

    happened = []
    generated, wait = fused.FusedKernel._generated, AsyncCompile._wait_futures

    def waited(self, scope):
        happened.append("waited")
        if broken:
            raise RuntimeError("a compiler crashed")
        wait(self, scope)

    monkeypatch.setattr(fused.FusedKernel, "_generated", lambda *a: happened.append("generated") or generated(*a))
    monkeypatch.setattr(AsyncCompile, "_wait_futures", waited)
    monkeypatch.setattr(fused, "_kernels", {})
    fused.kernel_for.cache_clear()
    with fresh_cache(), config.patch(compile_threads=2):
        step = compile_aten(trace(block, *block_inputs(9), dynamic=[(0,), (0,), (), (0,), (0,), (0,)]), MosaicOptions())
        inputs = block_inputs(12)
        for got, expected in zip(step(list(inputs)), block(*inputs), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    half = len(happened) // 2
    assert half > 1
    assert happened == ["generated"] * half + ["waited"] * half
    reasons = {(fallback.name, fallback.reason) for fallback in step.fallbacks}
    assert reasons == ({("unfused-cluster", "RuntimeError: a compiler crashed")} if broken else set())
    fused.kernel_for.cache_clear()


@pytest.mark.parametrize(("f", "inputs"), [(block, block_inputs), (experts, expert_inputs)])
@pytest.mark.parametrize("most", [1 << 14, 1 << 20, 1 << 26])
def test_kernels_run_on_samples_of_a_limited_size(f, inputs, most):
    rows = [tuple(range(min(t.dim(), 1))) if t.shape[0] in (9, 36) else () for t in inputs(9)]
    module, _ = run_passes(trace(f, *inputs(9), dynamic=rows), disable=("chunk-loops",))
    sizes = []
    for _, cluster in clusters_in(module):
        kernel = fused.kernel_for(cluster)
        sample = kernel._form.sample(most)
        assert sample is not None
        tensors = [part for part in sample if isinstance(part, torch.Tensor)]
        sizes.append(sum(t.untyped_storage().nbytes() for t in tensors))
        kernel.compile()(list(sample))
        assert all(torch.isfinite(t).all() for t in tensors)
    assert max(sizes) <= most
    assert max(sizes) >= min(most, 1 << 22) / 4, "as large as that allows, up to 4,096 rows"
