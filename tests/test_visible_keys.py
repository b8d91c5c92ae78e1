"""Which keys queries see, read off the arithmetic of masks; and attention that is told so."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn.functional as F
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

import mosaic_compiler
from mosaic_compiler import book, ir
from mosaic_compiler.compat.symbols import Min, Mod
from mosaic_compiler.ir import ops
from mosaic_compiler.kernels.interval_attention import TILE, attend_in_tiles_, reference
from mosaic_compiler.passes.base import trace
from mosaic_compiler.passes.canonicalize import CanonicalizePass
from mosaic_compiler.passes.causal_first import CausalFirstPass
from mosaic_compiler.passes.verifier import Verifier
from mosaic_compiler.passes.visible_keys import VisibleKeysPass
from mosaic_compiler.passes.visible_keys.formulas import Bounds
from mosaic_compiler.planning.reach import QUERY

INF = float("inf")


# ------------------------------------------------------------------------------------- masks, in many spellings
def causal(n, pads):
    return torch.ones(n, n, dtype=torch.bool).tril()


def causal_by_positions(n, pads):
    at = torch.arange(n)
    return at[None, :] <= at[:, None]


def causal_additive(n, pads):
    return torch.full((n, n), -INF).triu(1)


def causal_filled(n, pads):
    at = torch.arange(n)
    return torch.zeros(n, n).masked_fill(at[:, None] < at[None, :], -INF)


def blocks(size):
    def mask(n, pads):
        at = torch.arange(n) // size
        return at[:, None] >= at[None, :]

    return mask


def blocks_repeated(size):
    """As LLaDA2's code writes it."""

    def mask(n, pads):
        count = (n + size - 1) // size
        whole = torch.ones(count, count).tril()
        return whole.repeat_interleave(size, dim=0).repeat_interleave(size, dim=1)[:n, :n].log()

    return mask


def blocks_divided(size):
    def mask(n, pads):
        at = torch.div(torch.arange(n), size, rounding_mode="floor").unsqueeze(1)
        return torch.where(at >= at.transpose(0, 1), 0.0, -INF)

    return mask


def window(size):
    def mask(n, pads):
        at = torch.arange(n)
        return (at[:, None] - at[None, :]).abs() <= size

    return mask


def sliding(size):
    def mask(n, pads):
        at = torch.arange(n)
        distance = at[:, None] - at[None, :]
        return (distance >= 0) & (distance < size)

    return mask


def prefix(size):
    """All see the first keys; of the rest, those before them."""

    def mask(n, pads):
        at = torch.arange(n)
        return (at[None, :] < size) | (at[None, :] <= at[:, None])

    return mask


def band(below, above):
    def mask(n, pads):
        return torch.ones(n, n, dtype=torch.bool).tril(above).triu(-below)

    return mask


def not_later(n, pads):
    at = torch.arange(n)
    return ~(at[None, :] > at[:, None])


SPELLINGS = st.one_of(
    st.sampled_from([causal, causal_by_positions, causal_additive, causal_filled, not_later]),
    st.integers(1, 9).flatmap(
        lambda n: st.sampled_from(
            [blocks(n), blocks_repeated(n), blocks_divided(n), window(n), sliding(n), prefix(n), band(n, 10 - n)]
        )
    ),
)


def attended(mask, padded):
    """Attention of q [B, H, N, d] with a mask, and perhaps padding bool [B, N]."""

    def function(q, k, v, pads):
        made = mask(q.shape[2], pads)
        made = made if made.dtype == torch.bool else made.to(q.dtype)
        if padded:
            seen = made if made.dtype == torch.bool else made == 0
            made = seen[None, None] & pads[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=made)

    return function


def operands(length, seed, batch=2, heads=3):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, length, 8, dtype=torch.float64, generator=generator)
    pads = torch.rand(batch, length, generator=generator) < 0.7
    return q, k, v, pads


