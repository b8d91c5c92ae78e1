"""On a CUDA device: state, recorded steps, and the kernel for few queries."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from kept import Kept
from test_canvas import model_of as canvas_model
from test_coded_attention import encoded
from test_gpu import model as step_of
from test_long_models import model_of as long_model
from test_session import Delayed, loop
from test_split_attention import attend, given_of

import mosaic_compiler
from mosaic_compiler import Session
from mosaic_compiler.backend import observing
from mosaic_compiler.kernels import key_selection
from mosaic_compiler.kernels.coded_attention import attend_codes_, numbers_of
from mosaic_compiler.kernels.few_queries import few_query_attention, few_query_reference
from mosaic_compiler.kernels.interval_attention import attend_intervals_, reference
from mosaic_compiler.planning.few import pieces
from mosaic_compiler.runtime.pools import pool_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.fuse,
    pytest.mark.usefixtures("fresh_gpu"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MiB = 1 << 20


def ids_of(tokens, seed=0):
    return torch.randint(4, 1000, (1, tokens), generator=torch.Generator().manual_seed(seed)).cuda()


def recorded(session):
    """The recordings of a session's reuse steps."""
    (kinds,) = session._store.ran
    found = [bound.program.recorder for bound in kinds.reuse._programs.values()]
    return [
        recorder for recorder in found if recorder is not None and recorder._graph is not None
    ], kinds.reuse.fallbacks


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_steps_equal_an_independent_implementation(kv_heads):
    """Eight steps for some rows, most of them replayed, with other ids and rows each; then another length."""
    model = step_of(kv_heads=kv_heads).model
    oracle, session = Kept(lambda ids: model(ids).logits), Session(model)
    for tokens in (300, 2000):
        ids = ids_of(tokens)
        torch.testing.assert_close(session.full(ids).logits, oracle.full(ids), atol=2e-3, rtol=1e-3)
        for number in range(8):
            ids = ids.clone()
            ids[:, 40 * number : 40 * number + 9] = 5 + number
            rows = torch.arange(40 * number % 250, 40 * number % 250 + 24)
            expected = oracle.reuse(rows[None].cuda(), ids)
            got = session.reuse(ids, rows).logits
            torch.testing.assert_close(got[:, rows], expected[:, rows], atol=2e-3, rtol=1e-3)
        found, fallbacks = recorded(session)
        assert found
        assert not fallbacks
    session.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_causal_generation_is_exact(dtype):
    """Where attention has a kernel of our own (bfloat16), and where it has not; ids may differ by rounding in bfloat16
    only."""
    model = step_of(kv_heads=1).model.to(dtype)
    options = {"gen_length": 40, "steps": 40, "block_causal": 16, "mask_token_id": 3}
    for tokens in (9, 300, 1500):
        kept = mosaic_compiler.generate(model, ids_of(tokens, seed=tokens), **options)
        plain = mosaic_compiler.generate(model, ids_of(tokens, seed=tokens), **options, cache="none")
        assert kept.steps_by_kind == {"full": 1, "reuse": 39}
        assert dtype == torch.bfloat16 or torch.equal(kept.sequences, plain.sequences)


@pytest.mark.parametrize(
    ("heads", "groups", "queries", "keys", "depth"),
    [(4, 2, 700, 700, 64), (8, 1, 33, 5000, 128), (2, 2, 1, 300, 16), (6, 3, 2500, 4000, 128), (4, 4, 129, 2049, 32)],
)
def test_runs_of_keys_on_the_device(heads, groups, queries, keys, depth):
    """With empty runs, runs beyond the keys, and keys that do not count."""
    generator = torch.Generator().manual_seed(queries)
    q = torch.randn(2, heads, queries, depth, generator=generator).cuda().bfloat16()
    k, v = torch.randn(2, 2, groups, keys, depth, generator=generator).cuda().bfloat16()
    first = torch.randint(-9, keys, (1, 1, queries, 1), generator=generator).cuda()
    last = torch.randint(0, keys + 9, (2, 1, queries, 1), generator=generator).cuda()
    only = (torch.rand(2, 1, 1, keys, generator=generator) < 0.5).cuda()
    for given in (
        (first, last, None),
        (first, last, only),
        (None, last, None),
        (first, None, only),
        (None, None, only),
    ):
        out = torch.full_like(q, float("nan"))
        got = attend_intervals_(out, q, k, v, *given, None).float()
        expected = reference(q.float(), k.float(), v.float(), *given, None)
        assert (got - expected).norm() <= 1e-2 * expected.norm()