@settings(max_examples=25)
@given(SPELLINGS, st.booleans(), st.lists(st.integers(2, 50), min_size=1, max_size=3), st.integers(0, 99))
def test_masks_that_say_runs_of_keys_are_gone(mask, padded, lengths, seed):
    """Whatever they are written as, the results are those of the mask; and nothing of [N, N] is left."""
    function = attended(mask, padded)
    module = CanonicalizePass()(trace(function, *operands(13, 0)))
    result = VisibleKeysPass()(module)
    Verifier(module).check(result, "visible-keys")
    assert [node.target for node in result.graph.nodes if book.is_attention(node)] == [ops.interval_attention]
    for tensor in (tensor for node in result.graph.nodes for tensor in ir.tensors_of(node) if tensor is not None):
        sizes = [ir.expr_of(size) for size in tensor.shape if not ir.expr_of(size).is_Integer]
        assert len(sizes) == len(set(sizes))
    for length in lengths:
        given = operands(length, seed)
        torch.testing.assert_close(result(*given), function(*given))


def opaque_masks():
    def random(n, pads):
        return pads[0, :, None] | pads[0, None, :]

    def other_half(n, pads):
        at = torch.arange(n)
        return (at[:, None] % 2) == (at[None, :] % 2)

    def biased(n, pads):
        at = torch.arange(n)
        return torch.where(at[:, None] >= at[None, :], 0.5, -INF)

    def not_itself(n, pads):
        at = torch.arange(n)
        return at[:, None] != at[None, :]

    def hidden_a_little(n, pads):
        at = torch.arange(n)
        return torch.where(at[:, None] >= at[None, :], 0.0, -1e4)

    return [random, other_half, biased, not_itself, hidden_a_little]


@pytest.mark.parametrize("mask", opaque_masks(), ids=lambda mask: mask.__name__)
def test_other_masks_stay(mask):
    function = attended(mask, False)
    module = CanonicalizePass()(trace(function, *operands(13, 0)))
    result = VisibleKeysPass()(module)
    assert not [node for node in result.graph.nodes if node.target is ops.interval_attention]


def nearly_blocks(n, pads):
    """One row sees a key that is not beside those of its block."""
    at = torch.arange(n)
    seen = at[:, None] // 4 >= at[None, :] // 4
    return seen | ((at[:, None] == 5) & (at[None, :] == 11))