def test_a_generation_with_noise_is_replayed():
    """What a sampler is told is read on the host: another temperature is another recording, and no other result."""
    model = step_of().model
    options = {"gen_length": 32, "block_length": 16, "steps": 16, "mask_token_id": 3, "bidirectional": True}
    for temperature in (0.0, 0.7, 0.3):
        got = [
            mosaic_compiler.generate(
                model, ids_of(200), cache="dual", temperature=temperature, cache_refresh=refresh,
                generator=torch.Generator().manual_seed(1), **options,
            ).sequences
            for refresh in (1, "block", "block")
        ]  # fmt: skip
        plain = mosaic_compiler.generate(
            model,
            ids_of(200),
            cache="none",
            temperature=temperature,
            generator=torch.Generator().manual_seed(1),
            **options,
        )
        assert torch.equal(got[0], plain.sequences)
        assert torch.equal(got[1], got[2])


def test_a_loop_of_ones_own_is_replayed():
    model = step_of().model
    options = {"needed_rows": "masked", "mask_token_id": 3, "cache": "delayed", "cache_refresh": 4}
    fast = torch.compile(model, backend="mosaic", dynamic=True, options=options)
    ids = ids_of(120)
    ids[:, 50:70] = 3
    got = [loop(fast, ids, steps=12, mask=3) for _ in range(2)]
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], loop(Delayed(model, 4, 3), ids, steps=12, mask=3))


def test_the_plan_has_state_and_the_peak_is_measured():
    """Of a full step and of one for some rows: planned is at least measured, within 2 %; and all of it goes back."""
    model = step_of(torch.bfloat16, kv_heads=1).model
    step = mosaic_compiler.sampling.DenoisingStep(model, 3)
    ids = ids_of(40_000)
    ids[:, -64:] = 3
    window = mosaic_compiler.sampling.block_window(40_000, 39_936, 39_968, "cuda")
    count = torch.tensor([1], device="cuda")
    torch.cuda.synchronize()
    session = Session(step)
    for kind, call in (
        ("full", lambda: session.full(ids, window, count)),
        ("reuse", lambda: session.reuse(ids, range(39_936, 39_968), window, count)),
    ):
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        allocated = torch.cuda.max_memory_allocated() - before
        measured = allocated + pool_for(torch.device("cuda", 0)).reserved() + session.nbytes
        plan = session.plans[kind]
        assert plan.state == session.nbytes > 0
        assert measured <= plan.peak + 512 * 64
        if kind == "full":
            assert plan.peak <= 1.02 * measured + MiB
    mapped = session._store._blocks
    arenas = [block._values.arena for block in mapped.values()]
    assert sum(arena.mapped for arena in arenas) >= session.nbytes
    session.close()
    assert sum(arena.mapped for arena in arenas) == 0


def test_an_op_that_waits_for_the_device_is_named():
    class Waits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            logits = self.model(ids).logits
            return torch.ops.gpu_state_tests.looks_at(logits)

    ids = ids_of(60)
    with Session(Waits(step_of().model)) as session:
        session.full(ids)
        results = [session.reuse(ids, range(4, 20)) for _ in range(4)]
        assert all(torch.equal(result, results[0]) for result in results)
        found, fallbacks = recorded(session)
        assert not found
        assert "not-recorded" in [fallback.name for fallback in fallbacks]
    torch.cuda.synchronize()


@torch.library.custom_op("gpu_state_tests::looks_at", mutates_args=())
def looks_at(x: torch.Tensor) -> torch.Tensor:
    return x * float(x.abs().sum().item() > 0)


@looks_at.register_fake
def _(x):
    return torch.empty_like(x)


def test_the_kernel_for_few_queries():
    torch.manual_seed(0)
    seen = set()
    for groups, share, queries, keys, depth, dtype in (
        (4, 7, 32, 6000, 128, torch.bfloat16), (4, 7, 32, 200_001, 128, torch.bfloat16),
        (1, 4, 5, 1025, 64, torch.float16), (2, 2, 33, 4096, 64, torch.bfloat16), (1, 8, 64, 1500, 32, torch.bfloat16),
    ):  # fmt: skip
        for batch, by_row in itertools.product((1, 2), (True, False)):
            query = torch.randn(batch, queries, groups * share, depth, dtype=dtype, device="cuda").transpose(1, 2)
            key, value = (
                torch.randn(batch, keys, groups, depth, dtype=dtype, device="cuda").transpose(1, 2)
                if by_row
                else torch.randn(batch, groups, keys, depth, dtype=dtype, device="cuda")
                for _ in range(2)
            )
            got = few_query_attention(query, key, value, depth**-0.5, 132)
            expected = few_query_reference(query, key, value, depth**-0.5)
            assert got.stride() == query.stride()
            torch.testing.assert_close(got.float(), expected.float(), atol=4e-3, rtol=2e-2)
            seen.add(pieces(batch * groups, share * queries, keys, 132))
    assert len(seen) > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_given_cache_is_read_where_it_stands(dtype):
    """Both kernels that say the sums of exponentials."""
    compiled, steps = torch.compile(lambda *given: attend(*given), backend="mosaic", dynamic=True), []
    exact = 1e-4 if dtype == torch.float32 else 3e-2
    with torch.no_grad(), observing(steps.append):
        for kept in (330, 4100):
            given = [tensor.cuda() for tensor in given_of(2, 65, kept, kept, heads=4, depth=64, dtype=dtype)]
            torch.testing.assert_close(compiled(*given), attend(*given), atol=exact, rtol=exact)
    assert len(steps) == 1
    assert not [b.describe() for b in steps[0].plan.buffers if not b.is_given and 4100 + 65 in b.shape]