def one_row_sees_its_next(n, pads):
    at = torch.arange(n)
    return (at[:, None] // 4 >= at[None, :] // 4) | ((at[:, None] == 5) & (at[None, :] < 9))


def blocks_of_each(n, pads):
    """Each entry's blocks begin somewhere else."""
    at = torch.arange(n)[None, :] + pads.sum(1, keepdim=True)
    return ((at // 4)[:, :, None] >= (at // 4)[:, None, :])[:, None]


@settings(max_examples=12)
@given(st.sampled_from([nearly_blocks, one_row_sees_its_next, blocks_of_each]), st.integers(13, 40), st.integers(0, 99))
def test_what_is_nearly_block_causal_is_right(mask, length, seed):
    """A run of keys for each query, or a mask as before: never another result."""
    function = attended(mask, False)
    module = CanonicalizePass()(trace(function, *operands(13, 0)))
    result = VisibleKeysPass()(module)
    Verifier(module).check(result, "visible-keys")
    given = operands(length, seed)
    torch.testing.assert_close(result(*given), function(*given))


RUNS_FROM_THE_FIRST = st.one_of(
    st.just(causal), st.integers(2, 9).flatmap(lambda n: st.sampled_from([blocks(n), window(n), sliding(n), prefix(n)]))
)


@settings(max_examples=20)
@given(
    RUNS_FROM_THE_FIRST,
    st.lists(st.integers(2, 50), min_size=1, max_size=3),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 99),
)
def test_what_is_causal_and_more(mask, lengths, dtype, seed):
    """Keys up to a query's own by another kernel, and those behind it; only where the graph says that there are any."""

    def given_of(length, number):
        return [each.to(dtype) if each.is_floating_point() else each for each in operands(length, number)]

    function = attended(mask, False)
    seen = VisibleKeysPass()(CanonicalizePass()(trace(function, *given_of(13, 0))))
    result = CausalFirstPass(force=True)(seen)
    Verifier(seen).check(result, "causal-first")
    targets = {node.target for node in result.graph.nodes}
    name = mask.__qualname__
    if "causal" in name or "blocks" in name:
        assert ops.interval_attention not in targets
        assert (ops.attention_behind in targets) == ("blocks" in name)
    if "window" in name or "sliding" in name:
        assert result is seen
    for length in lengths:
        given = given_of(length, seed)
        torch.testing.assert_close(result(*given), function(*given), atol=1e-5, rtol=1e-5)


@settings(max_examples=25)
@given(
    st.integers(1, 2 * TILE + 9),
    st.integers(1, 700),
    st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    st.integers(0, 7),
    st.integers(0, 99),
)
def test_the_kernel_in_tiles(queries, keys, heads, which, seed):
    """Runs that are empty, reach beyond the keys, of each entry its own; keys that do not count."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads[0], queries, 8, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, 2, heads[1], keys, 8, dtype=torch.float64, generator=generator)
    first = torch.randint(-9, keys + 9, (1, 1, queries, 1), generator=generator) if which & 1 else None
    last = torch.randint(-9, keys + 9, (2, 1, queries, 1), generator=generator) if which & 2 else None
    only = torch.rand(2, 1, 1, keys, generator=generator) < 0.5 if which & 4 else None
    got = attend_in_tiles_(torch.empty_like(q), q, k, v, first, last, only, 0.4)
    torch.testing.assert_close(got, reference(q, k, v, first, last, only, 0.4))


# --------------------------------------------------------------------------------------------- whole steps
WIDTH, HEADS, VOCABULARY, MASK = 16, 2, 40, 3


class Toy(torch.nn.Module):
    """Two layers of attention with a mask that the step itself makes."""

    def __init__(self, mask, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.mask = mask
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH, dtype=dtype)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(4)) for _ in "ab"
        )
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=dtype)
        self.requires_grad_(False)

    def forward(self, ids):
        x = self.embed(ids)
        mask = self.mask(ids.shape[1], ids != 0)
        mask = mask if mask.dtype == torch.bool else mask.to(x.dtype)
        for wq, wk, wv, wo in self.layers:
            q, k, v = (w(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w in (wq, wk, wv))
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + wo(attended.transpose(1, 2).flatten(2)).tanh()
        return self.head(x)


def ids_of(length, seed, batch=2):
    return torch.randint(4, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=examples(2, 8))
@given(
    SPELLINGS,
    st.lists(st.integers(3, 120), min_size=1, max_size=3),
    st.sampled_from([None, 1, 7]),
    st.booleans(),
    st.integers(0, 99),
)
def test_whole_steps_in_chunks(mask, lengths, rows, poison, seed):
    model = Toy(mask)
    options = {"poison": poison, **({"chunk_rows": rows} if rows else {})}
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="mosaic", dynamic=True, options=options)
        for length in lengths:
            ids = ids_of(length, seed)
            torch.testing.assert_close(compiled(ids), model(ids))


def test_no_mask_of_all_pairs_is_in_a_plan():
    """A block-causal step of 16,384 tokens fits in less than a quarter of what its mask would take."""
    model = Toy(blocks(32), torch.float32)
    with torch.no_grad():
        report = mosaic_compiler.explain(model, ids_of(64, 0, batch=1), tokens=16384)
    assert report.plan.peak < 16384 * 16384 / 4


@pytest.mark.parametrize("lowest", [-65504.0, torch.finfo(torch.float32).min])
def test_the_lowest_numbers_hide_where_queries_see_something(lowest):
    def mask(n, pads):
        at = torch.arange(n) // 4
        return torch.where(at[:, None] >= at[None, :], 0.0, lowest)

    def strictly_before(n, pads):  # the first query sees nothing: all scores are as low
        at = torch.arange(n)
        return torch.where(at[:, None] > at[None, :], 0.0, lowest)

    for made, is_known in ((mask, True), (strictly_before, False)):
        module = CanonicalizePass()(trace(attended(made, False), *operands(13, 0)))
        result = VisibleKeysPass()(module)
        assert any(node.target is ops.interval_attention for node in result.graph.nodes) == is_known
        given = operands(21, 1)
        torch.testing.assert_close(result(*given), attended(made, False)(*given))


def test_masks_may_be_padded_and_cut_again():
    """As PyTorch does it for kernels that want strides of a multiple of 8."""

    def floats(n, pads):
        return F.pad(causal_filled(n, pads), (0, 8 - n % 8))[:, :n]

    def booleans(n, pads):
        return F.pad(causal(n, pads), (3, 5), value=True)[:, 3 : n + 3]

    for mask in (floats, booleans):
        module = CanonicalizePass()(trace(attended(mask, False), *operands(13, 0)))
        result = VisibleKeysPass()(module)
        assert any(node.target is ops.interval_attention for node in result.graph.nodes), mask
        given = operands(21, 1)
        torch.testing.assert_close(result(*given), attended(mask, False)(*given))


def test_masks_that_hide_all_or_nothing():
    def everything(n, pads):
        at = torch.arange(n)
        return at[:, None] + at[None, :] >= 0

    def nothing(n, pads):
        at = torch.arange(n)
        return at[:, None] + at[None, :] < 0

    for mask, kept in ((everything, False), (nothing, True)):
        module = CanonicalizePass()(trace(attended(mask, False), *operands(13, 0)))
        result = VisibleKeysPass()(module)
        (node,) = [node for node in result.graph.nodes if book.is_attention(node)]
        assert node.target is not ops.interval_attention
        assert (ir.argument(node, "attn_mask") is not None) == kept
        given = operands(21, 1)
        torch.testing.assert_close(result(*given), attended(mask, False)(*given))


def test_attentions_of_other_lengths_have_bounds_of_their_own():
    def function(q, k, v, pads, more, n):
        short = F.scaled_dot_product_attention(q, k, v, attn_mask=blocks(4)(q.shape[2], pads))
        return short, F.scaled_dot_product_attention(more, more, more, attn_mask=blocks(4)(more.shape[2], pads))

    given = (*operands(9, 0), operands(13, 1)[0], torch.zeros(1))
    result = VisibleKeysPass()(CanonicalizePass()(trace(function, *given)))
    assert [node.target for node in result.graph.nodes].count(ops.interval_attention) == 2
    given = (*operands(6, 2), operands(21, 3)[0], torch.zeros(1))
    torch.testing.assert_close(result(*given), function(*given))


@pytest.mark.parametrize("bound", [5, 40])
def test_nothing_is_claimed_of_limited_positions(bound):
    """A smaller of two numbers may be negative."""

    def mask(n, pads):
        at = torch.arange(n)
        return (torch.clamp(at - 5, max=bound)[:, None] >= 0) | (at[None, :] == 0)

    module = CanonicalizePass()(trace(attended(mask, False), *operands(13, 0)))
    result = VisibleKeysPass()(module)
    given = operands(21, 1)
    torch.testing.assert_close(result(*given), attended(mask, False)(*given))


def test_what_bounds_know():
    size = sympy.Symbol("s", integer=True, positive=True)
    bounds = Bounds({QUERY: size})
    for number, known in (
        (QUERY, True), (size - 1 - QUERY, True), (size - 1, True), (QUERY * size, True), (QUERY * size - 1, False),
        (Min(QUERY - 5, 10), False), (sympy.Abs(QUERY - 3) - 1, False), (Mod(size, 8) - 1, False), (QUERY - 1, False),
    ):  # fmt: skip
        assert bounds.is_positive_or_zero(number) == known, number