@pytest.mark.parametrize("precision", ["int4", "int8", "fp8"])
@pytest.mark.parametrize(
    ("groups", "share", "queries", "keys", "depth"),
    [(32, 1, 32, 5000, 128), (4, 7, 32, 5000, 128), (2, 2, 5, 130, 64), (1, 1, 33, 700, 32), (2, 1, 32, 40, 16)],
)
def test_attention_of_codes(precision, groups, share, queries, keys, depth):
    """Against float64; large and small values, runs of keys, rows that come twice."""
    torch.manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    query = random(2, queries, groups * share, depth).transpose(1, 2) * 3
    wide = [random(2, keys, groups, depth).transpose(1, 2) * scale for scale in (1.0, 1e-3)]
    wide[1] = wide[1] * torch.logspace(0, 5, groups, device="cuda").view(1, -1, 1, 1).bfloat16()
    parts = []
    for part in wide:
        parts += encoded(part.float(), precision)
    own = [random(2, queries, groups, depth).transpose(1, 2) * scale for scale in (1.0, 1e-3)]
    rows = torch.stack([torch.randperm(keys)[:queries].sort().values for _ in range(2)]).cuda().unsqueeze(1)
    if queries > 1:
        rows[..., -1] = rows[..., -2]
        for part in own:
            part[:, :, -1] = part[:, :, -2]
    first = torch.randint(0, keys // 2, (1, 1, queries, 1), device="cuda")
    exact = []
    for (codes, scale), new in zip((parts[:2], parts[2:]), own, strict=True):
        whole = (numbers_of(codes, precision) * scale).double()
        index = rows.expand(-1, groups, -1).unsqueeze(-1).expand(-1, -1, -1, depth)
        exact.append(whole.scatter(2, index, new.double()))
    for bound in (None, first):
        given = (query, *parts, *own, rows, bound, None, None, None, precision)
        got = attend_codes_(torch.empty_like(query), *given).double()
        expected = reference(query.double(), *exact, bound, None, None, None)
        assert ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 0.02
        assert (got - expected).norm() / expected.norm() < 4e-3


@pytest.mark.parametrize(("groups", "share", "queries", "keys", "depth"), [(4, 7, 32, 5000, 128), (2, 1, 5, 200, 64)])
def test_keys_are_chosen_as_elsewhere(groups, share, queries, keys, depth):
    torch.manual_seed(0)
    query = torch.randn(2, groups * share, queries, depth, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(2, groups, keys, depth, device="cuda", dtype=torch.bfloat16)
    first = torch.randint(0, keys // 2, (1, 1, queries, 1), device="cuda")
    for bound in (None, first):
        scores = key_selection._with_kernels(query, key, bound, None, None, 0.3) * 0.6931471805599453
        seen = key_selection._Seen(bound, None, None, share)
        packed = (query.float() * 0.3).reshape(2, groups, share, queries, depth)
        torch.testing.assert_close(scores, key_selection._probabilities(packed, key, seen, groups), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", [None, "int4"])
def test_chosen_keys_are_read_where_all_are_kept(dtype, precision):
    """As without choosing in the step that chooses, and where all are chosen; few of them as where others are evicted.
    Steps that read are replayed."""
    model, ids, rows = step_of(dtype, kv_heads=1).model, ids_of(500), range(300, 332)
    close = {"atol": 2e-3, "rtol": 1e-3} if dtype == torch.float32 else {"atol": 6e-2, "rtol": 6e-2}
    kept = {} if precision is None else {"cache_dtype": precision}
    read = {**kept, "cache_keep": 0.1, "cache_evict": False}
    with Session(model, options=read) as session, Session(model, options=kept) as every:
        for one in (session, every):
            one.full(ids)
        expected = every.reuse(ids, rows).logits
        torch.testing.assert_close(session.choose(ids, rows).logits[:, rows], expected[:, rows], **close)
        for _ in range(4):
            got = session.reuse(ids, rows).logits
        assert not torch.equal(got[:, rows], expected[:, rows])
        found, fallbacks = recorded(session)
        assert found
        assert {fallback.name for fallback in fallbacks} <= {"tiled-attention"}
    with Session(model, options={**read, "cache_keep": 1.0}) as session:
        session.full(ids)
        session.choose(ids, rows)
        torch.testing.assert_close(session.reuse(ids, rows).logits[:, rows], expected[:, rows], **close)
    if precision is None and dtype == torch.float32:
        with Session(model, options={"cache_keep": 0.1}) as evicting:
            evicting.full(ids, rows=rows)
            torch.testing.assert_close(evicting.reuse(ids, rows).logits[:, rows], got[:, rows], **close)


def test_canvases():
    model, prompt = canvas_model().cuda(), ids_of(40).remainder(90).add(3)
    ids = []
    for compiled in (True, False):
        generator = torch.Generator().manual_seed(1)
        got = mosaic_compiler.generate(
            model, prompt, gen_length=24, steps=4, entropy_bound=2.0, generator=generator, compile=compiled
        )
        ids.append(got.sequences)
    assert torch.equal(*ids)


def test_values_of_another_depth():
    model = long_model("deepseek_v2").cuda()
    compiled = torch.compile(model, backend="mosaic", dynamic=True)
    with torch.no_grad():
        for length in (150, 33):
            ids = torch.randint(4, 64, (1, length), generator=torch.Generator().manual_seed(length)).cuda()
            got, expected = (each(input_ids=ids, use_cache=False).logits for each in (compiled, model))
            torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-3)


def causally(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def by_blocks(query, key, value):
    at = torch.arange(query.shape[2], device=query.device) // 32
    return F.scaled_dot_product_attention(query, key, value, attn_mask=at[:, None] >= at[None, :], enable_gqa=True)


@pytest.mark.parametrize("attend", [causally, by_blocks])
@pytest.mark.parametrize("dynamic", [True, None])
def test_causal_attention_first(attend, dynamic):
    """cuDNN's, and the keys behind a query's own by ours; not where the depth is a symbol."""
    compiled, steps = torch.compile(attend, backend="mosaic", dynamic=dynamic), []
    with torch.no_grad(), observing(steps.append):
        for tokens in (1000, 3100):
            generator = torch.Generator().manual_seed(tokens)
            query = torch.randn(2, 8, tokens, 128, generator=generator).bfloat16().cuda()
            key, value = torch.randn(2, 2, 2, tokens, 128, generator=generator).bfloat16().cuda()
            if dynamic is None:
                for tensor in (query, key, value):
                    torch._dynamo.mark_dynamic(tensor, 2)
            got = compiled(query, key, value)
            exact = attend(*(tensor.float() for tensor in (query, key, value)))
            torch.testing.assert_close(got.float(), exact, atol=2e-2, rtol=2e-2)
    (step,) = steps
    targets = {str(node.target) for graph in step.graphs.values() for node in graph.graph.nodes}
    if dynamic is None:
        assert ("mosaic.attention_behind.default" in targets) == (attend is by_blocks)
        assert "aten._scaled_dot_product_cudnn_attention.default" in targets
        assert not step.fallbacks
